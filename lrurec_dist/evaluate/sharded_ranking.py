"""The ranking over a sharded item table: each rank looks at the items it owns, for the users of all ranks."""

import torch
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.evaluate.ranking import ItemRows, count_ahead, top_k
from lrurec_dist.model.sharded_table import ShardedItemTable


def rows_of(table: ShardedItemTable) -> ItemRows:
    """The items this rank owns."""
    return ItemRows(first=table.rank, stride=table.world_size, num_items=table.num_items)


def sharded_target_ranks(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: ItemRows,
    targets: Tensor,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
) -> Tensor:
    """Rank of each target of this rank's users among the items of all ranks.

    Args:
        as `target_ranks`, for this rank's users, but weight (local_rows, dim) and bias (local_rows,) are those of `items`.
        items: the items this rank owns.

    Returns:
        (users,) int64, the same numbers as `target_ranks` with the whole table wherever the products round alike.

    Every rank has to call it, with or without users. The owner of a target reads its score from the product in which it
    stands, and shares it; what each rank counts is added as whole numbers.

    Raises:
        LrurecError: a target's score is not a number; on every rank.
    """
    counts, vectors, excluded_rows, excluded_ids = _users_of_all(vectors, excluded_rows, excluded_ids)
    targets = collectives.all_gather_rows(targets, counts)
    ahead, excluded = count_ahead(vectors, weight, bias, targets, excluded_rows, excluded_ids, items, collectives.all_reduce_sum)
    ranks = torch.where(excluded, items.num_items + 1, 1 + collectives.all_reduce_sum(ahead))
    return ranks.split(counts)[collectives.rank()]


def sharded_top_k(
    vectors: Tensor,
    weight: Tensor,
    bias: Tensor,
    items: ItemRows,
    k: int,
    excluded_rows: Tensor,
    excluded_ids: Tensor,
) -> tuple[Tensor, Tensor]:
    """The k best candidates of each of this rank's users, ordered by (-score, item_id).

    Args:
        as `sharded_target_ranks`; k may exceed the number of candidates.

    Returns:
        (users, k) int64 item ids and float scores; `PAD_ID` and -inf where candidates run out.

    Every rank has to call it, with or without users, with the same k.
    """
    own_users = len(vectors)
    counts, vectors, excluded_rows, excluded_ids = _users_of_all(vectors, excluded_rows, excluded_ids)
    lists = top_k(vectors, weight, bias, k, excluded_rows, excluded_ids, items)
    received = [own_users] * len(counts)
    ids, scores = (
        collectives.exchange_rows(part, counts, received).view(len(counts), own_users, k).transpose(0, 1).flatten(1)
        for part in lists
    )
    by_id = torch.argsort(ids, dim=1, stable=True)
    order = by_id.gather(1, torch.argsort(scores.gather(1, by_id), dim=1, descending=True, stable=True))[:, :k]
    return ids.gather(1, order), scores.gather(1, order)


def _users_of_all(vectors: Tensor, excluded_rows: Tensor, excluded_ids: Tensor) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Users of each rank, and the three arrays over the users of all ranks."""
    counts, pairs = (
        collectives.exchange_counts([len(part)] * collectives.world_size(), vectors.device) for part in (vectors, excluded_rows)
    )
    excluded_rows = excluded_rows + sum(counts[: collectives.rank()])
    return (
        counts,
        collectives.all_gather_rows(vectors, counts),
        collectives.all_gather_rows(excluded_rows, pairs),
        collectives.all_gather_rows(excluded_ids, pairs),
    )
