"""Both feeds against the data order computed directly."""

import dataclasses
import itertools
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from lrurec_dist.data import feed, ray_feed
from lrurec_dist.data.batches import (
    DataOrder,
    TrainingBatch,
    TrainingWindows,
    group_shards,
    iter_batches,
    plan_batches,
    read_for_training,
)
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Split
from lrurec_dist.errors import DataQualityError, IntegrityError
from tests.datasets import chain_sequences, write_dataset

ORDER = DataOrder(seed=5, shards_mixed=2, global_batch_size=9, max_length=4, first_item_is_target=True)
OTHER_ORDER = dataclasses.replace(
    ORDER, windows="sliding", stride=2, tokens=30, split=Split(kind="global_time", train_until=9, test_from=11)
)


CARRIED_ORDER = dataclasses.replace(ORDER, windows="carried")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(str(tmp_path_factory.mktemp("feed")), chain_sequences(70, 30), 30, shards=5)


def assert_same(fed: list[TrainingBatch], expected: list[TrainingBatch]) -> None:
    for got, want in zip(fed, expected, strict=True):
        for field in dataclasses.fields(TrainingBatch):
            assert np.array_equal(getattr(got, field.name), getattr(want, field.name)), (field.name, want.epoch, want.batch)


@pytest.mark.parametrize(("rank", "world_size", "first_batch"), [(0, 1, 0), (0, 5, 3), (2, 3, 8)])
@pytest.mark.parametrize("kind", ["local", "ray"])
@pytest.mark.usefixtures("ray_session")
def test_a_feed_yields_the_batches_of_the_order_across_epochs(monkeypatch, dataset, kind, rank, world_size, first_batch):
    monkeypatch.setattr(ray_feed, "BATCHES_PER_TASK", 2)
    monkeypatch.setattr(ray_feed, "TASKS_PER_EXECUTION", 7)  # executions of 1, 2, 4, 7, 7, … tasks end anywhere in an epoch
    place = {"epoch": 3, "first_batch": first_batch, "rank": rank, "world_size": world_size}
    expected = list(itertools.islice(iter_batches(dataset, ORDER, **place), 45))
    stream = feed.iter_training_batches(dataset, ORDER, feed=kind, **place)
    fed = list(itertools.islice(stream, len(expected)))
    stream.close()
    assert_same(fed, expected)
    assert len({batch.epoch for batch in fed}) >= 4


@pytest.mark.parametrize(
    ("order", "kind"),
    [(OTHER_ORDER, "ray"), (CARRIED_ORDER, "ray"), (CARRIED_ORDER, "local")],
    ids=["token budget, sliding windows and split by Ray", "carried windows by Ray", "carried windows"],
)
@pytest.mark.usefixtures("ray_session")
def test_a_feed_keeps_to_every_option_of_the_order(monkeypatch, dataset, order, kind):
    monkeypatch.setattr(ray_feed, "BATCHES_PER_TASK", 2)
    place = {"epoch": 1, "first_batch": 5, "rank": 1, "world_size": 2}
    expected = list(itertools.islice(iter_batches(dataset, order, **place), 45))
    stream = feed.iter_training_batches(dataset, order, feed=kind, **place)
    fed = list(itertools.islice(stream, len(expected)))
    stream.close()
    assert_same(fed, expected)
    assert {batch.epoch for batch in fed} >= {1, 2}
    assert (order.windows == "carried") == any(batch.goes_on is not None and batch.goes_on.any() for batch in fed)


class Unread(SequenceDataset):
    """Lets nobody read a shard."""

    def read_shard(self, name: str, *, timestamps: bool = False) -> SequenceShard:
        raise AssertionError(f"{name} was read, timestamps={timestamps}")


ORDERS = {
    "paper": ORDER,
    "without the first item": dataclasses.replace(ORDER, first_item_is_target=False),
    "sliding": dataclasses.replace(ORDER, windows="sliding", stride=3),
    "global_time": dataclasses.replace(ORDER, split=OTHER_ORDER.split),
    "tokens": dataclasses.replace(ORDER, tokens=30),
}


@pytest.mark.parametrize("name", ORDERS)
@pytest.mark.usefixtures("ray_session")
def test_this_process_counts_batches_exactly_and_reads_no_shard_for_it(dataset, name):
    order = ORDERS[name]
    batches_of = ray_feed._batch_counter(Unread(dataset.url), order, {})
    for epoch in range(3):
        for group, members in enumerate(group_shards(dataset.shard_names, order, epoch)):
            windows = TrainingWindows([read_for_training(dataset, member, order) for member in members], order)
            assert batches_of(members, epoch, group) == len(plan_batches(windows.positions, order, epoch, group)[1])


@pytest.mark.usefixtures("ray_session")
def test_a_ray_feed_without_a_window_is_refused(tmp_path):
    nothing = write_dataset(str(tmp_path), [[1], [2]], 2, shards=2)
    for changes in ({}, {"tokens": 30}):
        order = dataclasses.replace(ORDER, first_item_is_target=False, **changes)
        with pytest.raises(DataQualityError, match="no user has an interaction to train on, of 2"):
            next(feed.iter_training_batches(nothing, order, rank=0, world_size=1, feed="ray"))


def test_a_rank_feeds_itself_where_a_group_of_shards_fits(monkeypatch, dataset):
    by_ray = object()
    monkeypatch.setattr(ray_feed, "iter_batches_by_ray", lambda *_, **__: by_ray)
    needed = feed.group_bytes(dataset, ORDER)
    assert needed == int(dataset.manifest["interactions"] * 2 / 5) * 8
    assert feed.group_bytes(dataset, OTHER_ORDER) == 2 * needed, "timestamps take as much as items"
    monkeypatch.setattr(feed, "LOCAL_BYTES", needed)
    assert feed.iter_training_batches(dataset, ORDER, rank=0, world_size=1) is not by_ray
    monkeypatch.setattr(feed, "LOCAL_BYTES", needed - 1)
    assert feed.iter_training_batches(dataset, ORDER, rank=0, world_size=1) is by_ray


def test_an_error_in_the_feeding_thread_is_raised_where_batches_are_used():
    def broken() -> Iterator[int]:
        yield 1
        raise IntegrityError("part-00003.parquet is missing")

    stream = feed._ahead(broken())
    assert next(stream) == 1
    with pytest.raises(IntegrityError, match="part-00003"):
        next(stream)


def test_a_closed_feed_leaves_no_thread_behind():
    stream = feed._ahead(itertools.count())
    assert next(stream) == 0
    (thread,) = (thread for thread in threading.enumerate() if thread.name == "feed")
    stream.close()
    thread.join(timeout=60)
    assert not thread.is_alive()
