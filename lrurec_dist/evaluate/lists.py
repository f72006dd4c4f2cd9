"""What a model recommends, beside whether it hits: coverage, popularity, novelty, calibration of the top score."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.evaluate.ranking import TILE_ELEMENTS, products, top_k

BINS = 15  # of equal width, as in Guo et al. 2017
_FRACTION = 1 << 32  # shares and bits are summed as whole multiples of its inverse


@dataclass
class ListSums:
    """Sums over users of what `metrics` needs; all whole numbers, so that adding them in any order gives the same.

    `recommended` counts of how many lists each item is part. `popularity`, `novelty` and `consumed`
    are sums of per-user means in units of 2^-32. `confidence`, `hits`, `in_bin`: (BINS,) int64 by
    predicted probability of the top item.
    """

    k: int
    users: int = 0
    recommended: dict[int, int] = field(default_factory=dict)
    popularity: int = 0
    novelty: int = 0
    consumed: int = 0
    confidence: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    hits: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))
    in_bin: np.ndarray = field(default_factory=lambda: np.zeros(BINS, dtype=np.int64))

    def add(self, ids: np.ndarray, consumed: np.ndarray, probabilities: np.ndarray, hits: np.ndarray, counts: np.ndarray) -> None:
        """Count more users.

        Args:
            ids: (users, k) int64 item ids, best first, `PAD_ID` where candidates ran out.
            consumed: (users,) float64, mean share of the training interactions that the items of each history have.
            probabilities: (users,) of the top item.
            hits: (users,) bool, whether the top item is the target.
            counts: (num_items + 1,) int64, occurrences of each item in the training part.
        """
        self.users += len(ids)
        items, lists = np.unique(ids[ids != PAD_ID], return_counts=True)
        for item, times in zip(items.tolist(), lists.tolist(), strict=True):
            self.recommended[item] = self.recommended.get(item, 0) + times
        total = max(1, int(counts.sum()))
        listed = ids != PAD_ID
        length = np.maximum(1, listed.sum(1))
        self.popularity += _whole((counts[ids] / total * listed).sum(1) / length)
        self.novelty += _whole((-np.log2(np.maximum(1, counts[ids]) / total) * listed).sum(1) / length)
        self.consumed += _whole(consumed)
        place = np.clip((probabilities * BINS).astype(np.int64), 0, BINS - 1)
        np.add.at(self.confidence, place, np.rint(probabilities * _FRACTION).astype(np.int64))
        np.add.at(self.hits, place, hits)
        np.add.at(self.in_bin, place, 1)

    def merge(self, other: "ListSums") -> None:
        """Count the users of another."""
        assert self.k == other.k
        for item, times in other.recommended.items():
            self.recommended[item] = self.recommended.get(item, 0) + times
        for name in ("users", "popularity", "novelty", "consumed", "confidence", "hits", "in_bin"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def metrics(self, num_items: int, interactions: int) -> dict[str, float]:
        """The list metrics; zero without users.

        Args:
            num_items: of the catalogue.
            interactions: of the training part.

        Returns:
            `coverage@k`: share of the catalogue that is in some list. `arp@k`: average
            recommendation popularity (Yin et al. 2012), training interactions of a recommended item.
            `popularity_lift@k` (Abdollahpouri et al. 2020): that, relative to the same average over
            histories, minus one; 0 is no popularity bias. `novelty@k`: mean self-information
            -log2 of an item's share of the training interactions (Zhou et al. 2010), in bits; an
            item that never trains counts as once. `confidence`: mean predicted probability of the
            top item; `hit_rate`: how often it is the target; `ece`: expected calibration error.
        """
        users = max(1, self.users) * _FRACTION
        confidence = self.confidence / _FRACTION
        return {
            f"coverage@{self.k}": len(self.recommended) / num_items,
            f"arp@{self.k}": self.popularity / users * interactions,
            f"popularity_lift@{self.k}": self.popularity / self.consumed - 1 if self.consumed else 0.0,
            f"novelty@{self.k}": self.novelty / users,
            "confidence": float(confidence.sum()) / max(1, self.users),
            "hit_rate": int(self.hits.sum()) / max(1, self.users),
            "ece": float(np.abs(self.hits - confidence).sum()) / max(1, self.users),
        }

    def reliability(self) -> list[Mapping[str, float]]:
        """For each bin with users: how many, their mean predicted probability, their hit rate."""
        return [
            {"users": int(users), "confidence": float(confidence / _FRACTION / users), "hit_rate": float(hits / users)}
            for users, confidence, hits in zip(self.in_bin, self.confidence, self.hits, strict=True)
            if users
        ]


def top_lists(
    vectors: Tensor, weight: Tensor, bias: Tensor, k: int, excluded_rows: Tensor, excluded_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each user and the probability that the model's softmax over the candidates gives the first.

    Args:
        as `ranking.top_k`.

    Returns:
        (users, k) int64 item ids, `PAD_ID` where candidates run out; (users,) float64, 0 for a user without candidates.
    """
    ids, scores = top_k(vectors, weight, bias, k, excluded_rows, excluded_ids)
    probabilities = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
    step = max(1, TILE_ELEMENTS // len(weight))
    for begin in range(0, len(vectors), step):
        tile = products(vectors[begin : begin + step], weight, bias)
        tile[:, PAD_ID] = -torch.inf
        inside = (excluded_rows >= begin) & (excluded_rows < begin + step)
        tile[excluded_rows[inside] - begin, excluded_ids[inside]] = -torch.inf
        best = scores[begin : begin + step, 0].double()
        normaliser = torch.logsumexp(tile.double(), dim=1)
        probabilities[begin : begin + step] = torch.where(best > -torch.inf, torch.exp(best - normaliser), 0).clamp(max=1)
    return ids, probabilities


def _whole(means: np.ndarray) -> int:
    return int(np.rint(means * _FRACTION).astype(np.int64).sum())
