"""From a log to sequences, against polars and DuckDB on the same rows.

    python benchmarks/prepare.py [rows ...] [skewed]        millions of rows, default 20

skewed: one user has a quarter of all events, at most five million, and one item half of them.

Polars and DuckDB read the user, item and time columns, sort by user and time and gather each
user's events into lists, in memory; they number no items, remove no duplicates, check no row and
write nothing. Ours does all of that and commits a dataset: in one process, as it would be by its size,
and by Ray tasks on all cores and on one. Sides run in turn, each in a process of its own, RUNS times; a
figure is the median. Memory is the peak of the sum over the side's processes of their private
pages, sampled ten times a second, with the object store's shared pages once; spilled is what Ray
says it wrote to disk because its object store was full.
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

from lrurec_dist.reporting import format_table, say, silent

RUNS = 3
FILES = 16
ROOT = Path(__file__).resolve().parent.parent
OBJECT_STORE_BYTES = 1 << 30
SIDES = ("polars", "duckdb", "one process", "Ray tasks", "Ray tasks, 1 core")
IN_MEMORY_MILLIONS = 50  # above it only Ray tasks are measured, once
CRAWLER_EVENTS = 5_000_000


def write_log(folder: Path, rows: int, *, skewed: bool) -> None:
    """Files of a log by time: users by a lognormal activity, items by Zipf's law, every hundredth row twice."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    users = max(1000, rows // 60)
    activity = np.cumsum(draw.lognormal(0, 1.2, users))
    items = np.cumsum(1 / np.arange(10, 10 + max(1000, rows // 300)) ** 0.9)
    per_file = rows // FILES
    for file in range(FILES):
        fresh = per_file - per_file // 100
        columns = {
            "user_id": np.searchsorted(activity, draw.random(fresh) * activity[-1]) * 7919 + 10_000_000_000,
            "item_id": np.searchsorted(items, draw.random(fresh) * items[-1]) * 104729,
            "timestamp": 1_700_000_000 + file * 86_400 + draw.integers(0, 86_400, fresh),
        }
        if skewed:
            columns["user_id"][draw.random(fresh) < min(0.25, CRAWLER_EVENTS / rows)] = 10_000_000_000
            columns["item_id"][draw.random(fresh) < 0.5] = 0
        table = pa.table(columns)
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
    from lrurec_dist.data import passes, prepare
    from lrurec_dist.data.events import EventRules

    if not local:
        passes.LOCAL_BYTES = 0
    rules = EventRules(
        user_column="user_id",
        item_column="item_id",
        timestamp_column="timestamp",
        timestamp_unit="s",
    )
    options = prepare.PrepareOptions(log_path=folder, log_format="auto", rules=rules, max_rejected_share=0.0)
    dataset, _ = prepare.prepare_dataset(out, options, silent, lambda: None)
    return int(dataset.manifest["rows_read"])


def spilled_mib() -> float:
    """What Ray's object stores have written to disk so far."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    return (
        get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats.spilled_bytes_total
        / 2**20
    )


def serve(side: str, folder: str, out: str, expected: int) -> None:
    """The other end of `run`: do it once and print the figures."""
    by_tasks = side.startswith("Ray tasks")
    if by_tasks:
        import ray

        os.environ["PYTHONPATH"] = str(ROOT)
        cores = 1 if side.endswith("1 core") else os.cpu_count()
        ray.init(
            address="local", num_cpus=cores, object_store_memory=OBJECT_STORE_BYTES, logging_level="ERROR", log_to_driver=False
        )
    work: dict[str, Callable[[str, str], int]] = {
        "polars": by_polars,
        "duckdb": by_duckdb,
        "one process": lambda folder, out: by_us(folder, out, local=True),
    }
    started = time.perf_counter()
    rows = by_us(folder, out, local=False) if by_tasks else work[side](folder, out)
    seconds = time.perf_counter() - started
    assert rows == expected, f"{side} saw {rows:,} of {expected:,} rows"
    say(json.dumps({"seconds": seconds, "spilled": spilled_mib() if by_tasks else 0.0}))


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


def run(side: str, folder: Path, rows: int) -> dict[str, float]:
    """`seconds`, `peak` and `spilled` MiB of one side."""
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
        return {**json.loads(process.stdout.read().splitlines()[-1]), "peak": peak / 2**20}


def main() -> None:
    """Measure, print a table, and one line of JSON."""
    if sys.argv[1:2] == ["--serve"]:
        serve(*sys.argv[2:5], int(sys.argv[5]))
        return
    given = sys.argv[1:]
    skewed = "skewed" in given
    figures: dict[str, dict[str, float | None]] = {}
    table = []
    for millions in [float(argument) for argument in given if argument != "skewed"] or [20.0]:
        rows = int(millions * 1e6) // FILES * FILES
        in_memory = millions <= IN_MEMORY_MILLIONS
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place) / "log"
            write_log(folder, rows, skewed=skewed)
            sides = SIDES if in_memory else SIDES[-2:-1]
            results: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
            for _, side in itertools.product(range(RUNS if in_memory else 1), sides):
                results[side].append(run(side, folder, rows))
            shutil.rmtree(folder)
        seconds = {side: statistics.median(run["seconds"] for run in runs) for side, runs in results.items()}
        best = min((seconds[side] for side in ("polars", "duckdb") if side in seconds), default=None)
        for side, runs in results.items():
            share = best and best / seconds[side]
            peak, spilled = (max(run[name] for run in runs) for name in ("peak", "spilled"))
            spread = f"{min(run['seconds'] for run in runs):.2f}–{max(run['seconds'] for run in runs):.2f}"
            share_text = "–" if share is None else f"{share:.2f}"
            rate = round(rows / seconds[side])
            table.append([side, rows, f"{seconds[side]:.2f}", spread, share_text, rate, round(peak), round(spilled)])
            figures[f"{side}, {millions:g} M"] = {
                "seconds": seconds[side],
                "share_of_best": share,
                "peak_mib": peak,
                "spilled_mib": spilled,
            }
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores{', skewed' if skewed else ''}")
    header = ["side", "rows", "seconds", "spread", "of the faster", "rows/s", "peak MiB", "spilled MiB"]
    say(format_table(header, table))
    say(json.dumps(figures))


if __name__ == "__main__":
    main()
