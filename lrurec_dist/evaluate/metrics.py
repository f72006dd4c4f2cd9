"""Ranking metrics from integer counts, so that summing over workers is exact."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

MEAN_RANK = "mean_rank"


def metric_values(ranks: np.ndarray, ks: Sequence[int], num_items: int) -> dict[str, np.ndarray]:
    """What each user adds to the mean that a metric is: recall@k, ndcg@k, mrr@k for each k, and mean_rank.

    Args:
        ranks: (users,) int64 target ranks; num_items + 1 stands for a target that is no candidate.
        ks: cut-offs; one beyond the catalogue is the catalogue.
        num_items: size of the catalogue.

    Returns:
        (users,) float64 each. With one target per user, recall@k is 1 for a target at rank k or
        better, ndcg@k 1 / log2(rank + 1) and mrr@k 1 / rank for such a target; else they are 0.
    """
    gain, reciprocal = 1 / np.log2(ranks + 1.0), 1 / ranks
    values: dict[str, np.ndarray] = {}
    for k in ks:
        hit = ranks <= min(k, num_items)
        values |= {f"recall@{k}": hit.astype(float), f"ndcg@{k}": gain * hit, f"mrr@{k}": reciprocal * hit}
    return {**values, MEAN_RANK: ranks.astype(float)}


class RankCounts:
    """How many users have their target at each rank up to `deepest`, and how many there are.

    Counts are integers: adding those of several workers gives the same metrics, to the last bit,
    as one worker that saw every user.
    """

    def __init__(self, deepest: int) -> None:
        self.counts = torch.zeros(deepest + 2, dtype=torch.int64)  # [0] all users, [r] rank r, [deepest + 1] beyond

    def add(self, ranks: Tensor) -> None:
        """Count the ranks (users,) int64 of more users."""
        deepest = len(self.counts) - 2
        self.counts += torch.bincount(ranks.cpu().clamp(max=deepest + 1), minlength=deepest + 2)
        self.counts[0] += len(ranks)

    @property
    def users(self) -> int:
        """How many users were counted."""
        return int(self.counts[0])

    def metrics(self, ks: Sequence[int]) -> dict[str, float]:
        """recall@k, ndcg@k and mrr@k for each k, as `metric_values` defines them; zero without users."""
        hits = self.counts[1:-1].numpy()
        if max(ks) > len(hits):
            raise ValueError(f"k={max(ks)} exceeds the deepest counted rank {len(hits)}")
        values = metric_values(np.arange(1, len(hits) + 1), ks, num_items=len(hits))
        del values[MEAN_RANK]  # of those beyond the deepest rank nothing is known
        return {name: math.fsum(hits * of_rank) / max(1, self.users) for name, of_rank in values.items()}
