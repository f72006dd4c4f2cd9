"""Evaluation of whole datasets: every evaluable user once, on any number of workers."""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.data.batches import iter_evaluation_batches
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Part, Split, trains
from lrurec_dist.errors import DataQualityError, LrurecError
from lrurec_dist.evaluate.baselines import Popularity
from lrurec_dist.evaluate.metrics import RankCounts
from lrurec_dist.evaluate.ranking import target_ranks
from lrurec_dist.evaluate.sharded_ranking import rows_of, sharded_target_ranks
from lrurec_dist.model.item_table import ItemTable
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.model.sharded_table import ShardedItemTable
from lrurec_dist.reporting import Progress, silent

if TYPE_CHECKING:
    import ray


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


@torch.inference_mode()
def rank_shard(model: Encoder, shard: SequenceShard, protocol: RankingProtocol) -> RankCounts:
    """Count the target ranks of every evaluable user in a shard; with a sharded table within `rank_shards`."""
    counts = RankCounts(protocol.deepest)
    weight, bias = model.item_rows(), model.table.bias
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
            counts.add(_sharded_ranks(model, model.table, weight, item_ids, targets, rows, ids))
        else:
            counts.add(target_ranks(model.encode(item_ids), weight, bias, targets, rows, ids))
    return counts


def rank_shards(model: Encoder, shards: Iterable[SequenceShard], protocol: RankingProtocol) -> Iterator[RankCounts]:
    """What `rank_shard` counts in each shard, in their order.

    With a sharded table every rank has to go through all of it, each with as many shards as it has: encoding and ranking a batch
    takes all ranks, so who is done before the others goes on without users.
    """
    for shard in shards:
        yield rank_shard(model, shard, protocol)
    if isinstance(model.table, ShardedItemTable):
        _rank_nobody(model, model.table)


@torch.inference_mode()
def _rank_nobody(model: Encoder, table: ShardedItemTable) -> None:
    """Take part in the batches that other ranks still have."""
    weight = model.item_rows()
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    while collectives.any_rank(False, weight.device):
        _sharded_ranks(model, table, weight, none[:, None], none, none, none)


def _sharded_ranks(
    model: Encoder, table: ShardedItemTable, weight: Tensor, item_ids: Tensor, targets: Tensor, rows: Tensor, ids: Tensor
) -> Tensor:
    return sharded_target_ranks(model.encode(item_ids), weight, table.bias, rows_of(table), targets, rows, ids)


