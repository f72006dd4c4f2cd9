"""The job that writes states: its words, its exit codes, and Ray where there is much to do."""

import re
from pathlib import Path

import pytest

from lrurec_dist import stage_recommend, stage_states
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.stages import run_job
from tests.datasets import chain_sequences, write_dataset
from tests.test_jobs import read_status
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
