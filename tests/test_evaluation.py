"""Rankings of shards: every user against the slow truth."""

from pathlib import Path

import numpy as np
import pytest
import torch

from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.evaluate.baselines import Popularity
from lrurec_dist.evaluate.evaluation import RankingProtocol, iter_ranked, rank_shard, training_counts
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
            expected[[0, 51 if rank > NUM_ITEMS else rank]] += 1  # a target that is no candidate
        actual += rank_shard(model, shard, protocol(part, exclude_history=exclude_history)).counts.numpy()
    assert actual.tolist() == expected.tolist()
    assert actual[0] == dataset.manifest["users_evaluable"] > 50


def test_bfloat16_products_rank_by_rounded_factors(dataset: SequenceDataset) -> None:
    model, rules = small_model(), protocol(product_dtype=torch.bfloat16)
    rows, bias = model.item_rows().bfloat16().double(), model.table.bias.double()
    differ = 0
    with torch.inference_mode():
        for shard in map(dataset.read_shard, dataset.shard_names):
            for ranked, exact in zip(iter_ranked(model, shard, rules), iter_ranked(model, shard, protocol()), strict=True):
                scores = (ranked.vectors.bfloat16().double() @ rows.T + bias).tolist()
                seen = [set(ranked.excluded_ids[ranked.excluded_rows == user].tolist()) for user in range(len(scores))]
                targets = ranked.batch.targets.tolist()
                assert ranked.ranks.tolist() == [rank_of(*user) for user in zip(scores, targets, seen, strict=True)]
                differ += int((ranked.ranks != exact.ranks).sum())
    assert differ > 0, "what is rounded ranks otherwise at times"


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
    counts[2], counts[3] = 256, 257  # one number in bfloat16
    exact = rank_shard(Popularity(counts), shard, protocol(product_dtype=torch.bfloat16)).counts
    assert exact.nonzero().flatten().tolist() == [0, 1], "counts are not rounded"
