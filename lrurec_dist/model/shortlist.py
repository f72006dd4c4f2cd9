"""The best items for a few users at once, without reading the whole table: exact, by a copy of it in half bytes."""

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.model import native

MOST_USERS = 8  # at once; of more, one pass over the table costs each of them less
MOST_ITEMS = 256  # of a list; beyond, keeping the best in order costs more than it saves
_ROWS = 64  # that are compared together
_LARGEST = 1e15  # element; scores are finite then
_AT_ONCE = 1 << 16  # rows that are rounded together
_UPWARDS = 1 + 2**-7  # times a number is at least as large in bfloat16


class Shortlist:
    """Lists of the best items, equal to those of `evaluate.ranking.top_k` to the bit.

    The table is held once more in half bytes, an eighth as large. They tell which items may be among the best, by bounds of
    what rounding can have moved, and only those are scored.

    Args:
        weight: (num_items + 1, dim) float32; row `PAD_ID` is no candidate.
        bias: (num_items + 1,) float32; -inf where an item is no candidate.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        rows, dim = weight.shape
        held, eights = -(-rows // _ROWS) * _ROWS, -(-dim // 8)
        self._weight, self._halves = weight.contiguous(), torch.zeros(held // _ROWS, eights, _ROWS, 4, dtype=torch.uint8)
        self._bias = torch.full((held,), -torch.inf)
        self._bias[:rows] = bias
        self._bias[PAD_ID] = -torch.inf
        self._scale, self._lost = torch.zeros(2, held, dtype=torch.bfloat16)
        for begin in range(0, rows, _AT_ONCE):
            self._round(begin, weight[begin : begin + _AT_ONCE])

    @staticmethod
    def usable(weight: Tensor) -> bool:
        """Whether this machine's processor multiplies bytes, and rows are of a kind that can be rounded to them."""
        kernels = native.load() if weight.device.type == "cpu" and weight.dtype == torch.float32 else None
        if kernels is None or not kernels.can_shortlist() or len(weight) >= 1 << 30 or weight.shape[1] > 1 << 15:
            return False
        low, high = torch.aminmax(weight)
        return float(low) > -_LARGEST and float(high) < _LARGEST

    def _round(self, begin: int, weight: Tensor) -> None:
        rows, dim = weight.shape
        low, high = torch.aminmax(weight, dim=1)
        scale = (torch.maximum(high, -low) / 7 * _UPWARDS).clamp(min=1e-30).bfloat16()
        whole = (weight / scale[:, None]).round_()
        lost = torch.linalg.vector_norm(weight - whole * scale[:, None], dim=1)
        self._scale[begin : begin + rows] = scale
        self._lost[begin : begin + rows] = 1.01 * _UPWARDS * lost  # and what its own sum may be off by
        groups, eights = -(-rows // _ROWS), self._halves.shape[1]
        padded = torch.zeros(groups * _ROWS, eights * 8, dtype=torch.uint8)
        padded[:rows, :dim] = whole.add_(8).to(torch.uint8)
        first, second = padded.view(groups, _ROWS, eights, 2, 4).unbind(3)
        self._halves[begin // _ROWS : begin // _ROWS + groups] = (first + 16 * second).transpose(1, 2)

    def top_k(self, vectors: Tensor, k: int, excluded: list[list[int]]) -> tuple[Tensor, Tensor] | None:
        """The k best items of each user by (-score, item_id), as `evaluate.ranking.top_k`; None where that is to be asked.

        Args:
            vectors: (users, dim) float32.
            excluded: item ids that are no candidates, of each user.
        """
        if len(vectors) > MOST_USERS or k > MOST_ITEMS:
            return None
        ids = torch.full((len(vectors), k), PAD_ID)
        scores = torch.full((len(vectors), k), -torch.inf)
        for user, dropped in enumerate(excluded):
            found = native.shortlist(
                vectors[user], self._weight, self._halves, (self._bias, self._scale, self._lost), dropped, ids[user], scores[user]
            )
            if found < 0:
                return None
            ids[user, found:], scores[user, found:] = PAD_ID, -torch.inf
        return ids, scores
