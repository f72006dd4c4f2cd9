"""The best items for a few users at once, without reading the whole table: exact, by a copy of it in bytes."""

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.model import native

MOST_USERS = 8  # at once; of more, one pass over the table costs each of them less
MOST_ITEMS = 256  # of a list; beyond, keeping the best in order costs more than it saves
_ROWS = 64  # that are compared together
_LARGEST = 1e15  # element; scores are finite then
_AT_ONCE = 1 << 16  # rows that are rounded together


class Shortlist:
    """Lists of the best items, equal to those of `evaluate.ranking.top_k` to the bit.

    The table is held once more in bytes, a quarter as large. They tell which items may be among the best, by bounds of what
    rounding can have moved, and only those are scored.

    Args:
        weight: (num_items + 1, dim) float32; row `PAD_ID` is no candidate.
        bias: (num_items + 1,) float32; -inf where an item is no candidate.
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        rows, dim = weight.shape
        held, quads = -(-rows // _ROWS) * _ROWS, -(-dim // 4)
        self._weight, self._bytes = weight.contiguous(), torch.zeros(held // _ROWS, quads, _ROWS, 4, dtype=torch.uint8)
        self._bias, self._scale, self._norm = (torch.zeros(held) for _ in range(3))
        self._bias[:rows] = bias
        self._bias[PAD_ID] = self._bias[rows:] = -torch.inf
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
        scale = (torch.maximum(high, -low) / 127).clamp(min=1e-30)
        whole = (weight / scale[:, None]).round_().clamp_(-127, 127)
        self._scale[begin : begin + rows] = scale
        self._norm[begin : begin + rows] = 1.01 * torch.linalg.vector_norm(weight, dim=1)  # and what its own sum may be off by
        _, quads, _, _ = self._bytes.shape
        padded = torch.zeros(-(-rows // _ROWS) * _ROWS, quads * 4, dtype=torch.uint8)
        padded[:rows, :dim] = whole.add_(128).to(torch.uint8)
        groups = padded.view(-1, _ROWS, quads, 4).transpose(1, 2)
        self._bytes[begin // _ROWS : begin // _ROWS + len(groups)] = groups

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
                vectors[user], self._weight, self._bytes, (self._bias, self._scale, self._norm), dropped, ids[user], scores[user]
            )
            if found < 0:
                return None
            ids[user, found:], scores[user, found:] = PAD_ID, -torch.inf
        return ids, scores
