"""Shared fixtures. Ray is started once per module that asks for it: starting it costs seconds."""

import os
from collections.abc import Iterator

import pytest
import ray

from lrurec_dist.data.ray_feed import configure_ray_data
from tests.stores import bucket as bucket
from tests.stores import faulty as faulty
from tests.stores import no_wait as no_wait
from tests.stores import s3 as s3
from tests.stores import s3_environment as s3_environment

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """A Ray of this module's own, never one that happens to run on the machine."""
    ray.init(address="local", num_cpus=3, logging_level="ERROR", log_to_driver=False)
    configure_ray_data()
    yield
    ray.shutdown()
