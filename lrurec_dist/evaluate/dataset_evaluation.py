"""Evaluation of whole datasets: every evaluable user once, on any number of Ray workers."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.cloudpickle
import ray.data

from lrurec_dist.data.ray_feed import configure_ray_data
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.errors import DataQualityError, LrurecError
from lrurec_dist.evaluate.baselines import recent_since
from lrurec_dist.evaluate.evaluation import RankingProtocol
from lrurec_dist.evaluate.neighbours import collect_neighbours
from lrurec_dist.evaluate.shard_evaluation import Comparison, Evaluation, Figures, ShardEvaluator, count_shard
from lrurec_dist.model.process import arrange_cpu
from lrurec_dist.reporting import Progress, silent


def evaluate_dataset(
    url: str,
    load_model: Callable[[], Any],
    protocol: RankingProtocol,
    figures: Figures,
    *,
    trained: Split | None = None,
    ranks_url: str | None = None,
    workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float = 0,
    resources: Mapping[str, float] | None = None,
    data_resources: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> Evaluation:
    """Rank every evaluable user's target over the full catalogue, by a model and by the baselines.

    Args:
        url: the dataset.
        load_model: called once on every worker; returns an `Encoder` on the device it should use. Its
            catalogue may be the first part of the dataset's (`KnownItems`).
        protocol: split, part and rules.
        figures: what is made of the ranks.
        trained: the split whose training part the model saw, when it is another one: the baselines see
            the same, and users whose target lies in it are not evaluated.
        ranks_url: where the ranks of single users go, one Parquet file a shard; None keeps none.
        workers: actors; each takes whole shards, and sums are whole numbers, so the figures do not
            depend on how many.
        cpus_per_worker: what an actor reserves,
        gpus_per_worker: and of GPUs,
        resources: and of the cluster's own resources.
        data_resources: what the tasks that count interactions reserve of those.
        progress: told of each shard that was counted and ranked.

    Raises:
        DataQualityError: no user is evaluable, or an item is outside the catalogue.
        LrurecError: a user was lost or counted twice.
    """
    dataset, trained = SequenceDataset(url), trained or protocol.split
    configure_ray_data()
    names = dataset.shard_names
    shards = ray.data.from_items([{"shard": name} for name in names], override_num_blocks=len(names))
    since = recent_since(dataset, trained)
    count = functools.partial(_count, dataset=dataset, protocol=protocol, trained=trained, since=since)
    data = dict(data_resources or {})
    counted = shards.map_batches(count, batch_size=1, batch_format="pyarrow", num_cpus=cpus_per_worker, resources=data)
    popularity, recent = np.zeros((2, dataset.num_items + 1), dtype=np.int64)
    facts: dict[str, int] = {}
    for found in _results(counted, "counted", len(names), progress):
        for total, (items, times) in zip((popularity, recent), found.pop("items"), strict=True):
            total[items] += times
        facts = {name: facts.get(name, 0) + value for name, value in found.items()}
    expected = facts.pop("evaluable")
    if expected == 0:
        raise DataQualityError(_nobody(dataset, protocol, facts["trained_targets"]))
    comparison = Comparison(
        url=url,
        protocol=protocol,
        trained=trained,
        figures=figures,
        ranks_url=ranks_url,
        popularity=popularity,
        recent=None if since is None else recent,
        neighbours=collect_neighbours(dataset, trained, popularity, cpus_per_worker, data),
    )
    ranking = shards.map_batches(
        _Ranker,
        fn_constructor_kwargs={"load_model": load_model, "holder": _Holder.remote(comparison)},  # type: ignore[attr-defined]
        batch_size=1,
        batch_format="pyarrow",
        concurrency=min(workers, len(names)),
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
        resources=dict(resources or {}),
    )
    evaluation = comparison.nothing()
    for part in _results(ranking, "ranked", len(names), progress):
        evaluation.add(part)
    if evaluation.users != expected:
        raise LrurecError(
            f"{evaluation.users:,} users were ranked of {expected:,} evaluable ones; this is a bug, please report it"
        )
    evaluation.interactions = int(popularity.sum())
    for name, value in facts.items():
        setattr(evaluation, name, value)
    return evaluation


def _nobody(dataset: SequenceDataset, protocol: RankingProtocol, trained_targets: int) -> str:
    if trained_targets:
        return f"{dataset.url}: the targets of all {trained_targets:,} evaluable users trained the model; evaluate it on the split it was trained with"
    users = f"none of {dataset.manifest['users']:,} users"
    if protocol.split.kind == "leave_last_out":
        return f"{dataset.url}: {users} has 3 interactions; leave-last-out evaluates nobody"
    return f"{dataset.url}: {users} has an interaction in the {protocol.part} part and one before it; move split.train_until, split.test_from"


def _results(shards: "ray.data.Dataset", what: str, total: int, progress: Progress) -> Iterator[Any]:
    """What was computed of each shard."""
    progress(what, 0, total, "shards")
    for done, row in enumerate(shards.iter_rows(), start=1):
        yield ray.cloudpickle.loads(row["result"])  # by `_as_rows` in a task of this run; it comes through Ray, not from storage
        progress(what, done, total, "shards")


def _as_rows(results: list[Any]) -> pa.Table:
    return pa.table({"result": pa.array([ray.cloudpickle.dumps(result) for result in results], pa.large_binary())})


def _count(names: pa.Table, dataset: SequenceDataset, protocol: RankingProtocol, trained: Split, since: int | None) -> pa.Table:
    return _as_rows([count_shard(dataset, name, protocol, trained, since) for name in names["shard"].to_pylist()])


@ray.remote(num_cpus=0)
class _Holder:
    """Has what all rankers need; as an argument of theirs it would be lost to one that Ray starts again."""

    def __init__(self, comparison: Comparison) -> None:
        self._comparison = comparison

    def comparison(self) -> Comparison:
        return self._comparison


class _Ranker:
    """Lives in a Ray actor: loads the model once, then evaluates shard after shard."""

    def __init__(self, load_model: Callable[[], Any], holder: Any) -> None:
        arrange_cpu()
        self._evaluator = ShardEvaluator(load_model(), ray.get(holder.comparison.remote()))

    def __call__(self, names: pa.Table) -> pa.Table:
        return _as_rows([self._evaluator.evaluate(name) for name in names["shard"].to_pylist()])
