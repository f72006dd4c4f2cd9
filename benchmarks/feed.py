"""What the two feeds deliver.

    python benchmarks/feed.py [users]

A synthetic dataset of the shape of ML-1M, or of so many users; one rank. Each feed yields BATCHES
batches of 128 windows that nobody uses, after WARM_UP to begin with; `collation alone` is the same
numpy without thread or Ray.
"""

import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from lrurec_dist.data.batches import DataOrder, TrainingBatch, iter_batches
from lrurec_dist.data.events import EventRules
from lrurec_dist.data.feed import iter_training_batches
from lrurec_dist.data.prepare import PrepareOptions, prepare_dataset
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.reporting import format_table, say, silent

BATCHES, WARM_UP, RUNS = 400, 40, 3
ORDER = DataOrder(seed=0, shards_mixed=64, global_batch_size=128, max_length=200, first_item_is_target=True)


def make_dataset(folder: str, users: int) -> SequenceDataset:
    """Users with a lognormal number of events, 165 on average, of 3,416 items."""
    draw = np.random.default_rng(0)
    lengths = np.maximum(3, draw.lognormal(4.6, 1.0, users)).astype(np.int64)
    rows = int(lengths.sum())
    table = pa.table(
        {
            "user": np.repeat(np.arange(users), lengths),
            "item": draw.integers(0, 3416, rows),
            "time": draw.integers(0, 10**9, rows),
        }
    )
    Path(folder).mkdir(exist_ok=True)
    pq.write_table(table, f"{folder}/log.parquet")
    rules = EventRules(
        user_column="user",
        item_column="item",
        timestamp_column="time",
        timestamp_unit="s",
    )
    options = PrepareOptions(log_path=f"{folder}/log.parquet", log_format="auto", rules=rules, max_rejected_share=0.0)
    return prepare_dataset(f"{folder}/dataset", options, silent, lambda: None)[0]


def rate(stream: Iterator[TrainingBatch]) -> tuple[float, float]:
    """(batches, targets) per second after the warm-up."""
    for _ in itertools.islice(stream, WARM_UP):
        pass
    started = time.perf_counter()
    targets = sum(batch.num_targets for batch in itertools.islice(stream, BATCHES))
    seconds = time.perf_counter() - started
    return BATCHES / seconds, targets / seconds


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    users = int(sys.argv[1]) if len(sys.argv) > 1 else 6040
    place = {"epoch": 0, "first_batch": 0, "rank": 0, "world_size": 1}
    ray.init(address="local", logging_level="ERROR", log_to_driver=False)
    with tempfile.TemporaryDirectory() as folder:
        dataset = make_dataset(folder, users)
        feeds = {
            "collation alone": lambda: iter_batches(dataset, ORDER, **place),
            "local": lambda: iter_training_batches(dataset, ORDER, **place, feed="local"),
            "ray": lambda: iter_training_batches(dataset, ORDER, **place, feed="ray"),
        }
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in feeds}
        for _, (name, begin) in itertools.product(range(RUNS), feeds.items()):
            stream = begin()
            rates[name].append(rate(stream))
            stream.close()  # type: ignore[attr-defined]
    ray.shutdown()
    rows, figures = [], {}
    for name, found in rates.items():
        batches = statistics.median(each for each, _ in found)
        targets = statistics.median(each for _, each in found)
        low, high = min(each for each, _ in found), max(each for each, _ in found)
        rows.append([name, f"{batches:,.0f} ({low:,.0f}–{high:,.0f})", f"{targets:,.0f}", f"{1e3 / batches:.2f}"])
        figures[name] = {"batches_per_s": round(batches, 1), "targets_per_s": round(targets)}
    say(
        f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {dataset.manifest['interactions']:,} interactions of {users:,} users"
    )
    say(format_table(["feed", "batches/s (spread)", "targets/s", "ms a batch"], rows))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
