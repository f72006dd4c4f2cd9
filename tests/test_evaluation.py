"""Whole-dataset evaluation: every user once, the same figures on any number of workers."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.errors import DataQualityError
from lrurec_dist.evaluate.baselines import Popularity
from lrurec_dist.evaluate.evaluation import RankingProtocol, evaluate_dataset, rank_shard, training_counts
from lrurec_dist.model.lrurec import LRURec
from tests.datasets import chain_sequences, write_dataset
from tests.reference import complex_parameters, rank_of, user_vectors

NUM_ITEMS = 40


def small_model() -> LRURec:
    torch.manual_seed(1)
    torch.set_num_threads(1)
    model = LRURec(num_items=NUM_ITEMS, dim=8, hidden=8, blocks=1, dropout=0.3)
    with torch.no_grad():
        model.table.weight.mul_(30)
    return model.eval()


def protocol(part: str = "test", **changes: object) -> RankingProtocol:
    options = {"split": Split(), "part": part, "max_length": 6, "batch_size": 7, "exclude_history": True, "deepest": 50}
    return RankingProtocol(**{**options, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("evaluation")), chain_sequences(120, NUM_ITEMS), NUM_ITEMS, shards=5)


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("exclude_history", [True, False])
def test_ranks_equal_the_slow_truth_user_by_user(dataset: SequenceDataset, part: str, exclude_history: bool) -> None:
    model = small_model()
    truth = complex_parameters(model.state_dict(), 1)
    expected = np.zeros(52, dtype=np.int64)
    actual = np.zeros(52, dtype=np.int64)
    for name in dataset.shard_names:
        shard = dataset.read_shard(name)
        for begin, end in zip(shard.offsets[:-1], shard.offsets[1:], strict=True):
            if end - begin < 3:
                continue
            *history, target = shard.item_ids[begin : end if part == "test" else end - 1].tolist()
            vector = user_vectors(truth, history[-6:], 1)[-1]
            scores = truth["table.weight"] @ vector + truth["table.bias"]
            rank = rank_of(scores.tolist(), target, set(history) if exclude_history else set())
            expected[[0, min(rank, 51)]] += 1
        actual += rank_shard(model, shard, protocol(part, exclude_history=exclude_history)).counts.numpy()
    assert actual.tolist() == expected.tolist()
    assert actual[0] == dataset.manifest["users_evaluable"] > 50


@pytest.mark.usefixtures("ray_session")
def test_evaluation_is_independent_of_the_number_of_workers(dataset: SequenceDataset) -> None:
    found = [
        evaluate_dataset(dataset.url, small_model, protocol(), workers=workers, cpus_per_worker=0.5) for workers in (1, 2, 3)
    ]
    assert found[0].users == dataset.manifest["users_evaluable"]
    for other in found[1:]:
        assert torch.equal(other.model.counts, found[0].model.counts)
        assert torch.equal(other.popularity.counts, found[0].popularity.counts)
        assert other.unseen_targets == found[0].unseen_targets


@pytest.mark.usefixtures("ray_session")
def test_a_global_time_split_evaluates_whoever_has_a_history_and_declares_the_others(tmp_path: Path) -> None:
    users = [
        ([1, 2, 3, 4], [1, 2, 12, 25]),  # test: 4 after 1, 2, 3
        ([2, 1], [3, 4]),  # trains alone
        ([5, 2], [15, 22]),  # no training part; test: 2 after 5
        ([6], [21]),  # no history
        ([1, 2], [9, 20]),  # test: 2 after 1
    ]
    sequences, times = map(list, zip(*users, strict=True))
    dataset = write_dataset(str(tmp_path), sequences, NUM_ITEMS, timestamps=times)
    split = Split(kind="global_time", train_until=10, test_from=20)
    found = evaluate_dataset(dataset.url, small_model, protocol(split=split), workers=2, cpus_per_worker=0.5)
    assert (found.users, found.unseen_targets, found.new_users, found.without_history) == (3, 1, 1, 1)
    # item 1 trains three times, 2 twice: rank 1 for 4 (without 1, 2, 3) and for 2 after 1, rank 2 for 2 after 5
    assert found.popularity.counts[:4].tolist() == [3, 2, 1, 0]
    validation = evaluate_dataset(
        dataset.url, small_model, protocol(split=split, part="validation"), workers=1, cpus_per_worker=0.5
    )
    assert (validation.users, validation.without_history) == (1, 1)


@pytest.mark.usefixtures("ray_session")
def test_a_global_time_split_that_evaluates_nobody_is_refused(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), [[1, 2], [3]], NUM_ITEMS, timestamps=[[1, 2], [30]])
    split = Split(kind="global_time", train_until=10, test_from=20)
    with pytest.raises(DataQualityError, match=r"none of 2 users has an interaction in the test part and one before it"):
        evaluate_dataset(dataset.url, small_model, protocol(split=split), workers=1, cpus_per_worker=0.5)


@pytest.mark.usefixtures("ray_session")
def test_a_dataset_without_evaluable_users_is_refused(tmp_path: Path) -> None:
    lonely = write_dataset(str(tmp_path / "short"), [[1, 2], [3]], NUM_ITEMS)
    with pytest.raises(DataQualityError, match="none of 2 users has 3 interactions"):
        evaluate_dataset(lonely.url, small_model, protocol(), workers=1, cpus_per_worker=0.5)


@pytest.mark.usefixtures("ray_session")
def test_targets_that_never_occur_in_training_are_counted(tmp_path: Path) -> None:
    # training parts: [1], [1, 2], [5] (too short to evaluate); test targets: 3 (never trained), 1
    dataset = write_dataset(str(tmp_path / "unseen"), [[1, 4, 3], [1, 2, 4, 1], [5]], NUM_ITEMS)
    found = evaluate_dataset(dataset.url, small_model, protocol(), workers=1, cpus_per_worker=0.5)
    assert (found.users, found.unseen_targets) == (2, 1)


def test_training_counts_leave_both_held_out_items_out(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path / "counts"), [[1, 1, 2, 3], [4, 5], [6, 7, 8]], 8, shards=2)
    counts = training_counts((dataset.read_shard(name) for name in dataset.shard_names), Split(), 8)
    assert counts.tolist() == [0, 2, 0, 0, 1, 1, 1, 0, 0]


def test_popularity_ranks_by_count_with_ties_by_item_id(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path / "popular"), [[9, 9, 3]], 9, shards=1)
    counts = torch.tensor([0, 5, 7, 7, 1, 0, 0, 0, 0, 99])
    shard = dataset.read_shard(dataset.shard_names[0])
    # item 9 is the history; 2 and 3 tie with 7, and 2 comes first
    ranks = rank_shard(Popularity(counts), shard, protocol()).counts
    assert ranks.nonzero().flatten().tolist() == [0, 2]
    with_history = rank_shard(Popularity(counts), shard, protocol(exclude_history=False)).counts
    assert with_history.nonzero().flatten().tolist() == [0, 3]
