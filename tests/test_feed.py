"""The feed by Ray Data against the data order computed directly."""

import dataclasses
import itertools

import numpy as np
import pytest

from lrurec_dist.data import feed
from lrurec_dist.data.batches import TrainingBatch, iter_group_batches
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import IntegrityError
from tests.datasets import chain_sequences, write_dataset

OPTIONS = {"seed": 5, "shards_mixed": 2, "global_batch_size": 9, "max_length": 4, "first_item_is_target": True}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return write_dataset(str(tmp_path_factory.mktemp("feed")), chain_sequences(70, 30), 30, shards=5)


def epoch_of(dataset: SequenceDataset, epoch: int, rank: int, world_size: int) -> list[TrainingBatch]:
    """An epoch's batches of one rank, group after group."""
    place = {"epoch": epoch, "rank": rank, "world_size": world_size}
    return [batch for group in range(3) for batch in iter_group_batches(dataset, group=group, **place, **OPTIONS)]


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (0, 5), (2, 3)])
@pytest.mark.usefixtures("ray_session")
def test_the_feed_yields_the_batches_of_the_order_across_epochs(monkeypatch, dataset, rank, world_size):
    monkeypatch.setattr(feed, "BATCHES_PER_TASK", 2)
    monkeypatch.setattr(feed, "TASKS_PER_EXECUTION", 7)  # executions of 1, 2, 4, 7, 7, … tasks end anywhere in an epoch
    first_epoch, epochs = 3, 5
    place = {"rank": rank, "world_size": world_size}
    expected = [batch for epoch in range(first_epoch, first_epoch + epochs) for batch in epoch_of(dataset, epoch, **place)]
    stream = feed.iter_training_batches(dataset.url, first_epoch=first_epoch, **place, **OPTIONS)
    fed = list(itertools.islice(stream, len(expected)))
    stream.close()
    for got, want in zip(fed, expected, strict=True):
        for field in dataclasses.fields(TrainingBatch):
            assert np.array_equal(getattr(got, field.name), getattr(want, field.name)), (field.name, want.epoch, want.batch)


def test_the_feed_of_a_place_without_a_dataset_fails_at_once(tmp_path):
    stream = feed.iter_training_batches(f"{tmp_path}/nowhere", first_epoch=0, rank=0, world_size=1, **OPTIONS)
    with pytest.raises(IntegrityError):
        next(stream)