def training_counts(shards: Iterable[SequenceShard], split: Split, num_items: int) -> np.ndarray:
    """(num_items + 1,) int64: occurrences of each item_id in the training part of the shards."""
    counts = np.zeros(num_items + 1, dtype=np.int64)
    for shard in shards:
        counts += np.bincount(shard.item_ids[trains(shard, split.bounds(shard))], minlength=num_items + 1)
    return counts


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation of one model found, with popularity on the same users beside it."""

    model: RankCounts
    popularity: RankCounts
    unseen_targets: int  # users whose target never occurs in the training part
    new_users: int  # users evaluated who have no training part
    without_history: int  # users not evaluated: nothing lies before their target

    @property
    def users(self) -> int:
        """Users evaluated."""
        return self.model.users


def evaluate_dataset(
    url: str,
    load_model: Callable[[], Any],
    protocol: RankingProtocol,
    *,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float = 0,
    progress: Progress = silent,
) -> Evaluation:
    """Rank every evaluable user's target over the full catalogue, on Ray workers.

    Args:
        url: the dataset.
        load_model: called once on every worker; returns an `Encoder` on the device it should use.
        protocol: split, part and rules.
        workers: actors; each takes whole shards, so the figures do not depend on how many.
        progress: told of each shard that was counted and ranked.

    Raises:
        DataQualityError: no user is evaluable.
        LrurecError: a user was lost or counted twice.
    """
    import ray.data  # who ranks shards of its own, as a training rank does, needs no Ray

    from lrurec_dist.data.ray_feed import configure_ray_data

    dataset = SequenceDataset(url)
    configure_ray_data()
    shards = ray.data.from_items([{"shard": name} for name in dataset.shard_names], override_num_blocks=len(dataset.shard_names))
    count = functools.partial(_count_shard, url=url, protocol=protocol)
    counted = shards.map_batches(count, batch_size=1, batch_format="pyarrow", num_cpus=cpus_per_worker)
    partial = _rows(counted, "counted", len(dataset.shard_names), progress)
    popularity = np.sum([np.asarray(row["counts"]) for row in partial], axis=0)
    expected, new_users, without_history = (sum(row[name] for row in partial) for name in ("evaluable", "new", "without_history"))
    if expected == 0:
        users = f"none of {dataset.manifest['users']:,} users"
        raise DataQualityError(
            f"{url}: {users} has 3 interactions; leave-last-out evaluates nobody"
            if protocol.split.kind == "leave_last_out"
            else f"{url}: {users} has an interaction in the {protocol.part} part and one before it; move split.train_until, split.test_from"
        )
    ranking = shards.map_batches(
        _ShardRanker,
        fn_constructor_kwargs={"url": url, "load_model": load_model, "popularity": [ray.put(popularity)], "protocol": protocol},
        batch_size=1,
        batch_format="pyarrow",
        concurrency=min(workers, len(dataset.shard_names)),
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
    )
    ranked = _rows(ranking, "ranked", len(dataset.shard_names), progress)
    model, baseline = RankCounts(protocol.deepest), RankCounts(protocol.deepest)
    model.counts += torch.from_numpy(np.sum([row["model"] for row in ranked], axis=0))
    baseline.counts += torch.from_numpy(np.sum([row["popularity"] for row in ranked], axis=0))
    if model.users != expected or baseline.users != expected:
        raise LrurecError(f"{model.users:,} users were ranked of {expected:,} evaluable ones; this is a bug, please report it")
    unseen = sum(int(row["unseen"]) for row in ranked)
    return Evaluation(model, baseline, unseen_targets=unseen, new_users=new_users, without_history=without_history)


def _rows(shards: "ray.data.Dataset", what: str, total: int, progress: Progress) -> list[dict[str, Any]]:
    """What was computed of each shard, one row a shard."""
    rows = []
    progress(what, 0, total, "shards")
    for row in shards.iter_rows():
        rows.append(row)
        progress(what, len(rows), total, "shards")
    return rows


def _count_shard(names: pa.Table, url: str, protocol: RankingProtocol) -> pa.Table:
    """What a shard trains on, and whom it evaluates."""
    dataset = SequenceDataset(url)
    rows = []
    for name in names["shard"].to_pylist():
        shard = dataset.read_shard(name, timestamps=protocol.split.needs_timestamps)
        bounds = protocol.split.bounds(shard)
        begin, end = bounds.part(protocol.part)
        evaluable = bounds.evaluable(protocol.part)
        rows.append(
            {
                "counts": training_counts([shard], protocol.split, dataset.num_items),
                "evaluable": int(evaluable.sum()),
                "new": int((evaluable & (bounds.train_end == 0)).sum()),
                "without_history": int(((begin < end) & ~evaluable).sum()),
            }
        )
    return pa.Table.from_pylist(rows)


class _ShardRanker:
    """Lives in a Ray actor: loads the model once, then ranks shard after shard."""

    def __init__(
        self, url: str, load_model: Callable[[], Any], popularity: "list[ray.ObjectRef[np.ndarray]]", protocol: RankingProtocol
    ) -> None:
        import ray

        arrange_cpu()
        self._dataset = SequenceDataset(url)
        self._model = load_model()
        self._popularity = Popularity(torch.from_numpy(ray.get(popularity[0]).copy())).to(self._model.table.weight.device)
        self._protocol = protocol

    def __call__(self, names: pa.Table) -> pa.Table:
        rows = []
        for name in names["shard"].to_pylist():
            protocol = self._protocol
            shard = self._dataset.read_shard(name, timestamps=protocol.split.needs_timestamps)
            unseen = 0
            for batch in iter_evaluation_batches(
                shard, split=protocol.split, part=protocol.part, max_length=1, batch_size=protocol.batch_size
            ):
                unseen += int((self._popularity.table.weight[torch.from_numpy(batch.targets)] == 0).sum())
            rows.append(
                {
                    "model": rank_shard(self._model, shard, protocol).counts.numpy(),
                    "popularity": rank_shard(self._popularity, shard, protocol).counts.numpy(),
                    "unseen": unseen,
                }
            )
        return pa.Table.from_pylist(rows)
