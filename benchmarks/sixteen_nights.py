"""Sixteen days of clicks as sixteen nights of the nightly job, with what goes wrong in a year.

    python benchmarks/sixteen_nights.py LOG.parquet [nights] [one user in so many] [directory that stays]

LOG has columns user_id, item_id, timestamp (ms); its first days become partitions, of every eighth user by default.
Each night merges its day, warm starts from the night that serves, is evaluated on the clicks of its last day,
which neither trained nor chose its checkpoint, beside the champion on the same users, and is published or refused. On the
way one night is killed while it trains, one finds a corrupted partition, one trains a bad model that the gate
has to refuse, and one is rolled back. Some nights are trained from scratch, too, on the same dataset with more than three
times the steps, and the two models are compared on the same users: a warm start is worth it where that is no better.
Exits with an error when a night ends with another code than it should, or serves another version. In a directory
that stays the same command goes on after the nights that are over.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrurec_dist.reporting import format_table, say
from lrurec_dist.stage_evaluate import read_figures

JOBS = Path(__file__).resolve().parent.parent / "jobs"
STEPS, FIRST_STEPS, SCRATCH_STEPS = 36, 120, 120  # of a night with a warm start, of the first one, and of one that is compared
KILLED, CORRUPTED, BAD, ROLLED_BACK = 3, 5, 7, 9  # which night, from 1
FROM_SCRATCH = (2, 6, 11, 16)
CHAMPION = "registry/channels/champion.json"  # below the root
HEADER = (
    "night, events, new items, prepare s, train s, evaluate s, bundle s, publish s, all s, users, ndcg@10, from scratch, popularity, "
    "beside champion, warm over scratch, 95 % of it, training s, from scratch s, what happened"
)
SETTINGS = (
    "log.timestamp_unit=ms",
    "train.workers=1",  # with all threads of the machine: each night starts every process anew
    "dataset.shards=8",
    "split.kind=global_time",
    "batch.global_batch_size=512",
    "train.learning_rate=0.002",
    "train.report_every=12",
    "train.validate_every=12",
    f"train.max_steps={FIRST_STEPS}",
    "evaluate.both_splits=false",
    "evaluate.bootstrap=200",
    f"night.warm_steps={STEPS}",
    "night.lease_s=10",
    "night.keep_nights=3",
    "publish.against_baselines=[]",  # most of a day's clicks go to articles of that day, which only recent popularity can guess
    "publish.margin=0.001",  # recall@10 of a night is about 0.01
    "publish.segment_margin=0.05",
    "publish.min_coverage_share=0.25",
    "publish.max_latency_ms=0",  # not what is tried here, on a machine that may have other work
)
FIRST_SPLIT = ("split.train_until=8h", "split.test_from=6h")  # of the first day, which has no day before
SPLIT = ("split.train_until=27h", "split.test_from=24h")  # the last day tests, three hours before it validate


def split_by_day(log: str, nights: int, one_in: int, folder: Path) -> list[str]:
    """One Hive partition a day, of the users whose id is a multiple of `one_in`."""
    table = pq.read_table(log, columns=["user_id", "item_id", "timestamp"])
    table = table.filter(pa.array(table["user_id"].to_numpy() % one_in == 0))
    days = table["timestamp"].to_numpy().astype("datetime64[ms]").astype("datetime64[D]")
    dates = [str(day) for day in np.unique(days)[:nights]]
    for date in dates:
        file = partition(folder, date)
        if file.exists():  # a file that was written anew would count as changed
            continue
        file.parent.mkdir(parents=True)
        pq.write_table(table.filter(pa.array(days == np.datetime64(date))), file, compression="zstd")
    return dates


def partition(folder: Path, date: str) -> Path:
    """Where the clicks of a day lie."""
    return folder / f"date={date}" / "part-0.parquet"


def job(name: str, *arguments: str, kill_at: str = "", log: Path) -> int:
    """Run a job, and kill it with all its processes when it says `kill_at`; its exit status."""
    command = [sys.executable, str(JOBS / f"{name}.py"), *arguments]
    with log.open("a", buffering=1) as file:  # by line: somebody may be watching
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=file, text=True, start_new_session=True)  # noqa: S603
        try:
            assert process.stdout is not None
            for line in process.stdout:
                file.write(line)
                if kill_at and kill_at in line:
                    os.killpg(process.pid, signal.SIGKILL)
            return process.wait()
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def read(path: Path) -> Any:
    """A JSON file."""
    return json.loads(path.read_text())


def training_seconds(run: Path) -> float:
    """What a run's steps and the validations between them took, over all attempts; Ray's start is no part of it."""
    last = max((run / "checkpoints").glob("step_*/manifest.json"))
    return float(read(last)["progress"]["seconds"])


def main() -> None:
    """Run the nights, print a table and one line of JSON."""
    log, *rest = sys.argv[1:5]
    numbers = [int(text) for text in rest[:2]]
    nights, one_in = (numbers + [16, 8][len(numbers) :])[:2]
    if len(rest) > 2:
        sixteen(log, nights, one_in, Path(rest[2]))
    else:
        with tempfile.TemporaryDirectory() as folder:
            sixteen(log, nights, one_in, Path(folder))


def sixteen(log: str, nights: int, one_in: int, folder: Path) -> None:
    """All nights below a directory."""
    root, data, output = folder / "root", folder / "log", folder / "output.txt"
    dates = split_by_day(log, nights, one_in, data)
    finished = folder / "over.jsonl"
    finished.touch()
    over = [json.loads(line) for line in finished.read_text().splitlines()]

    def night(number: int, *overrides: str, kill_at: str = "") -> int:
        settings = [*SETTINGS, *(FIRST_SPLIT if number == 1 else SPLIT), f"log.path={data}", f"night.root={root}"]
        return job("nightly", *settings, f"night.date={dates[number - 1]}", *overrides, kill_at=kill_at, log=output)

    for number, date in enumerate(dates[len(over) :], len(over) + 1):
        served, events = serving(root), []
        begun = time.perf_counter()
        if number == KILLED:
            expect(date, night(number, kill_at="train: step"), (-signal.SIGKILL,), served, root)
            events.append("killed in training")
        if number == CORRUPTED:
            whole = partition(data, date).read_bytes()
            partition(data, date).write_bytes(whole[: len(whole) // 2])
            expect(date, night(number), (21,), served, root)
            partition(data, date).write_bytes(whole)
            events.append("corrupted partition: 21, mended")
        if number == BAD:
            expect(date, night(number, "train.learning_rate=0.1"), (10,), served, root)
            events.append("bad model: 10")
        else:
            code = expect(date, night(number), (0, 10) if served else (0,), None, root)
            events += ["refused: 10"] if code else []
        if number == ROLLED_BACK:
            before = read(root / CHAMPION)["previous"][0]
            if job("registry", "rollback", f"{root}/registry", log=output) != 0 or serving(root) != before:
                sys.exit(f"night {date}: was not rolled back to {before}")
            events.append("rolled back")
        wall_s = time.perf_counter() - begun
        run = root / "nights" / date
        lineage = read(run / "lineage.json")
        figures = lineage["evaluation"]
        beside = figures["beside_previous"]
        scratch = from_scratch(run, folder / "scratch" / date, output) if number in FROM_SCRATCH else None
        row = [
            date,
            lineage["dataset"]["rows_read"],
            lineage["dataset"]["new_items"],
            *(f"{lineage['seconds'].get(stage, 0):.0f}" for stage in ("prepare", "train", "evaluate", "bundle", "publish")),
            f"{wall_s:.0f}",
            figures["users"],
            figures["model"]["ndcg@10"],
            scratch["ndcg@10"] if scratch else "",
            figures["popularity"]["ndcg@10"],
            "" if beside is None else f"{beside['ndcg@10']['value']:+.5f}",
            f"{scratch['warm_over_scratch']:+.5f}" if scratch else "",
            f"{scratch['low']:+.5f} to {scratch['high']:+.5f}" if scratch else "",
            f"{training_seconds(run):.1f}",
            f"{scratch['training_s']:.1f}" if scratch else "",
            "; ".join(events),
        ]
        over.append({"row": row, "wall_s": wall_s, "scratch": scratch})
        with finished.open("a") as file:
            file.write(json.dumps(over[-1]) + "\n")
        say(f"night {date}: {row}")
    say(f"{time.strftime('%Y-%m-%d')}, {os.cpu_count()} cores, {log}, one user in {one_in}; {STEPS} steps a night")
    say(format_table(HEADER.split(", "), [night["row"] for night in over]))
    say(json.dumps({"nights": len(over), "minutes": round(sum(night["wall_s"] for night in over) / 60, 1)}))
    if job("status", str(root), "--last", str(nights), log=output) != 0:
        sys.exit(f"{root}: jobs/status.py failed; {output} has its lines")


def serving(root: Path) -> str:
    """The version that serves; empty before the first one."""
    return str(read(root / CHAMPION)["version"]) if (root / CHAMPION).exists() else ""


def expect(date: str, code: int, wanted: Sequence[int], served: str | None, root: Path) -> int:
    """The code with which a night ended; the benchmark ends unless it is a wanted one and, if given, `served` still serves."""
    if code not in wanted:
        sys.exit(f"night {date}: ended with {code}, not {wanted}; {root.parent / 'output.txt'} has its lines")
    if served is not None and serving(root) != served:
        sys.exit(f"night {date}: {serving(root)} serves, not {served}")
    return code


def from_scratch(run: Path, url: Path, output: Path) -> dict[str, Any]:
    """The same night without a warm start: its ndcg@10, and how far the warm start's is above it on the same users."""
    overrides = [
        "train.warm_start=''",
        f"train.max_steps={SCRATCH_STEPS}",
        f"evaluate.previous={run}",
        f"bundle.registry={url}/registry",
    ]
    settings = [str(run / "config.yaml"), f"run_dir={url}", f"dataset.dir={run}/dataset", *overrides]
    if job("train", *settings, log=output) != 0:
        sys.exit(f"{url}: training from scratch failed; {output} has its lines")
    ndcg = read(url / "status.json")["stages"]["evaluate"]["outputs"]["model"]["ndcg@10"]
    above = read_figures(str(url), "global_time")["previous"]["differences"]["ndcg@10"]  # of it over the warm start
    return {
        "ndcg@10": ndcg,
        "warm_over_scratch": -above["value"],
        "low": -above["high"],
        "high": -above["low"],
        "training_s": training_seconds(url),
    }


if __name__ == "__main__":
    main()
