"""Ranking metrics from integer counts, so that summing over workers is exact."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
        """recall@k, ndcg@k and mrr@k for each k; zero without users.

        With one target per user, recall@k is the share of targets at rank k or better, ndcg@k the
        mean of 1 / log2(rank + 1) over those and mrr@k the mean of 1 / rank over those.
        """
        hits = self.counts[1:-1].tolist()
        if max(ks) > len(hits):
            raise ValueError(f"k={max(ks)} exceeds the deepest counted rank {len(hits)}")
        values: dict[str, float] = {}
        for k in ks:
            ranked = list(enumerate(hits[:k], start=1))
            sums = {
                "recall": float(sum(count for _, count in ranked)),
                "ndcg": math.fsum(count / math.log2(rank + 1) for rank, count in ranked),
                "mrr": math.fsum(count / rank for rank, count in ranked),
            }
            values |= {f"{name}@{k}": value / max(1, self.users) for name, value in sums.items()}
        return values
