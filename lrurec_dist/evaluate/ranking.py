"""Where a target stands among all items, and which items stand first: exact, by one tiled product."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError

TILE_ELEMENTS = 1 << 23  # scores held at a time


class ItemRows(NamedTuple):
    """Which items the rows of a table belong to: row i to item first + i * stride, up to item num_items."""

    first: int
    stride: int
    num_items: int

    def find(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For item_ids (n,): bool, whether an item is among these rows, and its row, 0 if it is not."""
        here = item_ids % self.stride == self.first
        return here, torch.where(here, item_ids // self.stride, 0)


def _all_rows(weight: Tensor) -> ItemRows:
    return ItemRows(first=PAD_ID, stride=1, num_items=weight.shape[0] - 1)


def _score_tiles(
    vectors: Tensor, weight: Tensor, bias: Tensor, excluded_rows: Tensor, excluded_ids: Tensor, items: ItemRows
) -> Iterator[tuple[slice, Tensor]]:
    """(users, scores (users, rows of weight)) with -inf for padding and for excluded items.

    The tiles are the same for every part of a catalogue with that stride.
    """
    step = max(1, TILE_ELEMENTS // (items.num_items // items.stride + 1))
    here, columns = items.find(excluded_ids)
    excluded_rows, columns = excluded_rows[here], columns[here]
    for begin in range(0, vectors.shape[0], step):
        users = slice(begin, min(begin + step, vectors.shape[0]))
        scores = torch.addmm(bias, vectors[users], weight.T)
        if items.first == PAD_ID:
            scores[:, 0] = -torch.inf
        here = (excluded_rows >= users.start) & (excluded_rows < users.stop)
        scores[excluded_rows[here] - users.start, columns[here]] = -torch.inf
        yield users, scores


def target_ranks(
    vectors: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, excluded_rows: Tensor, excluded_ids: Tensor
) -> Tensor:
    """Rank of each target among all items that are candidates for its user.

    Args:
        vectors: (users, dim).
        weight, bias: (num_items + 1, dim) and (num_items + 1,); row `PAD_ID` is no candidate.
        targets: (users,) int64 in 1..num_items.
        excluded_rows, excluded_ids: (pairs,) int64: item excluded_ids[p] is no candidate for user
            excluded_rows[p].

    Returns:
        (users,) int64: 1 + the number of candidates that score higher, or equal with a smaller
        item_id. A target that is itself excluded cannot be found: its rank is num_items + 1.

    Exact: counted, never sorted; the target's score is read from the product it is compared with.

    Raises:
        LrurecError: a score is not finite, so that no ranking exists.
    """
    ahead, excluded = count_ahead(vectors, weight, bias, targets, excluded_rows, excluded_ids, _all_rows(weight), lambda x: x)
    return torch.where(excluded, weight.shape[0], 1 + ahead)


def count_ahead(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    targets: Tensor,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
    items: ItemRows,
    share: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """How many candidates among some items stand before each target.

    Args:
        as `target_ranks`, but weight and bias are those of `items` only.
        items: the items counted.
        share: called for a tile of users with the target's score where the target is among `items`, 0 elsewhere; returns the
            target's score. Every part of a catalogue with that stride calls it equally often.

    Returns:
        (users,) int64, and (users,) bool: whether the target is itself excluded.

    Raises:
        LrurecError: as `target_ranks`.
    """
    ahead, excluded = torch.empty_like(targets), torch.empty_like(targets, dtype=torch.bool)
    item_ids = torch.arange(items.first, items.num_items + 1, items.stride, device=weight.device)
    for users, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids, items):
        target = targets[users]
        here, column = items.find(target)
        target_score = share(scores.gather(1, column[:, None]).squeeze(1).where(here, 0))[:, None]
        if torch.isnan(target_score).any():
            raise LrurecError("a target's score is nan: the model has diverged and ranks nothing")
        excluded[users] = target_score.squeeze(1) == -torch.inf
        buffer = torch.empty_like(scores)
        above = _count(torch.gt(scores, target_score, out=buffer))
        at_least = _count(torch.ge(scores, target_score, out=buffer))
        tied = ((at_least - above > here.long()) & ~excluded[users]).nonzero().squeeze(1)  # rare: others have the target's score
        before = (scores[tied] == target_score[tied]) & (item_ids < target[tied, None])
        above[tied] += before.sum(1)
        ahead[users] = above
    return ahead, excluded


def _count(ones: Tensor) -> Tensor:
    """(users,) int64: how many entries of a 0/1 float matrix (users, items) are one.

    A sum of floats is several times faster than one of booleans, and exact in float32 up to 2^24.
    """
    return torch.stack([part.sum(1).long() for part in ones.split(1 << 24, dim=1)]).sum(0)


def top_k(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
    items: ItemRows | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each user, ordered by (-score, item_id).

    Args:
        as `target_ranks`; k may exceed the number of candidates.
        items: the items that weight and bias belong to; all of them when None.

    Returns:
        (users, k) int64 item ids and float scores; `PAD_ID` and -inf where candidates run out.
    """
    items = items or _all_rows(weight)
    ids = torch.full((vectors.shape[0], k), PAD_ID, dtype=torch.int64, device=vectors.device)
    best = torch.full((vectors.shape[0], k), -torch.inf, dtype=vectors.dtype, device=vectors.device)
    for users, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids, items):
        bar = torch.topk(scores, min(k, scores.shape[1]), dim=1).values[:, -1:]
        # topk breaks ties as it likes: take all that reach the bar, order them, cut.
        user, item = ((scores >= bar) & (scores > -torch.inf)).nonzero(as_tuple=True)
        score = scores[user, item]
        order = torch.argsort(score, descending=True, stable=True)  # items ascend already, within a user
        order = order[torch.argsort(user[order], stable=True)]
        user, item, score = user[order], item[order], score[order]
        first = torch.searchsorted(user, torch.arange(scores.shape[0], device=user.device))
        place = torch.arange(len(user), device=user.device) - first[user]
        kept = place < k
        ids[users.start + user[kept], place[kept]] = items.first + items.stride * item[kept]
        best[users.start + user[kept], place[kept]] = score[kept]
    return ids, best
