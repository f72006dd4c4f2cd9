"""From a log to sequences, against polars and DuckDB on the same rows.

    python benchmarks/prepare.py [rows ...]        millions of rows, default 20

Polars and DuckDB read the user, item and time columns, sort by user and time and gather each
user's events into lists, in memory; they number no items, remove no duplicates, check no row and
write nothing. Ours does all of that and commits a dataset: in one process, as it would be by its size,
and by Ray tasks on as many cores. Sides run in turn, each in a process of its own, RUNS times; a
figure is the median. Memory is the peak of the sum over the side's processes of their private
pages, sampled ten times a second, with the object store's shared pages once; Ray's own spill is
what its session directory holds at most.
"""

import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from lrurec_dist.reporting import format_table, say

RUNS = 3
FILES = 16
ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 1 << 30
SIDES = ("polars", "duckdb", "one process", "Ray tasks")


def write_log(folder: Path, rows: int) -> None:
    """Files of a log by time: users by a lognormal activity, items by Zipf's law, every hundredth row twice."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    users = max(1000, rows // 60)
    activity = np.cumsum(draw.lognormal(0, 1.2, users))
    items = np.cumsum(1 / np.arange(10, 10 + max(1000, rows // 300)) ** 0.9)
    per_file = rows // FILES
    for file in range(FILES):
        fresh = per_file - per_file // 100
        table = pa.table(
            {
                "user_id": np.searchsorted(activity, draw.random(fresh) * activity[-1]) * 7919 + 10_000_000_000,
                "item_id": np.searchsorted(items, draw.random(fresh) * items[-1]) * 104729,
                "timestamp": 1_700_000_000 + file * 86_400 + draw.integers(0, 86_400, fresh),
            }
        )
        twice = pa.array(np.sort(draw.integers(0, fresh, per_file - fresh)))
        pq.write_table(pa.concat_tables([table, table.take(twice)]), folder / f"part-{file:03d}.parquet", compression="zstd")


def by_polars(folder: str, _: str) -> int:
    import polars

    frame = polars.read_parquet(f"{folder}/*.parquet", columns=["user_id", "item_id", "timestamp"])
    lists = frame.sort(["user_id", "timestamp", "item_id"]).group_by("user_id", maintain_order=True).agg("item_id", "timestamp")
    return int(lists["item_id"].list.len().sum())


def by_duckdb(folder: str, _: str) -> int:
    import duckdb

    rows = duckdb.connect().read_parquet(f"{folder}/*.parquet")
    order = "order by timestamp, item_id"
    lists = rows.aggregate(f"user_id, list(item_id {order}) items, list(timestamp {order}) times", "user_id").to_arrow_table()
    return sum(len(chunk.flatten()) for chunk in lists["items"].chunks)


def by_us(folder: str, out: str, *, local: bool) -> int:
    from lrurec_dist.data import prepare
    from lrurec_dist.data.events import EventRules

    if not local:
        prepare.LOCAL_BYTES = 0
    rules = EventRules(
        user_column="user_id",
        item_column="item_id",
        timestamp_column="timestamp",
        timestamp_unit="s",
    )
    options = prepare.PrepareOptions(log_path=folder, log_format="auto", rules=rules, max_rejected_share=0.0)
    dataset, _ = prepare.prepare_dataset(out, options, lambda _: None, lambda: None)
    return int(dataset.manifest["rows_read"])


def serve(side: str, folder: str, out: str, expected: int) -> None:
    """The other end of `run`: do it once and print the seconds."""
    if side == "Ray tasks":
        import ray

        os.environ["PYTHONPATH"] = str(ROOT)
        ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, logging_level="ERROR", log_to_driver=False)
    work: dict[str, Callable[[str, str], int]] = {
        "polars": by_polars,
        "duckdb": by_duckdb,
        "one process": lambda folder, out: by_us(folder, out, local=True),
        "Ray tasks": lambda folder, out: by_us(folder, out, local=False),
    }
    started = time.perf_counter()
    rows = work[side](folder, out)
    seconds = time.perf_counter() - started
    assert rows == expected, f"{side} saw {rows:,} of {expected:,} rows"
    say(json.dumps({"seconds": seconds}))


def memory_of(process: psutil.Process) -> int:
    """Bytes held by a process and all below it: private pages, and shared ones once."""
    private, shared = 0, 0
    for each in [process, *process.children(recursive=True)]:
        try:
            info = each.memory_info()
        except psutil.Error:
            continue
        private += info.rss - info.shared
        shared = max(shared, info.shared)
    return private + shared


def run(side: str, folder: Path, rows: int) -> tuple[float, float]:
    """(seconds, peak MiB) of one side."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as out:
        command = [sys.executable, __file__, "--serve", side, str(folder), f"{out}/dataset", str(rows)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": "/tmp"}  # noqa: S108
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)  # noqa: S603
        watched, peak = psutil.Process(process.pid), 0
        while process.poll() is None:
            peak = max(peak, memory_of(watched))
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"{side} failed with exit code {process.returncode}")
        assert process.stdout
        return json.loads(process.stdout.read().splitlines()[-1])["seconds"], peak / 2**20


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:5], int(sys.argv[5]))
        return
    figures: dict[str, dict[str, float]] = {}
    table = []
    for millions in [float(argument) for argument in sys.argv[1:]] or [20.0]:
        rows = int(millions * 1e6) // FILES * FILES
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "log"
            write_log(folder, rows)
            sides = SIDES if millions <= 50 else SIDES[-1:]
            results: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
            for _, side in itertools.product(range(RUNS if millions <= 50 else 1), sides):
                results[side].append(run(side, folder, rows))
            shutil.rmtree(folder)
        seconds = {side: statistics.median(s for s, _ in runs) for side, runs in results.items()}
        best = min((seconds[side] for side in ("polars", "duckdb") if side in seconds), default=None)
        for side, runs in results.items():
            spread = f"{min(s for s, _ in runs):.2f}–{max(s for s, _ in runs):.2f}"
            peak = max(p for _, p in runs)
            table.append(
                [
                    side,
                    rows,
                    f"{seconds[side]:.2f}",
                    spread,
                    f"{best / seconds[side]:.2f}" if best else "–",
                    round(rows / seconds[side]),
                    round(peak),
                ]
            )
            figures[f"{side}, {millions:g} M"] = {
                "seconds": seconds[side],
                "share_of_best": best and best / seconds[side],
                "peak_mib": peak,
            }
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores")
    say(format_table(["side", "rows", "seconds", "spread", "of the faster", "rows/s", "peak MiB"], table))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
