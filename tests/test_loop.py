"""The training loop on real ranks, without Ray: what decides its end, and how it goes on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lrurec_dist.config import Config
from lrurec_dist.train.checkpoint import checkpoint_url, rank_file, read_checkpoint_manifest
from lrurec_dist.train.checkpoint_index import find_checkpoint
from lrurec_dist.train.presence import Presence
from tests.datasets import chain_sequences, write_dataset
from tests.processes import run_ranks
from tests.trainings import NUM_ITEMS, configure, losses, records, train_in_turn


@pytest.fixture(scope="module")
def dataset_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(str(tmp_path_factory.mktemp("loop")), chain_sequences(100, NUM_ITEMS), NUM_ITEMS, shards=4).url


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
    # 15 steps end in the middle of an epoch: 10 batches each, in groups of 3 shards and 1
    often = ("train.checkpoint_every=5", "train.keep_checkpoints=3")
    whole = configure(tmp_path / "whole", dataset_url, dropout, "train.max_steps=35")
    cut = configure(tmp_path / "cut", dataset_url, dropout, *often, "train.max_steps=25")
    run_ranks(2, train_in_turn, [whole, cut])
    run = str(tmp_path / "cut")
    assert [(record["step"], record["bytes"] > 0) for record in records(tmp_path / "cut", "checkpoint")] == [
        (step, True) for step in (5, 10, 15, 20, 25)
    ]
    for step in (20, 25):  # the validated ones: training goes on from one between two validations
        file = Path(checkpoint_url(run, step)) / rank_file(1, 2)
        file.write_bytes(file.read_bytes()[:-1])
    run_ranks(2, train_in_turn, [configure(tmp_path / "cut", dataset_url, dropout, "train.max_steps=35")])
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


def test_early_stopping_keeps_the_best_and_a_checkpoint_of_another_catalogue_is_refused(tmp_path: Path, dataset_url: str) -> None:
    # a rate this small changes no rank: the first validation stays the best
    still = ("train.learning_rate=1e-12", "train.max_steps=100", "train.validate_every=5", "train.patience=2")
    other = write_dataset(str(tmp_path / "other"), chain_sequences(60, 30), 30, shards=2).url
    run = tmp_path / "run"
    (ends,) = run_ranks(1, train_in_turn, [configure(run, dataset_url, *still), configure(run, other, "train.max_steps=200")])
    assert [record["is_best"] for record in records(run, "validation")] == [True, False, False]
    assert "train.patience=2" in ends[0]
    assert str(find_checkpoint(str(run), "best")).endswith("step_000005")
    assert str(find_checkpoint(str(run), "last")).endswith("step_000015")
    assert ends[1].startswith("CatalogueError")
    assert "set train.resume=never or another run_dir" in ends[1]
