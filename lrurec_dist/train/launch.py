"""Starts the training workers with Ray Train and brings their outcome back."""

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
from lrurec_dist.run_directory import run_metrics
from lrurec_dist.train.attempts import train_in_attempts
from lrurec_dist.train.checks import check_settings
from lrurec_dist.train.failures import is_collective
from lrurec_dist.train.heartbeats import BeatingPresence, Heartbeats
from lrurec_dist.train.worker_process import prepare_process, set_threads

# Ray trains on a thread of its own. glibc gives that an arena of 64 MiB pieces, which go back to the kernel with every
# step whatever `keep_freed_memory` asks: a third more page faults. One arena for all threads keeps what it has.
_WORKER_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
# Ray has PyTorch loaded before anything of ours, on nodes that do not inherit this process's environment.
_INHERITED = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")

# A rank that loses touch with a dead one fails at once, and Ray may hear of that first: it shall find the dead one.
_UNTIL_RAY_LOOKED_S = 5.0


def use_cuda(device: str) -> bool:
    """Whether workers compute on GPUs: as asked, or where the cluster has any."""
    return device == "cuda" or (device == "auto" and ray.cluster_resources().get("GPU", 0) > 0)


def launch_training(config: Config) -> None:
    """Run the training loop on `train.workers` workers until it ends, through losses of workers and nodes.

    Every attempt is a Ray run of its own name: under a used one, Ray would silently resume the old
    run. What counts of a run is in our own checkpoints.

    Raises:
        ConfigError: settings that the devices there are cannot have; nothing is started.
        LrurecError: what a worker raised.
        WorkersError: workers were lost too often, or there is no room for them.
        StoppedError: SIGTERM arrived.
    """
    options = config.train
    cuda = use_cuda(options.device)
    check_settings(config, cuda=cuda)
    bundle = {"CPU": options.cpus_per_worker, **({"GPU": 1} if cuda else {}), **options.resources}
    inherited = {name: os.environ[name] for name in _INHERITED if name in os.environ}

    def attempt(number: int, workers: int, heartbeats: Heartbeats) -> str:
        # only the first attempt may begin anew
        again = config if number == 1 else replace(config, train=replace(options, resume="auto"))
        # mypy knows the classes that these names stood for before Ray Train's second version
        run_config = RunConfig(  # type: ignore[call-arg]
            name=f"attempt-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}-{number}",
            storage_path=storage.join(config.run_dir, "ray"),
            # Ray starts nothing again: it would go on from checkpoints of its own, of which there are none.
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=0, controller_failure_limit=0, max_preemption_failures=0
            ),
            worker_runtime_env={"env_vars": {**_WORKER_ENVIRONMENT, **inherited}},
        )
        trainer = TorchTrainer(
            _worker_entry,  # type: ignore[arg-type]
            train_loop_config={"config": to_dict(again), "cuda": cuda, "heartbeats": heartbeats.actor},
            torch_config=TorchConfig(backend="nccl" if cuda else "gloo", timeout_s=math.ceil(options.collective_timeout_s)),
            scaling_config=ScalingConfig(num_workers=workers, use_gpu=cuda, resources_per_worker=bundle),
            run_config=run_config,
        )
        return trainer.fit().return_value  # type: ignore[attr-defined]

    metrics = run_metrics(config, "train")
    with metrics.followed(options.max_steps), _ray_settings(options.collective_timeout_s):
        train_in_attempts(attempt, options, config.run_dir, bundle, metrics)


@contextmanager
def _ray_settings(timeout_s: float) -> Iterator[None]:
    """Ray Train's settings that exist as environment variables of the driver alone; those of the user stay."""
    settings = {
        "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": timeout_s,  # of Ray's own exchanges; without it there is none
        "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": timeout_s,
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": 1.0,  # a node that is taken away often has 30 s left
    }
    ours = {name: f"{value:g}" for name, value in settings.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            del os.environ[name]


def _worker_entry(arguments: dict[str, Any]) -> str:
    """What each worker runs; why it left before the end of training, if it did."""
    prepare_process(arguments["cuda"])
    from lrurec_dist.train.loop import train  # DeepSpeed is a worker's business, not the driver's

    config = from_dict(arguments["config"])
    config = replace(config, train=replace(config.train, track=sorted({*config.train.track, "ray"})))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    if arguments["cuda"]:
        device = ray.train.torch.get_device()
    else:
        device = torch.device("cpu")
        set_threads(config.train.threads_per_worker, ray.train.get_context().get_local_world_size())
    presence = BeatingPresence(arguments["heartbeats"])
    try:
        with presence.beating():
            ended = train(config, device, ray.train.report, presence)
    except RuntimeError as error:
        if is_collective(error):
            time.sleep(_UNTIL_RAY_LOOKED_S)
        raise
    return "" if ended else presence.leave
