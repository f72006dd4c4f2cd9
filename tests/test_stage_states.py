"""The job that writes states: its words, its exit codes, and Ray where there is much to do."""

import re
from pathlib import Path

import pytest

from lrurec_dist import stage_recommend, stage_states
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.stages import run_job
from tests.datasets import chain_sequences, write_dataset
from tests.processes import killed_at
from tests.test_jobs import ROOT, read_status
from tests.test_recommendations import files_below
from tests.test_recommender import NUM_ITEMS, export


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("stage") / "dataset"), chain_sequences(40, NUM_ITEMS), NUM_ITEMS)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> list[str]:
    """Arguments that name a bundle and its dataset."""
    return [f"dataset.dir={dataset.url}", f"states.bundle={export(tmp_path_factory.mktemp('registry'), dataset)}"]


def run(*arguments: str) -> int:
    return run_job(arguments, stages=("states",), description="", default_config="configs/quickstart.yaml")


def test_the_job_writes_states_once_and_says_so(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*given, f"run_dir={tmp_path / 'run'}") == 0
    line = rf"^states: 40 users by bundle 2026-01-02-\w+, {tmp_path}/run/states$"
    assert re.search(line, capsys.readouterr().out, re.M)
    assert read_status(tmp_path / "run")["stages"]["states"]["outputs"] == {"url": f"{tmp_path}/run/states"}
    assert run(*given, f"run_dir={tmp_path / 'run'}", f"states.dir={tmp_path / 'run' / 'states'}") == 0
    assert "states: skipped" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_much_work_goes_to_ray_and_gives_the_same_files(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*given, f"run_dir={tmp_path / 'threads'}") == 0
    monkeypatch.setattr(stage_states, "LOCAL_EVENTS", 0)
    monkeypatch.setattr(stage_recommend, "LocalPasses", lambda **_: pytest.fail("not by Ray"))
    assert run(*given, f"run_dir={tmp_path / 'ray'}") == 0
    assert files_below(tmp_path / "threads" / "states") == files_below(tmp_path / "ray" / "states")


KILLED = """
import itertools, os, runpy, sys, threading
from lrurec_dist.serve.shard_files import ShardFiles

begun, finished, write, told = itertools.count(), threading.Semaphore(0), ShardFiles.write, sys.stdout

def half_written(tables):
    yield from tables()
    finished.acquire()
    print("amid", file=told, flush=True)
    threading.Event().wait()  # for the kill

def writing(files, shard, schema, tables):
    if next(begun) == 0:
        record = write(files, shard, schema, tables)
        finished.release()
        return record
    return write(files, shard, schema, lambda: half_written(tables))

ShardFiles.write = writing
sys.stdout, sys.argv = open(os.devnull, "w"), sys.argv[:1] + {arguments}
runpy.run_path({job!r}, run_name="__main__")
"""


def test_a_job_that_is_killed_amid_its_shards_goes_on_with_the_missing_ones_to_the_same_bytes(
    tmp_path: Path, given: list[str]
) -> None:
    dataset = write_dataset(str(tmp_path / "dataset"), chain_sequences(40, NUM_ITEMS), NUM_ITEMS, shards=6)
    states = tmp_path / "run" / "states"
    arguments = [given[1], f"dataset.dir={dataset.url}", f"run_dir={tmp_path / 'run'}"]
    killed_at("amid", KILLED.format(arguments=arguments, job=str(ROOT / "jobs" / "states.py")), timeout_s=200)
    done = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (states / "states").glob("part-*.parquet")}
    assert len(done) == 1
    assert not (states / "manifest.json").exists()
    assert run(*arguments) == 0
    assert run(*arguments[:2], f"run_dir={tmp_path / 'other'}") == 0
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in done} == done, "what was finished is left alone"
    whole = files_below(tmp_path / "other" / "states")
    assert {name: data for name, data in files_below(states).items() if "/." not in name} == whole


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["states.recent_items=-1"], 30, "states.recent_items=-1: cannot be negative"),
        (["states.bundle=''"], 20, "states.bundle is not set"),
        (["states.bundle=/no/such/bundle"], 20, "states.bundle=/no/such/bundle does not exist"),
        (["dataset.dir={other}"], 21, "other has"),
    ],
)
def test_a_bad_start_ends_with_one_clear_line_and_its_code(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    other = write_dataset(str(tmp_path / "other"), [[1, 2, 3]], NUM_ITEMS + 1).url
    assert run(*given, f"run_dir={tmp_path / 'run'}", *(argument.format(other=other) for argument in arguments)) == code
    assert message in capsys.readouterr().out.splitlines()[-1]
