"""Sliding and carried windows and token budgets: the same guarantees as the plain order, each against a slow truth."""

import dataclasses
import itertools
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import PAD_ID
from lrurec_dist.data import batches
from lrurec_dist.data.batches import (
    DataOrder,
    TrainingBatch,
    count_batches,
    iter_batches,
    plan_batches,
    untrained_targets,
)
from lrurec_dist.data.sequences import LengthHistogram, SequenceDataset
from lrurec_dist.data.splits import Split
from lrurec_dist.data.windows import chain_windows, slide_windows
from tests.datasets import write_dataset

MAX_LENGTH, STRIDE, TOKENS = 6, 2, 40
ORDER = DataOrder(seed=5, shards_mixed=2, global_batch_size=7, max_length=MAX_LENGTH, first_item_is_target=True)
SLIDING = {"windows": "sliding", "stride": STRIDE}
CARRIED = {"windows": "carried"}
OPTIONS = {
    "sliding": SLIDING,
    "tokens": {"tokens": TOKENS},
    "sliding, tokens": {**SLIDING, "tokens": TOKENS},
    "sliding, tokens, no first, global time": {
        **SLIDING,
        "tokens": TOKENS,
        "first_item_is_target": False,
        "split": Split(kind="global_time", train_until=11, test_from=15),
    },
    "carried": CARRIED,
    "carried, no first, global time": {
        **CARRIED,
        "first_item_is_target": False,
        "split": Split(kind="global_time", train_until=20, test_from=22),
    },
}
LENGTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17, 24, 25, 40, 3, 3, 9, 6, 2]


def make_sequences() -> list[list[int]]:
    """Sequences in which no item occurs twice, so that an item says where it came from."""
    counter = itertools.count(1)
    return [[next(counter) for _ in range(length)] for length in LENGTHS]


def training_parts(order: DataOrder) -> list[list[int]]:
    if order.split.kind == "global_time":  # times are places
        return [sequence[: order.split.train_until] for sequence in make_sequences()]
    return [sequence[:-2] if len(sequence) > 2 else sequence for sequence in make_sequences()]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    return write_dataset(str(tmp_path_factory.mktemp("options")), make_sequences(), sum(LENGTHS), shards=5)


def order_of(options: str) -> DataOrder:
    return dataclasses.replace(ORDER, **OPTIONS[options])


def epoch_of(dataset: SequenceDataset, order: DataOrder, *, epoch: int = 0, **place: Any) -> list[TrainingBatch]:
    """One rank's batches of a whole epoch."""
    stream = iter_batches(dataset, order, epoch=epoch, **{"first_batch": 0, "rank": 0, "world_size": 1, **place})
    return list(itertools.takewhile(lambda batch: batch.epoch == epoch, stream))


def pairs_of(batch: TrainingBatch) -> list[list[tuple[int, int]]]:
    """(input, target) of each row's positions, without what is padding in both."""
    rows = (zip(*row, strict=True) for row in zip(batch.item_ids.tolist(), batch.targets.tolist(), strict=True))
    return [[pair for pair in row if pair != (PAD_ID, PAD_ID)] for row in rows]


@settings(deadline=None)  # a loaded machine is slow now and then
@given(lengths=st.lists(st.integers(0, 60), max_size=8), max_length=st.integers(2, 12), data=st.data())
def test_sliding_windows_are_cut_from_the_end_one_stride_at_a_time(lengths, max_length, data):
    stride = data.draw(st.integers(1, max_length))
    expected = []
    for user, length in enumerate(lengths):
        end = length
        while end > max_length:
            expected.append((user, end, stride))
            end -= stride
        if end:
            expected.append((user, end, end))
    found = slide_windows(np.array(lengths, dtype=np.int64), max_length, stride)
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


@pytest.mark.parametrize("first_item_is_target", [True, False])
@pytest.mark.parametrize("stride", [1, STRIDE, MAX_LENGTH])
def test_with_sliding_windows_every_interaction_is_a_target_exactly_once(dataset, first_item_is_target, stride):
    options = {**SLIDING, "stride": stride, "first_item_is_target": first_item_is_target}
    order = dataclasses.replace(ORDER, **options)
    seen = Counter(item for batch in epoch_of(dataset, order) for item in batch.targets[batch.targets > 0].tolist())
    skipped = 0 if first_item_is_target else 1
    assert seen == Counter(item for part in training_parts(order) for item in part[skipped:])
    lengths = np.array([len(part) for part in training_parts(order)])
    assert untrained_targets(LengthHistogram.of(lengths), order) == skipped * len(LENGTHS)


