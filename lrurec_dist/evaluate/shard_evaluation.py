"""One shard of an evaluation: the ranks of its users by a model and the baselines, and the sums that figures are made of."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lrurec_dist import storage
from lrurec_dist.data.batches import EvaluationBatch
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.shards import hash_keys
from lrurec_dist.data.splits import Split, trains
from lrurec_dist.errors import DataQualityError
from lrurec_dist.evaluate.baselines import Popularity
from lrurec_dist.evaluate.bootstrap import ReplicateSums
from lrurec_dist.evaluate.evaluation import RankedBatch, RankingProtocol, iter_ranked
from lrurec_dist.evaluate.known_items import KnownItems
from lrurec_dist.evaluate.lists import ListSums, top_lists
from lrurec_dist.evaluate.metrics import metric_values
from lrurec_dist.evaluate.neighbours import Neighbours, neighbour_ranks
from lrurec_dist.evaluate.ranks import MODEL, rank_column, ranks_file
from lrurec_dist.evaluate.segments import popularity_deciles, segments_of

SEGMENT_METRICS = ("recall@10", "ndcg@10", "mean_rank")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Which figures an evaluation makes of its ranks."""

    ks: tuple[int, ...]  # 10 among them
    list_k: int  # length of the lists of which coverage and the like are measured; 0: none
    replicates: int  # of the bootstrap
    seed: int  # of the bootstrap


