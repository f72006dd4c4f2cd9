"""Training goes on after a lost worker and after SIGTERM: real workers, real signals, losses equal to the bit."""

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lrurec_dist import stages, storage
from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.errors import DivergenceError, LrurecError, StoppedError, WorkersError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.attempts import _Row
from lrurec_dist.train.checkpoint import read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint
from lrurec_dist.train.failures import Failure
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.presence import Agreement, Presence
from tests.clusters import training_workers, wait_for
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.trainings import train_in_turn

pytestmark = pytest.mark.timeout(900)  # several trainings each, on a machine that others may use too
NUM_ITEMS = 25


def configure(run: Path, dataset_url: str, *overrides: str) -> Config:
    """A run whose every step is reported, so that a test can act at a step, and losses compare step by step."""
    small = ["model.dim=8", "model.hidden=8", "batch.global_batch_size=10", "batch.max_length=8", "model.dropout=0.2"]
    budget = ["train.max_steps=300", "train.report_every=1", "train.validate_every=100", "train.patience=1000"]
    return load_config(
        None, [f"run_dir={run}", f"dataset.dir={dataset_url}", "train.threads_per_worker=1", *small, *budget, *overrides]
    )


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in MetricsFile(str(run / METRICS)).read() if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run, "train")}


def notes(run: Path) -> str:
    return "\n".join(record["text"] for record in records(run, "note"))


def reached(run: Path, step: int) -> bool:
    return any(record["step"] >= step for record in records(run, "train"))


def when(holds: Callable[[], object], act: Callable[[], None]) -> threading.Thread:
    """Act once a condition holds, beside what the test does."""

    def wait() -> None:
        wait_for("the moment to act", holds, 250)
        act()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def last_files(run: Path) -> Any:
    return read_checkpoint_manifest(str(find_checkpoint(str(run), "last")))["files"]


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("attempts")), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=4).url


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, dataset_url: str) -> Path:
    run = tmp_path_factory.mktemp("undisturbed")
    run_ranks(2, train_in_turn, [configure(run, dataset_url)])
    return run


@pytest.mark.usefixtures("ray_session")
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint_and_nothing_else(
    tmp_path: Path, dataset_url: str, undisturbed: Path
) -> None:
    acting = when(lambda: reached(tmp_path, 120), lambda: training_workers(os.getpid())[-1].kill())
    launch_training(configure(tmp_path, dataset_url))
    acting.join()
    assert losses(tmp_path) == losses(undisturbed)
    assert last_files(tmp_path) == last_files(undisturbed)
    said = [line for line in notes(tmp_path).splitlines() if line.startswith("attempt")]
    assert len(said) == 1, said
    assert "attempt 2: rank " in said[0]
    assert " died (killed from outside" in said[0]
    assert "; 2 workers go on from step 100, " in said[0]
    assert said[0].endswith(" steps are repeated")


@pytest.mark.faults
@pytest.mark.usefixtures("ray_session")
def test_sigterm_saves_a_checkpoint_and_the_same_command_goes_on(tmp_path: Path, dataset_url: str, undisturbed: Path) -> None:
    config = configure(tmp_path, dataset_url)
    acting = when(lambda: reached(tmp_path, 20), lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match="SIGTERM: stopped after step") as stopped:
        stages.run(config, ["train"])
    acting.join()
    assert stopped.value.exit_code == 75
    status = storage.read_json(str(tmp_path / "status.json"))
    assert (status["result"], status["exit_code"], status["stage"]) == ("stopped", 75, "train")
    at = max(losses(tmp_path))
    assert 20 <= at < 100, "before the first validation: the checkpoint is one that SIGTERM made"
    assert str(find_checkpoint(str(tmp_path), "last")).endswith(f"step_{at:06d}")
    stages.run(config, ["train"])
    assert storage.read_json(str(tmp_path / "status.json"))["result"] == "done"
    assert losses(tmp_path) == losses(undisturbed)
    assert len(records(tmp_path, "train")) == 300, "no step was made twice"
    assert last_files(tmp_path) == last_files(undisturbed)


def steps_until_leaving(wishes: list[int]) -> tuple[int, int]:
    """The steps after which a rank leaves when its wish comes at its own time, and how many there were to ask."""
    import torch

    from lrurec_dist import collectives

    presence = Presence()
    agreement = Agreement(presence, torch.device("cpu"))
    for step in range(1, 100_000):
        if step >= wishes[collectives.rank()]:
            presence.leave = "asked"
        if agreement.to_leave():
            return step, wishes[collectives.rank()]
    return 0, 0


def test_ranks_leave_after_the_same_step_whoever_is_asked_first() -> None:
    (one, _), (other, _) = run_ranks(2, steps_until_leaving, [50, 10**9])
    assert one == other >= 50


def test_failures_are_counted_afresh_once_a_new_checkpoint_is_there() -> None:
    row, lost = _Row(2, 0), Failure("rank 1 died")
    for saved_step in (0, 0, 100, 100, 200, 200):
        assert row.add(lost, saved_step) == "rank 1 died"
    with pytest.raises(WorkersError, match=r"train\.max_failures=2: 3 failures without a checkpoint after step 200") as caught:
        row.add(lost, 200)
    assert caught.value.exit_code == 75


def test_announced_preemptions_are_not_counted() -> None:
    row = _Row(0, 0)
    for _ in range(5):
        row.add(Failure("rank 1 lost a node", preempted=True), 0)
    with pytest.raises(WorkersError):
        row.add(Failure("rank 1 died"), 0)


def test_lack_of_memory_twice_at_a_step_says_what_to_lower() -> None:
    row = _Row(3, 0)
    short = Failure("rank 1 died for lack of memory", memory=True, step=37)
    assert "batch.tokens" not in row.add(short, 0)
    assert "for the second time after step 37: lower batch.tokens or batch.global_batch_size" in row.add(short, 0)


def test_what_another_attempt_would_repeat_is_final() -> None:
    final: LrurecError = DivergenceError("rank 0: loss is nan")
    with pytest.raises(DivergenceError, match="rank 0"):
        _Row(3, 0).add(Failure("loss is nan", final=final), 0)