@settings(deadline=None)  # a loaded machine is slow now and then
@given(lengths=st.lists(st.integers(0, 60), max_size=8), max_length=st.integers(2, 12))
def test_chained_windows_are_cut_from_the_start_one_after_the_other(lengths, max_length):
    expected = [
        (user, begin, min(begin + max_length, length))
        for user, length in enumerate(lengths)
        for begin in range(0, length, max_length)
    ]
    found = chain_windows(np.array(lengths, dtype=np.int64), max_length)
    assert list(zip(*(values.tolist() for values in found), strict=True)) == expected


@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_a_lane_goes_through_one_user_after_the_other_and_misses_nothing(dataset, first_item_is_target):
    order = dataclasses.replace(ORDER, **CARRIED, first_item_is_target=first_item_is_target)
    skipped = 0 if first_item_is_target else 1
    waiting = Counter(tuple(part) for part in training_parts(order) if len(part) > skipped)
    epoch = epoch_of(dataset, order)
    assert {batch.group for batch in epoch} == {0, 1, 2}
    for group in range(3):
        of_group = [batch for batch in epoch if batch.group == group]
        for lane in range(order.global_batch_size):
            user: list[tuple[int, int]] = []  # (input, target) of one user, from whatever windows
            for batch in of_group:
                assert batch.goes_on.shape == (len(batch.item_ids),) == (order.global_batch_size,)
                row = pairs_of(batch)[lane]
                if not batch.goes_on[lane]:
                    waiting.subtract([whole(user, skipped)] if user else [])
                    user = []
                else:
                    assert row, "what goes on goes somewhere"
                    assert len(user) % MAX_LENGTH == 0, "only a user's last window is short"
                    assert row[0][0] == user[-1][1], "the first input is the interaction before the window"
                user += row
            waiting.subtract([whole(user, skipped)] if user else [])
    assert not any(waiting.values())


def whole(pairs: list[tuple[int, int]], skipped: int) -> tuple[int, ...]:
    """The interactions of which the pairs are all steps."""
    inputs, targets = zip(*pairs, strict=True)
    assert inputs[1:] == targets[:-1]
    assert (inputs[0] == PAD_ID) == (skipped == 0)
    return (*inputs[:skipped], *targets)


def test_where_one_window_holds_a_history_carried_windows_are_those_of_the_paper(dataset):
    for first_item_is_target in (True, False):
        found = []
        for windows in ("paper", "carried"):
            order = dataclasses.replace(ORDER, windows=windows, max_length=40, first_item_is_target=first_item_is_target)
            epoch = epoch_of(dataset, order)
            assert windows == "paper" or not any(batch.goes_on.any() for batch in epoch)
            found.append(Counter(row for batch in epoch for row in map(tuple, pairs_of(batch)) if row))
        assert found[0] == found[1]


@pytest.mark.parametrize("first_item_is_target", [True, False])
def test_a_sliding_window_predicts_from_all_before_or_from_at_least_max_length_minus_stride(dataset, first_item_is_target):
    order = dataclasses.replace(ORDER, **SLIDING, first_item_is_target=first_item_is_target)
    part_of = {item: part for part in training_parts(order) for item in part}
    contexts = set()
    for batch in epoch_of(dataset, order):
        assert batch.item_ids.shape[1] <= MAX_LENGTH
        for row in pairs_of(batch):
            inputs = [item for item, _ in row if item != PAD_ID]
            targets = [target for _, target in row if target != PAD_ID]
            part = part_of[targets[0]]
            first = part.index(targets[0])
            assert targets == part[first : first + len(targets)], "targets follow each other"
            end = first + len(targets) - 1
            assert inputs == part[end - len(inputs) : end], "inputs lead up to the last target"
            context = len(inputs) - len(targets) + 1  # items before the first target
            assert context == first or context >= MAX_LENGTH - STRIDE
            contexts.add(context)
    assert max(contexts) == MAX_LENGTH - STRIDE + 1


