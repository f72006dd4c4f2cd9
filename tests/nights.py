"""A log with a partition a day, and nights that take seconds."""

import datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config, with_absolute_paths
from lrurec_dist.data.synthetic import build_synthetic_log
from lrurec_dist.nightly.plan import begin, config_of, registry_of, root_of
from lrurec_dist.nightly.records import LINEAGE, NightRecord, night_url, pin, read_nights
from lrurec_dist.reporting import Status
from lrurec_dist.serve.gate import Check
from lrurec_dist.serve.registry import offer, version_url
from lrurec_dist.stages import run

FIRST = "2025-01-26"  # the first partition has all days up to it, each later one its day
DAYS = ("2025-01-26", "2025-01-27", "2025-01-28", "2025-01-29")
TINY = (
    "dataset.shards=2",
    "model.dim=16",
    "model.hidden=16",
    "model.dropout=0",
    "train.workers=1",
    "train.max_steps=20",
    "train.validate_every=10",
    "train.report_every=10",
    "train.learning_rate=0.01",
    "evaluate.bootstrap=50",
    "evaluate.both_splits=false",
    "publish.against_baselines=[]",
    "publish.margin=1",
    "publish.segment_margin=1",
    "publish.min_coverage_share=0",
    "night.lease_s=2",
)


def partition(folder: Path, day: str) -> Path:
    """Where a day's file lies."""
    return folder / f"date={day}" / "part-0.parquet"


def write_log(folder: Path, days: tuple[str, ...] = DAYS) -> list[str]:
    """Write partitions of a synthetic log, and give the settings to read them."""
    log = build_synthetic_log(users=200, items=80, mean_length=20, seed=0)
    numbers = log["timestamp"].to_numpy() // 86_400
    epoch = datetime.date(1970, 1, 1)
    for day in days:
        number = (datetime.date.fromisoformat(day) - epoch).days
        rows = numbers <= number if day == FIRST else numbers == number
        partition(folder, day).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(log.filter(pa.array(np.asarray(rows))), partition(folder, day))
    return [f"log.path={folder}"]


def tiny(root: Path, log: Path, *overrides: str) -> Config:
    """The settings of tiny nights below a directory."""
    return with_absolute_paths(load_config(None, [f"night.root={root}", f"log.path={log}", *TINY, *overrides]))


def prepared(config: Config) -> NightRecord:
    """A night that was begun and whose dataset is committed, as the job does it."""
    root, date = root_of(config), config.night.date
    night = begin(config, date, read_nights(root))
    pin(root, night)
    run(config_of(config, night), ["prepare"])
    return NightRecord(date, night_url(root, date))


def ended(config: Config, *, promoted: bool = True) -> NightRecord:
    """A night that is over, with small files in the place of large ones, its version in the registry."""
    record, registry = prepared(config), registry_of(config)
    version = f"{record.date}-{'good' if promoted else 'poor'}"
    for name in ("checkpoints/step_000010/manifest.json", "report.html", "metrics.jsonl", "ray/state"):
        storage.write_bytes(storage.join(record.url, name), b"")
    for name in ("manifest.json", "metrics.json", "ranks/part-00000.parquet"):
        storage.write_bytes(storage.join(record.url, "evaluation", "leave_last_out", name), b"{}")
    bundle = version_url(registry, version)
    storage.write_bytes(storage.join(bundle, "model.safetensors"), version.encode())
    storage.commit(bundle, {"version": version, "num_items": 80})
    outcome = offer(registry, version, lambda _: ([Check("recall@10", 0.3, 0.1, promoted)], {}), {})
    status = Status(record.url)
    status.commit("publish", "", {"version": version, "promoted": promoted, "decision": outcome.decision, "generation": 1})
    status.done()
    storage.write_json(storage.join(record.url, LINEAGE), {"result": "done" if promoted else "refused", "serving": version})
    return NightRecord(record.date, record.url)
