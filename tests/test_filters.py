"""Filters against plain Python, and over nights against a rebuild."""

import itertools
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data import passes
from lrurec_dist.data.filters import ABOVE_CAP, Filters, filter_dataset, near_duplicates
from lrurec_dist.data.sequences import SequenceDataset
from lrurec_dist.errors import ConfigError, DataQualityError
from tests.dirty_log import expected_keys, prepare, ray_is_there, sequences_of, write_parquet

Event = tuple[int, int, int]  # user, item, seconds
Sequences = dict[int, list[int]]

events = st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 12)), min_size=1, max_size=30)
rules = st.builds(
    Filters,
    duplicate_tolerance=st.sampled_from([0, 1_000_000, 2_500_000, 4_000_000]),
    max_user_events=st.sampled_from([0, 3, 6]),
    users_above_cap=st.sampled_from(["capped", "quarantined"]),
    drop_repeats=st.booleans(),
    min_item_count=st.integers(0, 4),
    min_user_events=st.integers(0, 4),
    k_core=st.sampled_from(["once", "until_stable"]),
)


def without_near_duplicates(timeline: list[tuple[int, int]], tolerance: int) -> list[tuple[int, int]]:
    """Of (time, item) in order, those that do not follow the last kept one of their item by at most the tolerance."""
    kept: list[tuple[int, int]] = []
    for time, item in timeline:
        if not any(other == item and time - earlier <= tolerance for earlier, other in kept):
            kept.append((time, item))
    return kept


def by_hand(log: list[Event], keys: list[int], filters: Filters) -> tuple[Sequences, list[Event], dict[str, int]]:
    """The definition, one step after the other: item keys per user, what is quarantined, and how many were dropped why."""
    dropped: Counter[str] = Counter()
    timelines: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for user, item, time in sorted(set(log), key=lambda event: (event[2], keys.index(event[1]))):
        timelines[user].append((time, item))
    left: Sequences = {}
    quarantined: list[Event] = []
    for user, timeline in timelines.items():
        apart = without_near_duplicates(timeline, filters.duplicate_tolerance / 1e6) if filters.duplicate_tolerance else timeline
        dropped["duplicate within log.duplicate_tolerance"] += len(timeline) - len(apart)
        if filters.max_user_events and len(apart) > filters.max_user_events:
            if filters.users_above_cap == "quarantined":
                quarantined += [(user, item, time) for time, item in apart]
                continue
            dropped["beyond a user's last"] += len(apart) - filters.max_user_events
            apart = apart[-filters.max_user_events :]
        left[user] = [item for _, item in apart]
    if filters.drop_repeats:
        once = {user: [item for item, _ in itertools.groupby(items)] for user, items in left.items()}
        dropped["immediate repeat"] += sum(map(len, left.values())) - sum(map(len, once.values()))
        left = once
    while True:
        counts = Counter(item for items in left.values() for item in items)
        fewer = {user: [item for item in items if counts[item] >= filters.min_item_count] for user, items in left.items()}
        fewer = {user: items for user, items in fewer.items() if len(items) >= max(1, filters.min_user_events)}
        if filters.k_core == "once" or fewer == left:
            return fewer, quarantined, dict(dropped)
        left = fewer


