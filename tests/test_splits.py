"""Splits against a slow truth user by user, and the audit against leaks put in by hand."""

import dataclasses
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.data.batches import DataOrder, TrainingWindows, iter_evaluation_batches, window_positions
from lrurec_dist.data.sequences import SequenceDataset, SequenceShard
from lrurec_dist.data.splits import PARTS, Split, SplitBounds, audit_split, describe_split, resolve_split, trains
from lrurec_dist.errors import ConfigError, DataQualityError, LrurecError
from lrurec_dist.evaluate.evaluation import training_counts
from tests.datasets import write_dataset

GLOBAL = Split(kind="global_time", train_until=10, test_from=20)
ORDER = DataOrder(seed=0, shards_mixed=1, global_batch_size=8, max_length=3, first_item_is_target=True)
DAY = 86_400_000_000

# few distinct times, so that ties and events exactly at a cut are common
users_of_times = st.lists(st.lists(st.integers(0, 30), max_size=9).map(sorted), max_size=7)
splits = st.one_of(
    st.just(Split()),
    st.tuples(st.integers(1, 28), st.integers(1, 5)).map(
        lambda cut: Split(kind="global_time", train_until=cut[0], test_from=cut[0] + cut[1])
    ),
)


def make_shard(times: list[list[int]]) -> SequenceShard:
    """Items are numbered through, so that an item says where it came from."""
    offsets = np.cumsum([0, *map(len, times)])
    return SequenceShard(
        user_keys=pa.array([f"user-{index}" for index in range(len(times))], pa.string()),
        offsets=offsets,
        item_ids=np.arange(1, offsets[-1] + 1),
        timestamps=np.array([time for user in times for time in user], dtype=np.int64),
    )


def parts_of(times: list[int], split: Split) -> dict[str, list[int]]:
    """Places of one user's interactions by part, decided one by one."""
    parts: dict[str, list[int]] = {"training": [], "validation": [], "test": []}
    for place, time in enumerate(times):
        if split.kind == "global_time":
            part = "training" if time < split.train_until else "validation" if time < split.test_from else "test"
        elif len(times) < 3 or place < len(times) - 2:
            part = "training"
        else:
            part = "validation" if place == len(times) - 2 else "test"
        parts[part].append(place)
    return parts


@settings(deadline=None)  # a loaded machine is slow now and then
@given(times=users_of_times, split=splits)
def test_every_interaction_belongs_to_the_one_part_that_the_slow_truth_gives_it(times, split):
    bounds = split.bounds(make_shard(times))
    for user, of_user in enumerate(times):
        truth = parts_of(of_user, split)
        assert list(range(bounds.train_end[user])) == truth["training"]
        for part in PARTS:
            begin, end = bounds.part(part)
            assert list(range(begin[user], end[user])) == truth[part]


@settings(deadline=None)  # a loaded machine is slow now and then
@given(times=users_of_times, split=splits, part=st.sampled_from(PARTS))
def test_a_user_is_asked_once_for_the_first_interaction_of_a_part_after_all_before_it(times, split, part):
    shard = make_shard(times)
    asked = {}
    for batch in iter_evaluation_batches(shard, split=split, part=part, max_length=50, batch_size=3):
        for row, user in enumerate(batch.users.tolist()):
            assert user not in asked
            asked[user] = (batch.item_ids[row][batch.item_ids[row] > 0].tolist(), batch.targets[row])
    expected = {}
    for user, of_user in enumerate(times):
        items = shard.item_ids[shard.offsets[user] : shard.offsets[user + 1]].tolist()
        places = parts_of(of_user, split)[part]
        if places and places[0] > 0:
            expected[user] = (items[: places[0]], items[places[0]])
    assert asked == expected


@settings(deadline=None)  # a loaded machine is slow now and then
@given(times=users_of_times, split=splits, sliding=st.booleans())
def test_windows_and_counts_hold_training_interactions_alone(times, split, sliding):
    shard = make_shard(times)
    order = dataclasses.replace(ORDER, split=split, **({"windows": "sliding", "stride": 2} if sliding else {}))
    training = {
        int(shard.offsets[user]) + place + 1
        for user, of_user in enumerate(times)
        for place in parts_of(of_user, split)["training"]
    }
    windows = TrainingWindows([shard], order)
    item_ids, targets = windows.collate(np.arange(len(windows)))
    seen = Counter(targets[targets > 0].tolist())
    assert set(seen) | set(item_ids[item_ids > 0].tolist()) <= training
    assert not sliding or seen == Counter(training)
    assert window_positions(shard, order).tolist() == windows.positions.tolist()
    assert set(shard.item_ids[trains(shard, split.bounds(shard))].tolist()) == training
    assert training_counts([shard], split, 63).nonzero()[0].tolist() == sorted(training)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> SequenceDataset:
    """Six users whose every interaction has a reason; cuts at 10 and 20."""
    users = [
        ([1, 2, 3, 4, 5], [1, 9, 10, 19, 20]),  # one interaction exactly at each cut
        ([1, 6], [10, 12]),  # nothing before the cut: new in both parts' sense, but without a test target
        ([7, 2, 8], [15, 20, 21]),  # new: without history in validation, with one in test
        ([2, 2, 9], [5, 6, 30]),  # no validation target; item 9 is trained by nobody
        ([3, 1, 2], [4, 4, 4]),  # trains alone; all at one time
        ([5], [25]),  # without history in test
    ]
    sequences, times = map(list, zip(*users, strict=True))
    return write_dataset(str(tmp_path_factory.mktemp("splits")), sequences, 10, shards=2, timestamps=times)


