"""Where a target stands among all items, and which items stand first: exact, and never a matrix of all scores.

On the CPU a kernel compares products where they are made (`lrurec_dist/model/ranking.c`); elsewhere, and for float64, tiles
of users are multiplied with the rows. Factors are of the type of the rows, float64, float32 or bfloat16; scores are float32
below float64. In the kernel the score of a user and an item is a function of the two alone.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lrurec_dist import PAD_ID
from lrurec_dist.errors import LrurecError
from lrurec_dist.model import native
from lrurec_dist.model.checks import require

TILE_ELEMENTS = 1 << 23  # scores held at a time
_WIDENED_ROWS = 1 << 14  # bfloat16 rows that are made float32 at a time


class ItemRows(NamedTuple):
    """Which items the rows of a table belong to: row i to item first + i * stride, up to item num_items."""

    first: int
    stride: int
    num_items: int

    def find(self, item_ids: Tensor) -> tuple[Tensor, Tensor]:
        """For item_ids (n,): bool, whether an item is among these rows, and its row, 0 if it is not."""
        if self.stride == 1:  # spares two divisions an id
            return torch.ones_like(item_ids, dtype=torch.bool), item_ids
        here = item_ids % self.stride == self.first
        return here, torch.where(here, item_ids // self.stride, 0)

    @property
    def begin(self) -> int:
        """The first row that is an item."""
        return 1 if self.first == PAD_ID else 0

    @property
    def users_a_tile(self) -> int:
        """The same for every part of a catalogue with that stride."""
        return max(1, TILE_ELEMENTS // (self.num_items // self.stride + 1))


def _all_rows(weight: Tensor) -> ItemRows:
    return ItemRows(first=PAD_ID, stride=1, num_items=weight.shape[0] - 1)


def _kernels(vectors: Tensor, weight: Tensor, bias: Tensor, items: ItemRows) -> native.Ranking | None:
    """The ranking by kernels, where they can do it."""
    usable = weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and len(weight) < 2**31
    if not usable or native.load() is None:
        return None
    vectors, bias = vectors.to(weight.dtype).float(), bias.float()
    return native.Ranking(vectors.contiguous(), weight.contiguous(), bias.contiguous(), items.begin)


def products(vectors: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Scores (users, rows), of factors in the type of the rows."""
    if weight.dtype != torch.bfloat16:
        return torch.addmm(bias, vectors.to(weight.dtype), weight.T)
    vectors, bias = vectors.bfloat16().float(), bias.float()  # products of bfloat16 numbers are exact in float32
    parts = zip(weight.split(_WIDENED_ROWS), bias.split(_WIDENED_ROWS), strict=True)
    return torch.cat([torch.addmm(biases, vectors, rows.float().T) for rows, biases in parts], dim=1)


def _score_tiles(
    vectors: Tensor, weight: Tensor, bias: Tensor, excluded_rows: Tensor, excluded_ids: Tensor, items: ItemRows
) -> Iterator[tuple[slice, Tensor]]:
    """(users, scores (users, rows of weight)) with -inf for padding and for excluded items."""
    step = items.users_a_tile
    here, columns = items.find(excluded_ids)
    excluded_rows, columns = excluded_rows[here], columns[here]
    for begin in range(0, vectors.shape[0], step):
        users = slice(begin, min(begin + step, vectors.shape[0]))
        scores = products(vectors[users], weight, bias)
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
        LrurecError: a target's score is not a number, so that no ranking exists; an id is outside the catalogue.
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
    num_items = items.num_items
    require((targets > PAD_ID) & (targets <= num_items), f"targets: an id is outside 1..{num_items}, the catalogue")
    _check_excluded(excluded_ids, items)
    if kernels := _kernels(vectors, weight, bias, items):
        return _count_by_kernels(kernels, targets, excluded_rows, excluded_ids, items, share)
    ahead, excluded = torch.empty_like(targets), torch.empty_like(targets, dtype=torch.bool)
    item_ids = torch.arange(items.first, items.num_items + 1, items.stride, device=weight.device)
    for users, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids, items):
        target = targets[users]
        here, column = items.find(target)
        target_score = share(scores.gather(1, column[:, None]).squeeze(1).where(here, 0))[:, None]
        _check_scores(target_score)
        excluded[users] = target_score.squeeze(1) == -torch.inf
        buffer = torch.empty_like(scores)
        above = _count(torch.gt(scores, target_score, out=buffer))
        at_least = _count(torch.ge(scores, target_score, out=buffer))
        tied = ((at_least - above > here.long()) & ~excluded[users]).nonzero().squeeze(1)  # rare: others have the target's score
        before = (scores[tied] == target_score[tied]) & (item_ids < target[tied, None])
        above[tied] += before.sum(1)
        ahead[users] = above
    return ahead, excluded


