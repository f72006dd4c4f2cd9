"""Training without Ray: what `torchrun` starts on every rank, over a prepared dataset.

    torchrun --nproc-per-node 2 -m lrurec_dist.train.standalone CONFIG run_dir=... dataset.dir=...

Losses and checkpoints are those of the same configuration under Ray.
"""

import dataclasses
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.errors import ConfigError, DataNotReadyError
from lrurec_dist.reporting import say
from lrurec_dist.run_directory import open_run, run_command, run_metrics
from lrurec_dist.train.checks import check_settings, check_start
from lrurec_dist.train.worker_process import prepare_process, set_threads


def main(arguments: Sequence[str], *, description: str, default_config: str) -> int:
    """Train as one rank of the group that the environment describes; returns the exit code."""
    return run_command(arguments, train_standalone, description=description, default_config=default_config)


def train_standalone(config: Config) -> None:
    """One rank's training, from the process group to its end; `train.workers` is what torchrun started.

    Raises:
        DataNotReadyError: no dataset.
        ConfigError: not started by torchrun, a feed that needs Ray, no GPU where one is asked for, or settings that contradict each other or the dataset.
        LrurecError: what `check_start` refuses.
    """
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR") if name not in os.environ]
    if missing:
        raise ConfigError(f"{missing[0]} is not set: start this with torchrun --nproc-per-node N, which sets it")
    if config.batch.feed == "ray":
        raise ConfigError("batch.feed=ray: there is no Ray here; set batch.feed=local, or start jobs/train.py")
    if not storage.is_committed(config.dataset_url):
        raise DataNotReadyError(f"dataset {config.dataset_url} does not exist; run jobs/prepare.py first")
    cuda = config.train.device != "cpu" and torch.cuda.is_available()
    if config.train.device == "cuda" and not cuda:
        raise ConfigError("train.device=cuda: torch sees no GPU here; set train.device=cpu")
    prepare_process(cuda)
    from lrurec_dist.train.loop import train  # DeepSpeed reads what was prepared when it is imported

    config = dataclasses.replace(
        config,
        batch=dataclasses.replace(config.batch, feed="local"),
        train=dataclasses.replace(config.train, workers=int(os.environ["WORLD_SIZE"])),
    )
    check_settings(config, cuda=cuda)
    check_start(config)
    if cuda:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        set_threads(config.train.threads_per_worker, int(os.environ["LOCAL_WORLD_SIZE"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    first = dist.get_rank() == 0
    try:
        if first:
            open_run(config)
        dist.barrier()  # the others train only if the directory is theirs
        with run_metrics(config, "train").followed(config.train.max_steps) if first else nullcontext():
            train(config, device, _unheard)
    finally:
        dist.destroy_process_group()
    if first:
        say(f"train: {config.run_dir} is trained; jobs/train.py evaluates and bundles it")


def _unheard(_: dict[str, float]) -> None:
    """Nobody else is told of a validation: metrics.jsonl has it."""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], description=__doc__ or "", default_config="configs/quickstart.yaml"))
