"""The feed: Ray Data tasks make training batches ahead of their use."""

import collections
import functools
import itertools
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import ray
import ray.data

from lrurec_dist.data.batches import TrainingBatch, TrainingWindows, count_windows, cut_batches, group_shards
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import DataQualityError

BATCHES_PER_TASK = 16
TASKS_PER_EXECUTION = 64  # at most; starting an execution costs about a second, so one serves long
EXECUTION_BYTES = 128 << 20  # at most: two executions, the current and the next, wait in the object store
FEED_CPUS = 0.25  # logical CPUs of one feeding task, so that two workers and their feeds fit two CPUs


def iter_training_batches(
    url: str,
    *,
    seed: int,
    first_epoch: int,
    shards_mixed: int,
    global_batch_size: int,
    max_length: int,
    first_item_is_target: bool,
    rank: int,
    world_size: int,
) -> Iterator[TrainingBatch]:
    """One rank's batches, epoch after epoch without end, made by Ray Data tasks ahead of their use.

    Each rank runs its own Ray Dataset over (epoch, group of shards, first batch): `streaming_split`
    would drop rows and hand them out by timing. One row is one whole batch, so nothing is collated
    in the training process.
    """
    configure_ray_data()
    dataset = SequenceDataset(url)
    windows = {
        name: count_windows(dataset.read_shard(name).lengths, max_length=max_length, first_item_is_target=first_item_is_target)
        for name in dataset.shard_names
    }
    make = functools.partial(
        _make_batches,
        url=url,
        identity=dataset.identity,
        seed=seed,
        shards_mixed=shards_mixed,
        global_batch_size=global_batch_size,
        rank=rank,
        max_length=max_length,
        first_item_is_target=first_item_is_target,
        world_size=world_size,
    )
    addresses = (
        {"epoch": epoch, "group": group, "begin": begin, "end": min(begin + BATCHES_PER_TASK, batches)}
        for epoch in itertools.count(first_epoch)
        for group, names in enumerate(group_shards(dataset.shard_names, seed=seed, epoch=epoch, shards_mixed=shards_mixed))
        for batches in [-(-sum(windows[name] for name in names) // global_batch_size)]
        for begin in range(0, batches, BATCHES_PER_TASK)
    )
    bytes_per_task = BATCHES_PER_TASK * -(-global_batch_size // world_size) * max_length * 8  # ids and targets, int32
    most_tasks = max(1, min(TASKS_PER_EXECUTION, EXECUTION_BYTES // bytes_per_task))

    def execute(num_tasks: int) -> "list[ray.ObjectRef[pa.Table]]":
        plan = list(itertools.islice(addresses, num_tasks))
        tasks = ray.data.from_items(plan, override_num_blocks=len(plan))
        return tasks.map_batches(make, batch_format="pyarrow", batch_size=1, concurrency=1, num_cpus=FEED_CPUS).to_arrow_refs()

    # An execution is run to its end ahead of its use: one whose output waits to be read keeps Ray Data's
    # scheduling loop spinning in this process, on a core that training needs. The first ones are small,
    # so that training begins at once.
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as ahead:
        num_tasks = 1
        upcoming = ahead.submit(execute, num_tasks)
        while True:
            blocks = collections.deque(upcoming.result())
            num_tasks = min(2 * num_tasks, most_tasks)
            upcoming = ahead.submit(execute, num_tasks)
            while blocks:
                block = ray.get(blocks.popleft())
                for row in range(block.num_rows):
                    yield _to_batch(block.slice(row, 1))


def configure_ray_data() -> None:
    """Keep block order, so that data order is ours; report through our own lines, not Ray Data's."""
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # or an error of ours arrives without its type
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _make_batches(
    addresses: pa.Table,
    url: str,
    identity: str,
    seed: int,
    shards_mixed: int,
    global_batch_size: int,
    max_length: int,
    first_item_is_target: bool,
    rank: int,
    world_size: int,
) -> pa.Table:
    """The body of a feeding task: whole batches as rows."""
    rows = []
    for address in addresses.to_pylist():
        epoch, group = address["epoch"], address["group"]
        names = group_shards(_cached_dataset(url, identity).shard_names, seed=seed, epoch=epoch, shards_mixed=shards_mixed)[group]
        windows = _cached_windows(url, identity, tuple(names), max_length, first_item_is_target)
        batches = range(address["begin"], address["end"])
        rows += [
            {
                "item_ids": batch.item_ids.astype(np.int32).ravel(),
                "targets": batch.targets.astype(np.int32).ravel(),
                "length": batch.item_ids.shape[1],
                "num_targets": batch.num_targets,
                "epoch": batch.epoch,
                "group": batch.group,
                "batch": batch.batch,
            }
            for batch in cut_batches(windows, batches, epoch, group, seed, global_batch_size, rank, world_size)
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
    ]
)


@functools.lru_cache(maxsize=1)
def _cached_dataset(url: str, identity: str) -> SequenceDataset:
    """One dataset per worker process; `identity` tells apart what was at `url` at two times."""
    dataset = SequenceDataset(url)
    if dataset.identity != identity:
        raise DataQualityError(f"{url}: the dataset was replaced while it was in use; start the job again")
    return dataset


@functools.lru_cache(maxsize=1)
def _cached_windows(
    url: str, identity: str, names: tuple[str, ...], max_length: int, first_item_is_target: bool
) -> TrainingWindows:
    """The group that this worker process cuts batches from, kept for its next task."""
    dataset = _cached_dataset(url, identity)
    return TrainingWindows(
        [dataset.read_shard(name) for name in names], max_length=max_length, first_item_is_target=first_item_is_target
    )


def _to_batch(row: pa.Table) -> TrainingBatch:
    length = row["length"][0].as_py()
    item_ids, targets = (
        row[name].combine_chunks().flatten().to_numpy().reshape(-1, length).astype(np.int64) for name in ("item_ids", "targets")
    )
    return TrainingBatch(
        item_ids, targets, row["num_targets"][0].as_py(), *(row[name][0].as_py() for name in ("epoch", "group", "batch"))
    )