@settings(deadline=None)  # a loaded machine is slow now and then
@given(
    positions=st.lists(st.integers(1, MAX_LENGTH), max_size=300),
    tokens=st.integers(MAX_LENGTH, 60),
    seed=st.integers(0, 3),
    sorted_batches=st.sampled_from([1, 3, 256]),
)
def test_a_token_budget_holds_and_puts_every_window_into_one_batch(positions, tokens, seed, sorted_batches):
    lengths = np.array(positions, dtype=np.uint8)
    order = dataclasses.replace(ORDER, tokens=tokens, seed=seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batches, "BATCHES_SORTED", sorted_batches)
        windows, bounds, *_ = plan_batches(lengths, order, 4, 1)
        assert count_batches(lengths, order, 4, 1) == len(bounds)
    members = [windows[begin:end] for begin, end in bounds]
    assert sorted(itertools.chain.from_iterable(part.tolist() for part in members)) == list(range(len(positions)))
    for part in members:
        assert len(part) >= 1
        assert len(part) * int(lengths[part].max()) <= tokens


def test_a_token_budget_leaves_little_padding_and_fills_its_batches():
    lengths = np.minimum(np.random.default_rng(1).geometric(0.05, 20_000), 50)
    order = dataclasses.replace(ORDER, tokens=2000, max_length=50)
    windows, bounds, *_ = plan_batches(lengths, order, 0, 0)
    padded = [(end - begin) * int(lengths[windows[begin:end]].max()) for begin, end in bounds]
    assert sum(padded) < 1.05 * lengths.sum()
    assert np.mean(padded) > 0.95 * order.tokens


def test_bucketed_batches_are_shuffled_and_made_anew_each_epoch():
    lengths = np.random.default_rng(1).integers(1, MAX_LENGTH + 1, 500)
    order = dataclasses.replace(ORDER, tokens=TOKENS)
    plans = [plan_batches(lengths, order, epoch, 0) for epoch in (0, 0, 1)]
    batches_of = [[tuple(windows[begin:end]) for begin, end in bounds] for windows, bounds, *_ in plans]
    assert batches_of[0] == batches_of[1]
    assert not set(batches_of[0]) & set(batches_of[2]), "other members, not the same ones in another order"
    longest = [lengths[list(members)].max() for members in batches_of[0]]
    assert longest != sorted(longest, reverse=True)


@pytest.mark.parametrize("options", OPTIONS)
def test_each_epoch_trains_on_each_target_once(dataset, options):
    order = order_of(options)
    first, second = (
        Counter(row for batch in epoch_of(dataset, order, epoch=epoch) for row in map(tuple, pairs_of(batch)) if row)
        for epoch in (0, 1)
    )
    assert first == second
    assert set(first.values()) == {1}
    targets = Counter(target for row in first for _, target in row if target != PAD_ID)
    assert set(targets.values()) == {1}
    trained = sum(map(len, training_parts(order)))
    lengths = np.array([len(part) for part in training_parts(order)])
    assert targets.total() == trained - untrained_targets(LengthHistogram.of(lengths), order)
    assert set(targets) <= {item for part in training_parts(order) for item in part}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("world_size", [2, 3, 11])  # 11: more ranks than most batches have rows
def test_any_number_of_ranks_sees_the_same_global_batches(dataset, options, world_size):
    order = order_of(options)
    alone = epoch_of(dataset, order, epoch=2)
    ranks = [epoch_of(dataset, order, epoch=2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [len(of_rank) for of_rank in ranks] == [len(alone)] * world_size
    for whole, *parts in zip(alone, *ranks, strict=True):
        assert [row for part in parts for row in pairs_of(part)] == pairs_of(whole)
        if order.windows == "carried":
            assert np.array_equal(np.concatenate([part.goes_on for part in parts]), whole.goes_on)
        assert {(part.num_targets, part.group, part.batch) for part in parts} == {(whole.num_targets, whole.group, whole.batch)}
        assert whole.num_targets == np.count_nonzero(whole.targets)
        assert not order.tokens or whole.item_ids.size <= order.tokens


@pytest.mark.parametrize("options", OPTIONS)
def test_a_place_within_an_epoch_is_where_the_order_goes_on(dataset, options):
    order = order_of(options)
    whole = [*epoch_of(dataset, order, epoch=2), *epoch_of(dataset, order, epoch=3)]
    in_first = sum(batch.epoch == 2 for batch in whole)
    assert in_first > 3
    for first_batch in range(in_first + 1):
        stream = iter_batches(dataset, order, epoch=2, first_batch=first_batch, rank=0, world_size=1)
        for want, got in zip(whole[first_batch:], stream, strict=False):
            assert np.array_equal(got.goes_on, want.goes_on)
            assert (got.epoch, got.group, got.batch, pairs_of(got)) == (want.epoch, want.group, want.batch, pairs_of(want))
