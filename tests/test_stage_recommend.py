"""The job that writes lists: its words, its exit codes, and Ray where there is much to do."""

import re
from pathlib import Path

import pytest

from lrurec_dist import stage_recommend
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.stages import run_job
from tests.datasets import chain_sequences, write_dataset
from tests.test_jobs import read_status
from tests.test_jobs import run_job as run_process
from tests.test_recommendations import files_below
from tests.test_recommender import NUM_ITEMS, export


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("stage") / "dataset"), chain_sequences(40, NUM_ITEMS), NUM_ITEMS)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, dataset: SequenceDataset) -> list[str]:
    """Arguments that name a bundle and its dataset."""
    bundle = export(tmp_path_factory.mktemp("registry"), dataset)
    return [f"dataset.dir={dataset.url}", f"recommend.bundle={bundle}", "recommend.k=5"]


def run(*arguments: str) -> int:
    return run_job(arguments, stages=("recommend",), description="", default_config="configs/quickstart.yaml")


def test_the_job_writes_lists_once_and_says_so(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    job = run_process("recommend", *given, f"run_dir={tmp_path / 'run'}")
    assert job.returncode == 0, job.stdout + job.stderr
    assert re.search(
        rf"^recommend: 5 items for 40 users by bundle 2026-01-02-\w+, {tmp_path}/run/recommendations$", job.stdout, re.M
    )
    assert read_status(tmp_path / "run")["result"] == "done"
    assert run(*given, f"run_dir={tmp_path / 'run'}") == 0
    assert "recommend: skipped" in capsys.readouterr().out


@pytest.mark.usefixtures("ray_session")
def test_much_work_goes_to_ray_and_gives_the_same_files(
    tmp_path: Path, given: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*given, f"run_dir={tmp_path / 'threads'}") == 0
    monkeypatch.setattr(stage_recommend, "LOCAL_SCORES", 0)
    monkeypatch.setattr(stage_recommend, "LocalPasses", lambda **_: pytest.fail("not by Ray"))
    assert run(*given, f"run_dir={tmp_path / 'ray'}") == 0
    assert files_below(tmp_path / "threads" / "recommendations") == files_below(tmp_path / "ray" / "recommendations")


def test_unknown_users_are_counted_and_named(tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "users.txt").write_text("u0003\nx1\nx2\n\nx3\nx4\nu0001\nx5\nx6\n")
    assert run(*given, f"run_dir={tmp_path / 'run'}", f"recommend.users={tmp_path / 'users.txt'}") == 0
    told = capsys.readouterr().out
    assert re.search(r"^recommend: 6 of the users asked for are unknown to .*: x1, x2, x3, x4, x5, …; all in /.*", told, re.M)
    assert "5 items for 2 users" in told


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["recommend.k=21"], 30, "recommend.k=21: the catalogue has 20 items"),
        (["recommend.k=0"], 30, "recommend.k=0: needs at least 1"),
        (["recommend.bundle=''"], 20, "recommend.bundle is not set"),
        (["recommend.bundle=/no/such/bundle"], 20, "recommend.bundle=/no/such/bundle does not exist"),
        (["recommend.users=/no/such/file"], 20, "recommend.users=/no/such/file does not exist"),
        (["dataset.dir={other}"], 21, "other has"),
    ],
)
def test_a_bad_start_ends_with_one_clear_line_and_its_code(
    tmp_path: Path, given: list[str], capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    other = write_dataset(str(tmp_path / "other"), [[1, 2, 3]], NUM_ITEMS + 1).url
    assert run(*given, f"run_dir={tmp_path / 'run'}", *(argument.format(other=other) for argument in arguments)) == code
    assert message in capsys.readouterr().out.splitlines()[-1]
