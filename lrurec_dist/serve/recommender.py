"""Recommendations from a bundle; needs torch, safetensors and pyarrow, nothing of training."""

from collections.abc import Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import BundleError, LrurecError
from lrurec_dist.evaluate.ranking import top_k
from lrurec_dist.serve.bundle import Bundle, load_bundle

# Products of another shape or thread count round differently; beyond this a score is another score.
SCORE_TOLERANCE = 1e-4


class Recommendation(NamedTuple):
    """An item and its score."""

    item_key: str | int
    score: float


class Recommender:
    """Answers from one bundle. Loading verifies every file and replays the golden requests."""

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._item_rows = bundle.model.item_rows()
        self.version = bundle.version
        self.num_items = len(bundle.item_keys)
        self.unknown_items = 0  # history items skipped so far because the catalogue does not know them

    @classmethod
    def load(cls, url: str) -> "Recommender":
        """Load, verify and check a bundle.

        Raises:
            BundleError: a file is missing or changed, or the loaded model does not give the
                answers that the trained one gave.
        """
        recommender = cls(load_bundle(url))
        recommender.check_golden()
        return recommender

    def recommend(self, history_keys: Sequence[str | int], k: int = 10) -> list[Recommendation]:
        """The k best items after a history, best first; fewer where candidates run out.

        Args:
            history_keys: item keys, oldest first; may be empty. Keys the catalogue does not know
                are skipped and counted in `unknown_items`.
            k: how many.

        The history is left out of the candidates if the model was evaluated that way. Ties are
        broken by item_id.
        """
        return self.recommend_many([history_keys], k)[0]

    def recommend_many(self, histories: Sequence[Sequence[str | int]], k: int = 10) -> list[list[Recommendation]]:
        """`recommend` for several histories at once."""
        ids, scores = self.top_ids(histories, k)
        keys = self._bundle.item_keys
        return [
            [
                Recommendation(keys[item_id - 1].as_py(), score)
                for item_id, score in zip(row_ids, row_scores, strict=True)
                if item_id != PAD_ID
            ]
            for row_ids, row_scores in zip(ids.tolist(), scores.tolist(), strict=True)
        ]

    @torch.inference_mode()
    def top_ids(self, histories: Sequence[Sequence[str | int]], k: int) -> tuple[Tensor, Tensor]:
        """(histories, k) int64 item ids and float32 scores; `PAD_ID` and -inf where candidates run out."""
        if k < 1:
            raise LrurecError(f"k={k}: needs at least 1")
        known = [self._known_ids(history) for history in histories]
        length = max(1, min(self._bundle.max_length, max(map(len, known), default=0)))
        item_ids = torch.full((len(known), length), PAD_ID)
        for row, history in enumerate(known):
            recent = history[-length:]
            item_ids[row, length - len(recent) :] = torch.tensor(recent, dtype=torch.int64)
        excluded = known if self._bundle.exclude_history else [[] for _ in known]
        rows = torch.tensor([row for row, history in enumerate(excluded) for _ in history], dtype=torch.int64)
        ids = torch.tensor([item for history in excluded for item in history], dtype=torch.int64)
        table = self._bundle.model.table
        return top_k(self._bundle.model.encode(item_ids), self._item_rows, table.bias, k, rows, ids)

    def _known_ids(self, history: Sequence[str | int]) -> list[int]:
        keys = self._bundle.item_keys
        try:
            asked = pa.array(history, type=keys.type)
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            raise LrurecError(
                f"history keys have to be {keys.type}, as in this bundle's catalogue; got {list(history)[:3]}"
            ) from None
        positions = pc.index_in(asked, value_set=keys).to_pylist()
        self.unknown_items += positions.count(None)
        return [position + 1 for position in positions if position is not None]

    def check_golden(self) -> float:
        """Replay the golden requests and return the largest difference in score.

        Raises:
            BundleError: a score differs by more than `SCORE_TOLERANCE`, relative to the larger of
                it and one, or another item stands in a place that no such difference explains.
        """
        golden = self._bundle.golden
        ids, scores = self.top_ids(golden.histories, golden.item_ids.shape[1])
        present = golden.item_ids != PAD_ID
        if not torch.equal(present, ids != PAD_ID):
            raise BundleError(f"bundle {self.version}: a golden request gets another number of items")
        allowed = SCORE_TOLERANCE * golden.scores.abs().clamp_min(1)
        difference = torch.where(present, (scores - golden.scores).abs(), 0)
        if not (difference <= allowed)[present].all():
            raise BundleError(
                f"bundle {self.version}: a golden request differs by {float(difference.max()):.2g} in a score, "
                f"allowed {SCORE_TOLERANCE:g} relative; the export is wrong"
            )
        # Items may change places only where their scores are as good as equal; the last place may
        # tie with an item beyond the list.
        gap = torch.where(present[:, 1:], (golden.scores[:, :-1] - golden.scores[:, 1:]).abs(), torch.inf)
        end = torch.zeros(len(ids), 1)
        tied = torch.minimum(torch.cat([gap, end], 1), torch.cat([torch.full_like(end, torch.inf), gap], 1)) <= 2 * allowed
        if not (tied | ~present)[ids != golden.item_ids].all():
            raise BundleError(f"bundle {self.version}: a golden request gets other items at the same scores; the export is wrong")
        return float(difference.max())
