import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import PAD_ID, storage
from lrurec_dist.data.batches import (
    DataOrder,
    TrainingBatch,
    TrainingWindows,
    count_windows,
    group_shards,
    iter_batches,
    iter_evaluation_batches,
    pad_left,
    plan_sizes,
    untrained_targets,
)
from lrurec_dist.data.sequences import SCHEMA_VERSION, LengthHistogram, SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Split
from lrurec_dist.data.windows import cut_windows
from lrurec_dist.errors import DataQualityError

MAX_LENGTH = 4
# Lengths around every rule: too short to evaluate, below, at and beyond twice the window plus the two held out.
LENGTHS_PER_SHARD = [[1, 2, 3, 4], [5, 6, 7], [8, 9, 10, 11], [12, 18, 23], [1, 1]]
ORDER = DataOrder(seed=5, shards_mixed=2, global_batch_size=6, max_length=MAX_LENGTH, first_item_is_target=True)

Row = tuple[tuple[int, ...], tuple[int, ...]]  # inputs and targets of one window, both MAX_LENGTH long


def make_sequences() -> list[list[list[int]]]:
    """Sequences per shard; no item occurs twice, so that an item says where it came from."""
    counter = itertools.count(1)
    return [[[next(counter) for _ in range(length)] for length in lengths] for lengths in LENGTHS_PER_SHARD]


def make_shard(sequences: list[list[int]]) -> SequenceShard:
    return SequenceShard(
        user_keys=pa.array([f"user-{index}" for index in range(len(sequences))]),
        offsets=np.cumsum([0, *map(len, sequences)]),
        item_ids=np.array([item for sequence in sequences for item in sequence], dtype=np.int64),
    )


def write_shards(url: str, shards: list[list[list[int]]]) -> SequenceDataset:
    for index, sequences in enumerate(shards):
        keys = pa.array([f"user-{index}-{row}" for row in range(len(sequences))], pa.large_string())
        table = pa.table({"user_key": keys, "item_ids": pa.array(sequences, pa.large_list(pa.int32()))})
        storage.write_table(f"{url}/sequences/part-{index:05d}.parquet", table)
    interactions = sum(len(sequence) for sequences in shards for sequence in sequences)
    storage.commit(url, {"schema_version": SCHEMA_VERSION, "interactions": interactions})
    return SequenceDataset(url)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_shards(str(tmp_path_factory.mktemp("dataset")), make_sequences())


def epoch_of(
    dataset: SequenceDataset, *, epoch: int = 0, rank: int = 0, world_size: int = 1, **changes: Any
) -> list[TrainingBatch]:
    """One rank's batches of a whole epoch, group after group."""
    order = dataclasses.replace(ORDER, **changes)
    stream = iter_batches(dataset, order, epoch=epoch, first_batch=0, rank=rank, world_size=world_size)
    return list(itertools.takewhile(lambda batch: batch.epoch == epoch, stream))


def repad(row: np.ndarray) -> tuple[int, ...]:
    return (PAD_ID,) * (MAX_LENGTH - len(row)) + tuple(row.tolist())


def rows_of(batch: TrainingBatch) -> list[Row]:
    return [(repad(inputs), repad(targets)) for inputs, targets in zip(batch.item_ids, batch.targets, strict=True)]


def rows_of_paper(sequence: list[int], max_length: int, *, first_item_is_target: bool = True) -> list[Row]:
    """The authors' training rows of one user, line by line: cut windows, shift by one, pad on the left."""
    training = sequence[:-2] if len(sequence) >= 3 else sequence
    if len(training) < 2 * max_length:
        windows = [training]
    else:
        windows = [training[start : start + max_length] for start in range(len(training) - max_length, -1, -max_length)]
    rows = []
    for window in windows:
        labels, tokens = window[-max_length:], window[:-1][-max_length:]
        if not first_item_is_target and len(tokens) < len(labels):
            labels = labels[1:]
        if labels:
            padded = [(PAD_ID,) * (max_length - len(part)) + tuple(part) for part in (tokens, labels)]
            rows.append((padded[0], padded[1]))
    return rows


def all_rows_of_paper(**options: bool) -> list[Row]:
    return [row for shard in make_sequences() for sequence in shard for row in rows_of_paper(sequence, MAX_LENGTH, **options)]


