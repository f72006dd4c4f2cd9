"""Metrics against their definitions, and their independence of how users are spread."""

import math

import pytest
import torch

from lrurec_dist.evaluate.metrics import RankCounts


def count(ranks: list[int], deepest: int = 50) -> RankCounts:
    counts = RankCounts(deepest)
    counts.add(torch.tensor(ranks, dtype=torch.int64))
    return counts


def test_metrics_equal_their_definitions() -> None:
    ranks = [1, 1, 2, 5, 6, 10, 11, 50, 51, 4000]
    metrics = count(ranks).metrics([1, 5, 10, 50])
    for k in (1, 5, 10, 50):
        within = [rank for rank in ranks if rank <= k]
        assert metrics[f"recall@{k}"] == pytest.approx(len(within) / 10)
        assert metrics[f"ndcg@{k}"] == pytest.approx(sum(1 / math.log2(rank + 1) for rank in within) / 10)
        assert metrics[f"mrr@{k}"] == pytest.approx(sum(1 / rank for rank in within) / 10)


def test_counts_of_parts_give_the_same_metrics_to_the_last_bit() -> None:
    torch.manual_seed(0)
    ranks = torch.randint(1, 80, (1000,)).tolist()
    whole = count(ranks).metrics([1, 5, 10, 20, 50])
    for parts in (2, 3, 7):
        summed = RankCounts(50)
        for part in range(parts):
            summed.counts += count(ranks[part::parts]).counts
        assert summed.users == 1000
        assert summed.metrics([1, 5, 10, 20, 50]) == whole


def test_a_user_beyond_the_deepest_rank_counts_as_a_miss_not_as_nobody() -> None:
    counts = count([51, 52], deepest=50)
    assert counts.users == 2
    assert counts.metrics([50])["recall@50"] == 0


def test_without_users_every_metric_is_zero() -> None:
    assert set(RankCounts(10).metrics([10]).values()) == {0.0}


def test_a_k_beyond_the_counted_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="k=20"):
        count([1], deepest=10).metrics([20])