def test_the_audit_of_a_global_time_split_counts_what_the_hand_counts(dataset):
    assert audit_split(dataset, GLOBAL) == {
        "users": 6,
        "interactions": 17,
        "train_users": 3,  # users 0, 3, 4
        "train_interactions": 7,
        "items_never_trained": 6,  # 4, 5, 6, 7, 8, 9; item 10 occurs nowhere
        "validation_interactions": 5,  # 3 and 4 of user 0, both of user 1, 7 of user 2
        "validation_targets": 1,  # user 0
        "validation_new_users": 0,
        "validation_new_items": 0,  # item 3 is in the training part of user 4
        "validation_without_history": 2,  # users 1, 2
        "validation_ties": 0,
        "test_interactions": 5,
        "test_targets": 3,  # users 0, 2, 3
        "test_new_users": 1,  # user 2
        "test_new_items": 2,  # items 5 and 9; 2 is trained
        "test_without_history": 1,  # user 5
        "test_ties": 0,
        "interactions_at_train_until": 2,
        "interactions_at_test_from": 2,
    }


def test_the_audit_of_leave_last_out_counts_ties_at_the_cut(dataset):
    assert audit_split(dataset, Split()) == {
        "users": 6,
        "interactions": 17,
        "train_users": 6,
        "train_interactions": 9,
        "items_never_trained": 3,  # 4, 8, 9
        "validation_interactions": 4,
        "validation_targets": 4,  # users 0, 2, 3, 4
        "validation_new_users": 0,
        "validation_new_items": 1,  # item 4
        "validation_without_history": 0,
        "validation_ties": 1,  # user 4
        "test_interactions": 4,
        "test_targets": 4,
        "test_new_users": 0,
        "test_new_items": 2,  # items 8, 9
        "test_without_history": 0,
        "test_ties": 1,  # user 4
    }


def test_an_audit_is_the_same_for_any_number_of_shards_and_fits_a_manifest(tmp_path):
    draw = np.random.default_rng(3)
    times = [sorted(draw.integers(0, 30, draw.integers(1, 12)).tolist()) for _ in range(40)]
    items = [draw.integers(1, 26, len(user)).tolist() for user in times]
    for split in (Split(), GLOBAL):
        found = [
            audit_split(write_dataset(str(tmp_path / f"{split.kind}-{shards}"), items, 25, shards, times), split)
            for shards in (1, 3, 60)  # 60: some without anybody
        ]
        assert found[0] == found[1] == found[2]
        assert found[0]["test_targets"] > 5
        assert json.loads(json.dumps(found[0])) == found[0]


@pytest.mark.parametrize("split", [Split(), GLOBAL], ids=["leave_last_out", "global_time"])
@pytest.mark.parametrize("bound", ["train_end", "test_begin"])
@pytest.mark.parametrize("shift", [-1, 1])
def test_bounds_that_are_wrong_by_one_do_not_pass_the_audit(monkeypatch, dataset, split, bound, shift):
    audit_split(dataset, split)
    right = Split.bounds

    def leaking(self: Split, shard: SequenceShard) -> SplitBounds:
        bounds = right(self, shard)
        return dataclasses.replace(bounds, **{bound: getattr(bounds, bound) + shift})

    monkeypatch.setattr(Split, "bounds", leaking)
    with pytest.raises(DataQualityError, match=rf"part-0000\d.parquet: split.kind={split.kind}: .*this is a bug"):
        audit_split(dataset, split)