def _count_by_kernels(
    kernels: native.Ranking,
    targets: Tensor,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
    items: ItemRows,
    share: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """`count_ahead`: all rows are counted, then the excluded ones taken off."""
    here, row = items.find(targets)
    own = kernels.score_pairs(torch.arange(len(targets)), row).where(here, 0)
    # in tiles as without kernels, so that ranks may differ in whether they have them
    step = items.users_a_tile
    scores = torch.cat([own[:0], *(share(own[begin : begin + step]) for begin in range(0, len(own), step))])
    _check_scores(scores)
    lower = (targets - items.first + items.stride - 1).div(items.stride, rounding_mode="floor")  # rows of items with lower ids
    ahead = kernels.count_ahead(scores, lower)

    here, row = items.find(excluded_ids)
    here &= excluded_ids != PAD_ID
    users, row = excluded_rows[here], row[here]
    ascending = (users[1:] > users[:-1]) | ((users[1:] == users[:-1]) & (row[1:] > row[:-1]))
    if not ascending.all():  # a pair may be named twice, and counts once
        users, row = torch.stack([users, row]).unique(dim=1)
    score, bar = kernels.score_pairs(users, row), scores[users]
    before = (score > bar) | ((score == bar) & (row < lower[users]))
    ahead -= torch.bincount(users[before], minlength=len(targets))

    excluded = scores == -torch.inf
    excluded[excluded_rows[excluded_ids == targets[excluded_rows]]] = True
    return ahead, excluded


def _check_excluded(item_ids: Tensor, items: ItemRows) -> None:
    require(
        (item_ids >= PAD_ID) & (item_ids <= items.num_items),
        f"excluded_ids: an id is outside 0..{items.num_items}, the catalogue",
    )


def _check_scores(of_targets: Tensor) -> None:
    if torch.isnan(of_targets).any():
        raise LrurecError("a target's score is nan: the model has diverged and ranks nothing")


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
    _check_excluded(excluded_ids, items)
    kernels = _kernels(vectors, weight, bias, items)
    score_type = torch.float32 if weight.dtype == torch.bfloat16 else weight.dtype
    ids = torch.full((vectors.shape[0], k), PAD_ID, dtype=torch.int64, device=vectors.device)
    best = torch.full((vectors.shape[0], k), -torch.inf, dtype=score_type, device=vectors.device)
    if kernels:
        depth = min(k, len(weight))
        rows, best[:, :depth] = kernels.best_rows(depth, *_by_user(excluded_rows, excluded_ids, len(vectors), items))
        ids[:, :depth] = torch.where(rows < 0, PAD_ID, items.first + items.stride * rows)
        return ids, best
    for users, scores in _score_tiles(vectors, weight, bias, excluded_rows, excluded_ids, items):
        scores.masked_fill_(scores.isnan(), -torch.inf)  # topk would put them first
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


def _by_user(excluded_rows: Tensor, excluded_ids: Tensor, users: int, items: ItemRows) -> tuple[Tensor, Tensor]:
    """Offsets (users + 1,) int64 into the excluded rows of these items, int32, user by user."""
    here, row = items.find(excluded_ids)
    user, row = excluded_rows[here], row[here]
    if not (user[1:] >= user[:-1]).all():
        order = torch.argsort(user, stable=True)
        user, row = user[order], row[order]
    return torch.searchsorted(user, torch.arange(users + 1)), row.int()
