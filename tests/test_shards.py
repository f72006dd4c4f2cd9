"""Hashing, ordering and merging of one shard's events, against plain Python."""

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data import shards
from lrurec_dist.data.shards import MergeRules, order_of, partition, shard_of, write_shard
from lrurec_dist.errors import ConfigError

Event = tuple[str, int, int]  # user, item_id, timestamp
RULES = MergeRules(drop_duplicates=True, max_user_events=0, deleted_users=None, deleted_items=None)
events = st.lists(st.tuples(st.sampled_from(["a", "b", "cc", "ü"]), st.integers(1, 5), st.integers(-3, 6)), max_size=40)


def as_table(rows: list[Event]) -> pa.Table:
    columns = list(zip(*rows, strict=True)) or [[], [], []]
    kinds = {"user_key": pa.large_string(), "item_id": pa.int32(), "timestamp": pa.int64()}
    return pa.table({name: pa.array(list(column), kind) for (name, kind), column in zip(kinds.items(), columns, strict=True)})


def merged(url: Path, new: list[Event], parent: pa.Table | None = None, **rules: Any) -> tuple[Any, pa.Table]:
    values = {name: getattr(RULES, name) for name in RULES.__dataclass_fields__} | rules
    report = write_shard(str(url), "part.parquet", as_table(new), parent, MergeRules(**values))
    return report, storage.read_table(str(url / "part.parquet"))


def by_hand(rows: list[Event], limit: int = 0) -> dict[str, list[tuple[int, int]]]:
    """Each user's distinct (timestamp, item_id) in order, the last `limit`."""
    found = defaultdict(set)
    for user, item, time in rows:
        found[user].add((time, item))
    return {user: sorted(pairs)[-limit:] for user, pairs in sorted(found.items(), key=lambda pair: pair[0].encode())}


def as_lists(table: pa.Table) -> dict[str, list[tuple[int, int]]]:
    return {row["user_key"]: list(zip(row["timestamps"], row["item_ids"], strict=True)) for row in table.to_pylist()}


@settings(deadline=None)
@given(old=events, new=events, limit=st.sampled_from([0, 1, 3]))
def test_a_merge_gives_the_bytes_of_a_rebuild_whatever_came_when(tmp_path_factory, old, new, limit):
    folder = tmp_path_factory.mktemp("shard")
    _, parent = merged(folder / "parent", old, max_user_events=limit)
    report, _ = merged(folder / "merged", new, parent, max_user_events=limit)
    rebuilt, table = merged(folder / "rebuilt", [*new[::-1], *old], max_user_events=limit)
    assert (folder / "merged/part.parquet").read_bytes() == (folder / "rebuilt/part.parquet").read_bytes()
    assert as_lists(table) == by_hand([*old, *new], limit)
    assert report.items == rebuilt.items
    kept = int(report.histogram.lengths @ report.histogram.users)
    assert kept == sum(map(len, as_lists(table).values())) == report.items["count"].to_numpy().sum()
    assert kept + sum(rebuilt.dropped.values()) == rebuilt.events_in == len(old) + len(new)


@settings(deadline=None)
@given(rows=events, doomed=st.sets(st.sampled_from(["a", "cc", "nobody"])), items=st.sets(st.integers(1, 6), min_size=1))
def test_deleted_users_and_items_leave_nothing_and_are_counted(tmp_path_factory, rows, doomed, items):
    folder = tmp_path_factory.mktemp("shard")
    _, parent = merged(folder / "parent", rows[::2])
    deletion = {"deleted_users": pa.array(sorted(doomed), pa.large_string()), "deleted_items": np.array(sorted(items))}
    report, table = merged(folder / "merged", rows[1::2], parent, **deletion)
    assert as_lists(table) == by_hand([row for row in rows if row[0] not in doomed and row[1] not in items])
    assert sum(report.dropped.values()) == report.events_in - report.items["count"].to_numpy().sum()


def test_duplicates_are_kept_when_they_are_meant(tmp_path):
    report, table = merged(tmp_path, [("a", 1, 5), ("a", 1, 5), ("a", 2, 5)], drop_duplicates=False)
    assert as_lists(table) == {"a": [(5, 1), (5, 1), (5, 2)]}
    assert report.dropped == {}


def test_an_empty_shard_is_written_and_read(tmp_path):
    report, table = merged(tmp_path, [])
    assert table.num_rows == report.events_in == report.items.num_rows == 0


def test_a_deleted_user_key_of_another_type_is_an_error(tmp_path):
    new = pa.table({"user_key": [1], "item_id": pa.array([1], pa.int32()), "timestamp": [1]})
    rules = MergeRules(drop_duplicates=True, max_user_events=0, deleted_users=pa.array(["u1"]), deleted_items=None)
    with pytest.raises(ConfigError, match="'u1'"):
        write_shard(str(tmp_path), "part.parquet", new, None, rules)


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 9)), max_size=50),
    scale=st.sampled_from([1, 7, 1_000, 1_000_000, 2**57]),
    offset=st.sampled_from([0, -(2**61)]),
)
def test_events_are_ordered_by_user_time_and_item(rows, scale, offset):
    users, times, items = (np.array([row[at] for row in rows], dtype=np.int64) for at in range(3))
    times = times * scale + offset
    expected = sorted(zip(users.tolist(), times.tolist(), items.tolist(), strict=True))
    order = order_of(users, times, items)
    assert sorted(order.tolist()) == list(range(len(rows)))
    assert list(zip(users[order].tolist(), times[order].tolist(), items[order].tolist(), strict=True)) == expected


@settings(deadline=None)
@given(keys=st.lists(st.one_of(st.text(max_size=40), st.text("ab\x00é", max_size=20)), max_size=20))
def test_the_hash_of_a_text_depends_on_its_bytes_alone(keys):
    whole = pa.array(["before", *keys, "behind"], pa.large_string())
    found = shards._hash_text(whole.slice(1, len(keys)))
    alone = [int(shards._hash_text(pa.array([key], pa.large_string()))[0]) for key in keys]
    assert found.tolist() == alone
    assert len(set(alone)) == len({key.encode() for key in keys}), "and different texts differ"


def test_shards_of_keys_are_the_same_in_every_version():
    assert shard_of(pa.array([0, 1, -1, 2**63 - 1]), 1000).tolist() == [535, 465, 936, 39]
    assert shard_of(pa.array(["", "a", "user-00017", "Žluťoučký kůň"], pa.large_string()), 1000).tolist() == [535, 555, 754, 147]


@pytest.mark.parametrize("keys", [pa.array(range(40_000)), pa.array([f"user-{n}" for n in range(40_000)])])
def test_users_spread_evenly_over_shards(keys):
    counts = np.bincount(shard_of(keys, 16), minlength=16)
    assert counts.min() > 2300
    assert counts.max() < 2700


def test_a_partition_keeps_every_row_once_and_in_order():
    shard = np.array([2, 0, 2, 1, 0, 2], dtype=np.int32)
    parts = partition(pa.table({"row": range(6)}), shard, 4)
    assert [part["row"].to_pylist() for part in parts] == [[1, 4], [3], [0, 2, 5], []]
