"""Splits against a slow truth user by user, and the audit against leaks put in by hand."""

import dataclasses
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist.data.batches import DataOrder, TrainingWindows, iter_evaluation_batches, plan_sizes
from lrurec_dist.data.sequences import SequenceShard
from lrurec_dist.data.splits import PARTS, Split, describe_split, resolve_split, trains
from lrurec_dist.errors import ConfigError, LrurecError
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
    assert plan_sizes(shard, order).tolist() == windows.sizes.tolist()
    assert set(shard.item_ids[trains(shard, split.bounds(shard))].tolist()) == training
    assert training_counts([shard], split, 63).nonzero()[0].tolist() == sorted(training)


def test_timestamps_are_read_only_where_the_split_needs_them(tmp_path):
    dataset = write_dataset(str(tmp_path), [[1, 2], [3]], 3, shards=1, timestamps=[[4, 9], [7]])
    (name,) = dataset.shard_names
    assert dataset.read_shard(name).timestamps is None
    assert dataset.read_shard(name, timestamps=True).timestamps.tolist() == [4, 9, 7]
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
