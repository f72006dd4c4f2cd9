"""Shared fixtures. Ray is started once, for all modules that ask for it, which come last: starting it costs seconds."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from lrurec_dist.data import passes
from lrurec_dist.data.ray_feed import configure_ray_data
from lrurec_dist.data.sequences import SequenceDataset
from tests.dirty_log import CLEAN, DIRTY, prepare, write_parquet
from tests.stores import bucket as bucket
from tests.stores import faulty as faulty
from tests.stores import no_wait as no_wait
from tests.stores import s3 as s3
from tests.stores import s3_environment as s3_environment

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that use the Ray of the tests run last, so that its processes are not beside all others."""
    using = {item.path for item in items if "ray_session" in item.fixturenames}  # type: ignore[attr-defined]
    items.sort(key=lambda item: item.path in using)


@pytest.fixture(scope="session")
def ray_session(s3_environment: object) -> Iterator[None]:  # noqa: ARG001
    """A Ray of the tests' own, never one that happens to run on the machine; its workers inherit the way to the S3 server."""
    ray.init(address="local", num_cpus=3, logging_level="ERROR", log_to_driver=False)
    configure_ray_data()
    yield
    ray.shutdown()


@pytest.fixture(params=["in one process", "by Ray tasks"])
def by(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of preparing, which the size of the log would choose."""
    if request.param == "by Ray tasks":
        monkeypatch.setattr(passes, "LOCAL_BYTES", 0)
    return str(request.param)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("module")


@pytest.fixture(scope="module")
def log(place: Path) -> str:
    """The dirty log as three Parquet files behind a glob, beside a file that is none."""
    write_parquet(place / "log", CLEAN + DIRTY, files=3)
    (place / "log" / "_SUCCESS").touch()
    return f"{place}/log/*.parquet"


@pytest.fixture(scope="module")
def dataset(place: Path, log: str) -> SequenceDataset:
    """The dirty log, prepared in three shards."""
    prepared, was_there = prepare(place / "dataset", log)
    assert not was_there
    return prepared


@pytest.fixture
def copy(dataset: SequenceDataset, tmp_path: Path) -> Path:
    """The prepared dataset at a place of the test's own."""
    return Path(shutil.copytree(dataset.url, tmp_path / "copy"))
