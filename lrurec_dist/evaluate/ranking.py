"""Where a target stands among all items, and which items stand first: exact, by one tiled product."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError

TILE_ELEMENTS = 1 << 23  # scores held at a time


def _score_tiles(
    vectors: Tensor, weight: Tensor, bias: Tensor, excluded_rows: Tensor, excluded_ids: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """(rows, scores (rows, num_items + 1)) with -inf for padding and for excluded items."""
    step = max(1, TILE_ELEMENTS // weight.shape[0])
    for begin in range(0, vectors.shape[0], step):
        rows = slice(begin, min(begin + step, vectors.shape[0]))
        scores = torch.addmm(bias, vectors[rows], weight.T)
        scores[:, PAD_ID] = -torch.inf
        here = (excluded_rows >= rows.start) & (excluded_rows < rows.stop)
        scores[excluded_rows[here] - rows.start, excluded_ids[here]] = -torch.inf
        yield rows, scores


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
    ranks = torch.empty_like(targets)
    item_ids = torch.arange(weight.shape[0], device=weight.device)
    for rows, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids):
        target = targets[rows, None]
        target_score = scores.gather(1, target)
        if torch.isnan(target_score).any():
            raise LrurecError("a target's score is nan: the model has diverged and ranks nothing")
        excluded = target_score.squeeze(1) == -torch.inf
        buffer = torch.empty_like(scores)
        above = _count(torch.gt(scores, target_score, out=buffer))
        at_least = _count(torch.ge(scores, target_score, out=buffer))
        tied = ((at_least - above > 1) & ~excluded).nonzero().squeeze(1)  # rare: somebody has the target's score
        before = (scores[tied] == target_score[tied]) & (item_ids < target[tied])
        rank = 1 + above
        rank[tied] += before.sum(1)
        ranks[rows] = torch.where(excluded, weight.shape[0], rank)
    return ranks


def _count(ones: Tensor) -> Tensor:
    """(users,) int64: how many entries of a 0/1 float matrix (users, items) are one.

    A sum of floats is several times faster than one of booleans, and exact in float32 up to 2^24.
    """
    return torch.stack([part.sum(1).long() for part in ones.split(1 << 24, dim=1)]).sum(0)


def top_k(
    vectors: Tensor, weight: Tensor, bias: Tensor, k: int, excluded_rows: Tensor, excluded_ids: Tensor
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each user, ordered by (-score, item_id).

    Args:
        as `target_ranks`; k may exceed the number of candidates.

    Returns:
        (users, k) int64 item ids and float scores; `PAD_ID` and -inf where candidates run out.
    """
    users, num_classes = vectors.shape[0], weight.shape[0]
    ids = torch.full((users, k), PAD_ID, dtype=torch.int64, device=vectors.device)
    best = torch.full((users, k), -torch.inf, dtype=vectors.dtype, device=vectors.device)
    for rows, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids):
        bar = torch.topk(scores, min(k, num_classes), dim=1).values[:, -1:]
        # topk breaks ties as it likes: take all that reach the bar, order them, cut.
        user, item = ((scores >= bar) & (scores > -torch.inf)).nonzero(as_tuple=True)
        score = scores[user, item]
        order = torch.argsort(score, descending=True, stable=True)  # items ascend already, within a user
        order = order[torch.argsort(user[order], stable=True)]
        user, item, score = user[order], item[order], score[order]
        first = torch.searchsorted(user, torch.arange(scores.shape[0], device=user.device))
        place = torch.arange(len(user), device=user.device) - first[user]
        kept = place < k
        ids[rows.start + user[kept], place[kept]] = item[kept]
        best[rows.start + user[kept], place[kept]] = score[kept]
    return ids, best
