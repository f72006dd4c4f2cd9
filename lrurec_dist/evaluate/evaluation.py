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
from lrurec_dist.evaluate.ranking import target_ranks
from lrurec_dist.evaluate.sharded_ranking import rows_of, sharded_target_ranks
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

    def item_rows(self, model: Encoder) -> Tensor:
        """The model's item rows as products take them; counts, float64, stay exact."""
        rows = model.item_rows()
        return rows.to(self.product_dtype) if rows.dtype == torch.float32 else rows


class RankedBatch(NamedTuple):
    """Users of a shard with what the ranking of their targets took.

    `excluded_rows`, `excluded_ids` (pairs,) are as in `target_ranks`; `ranks` is (users,) int64.
    """

    batch: EvaluationBatch
    vectors: Tensor
    excluded_rows: Tensor
    excluded_ids: Tensor
    ranks: Tensor


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
            vectors, ranks = _sharded_ranks(model, model.table, weight, item_ids, targets, rows, ids)
        else:
            vectors = model.encode(item_ids)
            ranks = target_ranks(vectors, weight, bias, targets, rows, ids)
        yield RankedBatch(batch, vectors, rows, ids, ranks)


@torch.inference_mode()
def rank_shard(model: Encoder, shard: SequenceShard, protocol: RankingProtocol) -> RankCounts:
    """Count the target ranks of every evaluable user in a shard; a target that is no candidate counts as beyond the deepest.

    With a sharded table call it within `rank_shards`.
    """
    counts = RankCounts(protocol.deepest)
    for ranked in iter_ranked(model, shard, protocol):
        counts.add(torch.where(ranked.ranks > model.table.num_items, protocol.deepest + 1, ranked.ranks))
    return counts


def rank_shards(model: Encoder, shards: Iterable[SequenceShard], protocol: RankingProtocol) -> Iterator[RankCounts]:
    """What `rank_shard` counts in each shard, in their order.

    With a sharded table every rank has to go through all of it, each with as many shards as it has: encoding and ranking a batch
    takes all ranks, so who is done before the others goes on without users.
    """
    for shard in shards:
        yield rank_shard(model, shard, protocol)
    if isinstance(model.table, ShardedItemTable):
        _rank_nobody(model, model.table, protocol)


@torch.inference_mode()
def _rank_nobody(model: Encoder, table: ShardedItemTable, protocol: RankingProtocol) -> None:
    """Take part in the batches that other ranks still have."""
    weight = protocol.item_rows(model)
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    while collectives.any_rank(False, weight.device):
        _sharded_ranks(model, table, weight, none[:, None], none, none, none)


def _sharded_ranks(
    model: Encoder, table: ShardedItemTable, weight: Tensor, item_ids: Tensor, targets: Tensor, rows: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor]:
    vectors = model.encode(item_ids)
    return vectors, sharded_target_ranks(vectors, weight, table.bias, rows_of(table), targets, rows, ids)


def training_counts(shards: Iterable[SequenceShard], split: Split, num_items: int) -> np.ndarray:
    """(num_items + 1,) int64: occurrences of each item_id in the training part of the shards."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for shard in shards:
        counts += np.bincount(shard.item_ids[trains(shard, split.bounds(shard))], minlength=num_items + 1)
    return counts
