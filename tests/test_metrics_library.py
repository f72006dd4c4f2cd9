"""Metrics equal those of a public library on random cases."""

import numpy as np
import pytest
import torch
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_normalized_dcg, retrieval_reciprocal_rank

from lrurec_dist.evaluate.metrics import metric_values
from lrurec_dist.evaluate.ranking import target_ranks

PUBLIC = {"recall": retrieval_hit_rate, "ndcg": retrieval_normalized_dcg, "mrr": retrieval_reciprocal_rank}


@pytest.mark.parametrize("num_items", [3, 11, 60])  # catalogues below, between and above the ks
def test_metrics_equal_those_of_torchmetrics(num_items: int) -> None:
    torch.manual_seed(num_items)
    users = 40
    vectors, weight, bias = torch.randn(users, 8), torch.randn(num_items + 1, 8), torch.randn(num_items + 1)
    targets = torch.randint(1, num_items + 1, (users,))
    nothing = torch.empty(0, dtype=torch.int64)
    ranks = target_ranks(vectors, weight, bias, targets, nothing, nothing)
    values = metric_values(ranks.numpy(), [1, 5, 10, 50], num_items)
    scores = (vectors @ weight.T + bias)[:, 1:].softmax(1)  # the library takes what is not above 0 for irrelevant
    for user in range(users):
        relevant = torch.zeros(num_items, dtype=torch.bool)
        relevant[targets[user] - 1] = True
        for k in (1, 5, 10, 50):
            for name, metric in PUBLIC.items():
                # the library computes in float32, logarithms included
                expected = metric(scores[user], relevant, top_k=min(k, num_items)).item()
                assert values[f"{name}@{k}"][user] == pytest.approx(expected, rel=1e-5), (name, k, user)


def test_a_target_that_is_no_candidate_is_a_miss_at_every_k() -> None:
    values = metric_values(np.array([4, 3]), [3, 10], num_items=3)
    assert values["recall@10"].tolist() == [0, 1]
    assert values["ndcg@10"].tolist() == [0, 0.5]
    assert values["mean_rank"].tolist() == [4, 3]