@dataclass
class Evaluation:
    """What an evaluation found of a model, and of the baselines on the same users.

    `metrics` has the values of `metric_values` as `<model>/<metric>`, `segments` those of
    SEGMENT_METRICS by (scheme, segment). `models` are `model` and the baselines.
    """

    models: tuple[str, ...]
    metrics: ReplicateSums
    lists: ListSums | None
    segments: dict[tuple[str, str], ReplicateSums] = field(default_factory=dict)
    unseen_targets: int = 0  # users whose target never occurs in the training part
    unknown_targets: int = 0  # users whose target the model's catalogue lacks: misses
    trained_targets: int = 0  # users not evaluated: their target trains the model
    new_users: int = 0  # users evaluated who have no training part
    without_history: int = 0  # users not evaluated: nothing lies before their target
    interactions: int = 0  # of the training part

    @property
    def users(self) -> int:
        """Users evaluated."""
        return self.metrics.users

    def add(self, other: "Evaluation") -> None:
        """Count the users of another shard."""
        self.metrics.merge(other.metrics)
        if self.lists is not None and other.lists is not None:
            self.lists.merge(other.lists)
        for key, sums in other.segments.items():
            self.segments.setdefault(key, ReplicateSums(sums.names, len(sums.sums) - 1)).merge(sums)
        self.unseen_targets += other.unseen_targets
        self.unknown_targets += other.unknown_targets


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What every shard is evaluated by.

    `popularity` and `recent` (None where a log has no times) count each item_id in the training
    part of `trained` and in its latest tenth. `ranks_url` says where ranks of single users go.
    """

    url: str
    protocol: RankingProtocol
    trained: Split
    figures: Figures
    ranks_url: str | None
    popularity: np.ndarray
    recent: np.ndarray | None
    neighbours: dict[str, Neighbours]

    @property
    def models(self) -> tuple[str, ...]:
        """Who is compared, in the order of the tables."""
        return (MODEL, "popularity", *(["recent_popularity"] if self.recent is not None else []), *self.neighbours)

    def nothing(self) -> Evaluation:
        """The evaluation of no users."""
        names = metric_values(np.empty(0, dtype=np.int64), self.figures.ks, 1)
        sums = ReplicateSums([f"{model}/{name}" for model in self.models for name in names], self.figures.replicates)
        return Evaluation(self.models, sums, ListSums(self.figures.list_k) if self.figures.list_k else None)


def evaluated(shard: SequenceShard, protocol: RankingProtocol, trained: Split) -> tuple[np.ndarray, np.ndarray]:
    """(users,) bool each: who is evaluated, and who is not because the target lies in the part that `trained` trains on."""
    bounds = protocol.split.bounds(shard)
    evaluable = bounds.evaluable(protocol.part)
    leaked = evaluable & (bounds.part(protocol.part)[0] < trained.bounds(shard).train_end)
    return evaluable & ~leaked, leaked


def count_shard(
    dataset: SequenceDataset, name: str, protocol: RankingProtocol, trained: Split, since: int | None
) -> dict[str, Any]:
    """What a shard trains on, and whom it evaluates.

    Returns:
        `items`: the distinct items with their counts, in the training part and in that from the moment `since` on;
        numbers of users under the names that they have in `Evaluation`, those evaluated as `evaluable`.

    Raises:
        DataQualityError: an item is outside the catalogue.
    """
    shard = dataset.read_shard(name, timestamps=since is not None)
    outside = shard.item_ids[(shard.item_ids < 1) | (shard.item_ids > dataset.num_items)]
    if len(outside):
        raise DataQualityError(
            f"{dataset.url}, {name}: item_id {outside[0]} is outside the catalogue, 1 to {dataset.num_items:,}; prepare the dataset again"
        )
    bounds, training_bounds = protocol.split.bounds(shard), trained.bounds(shard)
    begin, end = bounds.part(protocol.part)
    mine, leaked = evaluated(shard, protocol, trained)
    training = trains(shard, training_bounds)
    recent = training & (shard.timestamps >= since) if shard.timestamps is not None else training
    return {
        "items": [np.unique(shard.item_ids[which], return_counts=True) for which in (training, recent)],
        "evaluable": int(mine.sum()),
        "new_users": int((mine & (training_bounds.train_end == 0)).sum()),
        "without_history": int(((begin < end) & ~bounds.evaluable(protocol.part)).sum()),
        "trained_targets": int(leaked.sum()),
    }


class ShardEvaluator:
    """Evaluates one shard after the other by a model and by the baselines.

    Args:
        model: an `Encoder`, on the device where ranks are computed; its catalogue is the dataset's or the first part of it.
        comparison: what by.
    """

    def __init__(self, model: Any, comparison: Comparison) -> None:
        self._comparison = comparison
        self._dataset = SequenceDataset(comparison.url)
        self._known = len(model.item_rows()) - 1
        self._model = model if self._known == self._dataset.num_items else KnownItems(model, self._dataset.num_items)
        with torch.inference_mode():
            self._rows = comparison.protocol.item_rows(self._model)
        device = self._rows.device
        dense = (comparison.popularity, comparison.recent)
        self._dense = [Popularity(torch.from_numpy(counts.copy())).to(device) for counts in dense if counts is not None]
        self._deciles = popularity_deciles(comparison.popularity)

    @torch.inference_mode()
    def evaluate(self, name: str) -> Evaluation:
        """The evaluation of a shard; its users' ranks are written where the comparison says."""
        comparison = self._comparison
        shard = self._dataset.read_shard(name, timestamps=comparison.recent is not None)
        mine, _ = evaluated(shard, comparison.protocol, comparison.trained)
        found = comparison.nothing()
        parts = [_no_targets(comparison, shard)]
        rankings = [iter_ranked(model, shard, comparison.protocol) for model in (self._model, *self._dense)]
        for ranked in zip(*rankings, strict=True):
            kept = mine[ranked[0].batch.users]
            parts.append(self._targets(shard, ranked).filter(pa.array(kept)))
            if found.lists is not None:
                self._add_lists(found.lists, ranked[0], kept)
        table = pa.concat_tables(parts)
        if comparison.ranks_url:
            storage.write_table(ranks_file(comparison.ranks_url, name), table)
        self._add_figures(found, table)
        return found

    def _targets(self, shard: SequenceShard, ranked: tuple[RankedBatch, ...]) -> pa.Table:
        """What was asked of the users of a batch, and all the ranks of their targets."""
        comparison, batch = self._comparison, ranked[0].batch
        ranks = [part.ranks.cpu().numpy() for part in ranked]
        ranks += [self._neighbour_ranks(neighbours, batch) for neighbours in comparison.neighbours.values()]
        history, _ = comparison.protocol.split.bounds(shard).part(comparison.protocol.part)
        place = (shard.offsets[:-1] + history)[batch.users]
        times = shard.timestamps
        columns = [
            shard.user_keys.take(pa.array(batch.users)),
            batch.targets,
            history[batch.users],
            comparison.trained.bounds(shard).train_end[batch.users] == 0,
            pa.nulls(len(place), pa.int64()) if times is None else times[place] - times[place - 1],
            self._deciles[batch.targets],
            *ranks,
        ]
        return pa.table([pa.array(column) for column in columns], schema=_no_targets(comparison, shard).schema)

    def _neighbour_ranks(self, neighbours: Neighbours, batch: EvaluationBatch) -> np.ndarray:
        pairs = slice(None) if self._comparison.protocol.exclude_history else slice(0)
        rows, ids = batch.history_rows[pairs], batch.history_ids[pairs]
        return neighbour_ranks(neighbours, batch.item_ids[:, -1], batch.targets, rows, ids, self._dataset.num_items)

    def _add_lists(self, lists: ListSums, ranked: RankedBatch, kept: np.ndarray) -> None:
        counts, batch = self._comparison.popularity, ranked.batch
        bias = self._model.table.bias
        ids, probabilities = top_lists(ranked.vectors, self._rows, bias, lists.k, ranked.excluded_rows, ranked.excluded_ids)
        shares = counts[batch.history_ids] / max(1, counts.sum())
        consumed = np.bincount(batch.history_rows, shares) / np.bincount(batch.history_rows)
        hits = ranked.ranks.cpu().numpy() == 1
        lists.add(ids.cpu().numpy()[kept], consumed[kept], probabilities.cpu().numpy()[kept], hits[kept], counts)

    def _add_figures(self, found: Evaluation, table: pa.Table) -> None:
        figures, num_items = self._comparison.figures, self._dataset.num_items
        targets, users = table["target"].to_numpy(), hash_keys(table["user_key"])
        values = {
            f"{model}/{name}": value
            for model in found.models
            for name, value in metric_values(table[rank_column(model)].to_numpy(), figures.ks, num_items).items()
        }
        found.metrics.add(values, users, figures.seed)
        names = [f"{model}/{name}" for model in found.models for name in SEGMENT_METRICS]
        for scheme, segment, rows in segments_of(table):
            sums = found.segments[scheme, segment] = ReplicateSums(names, figures.replicates)
            sums.add({name: values[name][rows] for name in names}, users[rows], figures.seed)
        found.unseen_targets = int((self._comparison.popularity[targets] == 0).sum())
        found.unknown_targets = int((targets > self._known).sum())


def _no_targets(comparison: Comparison, shard: SequenceShard) -> pa.Table:
    fields = {"user_key": shard.user_keys.type, "target": pa.int64(), "history_length": pa.int64(), "new_user": pa.bool_()}
    fields |= {
        "gap_us": pa.int64(),
        "popularity_decile": pa.int64(),
        **{rank_column(model): pa.int64() for model in comparison.models},
    }
    return pa.schema(list(fields.items())).empty_table()
