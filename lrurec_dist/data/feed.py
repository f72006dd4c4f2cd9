"""The feed: training batches ahead of their use, made in this process or by Ray Data tasks."""

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Literal

from lrurec_dist.data.batches import DataOrder, TrainingBatch, iter_batches
from lrurec_dist.data.sequences import SequenceDataset

Feed = Literal["auto", "local", "ray"]

LOCAL_BYTES = 1 << 30  # a group of shards up to this size in memory is cut by the rank that trains on it
BYTES_PER_INTERACTION = 8
BATCHES_AHEAD = 16


def iter_training_batches(
    dataset: SequenceDataset,
    order: DataOrder,
    *,
    epoch: int = 0,
    first_batch: int = 0,
    rank: int,
    world_size: int,
    feed: Feed = "auto",
    resources: Mapping[str, float] | None = None,
) -> Iterator[TrainingBatch]:
    """One rank's batches from a place in the data order on, without end; the same ones by either feed.

    Args:
        dataset: what to train on.
        order: which batches there are.
        epoch: where to begin,
        first_batch: and how many of that epoch's batches to leave out.
        rank: whose slice of each global batch,
        world_size: of how many.
        feed: `local`: a thread of this process reads shards and cuts batches. `ray`: Ray Data tasks
            do, on any machine of the cluster. `auto`: local where a group of shards fits LOCAL_BYTES,
            since cutting a batch from memory costs less than fetching a made one.
        resources: what a Ray task of the feed reserves besides its CPUs.
    """
    if feed == "local" or (feed == "auto" and group_bytes(dataset, order) <= LOCAL_BYTES):
        return _ahead(iter_batches(dataset, order, epoch=epoch, first_batch=first_batch, rank=rank, world_size=world_size))
    from lrurec_dist.data.ray_feed import iter_batches_by_ray  # a rank that feeds itself needs no Ray

    return iter_batches_by_ray(
        dataset, order, epoch=epoch, first_batch=first_batch, rank=rank, world_size=world_size, resources=resources
    )


def group_bytes(dataset: SequenceDataset, order: DataOrder) -> int:
    """About how much memory a group of shards takes that is being cut into batches."""
    share = min(1.0, order.shards_mixed / len(dataset.shard_names))
    columns = 2 if order.split.needs_timestamps else 1
    return int(dataset.manifest["interactions"] * share) * columns * BYTES_PER_INTERACTION


def _ahead(batches: Iterator[TrainingBatch]) -> Iterator[TrainingBatch]:
    """The same batches, made by a thread that keeps up to BATCHES_AHEAD waiting."""
    made: queue.Queue[TrainingBatch | BaseException] = queue.Queue(BATCHES_AHEAD)
    closed = threading.Event()

    def put(what: TrainingBatch | BaseException) -> None:
        while not closed.is_set():
            try:
                return made.put(what, timeout=1.0)
            except queue.Full:
                continue

    def make() -> None:
        try:
            for batch in batches:
                put(batch)
                if closed.is_set():
                    return
        except BaseException as error:  # raised again where the batches are used
            put(error)

    thread = threading.Thread(target=make, name="feed", daemon=True)
    thread.start()
    try:
        while True:
            batch = made.get()
            if isinstance(batch, BaseException):
                raise batch
            yield batch
    finally:
        closed.set()