@pytest.mark.parametrize(("bound", "user", "shift", "what"), [
    ("train_end", 0, 1, "1 interactions of the validation or test part would train"),
    ("train_end", 0, -1, "1 interactions of the training part would not train"),
    ("test_begin", 0, 1, "1 interactions of the test part would be history or target of validation"),
    ("test_begin", 0, -1, "1 interactions from before the test part would be its target"),
    ("train_end", 0, 9, "the parts of 1 users lie outside their sequences"),
])  # fmt: skip
def test_the_audit_names_a_single_leaking_user(monkeypatch, dataset, bound, user, shift, what):
    right = Split.bounds

    def leaking(self: Split, shard: SequenceShard) -> SplitBounds:
        bounds = right(self, shard)
        shifts = shift * (np.arange(len(bounds.lengths)) == user)
        return dataclasses.replace(bounds, **{bound: getattr(bounds, bound) + shifts})

    monkeypatch.setattr(Split, "bounds", leaking)
    with pytest.raises(DataQualityError, match=what):
        audit_split(dataset, GLOBAL)


def test_sequences_that_are_not_in_time_order_do_not_pass_the_audit(tmp_path):
    dataset = write_dataset(str(tmp_path), [[1, 2, 3], [4, 5]], 5, shards=1, timestamps=[[7, 8, 9], [3, 2]])
    with pytest.raises(DataQualityError, match="1 interactions are older than the one before them"):
        audit_split(dataset, Split())


def test_timestamps_are_read_only_where_the_split_needs_them(dataset):
    (name, *_) = dataset.shard_names
    assert dataset.read_shard(name).timestamps is None
    assert dataset.read_shard(name, timestamps=True).timestamps.tolist() == [1, 9, 10, 19, 20, 15, 20, 21, 4, 4, 4]
    with pytest.raises(LrurecError, match="read without timestamps"):
        GLOBAL.bounds(dataset.read_shard(name))
    assert not Split().needs_timestamps


@dataclasses.dataclass
class Described:
    """As much of a dataset as settings are resolved against."""

    manifest: dict[str, Any]
    url: str = "the-dataset"


LAST = 1_763_683_199_000_000  # 2025-11-20T23:59:59Z
TEN_DAYS = Described({"time_unit": "us", "time_range": [LAST - 10 * DAY, LAST]})
POSITIONS = Described({"time_unit": "position", "time_range": [0, 999]})


@pytest.mark.parametrize(
    ("text", "moment"),
    [
        ("1d", LAST + 1 - DAY),
        ("1.5d", LAST + 1 - DAY * 3 // 2),
        ("36h", LAST + 1 - DAY * 3 // 2),
        ("30m", LAST + 1 - DAY // 48),
        ("10%", LAST - DAY + 1),
        ("2025-11-20", LAST - DAY + 1_000_000),
        ("2025-11-20T00:00:00Z", LAST - DAY + 1_000_000),
        ("2025-11-20T01:00:00+01:00", LAST - DAY + 1_000_000),
        (str(LAST - DAY), LAST - DAY),
    ],
)
def test_a_moment_can_be_given_in_several_ways(text, moment):
    split = resolve_split(TEN_DAYS, kind="global_time", train_until=text, test_from=str(LAST))
    assert split == Split(kind="global_time", train_until=moment, test_from=LAST)


def test_positions_can_be_cut_at_a_position_or_a_share():
    split = resolve_split(POSITIONS, kind="global_time", train_until="20%", test_from="900")
    assert split == Split(kind="global_time", train_until=800, test_from=900)
    assert describe_split(split, "position") == "global_time, training before 800, test from 900"


@pytest.mark.parametrize(
    ("dataset_facts", "train_until", "test_from", "message"),
    [
        (TEN_DAYS, "20d", "1d", r"split\.train_until=20d: .*lie from \d+ to \d+; choose a moment after the first"),
        (TEN_DAYS, "2d", "2026-11-20", r"split\.test_from=2026-11-20: .*not after the last"),
        (TEN_DAYS, "1d", "2d", r"split\.train_until=1d: .*not before split\.test_from=2d.*nothing would validate"),
        (TEN_DAYS, "1d", "1d", r"nothing would validate"),
        (TEN_DAYS, "2025-13-01", "1d", r"split\.train_until=2025-13-01: is no time; write 2026-11-20"),
        (POSITIONS, "2d", "1d", r"split\.train_until=2d: this log has positions, not times; .*from 0 to 999"),
    ],
)
def test_a_moment_that_leaves_a_part_empty_or_means_nothing_is_refused(dataset_facts, train_until, test_from, message):
    with pytest.raises(ConfigError, match=message):
        resolve_split(dataset_facts, kind="global_time", train_until=train_until, test_from=test_from)


def test_a_split_says_its_moments_as_people_write_them():
    split = resolve_split(TEN_DAYS, kind="global_time", train_until="2025-11-19", test_from="2025-11-20T12:00:00Z")
    described = "global_time, training before 2025-11-19T00:00:00+00:00, test from 2025-11-20T12:00:00+00:00"
    assert describe_split(split, "us") == described
    assert describe_split(resolve_split(TEN_DAYS, kind="leave_last_out", train_until="", test_from=""), "us") == "leave_last_out"
