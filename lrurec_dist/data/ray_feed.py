"""Training batches made by Ray Data tasks anywhere in the cluster, for ranks that shall only train."""

import collections
import functools
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lrurec_dist.data.batches import (
    BatchPlan,
    DataOrder,
    TrainingBatch,
    TrainingWindows,
    count_batches,
    count_windows,
    cut_batches,
    group_shards,
    plan_batches,
    plan_sizes,
    read_for_training,
    require_windows,
)
from lrurec_dist.data.passes import RayPasses
from lrurec_dist.data.sequences import LengthHistogram, SequenceDataset
from lrurec_dist.errors import DataQualityError

BatchCounter = Callable[[list[str], int, int], int]  # batches of a group of shards, in an epoch, as the how-manieth

BATCHES_PER_TASK = 16
TASKS_PER_EXECUTION = 64  # at most; starting an execution costs about a second, so one serves long
EXECUTION_BYTES = 128 << 20  # at most: two executions, the current and the next, wait in the object store
FEED_CPUS = 0.25  # logical CPUs of one feeding task, so that two workers and their feeds fit two CPUs


def iter_batches_by_ray(
    dataset: SequenceDataset,
    order: DataOrder,
    *,
    epoch: int,
    first_batch: int,
    rank: int,
    world_size: int,
    resources: Mapping[str, float] | None = None,
) -> Iterator[TrainingBatch]:
    """The batches of `batches.iter_batches`, made ahead of their use by Ray Data tasks.

    Each rank has its own Ray Dataset over (epoch, group of shards, first batch): `streaming_split`
    would drop rows and hand them out by timing. One row is one whole batch, so nothing is collated
    in the training process.
    """
    batches_of = _batch_counter(dataset, order, resources)
    make = functools.partial(
        _make_batches, url=dataset.url, identity=dataset.identity, order=order, rank=rank, world_size=world_size
    )
    addresses = _addresses(dataset.shard_names, batches_of, order, epoch, first_batch)
    positions_per_batch = order.tokens or order.global_batch_size * order.max_length
    bytes_per_task = BATCHES_PER_TASK * -(-positions_per_batch // world_size) * 8  # ids, targets: int32
    most_tasks = max(1, min(TASKS_PER_EXECUTION, EXECUTION_BYTES // bytes_per_task))
    # The scheduling loop of an execution takes a core while tasks run, and the interpreter's lock with
    # it: it runs in a process of its own. An execution is run to its end ahead of its use, since one
    # whose output waits to be read keeps spinning. The first ones are small, to begin at once.
    executor = _Executor.remote(dict(resources or {}))  # type: ignore[attr-defined]
    num_tasks = 1
    upcoming = executor.execute.remote(make, list(itertools.islice(addresses, num_tasks)))
    while True:
        blocks = collections.deque(ray.get(upcoming))
        num_tasks = min(2 * num_tasks, most_tasks)
        upcoming = executor.execute.remote(make, list(itertools.islice(addresses, num_tasks)))
        while blocks:
            block = ray.get(blocks.popleft())
            for row in range(block.num_rows):
                yield _to_batch(block.slice(row, 1))


@ray.remote(num_cpus=0)
class _Executor:
    """Runs Ray Data executions; what they made lives as long as this actor does."""

    def __init__(self, resources: dict[str, float]) -> None:
        self._resources = resources

    def execute(self, make: Any, addresses: list[dict[str, int]]) -> "list[ray.ObjectRef[pa.Table]]":
        configure_ray_data()
        tasks = ray.data.from_items(addresses, override_num_blocks=len(addresses))
        made = tasks.map_batches(
            make, batch_format="pyarrow", batch_size=1, concurrency=1, num_cpus=FEED_CPUS, resources=self._resources
        )
        return made.to_arrow_refs()


def _batch_counter(dataset: SequenceDataset, order: DataOrder, resources: Mapping[str, float] | None) -> BatchCounter:
    """What says how many batches there are. Shards are read for it, by tasks, only where their lengths do not tell."""
    names = dataset.shard_names
    if order.tokens or order.split.needs_timestamps or order.windows == "carried":
        read = functools.partial(_read_sizes, url=dataset.url, identity=dataset.identity, order=order)
        of_each = RayPasses(resources).each(read, [(name,) for name in names], num_cpus=FEED_CPUS)
        sizes = dict(zip(names, of_each, strict=True))
        require_windows(dataset, sum(map(len, sizes.values())))
        return lambda members, epoch, group: count_batches(np.concatenate([sizes[name] for name in members]), order, epoch, group)
    windows = {
        name: count_windows(LengthHistogram.of(order.split.bounds_of_lengths(lengths).train_end, users), order)
        for name, (lengths, users) in dataset.lengths.items()
    }
    require_windows(dataset, sum(windows.values()))
    return lambda members, *_: -(-sum(windows[name] for name in members) // order.global_batch_size)


def _addresses(
    names: list[str], batches_of: BatchCounter, order: DataOrder, epoch: int, first_batch: int
) -> Iterator[dict[str, int]]:
    """What one feeding task makes, without end: batches begin..end-1 of a group of an epoch."""
    for at_epoch in itertools.count(epoch):
        to_skip = first_batch if at_epoch == epoch else 0
        for group, members in enumerate(group_shards(names, order, at_epoch)):
            batches = batches_of(members, at_epoch, group)
            for begin in range(min(to_skip, batches), batches, BATCHES_PER_TASK):
                end = min(begin + BATCHES_PER_TASK, batches)
                yield {"epoch": at_epoch, "group": group, "begin": begin, "end": end}
            to_skip -= min(to_skip, batches)


def configure_ray_data() -> None:
    """Keep block order, so that data order is ours; report through our own lines, not Ray Data's."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # or an error of ours arrives without its type
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _make_batches(addresses: pa.Table, url: str, identity: str, order: DataOrder, rank: int, world_size: int) -> pa.Table:
    """The body of a feeding task: whole batches as rows."""
    rows = []
    for address in addresses.to_pylist():
        epoch, group = address["epoch"], address["group"]
        names = group_shards(_cached_dataset(url, identity).shard_names, order, epoch)[group]
        windows = _cached_windows(url, identity, tuple(names), order)
        plan = _cached_plan(url, identity, tuple(names), order, epoch, group)
        rows += [
            {
                "item_ids": batch.item_ids.astype(np.int32).ravel(),
                "targets": batch.targets.astype(np.int32).ravel(),
                "length": batch.item_ids.shape[1],
                "num_targets": batch.num_targets,
                "epoch": batch.epoch,
                "group": batch.group,
                "batch": batch.batch,
                "goes_on": batch.goes_on,
            }
            for batch in cut_batches(windows, plan, range(address["begin"], address["end"]), epoch, group, rank, world_size)
        ]
    return pa.Table.from_pylist(rows, schema=_ROW)


_ROW = pa.schema(
    [
        ("item_ids", pa.large_list(pa.int32())),
        ("targets", pa.large_list(pa.int32())),
        ("length", pa.int32()),
        ("num_targets", pa.int64()),
        ("epoch", pa.int64()),
        ("group", pa.int64()),
        ("batch", pa.int64()),
        ("goes_on", pa.large_list(pa.bool_())),
    ]
)


def _read_sizes(name: str, url: str, identity: str, order: DataOrder) -> np.ndarray:
    """The body of a counting task."""
    return plan_sizes(read_for_training(_cached_dataset(url, identity), name, order), order)


@functools.lru_cache(maxsize=1)
def _cached_dataset(url: str, identity: str) -> SequenceDataset:
    """One dataset per worker process; `identity` tells apart what was at `url` at two times."""
    dataset = SequenceDataset(url)
    if dataset.identity != identity:
        raise DataQualityError(f"{url}: the dataset was replaced while it was in use; start the job again")
    return dataset


@functools.lru_cache(maxsize=1)
def _cached_windows(url: str, identity: str, names: tuple[str, ...], order: DataOrder) -> TrainingWindows:
    """The group that this worker process cuts batches from, kept for its next task."""
    dataset = _cached_dataset(url, identity)
    return TrainingWindows([read_for_training(dataset, name, order) for name in names], order)


@functools.lru_cache(maxsize=1)
def _cached_plan(url: str, identity: str, names: tuple[str, ...], order: DataOrder, epoch: int, group: int) -> BatchPlan:
    """The plan of that group's batches, likewise."""
    return plan_batches(_cached_windows(url, identity, names, order).sizes, order, epoch, group)


def _to_batch(row: pa.Table) -> TrainingBatch:
    length = row["length"][0].as_py()
    item_ids, targets = (
        row[name].combine_chunks().flatten().to_numpy().reshape(-1, length).astype(np.int64) for name in ("item_ids", "targets")
    )
    address = {name: row[name][0].as_py() for name in ("num_targets", "epoch", "group", "batch")}
    goes_on = row["goes_on"][0].as_py()
    return TrainingBatch(item_ids, targets, **address, goes_on=None if goes_on is None else np.array(goes_on, dtype=bool))
