"""Starts the training workers with Ray Train and brings their outcome back."""

import logging
import os
import time
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from lrurec_dist import storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import from_dict, to_dict
from lrurec_dist.errors import LrurecError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.worker_process import prepare_process, set_threads

# Ray trains on a thread of its own. glibc gives that an arena of 64 MiB pieces, which go back to the kernel with every
# step whatever `keep_freed_memory` asks: a third more page faults. One arena for all threads keeps what it has.
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}


def use_cuda(device: str) -> bool:
    """Whether workers compute on GPUs: as asked, or where the cluster has any."""
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def launch_training(config: Config) -> None:
    """Run the training loop on `train.workers` workers until it ends.

    Every attempt is a Ray run of its own name: under a used one, Ray would silently resume the old
    run. What counts of a run is in our own checkpoints.

    Raises:
        LrurecError: what a worker raised, or a failure of the worker group.
    """
    cuda = use_cuda(config.train.device)
    trainer = TorchTrainer(
        _worker_entry,
        train_loop_config={"config": to_dict(config), "cuda": cuda},
        torch_config=TorchConfig(backend="nccl" if cuda else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=cuda,
            resources_per_worker={"CPU": config.train.cpus_per_worker, **({"GPU": 1} if cuda else {})},
        ),
        run_config=RunConfig(
            name=f"attempt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}",
            storage_path=storage.join(config.run_dir, "ray"),
            failure_config=FailureConfig(max_failures=0),
            worker_runtime_env={"env_vars": _WORKER_ENVIRONMENT},  # type: ignore[call-arg]  # Ray shows checkers an older class
        ),
    )
    try:
        with MetricsFile(storage.join(config.run_dir, METRICS)).followed(config.train.max_steps):
            trainer.fit()
    except ray.train.TrainingFailedError as error:
        raise _cause_of(error) from error


def _cause_of(error: BaseException) -> LrurecError:
    """The deliberate error of a worker if there is one, else the first failure in one line."""
    failures = getattr(error, "worker_failures", None) or {}
    causes: list[tuple[int, BaseException]] = [
        (rank, getattr(failure, "cause", failure)) for rank, failure in sorted(failures.items())
    ]
    for rank, cause in causes:
        if isinstance(cause, LrurecError):
            return type(cause)(f"rank {rank}: {cause}")
    for rank, cause in causes:
        lines = [line for line in str(cause).splitlines() if line.strip()]
        return LrurecError(f"rank {rank} failed: {type(cause).__name__}: {lines[-1] if lines else ''}")
    return LrurecError(f"training failed: {type(error).__name__}: {error}")


def _worker_entry(arguments: dict[str, Any]) -> None:
    prepare_process(arguments["cuda"])
    from lrurec_dist.train.loop import train  # DeepSpeed is a worker's business, not the driver's

    config = from_dict(arguments["config"])
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if arguments["cuda"]:
        device = ray.train.torch.get_device()
    else:
        device = torch.device("cpu")
        set_threads(config.train.threads_per_worker, ray.train.get_context().get_local_world_size())
    train(config, device, ray.train.report)