def paper_windows(length: int, max_length: int) -> list[list[int]]:
    """Targets of each window of a training part, as positions in it, newest window first."""
    if length < 2 * max_length:
        return [list(range(length))[-max_length:]] if length else []
    windows, end = [], length
    while end >= max_length:
        windows.append(list(range(end - max_length, end)))
        end -= max_length
    return windows


@settings(deadline=None)  # a loaded machine is slow now and then
@given(lengths=st.lists(st.integers(0, 60), max_size=8), max_length=st.integers(2, 12))
def test_windows_are_cut_as_the_paper_cuts_them(lengths, max_length):
    sequence, begin, end = cut_windows(np.array(lengths, dtype=np.int64), max_length)
    cut = [(user, list(range(first, last))) for user, first, last in zip(sequence, begin, end, strict=True)]
    assert cut == [(user, window) for user, length in enumerate(lengths) for window in paper_windows(length, max_length)]


@settings(deadline=None)  # a loaded machine is slow now and then
@given(lengths=st.lists(st.integers(0, 60), max_size=8), max_length=st.integers(2, 12))
def test_untrained_targets_are_those_outside_every_window(lengths, max_length):
    outside = sum(length - len({item for window in paper_windows(length, max_length) for item in window}) for length in lengths)
    order = dataclasses.replace(ORDER, max_length=max_length)
    assert untrained_targets(LengthHistogram.of(np.array(lengths, dtype=np.int64)), order) == outside


def test_rows_are_padded_on_the_left_only():
    padded = pad_left([np.array([1, 2, 3]), np.array([], dtype=np.int64), np.array([4])], 3)
    assert padded.tolist() == [[1, 2, 3], [0, 0, 0], [0, 0, 4]]
    assert padded.dtype == np.int64
    assert pad_left([], 5).shape == (0, 5)


@pytest.mark.parametrize("first_item_is_target", [True, False])
@pytest.mark.parametrize("shards_mixed", [1, 2, 64])
@pytest.mark.parametrize("global_batch_size", [1, 6, 1000])
def test_an_epoch_holds_each_row_of_the_paper_exactly_once(dataset, first_item_is_target, shards_mixed, global_batch_size):
    epoch = epoch_of(
        dataset, first_item_is_target=first_item_is_target, shards_mixed=shards_mixed, global_batch_size=global_batch_size
    )
    rows = Counter(row for batch in epoch for row in rows_of(batch))
    assert rows == Counter(all_rows_of_paper(first_item_is_target=first_item_is_target))


def test_without_the_first_item_as_target_a_window_that_knows_no_item_before_loses_one_target():
    with_first, without = (all_rows_of_paper(first_item_is_target=first) for first in (True, False))
    lost = {item for _, targets in with_first for item in targets} - {item for _, targets in without for item in targets}
    starts = {targets[inputs.count(PAD_ID) - 1] for inputs, targets in with_first if PAD_ID in inputs}
    assert lost == starts


@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_a_target_is_the_next_input(dataset, first_item_is_target):
    checked = 0
    for batch in epoch_of(dataset, first_item_is_target=first_item_is_target):
        assert batch.item_ids.dtype == batch.targets.dtype == np.int64
        followed = batch.item_ids[:, 1:] != PAD_ID
        checked += followed.sum()
        if first_item_is_target:
            assert np.array_equal(batch.targets[:, :-1][followed], batch.item_ids[:, 1:][followed])
        else:  # a window's first item is input alone: nothing is predicted where it is what comes next
            predicted = followed & (batch.targets[:, :-1] != PAD_ID)
            assert np.array_equal(batch.targets[:, :-1][predicted], batch.item_ids[:, 1:][predicted])
            assert np.all(batch.item_ids[batch.targets != PAD_ID] != PAD_ID)
    assert checked > 20


@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_padding_is_a_prefix_and_no_longer_than_the_longest_window_needs(dataset, first_item_is_target):
    for batch in epoch_of(dataset, first_item_is_target=first_item_is_target):
        for values in (batch.item_ids, batch.targets):
            real = values != PAD_ID
            assert np.all(real[:, 1:] >= real[:, :-1])
        assert np.any(batch.targets[:, 0] != PAD_ID)
        assert np.all(batch.targets[:, -1] != PAD_ID)


