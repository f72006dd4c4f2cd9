"""Training under Ray: workers of Ray Train, batches of Ray Data, errors brought back; compared with the loop without Ray."""

import os
from pathlib import Path

import pytest

from lrurec_dist.errors import DivergenceError
from lrurec_dist.train import launch
from lrurec_dist.train.launch import launch_training
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.trainings import NUM_ITEMS, configure, losses, records, train_in_turn

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("launch")), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=4).url


def test_losses_and_metrics_are_independent_of_the_number_of_workers(tmp_path: Path, dataset_url: str) -> None:
    runs = {workers: configure(tmp_path / str(workers), dataset_url, f"train.workers={workers}") for workers in (1, 2, 3)}
    launch_training(runs[2])
    for workers in (1, 3):
        run_ranks(workers, train_in_turn, [runs[workers]])
    alone = losses(tmp_path / "1")
    assert sorted(alone) == [5, 10, 15, 20]
    assert alone[20] < alone[5]
    for workers in (2, 3):
        assert losses(tmp_path / str(workers)) == pytest.approx(alone, rel=1e-5)
    for workers in (1, 2, 3):
        validations = records(tmp_path / str(workers), "validation")
        assert [(record["step"], record["users"]) for record in validations] == [(10, 86), (20, 86)]
        # weights agree to rounding, so a rank differs only where two scores are as good as tied
        first = records(tmp_path / "1", "validation")
        for name in ("recall@10", "ndcg@10", "mrr@50"):
            assert [record[name] for record in validations] == pytest.approx([record[name] for record in first], abs=0.01)


OTHER_OPTIONS = (
    "split.kind=global_time",
    "split.train_until=9",
    "split.test_from=11",
    "batch.windows=sliding",
    "batch.stride=3",
    "batch.tokens=80",
    "loss.negatives=20",
)


def test_losses_with_every_option_of_the_data_order_depend_on_neither_workers_nor_where_the_item_table_lies(
    tmp_path: Path, dataset_url: str
) -> None:
    runs = {"alone": ["train.workers=1"], "sharded": ["train.workers=2", "model.table=sharded", "train.zero_stage=1"]}
    configs = {run: configure(tmp_path / run, dataset_url, *OTHER_OPTIONS, *settings) for run, settings in runs.items()}
    run_ranks(1, train_in_turn, [configs["alone"]])
    launch_training(configs["sharded"])
    alone = losses(tmp_path / "alone")
    assert alone[20] < alone[5]
    assert losses(tmp_path / "sharded") == pytest.approx(alone, rel=1e-5)
    longer_than_nine = sum(len(sequence) > 9 for sequence in chain_sequences(100, NUM_ITEMS))
    for run in runs:
        assert [record["users"] for record in records(tmp_path / run, "validation")] == [longer_than_nine] * 2
    # context before the targets is no padding: a window of 8 positions with 3 targets is full
    assert all(1 <= record["padded_per_real"] < 1.3 for record in records(tmp_path / "alone", "train"))


def test_a_diverging_loss_is_named_with_step_and_rate(tmp_path: Path, dataset_url: str) -> None:
    with pytest.raises(DivergenceError, match=r"loss is (nan|inf).*before step [1-5], train\.learning_rate=1e\+30"):
        launch_training(configure(tmp_path, dataset_url, "train.learning_rate=1e30"))


def test_workers_wait_for_each_other_as_the_driver_says_whatever_their_nodes_began_with(
    tmp_path: Path, dataset_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tell(_: object) -> str:
        raise DivergenceError(f"looks {os.environ['GOMP_SPINCOUNT']} times")

    monkeypatch.setenv("GOMP_SPINCOUNT", "7")  # Ray was started before
    monkeypatch.setattr(launch, "_worker_entry", tell)
    with pytest.raises(DivergenceError, match="looks 7 times"):
        launch_training(configure(tmp_path, dataset_url, "train.workers=1"))
