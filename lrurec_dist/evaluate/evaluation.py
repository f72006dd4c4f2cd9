"""The rankings that every figure is made of: a model, a shard, the targets of its evaluable users."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.data.batches import EvaluationBatch, iter_evaluation_batches
from lrurec_dist.data.sequences import SequenceShard
from lrurec_dist.data.splits import Part, Split, trains
from lrurec_dist.evaluate.metrics import RankCounts
from lrurec_dist.evaluate.ranking import target_ranks, top_k
from lrurec_dist.evaluate.sharded_ranking import rows_of, sharded_target_ranks, sharded_top_k
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.sharded_table import ShardedItemTable


class Encoder(Protocol):
    """What can be ranked: histories to vectors, and a table to score them with."""

    @property
    def table(self) -> ItemTable | ShardedItemTable: ...

    def encode(self, item_ids: Tensor) -> Tensor: ...

    def item_rows(self) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class RankingProtocol:
    """How users are evaluated; the same for every model of a comparison."""

    split: Split
    part: Part
    max_length: int  # history items the model sees, most recent
    batch_size: int
    exclude_history: bool  # items of the full history are no candidates
    deepest: int  # ranks are counted one by one up to here
    product_dtype: torch.dtype = torch.float32  # what the factors of a model's scores are rounded to
    list_k: int = 0  # length of the lists that are built beside the ranks; 0: none

    def item_rows(self, model: Encoder) -> Tensor:
        """The model's item rows as products take them; counts, float64, stay exact."""
        rows = model.item_rows()
        return rows.to(self.product_dtype) if rows.dtype == torch.float32 else rows


class RankedBatch(NamedTuple):
    """Users of a shard with what the ranking of their targets took.

    `excluded_rows`, `excluded_ids` (pairs,) are as in `target_ranks`; `ranks` is (users,) int64, `lists` (users, list_k)
    int64 item ids as of `top_k`.
    """

    batch: EvaluationBatch
    vectors: Tensor
    excluded_rows: Tensor
    excluded_ids: Tensor
    ranks: Tensor
    lists: Tensor


def iter_ranked(model: Encoder, shard: SequenceShard, protocol: RankingProtocol) -> Iterator[RankedBatch]:
    """Rank the target of every evaluable user in a shard; call it in inference mode."""
    weight, bias = protocol.item_rows(model), model.table.bias
    for batch in iter_evaluation_batches(
        shard, split=protocol.split, part=protocol.part, max_length=protocol.max_length, batch_size=protocol.batch_size
    ):
        pairs = slice(None) if protocol.exclude_history else slice(0)
        item_ids, targets, rows, ids = (
            torch.from_numpy(values).to(weight.device)
            for values in (batch.item_ids, batch.targets, batch.history_rows[pairs], batch.history_ids[pairs])
        )
        if isinstance(model.table, ShardedItemTable):
            collectives.any_rank(True, weight.device)  # this rank has another batch
            vectors, ranks, lists = _sharded_ranks(model, model.table, weight, item_ids, targets, rows, ids, protocol.list_k)
        else:
            vectors = model.encode(item_ids)
            ranks = target_ranks(vectors, weight, bias, targets, rows, ids)
            lists = top_k(vectors, weight, bias, protocol.list_k, rows, ids)[0] if protocol.list_k else targets[:, None][:, :0]
        yield RankedBatch(batch, vectors, rows, ids, ranks, lists)


@torch.inference_mode()
def rank_shard(model: Encoder, shard: SequenceShard, protocol: RankingProtocol, listed: Tensor | None = None) -> RankCounts:
    """Count the target ranks of every evaluable user in a shard; a target that is no candidate counts as beyond the deepest.

    The items of their lists, and `PAD_ID` where candidates run out, become True in `listed` (num_items + 1,) bool.
    With a sharded table call it within `rank_shards`.
    """
    counts = RankCounts(protocol.deepest)
    for ranked in iter_ranked(model, shard, protocol):
        counts.add(torch.where(ranked.ranks > model.table.num_items, protocol.deepest + 1, ranked.ranks))
        if listed is not None:
            listed[ranked.lists] = True
    return counts


def rank_shards(
    model: Encoder, shards: Iterable[SequenceShard], protocol: RankingProtocol, listed: Tensor | None = None
) -> Iterator[RankCounts]:
    """What `rank_shard` counts in each shard, in their order.

    With a sharded table every rank has to go through all of it, each with as many shards as it has: encoding and ranking a batch
    takes all ranks, so who is done before the others goes on without users.
    """
    for shard in shards:
        yield rank_shard(model, shard, protocol, listed)
    if isinstance(model.table, ShardedItemTable):
        _rank_nobody(model, model.table, protocol)


@torch.inference_mode()
def _rank_nobody(model: Encoder, table: ShardedItemTable, protocol: RankingProtocol) -> None:
    """Take part in the batches that other ranks still have."""
    weight = protocol.item_rows(model)
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    while collectives.any_rank(False, weight.device):
        _sharded_ranks(model, table, weight, none[:, None], none, none, none, protocol.list_k)


def _sharded_ranks(
    model: Encoder,
    table: ShardedItemTable,
    weight: Tensor,
    item_ids: Tensor,
    targets: Tensor,
    rows: Tensor,
    ids: Tensor,
    list_k: int,
) -> tuple[Tensor, Tensor, Tensor]:
    vectors, items = model.encode(item_ids), rows_of(table)
    ranks = sharded_target_ranks(vectors, weight, table.bias, items, targets, rows, ids)
    lists = sharded_top_k(vectors, weight, table.bias, items, list_k, rows, ids)[0] if list_k else targets[:, None][:, :0]
    return vectors, ranks, lists


def training_counts(shards: Iterable[SequenceShard], split: Split, num_items: int) -> np.ndarray:
    """(num_items + 1,) int64: occurrences of each item_id in the training part of the shards."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for shard in shards:
        counts += np.bincount(shard.item_ids[trains(shard, split.bounds(shard))], minlength=num_items + 1)
    return counts
