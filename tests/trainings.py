"""Trainings small enough for a test, with and without Ray, and what they wrote."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.errors import LrurecError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.worker_process import prepare_process

NUM_ITEMS = 25


def configure(run: Path, dataset_url: str, *overrides: str) -> Config:
    small = [
        "model.dim=8",
        "model.hidden=8",
        "batch.global_batch_size=10",
        "batch.max_length=8",
        "batch.shards_mixed=3",
        "model.dropout=0",
    ]
    budget = [
        "train.max_steps=20",
        "train.report_every=5",
        "train.validate_every=10",
        "train.learning_rate=0.01",
        "train.threads_per_worker=1",
    ]
    return load_config(None, [f"run_dir={run}", f"dataset.dir={dataset_url}", *small, *budget, *overrides])


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in MetricsFile(str(run / METRICS)).read() if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run, "train")}


def train_in_turn(configs: list[Config]) -> list[str]:
    """On every rank of a group: one training after the other by the loop itself; why each ended, or its error."""
    prepare_process(cuda=False)
    from lrurec_dist.train.loop import train  # DeepSpeed only where a rank runs

    ends = []
    for config in configs:
        local = replace(config, batch=replace(config.batch, feed="local"))
        try:
            ends.append(train(local, torch.device("cpu"), lambda _: None))
        except LrurecError as error:
            ends.append(f"{type(error).__name__}: {error}")
    return ends
