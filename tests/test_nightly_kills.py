"""A night that is killed at any moment goes on from what lies on storage, and ends like one that was not.

One night runs once, as a real process. At each of the moments all its processes are stopped and its directory is
copied: what `kill -9` would leave there. From each copy the same command is run again, in this process and with one Ray for
all. (`test_nightly.py` really kills one.)
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config, with_absolute_paths
from lrurec_dist.nightly.night import run_nights
from lrurec_dist.reporting import MetricsFile
from tests.nights import DAYS, write_log
from tests.test_jobs import ROOT
from tests.test_nightly import champion, read, settings

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900), pytest.mark.usefixtures("ray_session")]

IN_TRAINING = ("train begins", "train: split", "train: validation at step 10")
MOMENTS = (
    "prepare begins",
    "prepare: reading",
    *IN_TRAINING,
    "evaluate begins",
    "evaluate: test",
    "bundle begins",
    "bundle: verified",
    "publish begins",
    "publish: the champion",
    "is champion, generation",
    "states begins",
    "states: ",
    "recommend begins",
    "recommend: 5 items for",
    f"night {DAYS[1]}: recommend done",
)
LISTS = ("night.states=true", "night.recommend=true", "recommend.k=5")


@dataclass(frozen=True)
class Nights:
    """A place with a log and one night, what a second one left of its root at each moment, and what became of it."""

    place: Path
    moments: dict[str, Path]
    lineage: dict[str, Any]
    version: str


def night(place: Path, day: str) -> Config:
    """What `jobs/nightly.py` reads from these settings."""
    return with_absolute_paths(load_config(str(ROOT / "configs" / "quickstart.yaml"), settings(place, day, *LISTS)))


@pytest.fixture(scope="module")
def nights(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Nights:  # noqa: ARG001
    place = tmp_path_factory.mktemp("kills")
    write_log(place / "log", DAYS[:2])
    run_nights(night(place, DAYS[0]))
    moments = copied_at(MOMENTS, place, *settings(place, DAYS[1], *LISTS))
    return Nights(place, moments, read(place / "root/nights" / DAYS[1] / "lineage.json"), champion(place))


def copied_at(lines: tuple[str, ...], place: Path, *arguments: str) -> dict[str, Path]:
    """Run the nightly job to its end; a copy of its root for each line, of the moment when it was said first."""
    command = [sys.executable, str(ROOT / "jobs" / "nightly.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    copies: dict[str, Path] = {}
    said = ""
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment) as process:
        assert process.stdout is not None
        for text in process.stdout:
            said += text
            for line in lines:
                if line in text and line not in copies:
                    copies[line] = place / f"copy-{len(copies)}"
                    with stopped(process.pid):
                        shutil.copytree(place / "root", copies[line])
    assert process.returncode == 0, said[-3000:]
    assert copies.keys() == set(lines), f"never said: {set(lines) - copies.keys()}"
    return copies


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """While the context is open no process that a process started does anything, nor does it itself."""
    halted: list[psutil.Process] = []
    while fresh := [each for each in _family(pid) if each not in halted]:  # until none was started meanwhile
        for process in fresh:
            process.suspend()
        halted += fresh
    try:
        yield
    finally:
        for process in reversed(halted):
            with suppress(psutil.NoSuchProcess):
                process.resume()


def _family(pid: int) -> list[psutil.Process]:
    first = psutil.Process(pid)
    return [first, *(each for each in first.children(recursive=True) if each.status() != psutil.STATUS_ZOMBIE)]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_night_killed_anywhere_ends_like_one_that_was_not(nights: Nights, moment: str) -> None:
    root, run = nights.place / "root", nights.place / "root/nights" / DAYS[1]
    shutil.rmtree(root)
    shutil.copytree(nights.moments[moment], root)
    assert read(root / "status.json")["result"] == "running"
    run_nights(night(nights.place, DAYS[1]))
    lineage = read(run / "lineage.json")
    for name in ("result", "partitions", "dataset", "evaluation"):
        assert lineage[name] == nights.lineage[name], name
    assert champion(nights.place) == lineage["serving"] == lineage["bundle"]["version"]
    assert read(root / "registry/channels/champion.json")["generation"] == 2, "it was promoted once"
    assert read(root / "status.json")["result"] == "done"
    steps = [record["step"] for record in MetricsFile(f"{run}/metrics.jsonl").read() if record["kind"] == "train"]
    assert steps[-1] == 20
    if moment not in IN_TRAINING:
        assert steps == [10, 20], "no step was made twice"