def test_all_batches_of_a_group_but_its_last_are_full(dataset):
    for group in range(3):
        sizes = [len(batch.item_ids) for batch in epoch_of(dataset) if batch.group == group]
        assert sizes[:-1] == [6] * (len(sizes) - 1)
        assert 1 <= sizes[-1] <= 6


@pytest.mark.parametrize("world_size", [2, 3, 5, 7])  # 7: more ranks than rows in a batch
@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_any_number_of_ranks_sees_the_same_global_batches(dataset, world_size, first_item_is_target):
    alone = epoch_of(dataset, epoch=2, first_item_is_target=first_item_is_target)
    ranks = [
        epoch_of(dataset, epoch=2, rank=rank, world_size=world_size, first_item_is_target=first_item_is_target)
        for rank in range(world_size)
    ]
    assert [len(batches_of_rank) for batches_of_rank in ranks] == [len(alone)] * world_size
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [row for part in parts for row in rows_of(part)] == rows_of(whole)
        assert {(part.num_targets, part.epoch, part.batch) for part in parts} == {(whole.num_targets, whole.epoch, whole.batch)}
        sizes = [len(part.item_ids) for part in parts]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_num_targets_counts_the_targets_of_the_global_batch(dataset, first_item_is_target):
    for batch in epoch_of(dataset, first_item_is_target=first_item_is_target):
        assert batch.num_targets == np.count_nonzero(batch.targets)
        assert isinstance(batch.num_targets, int)


def test_an_epoch_trains_on_every_target_that_is_not_held_out_or_left_over(dataset):
    lengths = np.concatenate([Split().bounds(make_shard(sequences)).train_end for sequences in make_sequences()])
    expected = lengths.sum() - untrained_targets(LengthHistogram.of(lengths), ORDER)
    assert sum(batch.num_targets for batch in epoch_of(dataset)) == expected


