"""Training for real: Ray Train workers, DeepSpeed, Ray Data feed, checkpoints; losses compared run by run."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lrurec_dist.config import Config
from lrurec_dist.config_file import load_config
from lrurec_dist.errors import CatalogueError, DivergenceError
from lrurec_dist.reporting import METRICS, MetricsFile
from lrurec_dist.train.checkpoint import checkpoint_url, rank_file, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint
from lrurec_dist.train.launch import launch_training
from lrurec_dist.train.presence import Presence
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks

pytestmark = pytest.mark.usefixtures("ray_session")
NUM_ITEMS = 25


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("launch")), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=4).url


def configure(run: Path, dataset_url: str, *overrides: str) -> Config:
    small = [
        "model.dim=8",
        "model.hidden=8",
        "batch.global_batch_size=10",
        "batch.max_length=8",
        "batch.shards_mixed=3",
        "model.dropout=0",
    ]
    budget = [
        "train.max_steps=20",
        "train.report_every=5",
        "train.validate_every=10",
        "train.learning_rate=0.01",
        "train.threads_per_worker=1",
    ]
    return load_config(None, [f"run_dir={run}", f"dataset.dir={dataset_url}", *small, *budget, *overrides])


def records(run: Path, kind: str) -> list[dict[str, Any]]:
    return [record for record in MetricsFile(str(run / METRICS)).read() if record["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in records(run, "train")}


def test_losses_and_metrics_are_independent_of_the_number_of_workers(tmp_path: Path, dataset_url: str) -> None:
    for workers in (1, 2, 3):
        launch_training(configure(tmp_path / str(workers), dataset_url, f"train.workers={workers}"))
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
    for run, settings in runs.items():
        launch_training(configure(tmp_path / run, dataset_url, *OTHER_OPTIONS, *settings))
    alone = losses(tmp_path / "alone")
    assert alone[20] < alone[5]
    assert losses(tmp_path / "sharded") == pytest.approx(alone, rel=1e-5)
    longer_than_nine = sum(len(sequence) > 9 for sequence in chain_sequences(100, NUM_ITEMS))
    for run in runs:
        assert [record["users"] for record in records(tmp_path / run, "validation")] == [longer_than_nine] * 2
    # context before the targets is no padding: a window of 8 positions with 3 targets is full
    assert all(1 <= record["padded_per_real"] < 1.3 for record in records(tmp_path / "alone", "train"))


def probabilities_of(config: Config) -> list[float]:
    from lrurec_dist.train.loop import _Worker  # DeepSpeed only where a rank runs

    sampler = _Worker(config, torch.device("cpu"), Presence()).objective.sampler
    assert sampler is not None
    return sampler.log_probability[1:].exp().tolist()


def validate_slowly(config: Config) -> list[dict[str, Any]]:
    from lrurec_dist.train import loop  # DeepSpeed only where a rank runs

    loop.RANKING_REPORT_S = 0.0
    loop._Worker(config, torch.device("cpu"), Presence())._validate()
    return records(Path(config.run_dir), "ranking")


def test_a_long_validation_says_how_far_it_is(tmp_path: Path, dataset_url: str) -> None:
    (told,) = run_ranks(1, validate_slowly, configure(tmp_path, dataset_url))
    assert [(record["shards_done"], record["shards"]) for record in told] == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_negatives_are_drawn_by_the_counts_of_the_training_part_alone(tmp_path: Path) -> None:
    # item 3 is always held out, item 2 always validates: neither occurs in training, so both are as rare as possible
    url = write_dataset(str(tmp_path / "data"), [[1, 1, 2, 3], [1, 4, 2, 3], [1, 2, 3]], 4, shards=2).url
    config = configure(tmp_path / "run", url, "loss.negatives=5")
    for probabilities in run_ranks(2, probabilities_of, config):
        assert probabilities == pytest.approx([4 / 7, 1 / 7, 1 / 7, 1 / 7])  # without any: as with a single occurrence


def test_a_run_continued_from_an_older_checkpoint_repeats_the_losses_of_an_uninterrupted_one(
    tmp_path: Path, dataset_url: str
) -> None:
    dropout = "model.dropout=0.3"  # masks have to repeat as well
    launch_training(configure(tmp_path / "whole", dataset_url, dropout, "train.max_steps=35"))
    # 15 steps end in the middle of an epoch: 10 batches each, in groups of 3 shards and 1
    often = ("train.checkpoint_every=5", "train.keep_checkpoints=3")
    launch_training(configure(tmp_path / "cut", dataset_url, dropout, *often, "train.max_steps=25"))
    run = str(tmp_path / "cut")
    assert [(record["step"], record["bytes"] > 0) for record in records(tmp_path / "cut", "checkpoint")] == [
        (step, True) for step in (5, 10, 15, 20, 25)
    ]
    for step in (20, 25):  # the validated ones: training goes on from one between two validations
        file = Path(checkpoint_url(run, step)) / rank_file(1, 2)
        file.write_bytes(file.read_bytes()[:-1])
    launch_training(configure(tmp_path / "cut", dataset_url, dropout, "train.max_steps=35"))
    assert losses(tmp_path / "cut") == losses(tmp_path / "whole")
    notes = [record["text"] for record in records(tmp_path / "cut", "note")]
    assert [note.split(":")[0] for note in notes[1:-1]] == [
        "skipping a damaged checkpoint",
        "skipping a damaged checkpoint",
        f"resuming from {checkpoint_url(run, 15)}",
    ]
    ends = [read_checkpoint_manifest(str(find_checkpoint(str(tmp_path / name), "last"))) for name in ("whole", "cut")]
    assert ends[0]["files"] == ends[1]["files"], "weights and moments are equal to the bit"
    for manifest in ends:
        del manifest["progress"]["seconds"]
    assert ends[0]["progress"] == ends[1]["progress"]


def test_early_stopping_ends_training_and_keeps_the_best(tmp_path: Path, dataset_url: str) -> None:
    # a rate this small changes no rank: the first validation stays the best
    launch_training(
        configure(
            tmp_path,
            dataset_url,
            "train.learning_rate=1e-12",
            "train.max_steps=100",
            "train.validate_every=5",
            "train.patience=2",
        )
    )
    assert [record["is_best"] for record in records(tmp_path, "validation")] == [True, False, False]
    assert "train.patience=2" in records(tmp_path, "note")[-1]["text"]
    assert str(find_checkpoint(str(tmp_path), "best")).endswith("step_000005")
    assert str(find_checkpoint(str(tmp_path), "last")).endswith("step_000015")


def test_a_diverging_loss_is_named_with_step_and_rate(tmp_path: Path, dataset_url: str) -> None:
    with pytest.raises(DivergenceError, match=r"loss is (nan|inf).*before step [1-5], train\.learning_rate=1e\+30"):
        launch_training(configure(tmp_path, dataset_url, "train.learning_rate=1e30"))


def test_a_checkpoint_of_another_catalogue_stops_training(tmp_path: Path, dataset_url: str) -> None:
    launch_training(configure(tmp_path / "run", dataset_url, "train.max_steps=10"))
    other = write_dataset(str(tmp_path / "other"), chain_sequences(60, 30), 30, shards=2)
    with pytest.raises(CatalogueError, match=r"set train\.resume=never or another run_dir"):
        launch_training(configure(tmp_path / "run", other.url, "train.max_steps=20"))
