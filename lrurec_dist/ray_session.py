"""The cluster of a job: connected to when the first stage needs it, left when the job ends."""

import os
from typing import Any

import ray

from lrurec_dist.config import Config
from lrurec_dist.data.ray_feed import configure_ray_data
from lrurec_dist.errors import ConfigError
from lrurec_dist.reporting import say
from lrurec_dist.signals import interrupt, on_sigterm
from lrurec_dist.train.launch import use_cuda

_PLENTY = 1e6  # of a custom resource; CPUs are what limits a machine


class RaySession:
    """Connects to the cluster this job was submitted to (RAY_ADDRESS), or starts Ray here for the job.

    Workers' output stays in Ray's own logs: what matters of it comes back as records and errors.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._ours = False

    @property
    def data_resources(self) -> dict[str, float]:
        """What a task of the data plane reserves besides its CPUs."""
        return self._config.dataset.resources

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
            options["resources"] = dict.fromkeys(self._custom(), _PLENTY)  # the one node there is does everything
        with on_sigterm(interrupt):  # Ray puts an answer of its own there, which would be one without a status
            ray.init(**options)
        self._ours = True
        configure_ray_data()
        missing = sorted(self._custom() - ray.cluster_resources().keys())
        if missing:
            say(
                f"cluster: no node has {', '.join(missing)} yet (dataset.resources, train.resources); what needs it waits until "
                "an autoscaler adds one"
            )
        if train.device == "cuda" and address == "local" and not use_cuda("auto"):
            raise ConfigError(
                "train.device=cuda: this machine has no GPU that Ray can see; set train.device=cpu, or submit to a cluster"
            )

    def _custom(self) -> set[str]:
        return {*self._config.dataset.resources, *self._config.train.resources}

    def close(self) -> None:
        """Leave the cluster, unless somebody else had connected."""
        if self._ours:
            ray.shutdown()
