"""The cluster of a job: connected to when the first stage needs it, left when the job ends."""

import os
from typing import Any

import ray

from lrurec_dist.config import Config
from lrurec_dist.data.ray_feed import configure_ray_data
from lrurec_dist.errors import ConfigError
from lrurec_dist.signals import interrupt, on_sigterm
from lrurec_dist.train.launch import use_cuda


class RaySession:
    """Connects to the cluster this job was submitted to (RAY_ADDRESS), or starts Ray here for the job.

    Workers' output stays in Ray's own logs: what matters of it comes back as records and errors.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ours = False

    def connect(self) -> None:
        """Be connected from now on.

        Raises:
            ConfigError: a GPU is asked for and there is none.
        """
        if ray.is_initialized():
            return
        address = os.environ.get("RAY_ADDRESS") or "local"
        options: dict[str, Any] = {"address": address, "logging_level": "ERROR", "log_to_driver": False}
        train = self._config.train
        if address == "local":
            # Logical CPUs: the workers' own, and two for the data tasks that feed them.
            cpus = train.workers * train.cpus_per_worker + 2
            options["num_cpus"] = max(os.cpu_count() or 1, round(cpus + 0.5))
        with on_sigterm(interrupt):  # Ray puts an answer of its own there, which would be one without a status
            ray.init(**options)
        self._ours = True
        configure_ray_data()
        if train.device == "cuda" and address == "local" and not use_cuda("auto"):
            raise ConfigError(
                "train.device=cuda: this machine has no GPU that Ray can see; set train.device=cpu, or submit to a cluster"
            )

    def close(self) -> None:
        """Leave the cluster, unless somebody else had connected."""
        if self._ours:
            ray.shutdown()