def quarantine_of(dataset: SequenceDataset) -> list[Event]:
    names = [name for name in dataset.manifest["files"] if name.startswith("quarantine/")]
    rows = [row for name in names for row in storage.read_table(f"{dataset.url}/{name}").to_pylist()]
    assert all(row["_reason"] == ABOVE_CAP for row in rows)
    return [(row["user_key"], row["item_key"], row["timestamp"] // 1_000_000) for row in rows]


def filtered_of(url: Path, base: SequenceDataset, filters: Filters, parent: Any = None, **options: Any) -> SequenceDataset:
    return filter_dataset(str(url), base, filters, parent, ray_is_there, **options)[0]


def dataset_of(folder: Path, log: list[Event], **options: Any) -> SequenceDataset:
    return prepare(folder / "base", write_parquet(folder / "log", log), drop_duplicates=True, **options)[0]


def of_sequences(sequences: Sequences) -> list[Event]:
    return [(user, item, place) for user, items in sequences.items() for place, item in enumerate(items)]


def counts_in(dataset: SequenceDataset) -> dict[int, int]:
    return dict(zip(dataset.catalogue.keys.to_pylist(), dataset.catalogue.table["count"].to_pylist(), strict=True))


def check(filtered: SequenceDataset, base: SequenceDataset, log: list[Event], filters: Filters) -> None:
    """Sequences, quarantine, catalogue and every count are those of the definition."""
    sequences, quarantined, dropped = by_hand(log, base.catalogue.keys.to_pylist(), filters)
    assert sequences_of(filtered) == sequences
    assert sorted(quarantine_of(filtered)) == sorted(quarantined)
    facts = filtered.manifest
    assert facts["interactions"] == sum(map(len, sequences.values()))
    assert facts["events_quarantined"] == ({ABOVE_CAP: len(quarantined)} if quarantined else {})
    assert facts["users_quarantined"] == len({user for user, _, _ in quarantined})
    rare_or_short = {"of a rare item", "of a short user"}
    added = Counter(facts["events_dropped"])
    added.subtract(base.manifest["events_dropped"])
    assert {reason: n for reason, n in added.items() if n and reason not in rare_or_short} == {
        reason: n for reason, n in dropped.items() if n
    }
    left_out = sum(facts["events_dropped"].values()) + sum(facts["events_quarantined"].values())
    assert facts["rows_read"] + facts["interactions_of_parent"] == facts["interactions"] + left_out
    counts = Counter(item for items in sequences.values() for item in items)
    assert counts_in(filtered) == {**dict.fromkeys(filtered.catalogue.keys.to_pylist(), 0), **counts}


@settings(deadline=None, max_examples=80)
@given(log=events, filters=rules)
def test_what_stays_is_what_the_definition_says(tmp_path_factory, log, filters):
    folder = tmp_path_factory.mktemp("filters")
    base = dataset_of(folder, log)
    if not by_hand(log, base.catalogue.keys.to_pylist(), filters)[0]:
        with pytest.raises(DataQualityError, match="none of"):
            filtered_of(folder / "filtered", base, filters)
        return
    check(filtered_of(folder / "filtered", base, filters), base, log, filters)


@settings(deadline=None, max_examples=40)
@given(nights=st.lists(events, min_size=2, max_size=3), filters=rules)
def test_night_after_night_gives_the_definition_and_the_bytes_of_a_rebuild(tmp_path_factory, nights, filters):
    folder = tmp_path_factory.mktemp("nights")
    logs, parent, catalogue, filtered = [], "", None, None
    nights[0] = [*nights[0], *((user, item, 3 * item) for user in (8, 9) for item in (8, 9)), (8, 8, 99)]
    for night, log in enumerate(nights):
        logs.append(write_parquet(folder / f"log-{night}", log, seed=night))
        base, _ = prepare(folder / f"base-{night}", ",".join(logs), parent=parent, drop_duplicates=True)
        parent = base.url
        so_far = [event for log in nights[: night + 1] for event in log]
        if by_hand(so_far, base.catalogue.keys.to_pylist(), filters)[0]:
            filtered = filtered_of(folder / f"night-{night}", base, filters, catalogue)
            catalogue = filtered.catalogue
            check(filtered, base, so_far, filters)
        else:
            filtered = None
    if filtered is not None:
        rebuilt, _ = prepare(folder / "base", ",".join(logs), parent=parent, rebuild=True, drop_duplicates=True)
        again = filtered_of(folder / "again", rebuilt, filters, catalogue)
        assert again.manifest["files"] == filtered.manifest["files"], "quarantine included"


@settings(deadline=None)
@given(
    log=st.lists(st.tuples(st.integers(0, 2), st.integers(1, 3), st.integers(0, 20)), max_size=40),
    tolerance=st.integers(1, 9),
    scale=st.sampled_from([1, 2**59]),  # the latter: differences beyond 64 bits
)
def test_near_duplicates_are_those_of_a_loop_whatever_the_size_of_times(log, tolerance, scale):
    log = sorted((user, (time - 16) * scale, item) for user, item, time in log)
    found = near_duplicates(*(np.array([row[at] for row in log], dtype=np.int64) for at in (0, 2, 1)), tolerance * scale)
    gone = [log[at] for at in found.tolist()]
    for who in range(3):
        timeline = [(time, item) for user, time, item in log if user == who]
        kept = without_near_duplicates(timeline, tolerance * scale)
        left = Counter(timeline) - Counter((time, item) for user, time, item in gone if user == who)
        assert left == Counter(kept)
    assert len(found) == len(set(found.tolist()))


def test_duplicates_follow_the_last_that_stays_and_a_late_event_decides_anew(tmp_path):
    filters = Filters(duplicate_tolerance=10_000_000)
    base = dataset_of(tmp_path, [(1, 5, 10), (1, 6, 12), (1, 5, 20), (1, 5, 21), (1, 5, 31), (1, 5, 32)])
    times = filtered_of(tmp_path / "one", base, filters)
    shard = times.read_shard(next(name for name in times.shard_names if len(times.read_shard(name).lengths)), timestamps=True)
    assert (shard.timestamps // 1_000_000).tolist() == [10, 12, 21, 32]
    late = write_parquet(tmp_path / "late", [(1, 5, 9)])
    merged, _ = prepare(tmp_path / "merged", f"{tmp_path / 'log'},{late}", parent=base.url, drop_duplicates=True)
    times = filtered_of(tmp_path / "two", merged, filters)
    shard = times.read_shard(next(name for name in times.shard_names if len(times.read_shard(name).lengths)), timestamps=True)
    assert (shard.timestamps // 1_000_000).tolist() == [9, 12, 20, 31], "20 and 31 had been dropped and are back"


def test_a_user_who_crosses_the_cap_leaves_as_a_whole_and_new_events_follow_into_quarantine(tmp_path):
    filters = Filters(max_user_events=3, users_above_cap="quarantined")
    nights = [[(1, 10, 0), (1, 11, 1), (1, 12, 2), (2, 10, 0), (2, 13, 4)], [(1, 13, 5), (1, 10, 0)], [(1, 14, 9), (2, 10, 8)]]
    logs, parent, catalogue, found = [], "", None, []
    for night, log in enumerate(nights):
        logs.append(write_parquet(tmp_path / f"log-{night}", log))
        base, _ = prepare(tmp_path / f"base-{night}", ",".join(logs), parent=parent, drop_duplicates=True)
        filtered = filtered_of(tmp_path / f"night-{night}", base, filters, catalogue)
        parent, catalogue = base.url, filtered.catalogue
        found.append((sequences_of(filtered), sorted(quarantine_of(filtered)), counts_in(filtered)))
    assert found[0] == ({1: [10, 11, 12], 2: [10, 13]}, [], {10: 2, 11: 1, 12: 1, 13: 1})
    whole = [(1, 10, 0), (1, 11, 1), (1, 12, 2), (1, 13, 5)]
    assert found[1] == ({2: [10, 13]}, whole, {10: 1, 11: 0, 12: 0, 13: 1}), "ids stay, without interactions"
    assert found[2] == ({2: [10, 13, 10]}, [*whole, (1, 14, 9)], {10: 2, 11: 0, 12: 0, 13: 1}), "14 was nobody else's"
    assert filtered.manifest["events_quarantined"] == {ABOVE_CAP: 5}
    assert base.manifest["events_quarantined"] == {}


def test_an_item_that_becomes_frequent_brings_its_earlier_interactions_and_keeps_its_id_for_ever(tmp_path):
    nights = [
        {1: [(10, 0), (11, 1)], 2: [(10, 0), (12, 1)], 3: [(10, 5)]},
        {3: [(11, 6), (12, 7)], 4: [(13, 6), (13, 8)]},
        {5: [(13, 9), (12, 9)]},
    ]
    filters = Filters(min_item_count=2)
    logs, parent, catalogue = [], "", None
    known: list[int] = []
    for night, by_user in enumerate(nights):
        rows = [(user, item, time) for user, pairs in by_user.items() for item, time in pairs]
        logs.append(write_parquet(tmp_path / f"log-{night}", rows))
        base, _ = prepare(tmp_path / f"base-{night}", ",".join(logs), parent=parent)
        filtered = filtered_of(tmp_path / f"night-{night}", base, filters, catalogue)
        parent, catalogue = base.url, filtered.catalogue
        assert catalogue.keys.to_pylist()[: len(known)] == known
        known = catalogue.keys.to_pylist()
    assert known == [10, 11, 12, 13]
    assert sequences_of(filtered)[1] == [10, 11], "11 was rare when it came"


FIRST: list[Event] = [(user, item, (user * item) % 7) for user in range(1, 9) for item in range(1, 7) if (user + item) % item < 2]


def test_first_ids_by_count_are_those_of_what_is_kept_and_later_items_are_appended(tmp_path):
    filters = Filters(min_item_count=2, min_user_events=3)
    base = dataset_of(tmp_path, FIRST)
    counted = filtered_of(tmp_path / "counted", base, filters, first_ids="count")
    kept = Counter(item for items in by_hand(FIRST, expected_keys(FIRST), filters)[0].values() for item in items)
    stay = [item for item in expected_keys(FIRST) if Counter(item for _, item, _ in FIRST)[item] >= 2]
    assert counted.catalogue.keys.to_pylist() == sorted(stay, key=lambda item: -kept[item])  # stable: by first time
    assert counted.catalogue.keys.to_pylist() != filtered_of(tmp_path / "appeared", base, filters).catalogue.keys.to_pylist()
    assert counted.manifest["inputs"]["first_ids"] == "count"
    assert sequences_of(counted) == by_hand(FIRST, expected_keys(FIRST), filters)[0]
    more = write_parquet(tmp_path / "more", [(user, 50, 20) for user in range(1, 9)])
    grown, _ = prepare(tmp_path / "grown", f"{tmp_path / 'log'},{more}", parent=base.url, drop_duplicates=True)
    later = filtered_of(tmp_path / "later", grown, filters, counted.catalogue, first_ids="count")
    assert later.catalogue.keys.to_pylist() == [*counted.catalogue.keys.to_pylist(), 50]


@pytest.mark.usefixtures("ray_session")
def test_tasks_and_threads_write_the_same_bytes_and_only_tasks_need_ray(tmp_path, monkeypatch):
    filters = Filters(
        duplicate_tolerance=1_000_000,
        max_user_events=5,
        users_above_cap="quarantined",
        drop_repeats=True,
        min_item_count=2,
        min_user_events=2,
        k_core="until_stable",
    )
    draw = np.random.default_rng(3)
    log = list(zip(*(draw.integers(1, bound, 200).tolist() for bound in (50, 20, 30)), strict=True))
    base = dataset_of(tmp_path, log)
    found, connected = [], []
    for limit, how in ((base.sequence_bytes, "in one process"), (base.sequence_bytes - 1, "by Ray tasks")):
        monkeypatch.setattr(passes, "LOCAL_BYTES", limit)
        url = str(tmp_path / how)
        filtered, _ = filter_dataset(url, base, filters, None, lambda how=how: connected.append(how), first_ids="count")
        check(filtered, base, log, filters)
        assert filtered.manifest["users_quarantined"] > 1
        assert filtered.manifest["filtered"] == how
        found.append(filtered.manifest["files"])
    assert found[0] == found[1]
    assert connected == ["by Ray tasks"]


def test_a_second_call_finds_it_and_other_filters_are_refused(tmp_path):
    base = dataset_of(tmp_path, of_sequences({1: [1, 2, 2], 2: [2, 1]}))
    url = tmp_path / "filtered"
    first = filtered_of(url, base, Filters(drop_repeats=True))
    again, was_there = filter_dataset(str(url), base, Filters(drop_repeats=True), None, ray_is_there)
    assert was_there
    assert again.manifest == first.manifest
    for other in (Filters(min_item_count=2), Filters(drop_repeats=True, max_user_events=9)):
        with pytest.raises(ConfigError, match="filtered in another way"):
            filtered_of(url, base, other)
    with pytest.raises(ConfigError, match="filtered in another way"):
        filtered_of(url, base, Filters(drop_repeats=True), first_ids="count")


def test_what_no_preparation_wrote_is_left_alone(tmp_path):
    base = dataset_of(tmp_path, of_sequences({1: [1, 2, 2], 2: [2, 1]}))
    with pytest.raises(ConfigError, match=r"holds part-0\.parquet, which no preparation wrote"):
        filtered_of(tmp_path / "log", base, Filters(drop_repeats=True))
    assert pq.read_table(tmp_path / "log" / "part-0.parquet").num_rows == 5


def test_a_filtered_dataset_is_no_ground_to_merge_into(tmp_path):
    base = dataset_of(tmp_path, of_sequences({1: [1, 2, 2], 2: [2, 1]}))
    filtered = filtered_of(tmp_path / "filtered", base, Filters(drop_repeats=True))
    with pytest.raises(ConfigError, match=r"was filtered, so what it lacks is not known; give the same log\.duplicate_tolerance"):
        prepare(tmp_path / "night", tmp_path / "log", parent=filtered.url)