def test_the_same_seed_and_epoch_repeat_the_order_and_others_change_it(dataset):
    def order(**arguments: int) -> tuple[Row, ...]:
        return tuple(row for batch in epoch_of(dataset, **arguments) for row in rows_of(batch))

    assert order(epoch=1, seed=3) == order(epoch=1, seed=3)
    orders = {order(epoch=epoch, seed=seed) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9
    assert len({frozenset(Counter(rows).items()) for rows in orders}) == 1


def test_the_windows_of_a_single_shard_are_shuffled_anew_each_epoch(tmp_path):
    single = write_shards(str(tmp_path), make_sequences()[3:4])
    orders = {tuple(row for batch in epoch_of(single, epoch=epoch) for row in rows_of(batch)) for epoch in range(5)}
    assert len(orders) > 1


@pytest.mark.parametrize(("shards", "shards_mixed"), [(1, 1), (5, 2), (6, 2), (5, 64)])
def test_every_epoch_groups_each_shard_once_in_an_order_of_its_own(shards, shards_mixed):
    names = [f"part-{index}" for index in range(shards)]
    order = dataclasses.replace(ORDER, shards_mixed=shards_mixed)
    epochs = [group_shards(names, order, epoch) for epoch in range(6)]
    for groups in epochs:
        assert sorted(itertools.chain.from_iterable(groups)) == names
        assert all(len(group) == shards_mixed for group in groups[:-1])
        assert all(group == sorted(group) for group in groups)
    assert shards <= shards_mixed or len({str(groups) for groups in epochs}) > 1
    assert epochs[2] == group_shards(names, order, 2)


def test_an_epoch_mixes_the_windows_of_a_group(dataset):
    shard_of_item = {item: index for index, shard in enumerate(make_sequences()) for sequence in shard for item in sequence}
    mixed = [{shard_of_item[row[1][-1]] for row in rows_of(batch)} for batch in epoch_of(dataset, shards_mixed=64)]
    assert any(len(shards) > 1 for shards in mixed)


@pytest.mark.parametrize("part", ["validation", "test"])
@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("sequences", make_sequences(), ids=["1-4", "5-7", "8-11", "12-23", "nobody evaluable"])
def test_leave_last_out_asks_each_evaluable_user_once_for_the_right_item(sequences, part, batch_size):
    held_out = {"validation": 2, "test": 1}[part]
    asked = {}
    shard = make_shard(sequences)
    for batch in iter_evaluation_batches(shard, split=Split(), part=part, max_length=MAX_LENGTH, batch_size=batch_size):
        assert 1 <= len(batch.users) <= batch_size
        assert batch.item_ids.shape[1] <= MAX_LENGTH
        assert np.any(batch.item_ids[:, 0] != PAD_ID)
        for row, user in enumerate(batch.users.tolist()):
            assert user not in asked
            distinct = batch.history_ids[batch.history_rows == row]
            asked[user] = (repad(batch.item_ids[row]), batch.targets[row], distinct.tolist())
    assert asked == {
        user: (repad(np.array(sequence[:-held_out][-MAX_LENGTH:])), sequence[-held_out], sequence[:-held_out])
        for user, sequence in enumerate(sequences)
        if len(sequence) >= 3
    }


def test_an_item_that_recurs_is_listed_once_in_the_full_history():
    shard = make_shard([[9, 9, 2, 9, 3, 3, 4, 7], [8, 8, 8]])
    (batch,) = iter_evaluation_batches(shard, split=Split(), part="test", max_length=2, batch_size=10)
    pairs = list(zip(batch.history_rows.tolist(), batch.history_ids.tolist(), strict=True))
    assert pairs == [(0, 8), (1, 2), (1, 3), (1, 4), (1, 9)]
    assert batch.users.tolist() == [1, 0]
    assert batch.item_ids.tolist() == [[8, 8], [3, 4]]
    assert batch.targets.tolist() == [8, 7]


def test_evaluation_batches_follow_history_length():
    shard = make_shard([list(range(1, length + 1)) for length in (9, 3, 7, 3, 5)])
    users = [
        batch.users.tolist() for batch in iter_evaluation_batches(shard, split=Split(), part="test", max_length=50, batch_size=2)
    ]
    assert users == [[1, 3], [4, 2], [0]]


@pytest.mark.parametrize("windows", ["paper", "carried"])
@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_windows_are_counted_without_being_cut(first_item_is_target, windows):
    for lengths in [*LENGTHS_PER_SHARD, [0], []]:
        shard = make_shard([list(range(1, length + 1)) for length in lengths])
        order = dataclasses.replace(ORDER, first_item_is_target=first_item_is_target, windows=windows)
        cut = TrainingWindows([shard], order)
        assert plan_sizes(shard, order).tolist() == cut.sizes.tolist()
        assert (cut.sizes.sum() if windows == "carried" else len(cut.sizes)) == len(cut)


@settings(deadline=None)  # a loaded machine is slow now and then
@given(
    lengths=st.lists(st.integers(0, 60), max_size=12),
    windows=st.sampled_from([{}, {"windows": "sliding", "stride": 3}]),
    first_item_is_target=st.booleans(),
)
def test_a_histogram_of_lengths_counts_windows_and_untrained_targets(lengths, windows, first_item_is_target):
    order = dataclasses.replace(ORDER, first_item_is_target=first_item_is_target, **windows)
    whole = TrainingWindows([make_shard([list(range(1, length + 1)) for length in lengths])], order)
    training = Split().bounds_of_lengths(np.array(lengths, dtype=np.int64)).train_end
    histogram = LengthHistogram.of(training)
    assert count_windows(histogram, order) == len(whole)
    assert untrained_targets(histogram, order) == training.sum() - whole.num_targets.sum()


@pytest.mark.parametrize("first_batch", [1, 3, 5, 100])
def test_a_place_within_an_epoch_is_where_the_order_goes_on(dataset, first_batch):
    whole = [*epoch_of(dataset, epoch=2), *epoch_of(dataset, epoch=3)]
    begin = min(first_batch, len(epoch_of(dataset, epoch=2)))
    stream = iter_batches(dataset, ORDER, epoch=2, first_batch=first_batch, rank=0, world_size=1)
    for want, got in zip(whole[begin:], stream, strict=False):
        assert (got.epoch, got.group, got.batch, rows_of(got)) == (want.epoch, want.group, want.batch, rows_of(want))


def test_a_dataset_without_a_training_window_is_refused_and_not_searched_for_ever(tmp_path):
    nothing = write_shards(str(tmp_path), [[[1]], [[2]]])
    stream = iter_batches(
        nothing, dataclasses.replace(ORDER, first_item_is_target=False), epoch=0, first_batch=0, rank=0, world_size=1
    )
    with pytest.raises(DataQualityError, match=r"no user has an interaction to train on, of 2"):
        next(stream)
