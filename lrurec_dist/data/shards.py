"""Events of many users into one shard's sequences: hashing, ordering in time, merging with what is there."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.data.catalogue import as_keys
from lrurec_dist.data.sequences import LENGTHS, MIN_EVALUABLE, LengthHistogram

TIE_RULE = "timestamp, then item_id"
BEYOND_LAST = "beyond a user's last"  # why an event was dropped
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio, as in splitmix64


@dataclass(frozen=True)
class ShardReport:
    """What a shard holds and what became of the events that went into it.

    `items` has one row per item that occurs: item_id, count, first_seen, last_seen.
    """

    file: str
    entry: dict[str, Any]
    items: pa.Table
    histogram: LengthHistogram
    dropped: dict[str, int]
    events_in: int


@dataclass(frozen=True, kw_only=True)
class MergeRules:
    """What is kept of the events of a user.

    `drop_duplicates`: events of one user, item and time count once. `max_user_events`: of a user's
    events only the last so many are kept; 0 keeps all. `deleted_users`, `deleted_items`: user keys
    and item ids of whom nothing is kept; None for none.
    """

    drop_duplicates: bool
    max_user_events: int
    deleted_users: pa.Array | None
    deleted_items: np.ndarray | None


def shard_of(keys: pa.Array | pa.ChunkedArray, shards: int) -> np.ndarray:
    """int32 shard of each user: the hash of the key, modulo shards."""
    return (hash_keys(keys) % np.uint64(shards)).astype(np.int32)


def hash_keys(keys: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """uint64 hash of each user key that no library version changes."""
    keys = keys.combine_chunks() if isinstance(keys, pa.ChunkedArray) else keys
    if pa.types.is_integer(keys.type):
        return mixed(keys.to_numpy().astype(np.int64).view(np.uint64))
    encoded = keys.dictionary_encode()
    return _hash_text(encoded.dictionary.cast(pa.large_string()))[encoded.indices.to_numpy()]


def mixed(value: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64: every bit of the input moves every bit of the output."""
    value = value + _MULTIPLIER
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = value ^ (value >> np.uint64(31))
    return mixed


def _hash_text(keys: pa.Array) -> np.ndarray:
    """uint64 hash of each string's UTF-8 bytes, eight bytes at a time over all strings at once."""
    _, offsets, data = keys.buffers()
    if len(keys) == 0:
        return np.empty(0, dtype=np.uint64)
    edges = np.frombuffer(offsets, dtype=np.int64)[keys.offset : keys.offset + len(keys) + 1]
    text = np.frombuffer(data, dtype=np.uint8) if data is not None else np.empty(0, np.uint8)
    text = np.concatenate([text, np.zeros(8, np.uint8)])  # the last word of the last string
    length = np.diff(edges)
    hashes = mixed(length.astype(np.uint64))
    with np.errstate(over="ignore"):
        for begin in range(0, int(length.max()), 8):
            left = np.flatnonzero(length > begin)
            words = np.lib.stride_tricks.sliding_window_view(text, 8)[edges[left] + begin].view("<u8")[:, 0]
            unused = np.maximum(8 - (length[left] - begin), 0).astype(np.uint64)
            hashes[left] = mixed(hashes[left] ^ ((words << (unused * np.uint64(8))) if unused.any() else words))
    return hashes


def partition(events: pa.Table, shard: np.ndarray, shards: int) -> list[pa.Table]:
    """The rows of each shard, in the order they came in."""
    order = np.argsort(shard.astype(np.uint16), kind="stable")  # radix sort
    counts = np.bincount(shard, minlength=shards)
    sorted_events = events.take(pa.array(order))
    return [sorted_events.slice(end - count, count) for end, count in zip(np.cumsum(counts), counts, strict=True)]


def order_of(users: np.ndarray, timestamps: np.ndarray, item_ids: np.ndarray) -> np.ndarray:
    """The permutation that sorts events by (user, timestamp, item_id); users are numbered from 0.

    Where user and time fit 63 bits together, one sort of one integer does nearly all of it.
    """
    if len(users) == 0:
        return np.empty(0, dtype=np.int64)
    first = int(timestamps.min())
    span = int(timestamps.max()) - first
    unit = next((unit for unit in (1_000_000, 1_000) if span % unit == 0 and not ((timestamps - first) % unit).any()), 1)
    bits = (span // unit).bit_length()
    if bits + int(users.max()).bit_length() > 62:
        return np.lexsort((item_ids, timestamps, users))
    key = (users.astype(np.int64) << bits) | ((timestamps - first) // unit)
    order = np.argsort(key)
    key = key[order]
    tied = np.flatnonzero(np.concatenate([[False], key[1:] == key[:-1]]) | np.concatenate([key[1:] == key[:-1], [False]]))
    among = order[tied]
    order[tied] = among[np.lexsort((item_ids[among], key[tied]))]
    return order


def write_shard(url: str, name: str, new: pa.Table, parent: pa.Table | None, rules: MergeRules) -> ShardReport:
    """Merge new events into a shard's sequences and write them.

    Args:
        url: the dataset's directory.
        name: the shard's file below it.
        new: user_key, item_id, timestamp of the new events, in any order.
        parent: user_key, item_ids, timestamps of the sequences that are there; None for none.
        rules: what is kept.

    What is written depends on the set of events alone: not on their order, nor on which of them
    came with the parent.
    """
    keys, users, item_ids, timestamps = _events_of(new, parent)
    events_in = len(users)
    dropped = {}
    kept = np.ones(events_in, dtype=bool)
    if rules.deleted_users is not None:
        gone = pc.is_in(keys, value_set=as_keys(rules.deleted_users, keys.type)).to_numpy(zero_copy_only=False)[users]
        dropped["of a deleted user"] = int(gone.sum())
        kept &= ~gone
    if rules.deleted_items is not None:
        gone = kept & np.isin(item_ids, rules.deleted_items)
        dropped["of a deleted item"] = int(gone.sum())
        kept &= ~gone
    if not kept.all():
        users, item_ids, timestamps = users[kept], item_ids[kept], timestamps[kept]
    order = order_of(users, timestamps, item_ids)
    users, item_ids, timestamps = users[order], item_ids[order], timestamps[order]
    if rules.drop_duplicates and len(users):
        same = (users[1:] == users[:-1]) & (timestamps[1:] == timestamps[:-1]) & (item_ids[1:] == item_ids[:-1])
        dropped["duplicate"] = int(same.sum())
        if dropped["duplicate"]:
            first = np.concatenate([[True], ~same])
            users, item_ids, timestamps = users[first], item_ids[first], timestamps[first]
    lengths = np.bincount(users, minlength=len(keys))
    if rules.max_user_events and lengths.max(initial=0) > rules.max_user_events:
        recent = among_last(lengths, rules.max_user_events)
        dropped[BEYOND_LAST] = int((~recent).sum())
        users, item_ids, timestamps = users[recent], item_ids[recent], timestamps[recent]
        lengths = np.minimum(lengths, rules.max_user_events)
    return write_sequences(url, name, keys, lengths, item_ids, timestamps, dropped, events_in)


def among_last(lengths: np.ndarray, count: int) -> np.ndarray:
    """bool for each interaction of users' sequences, given end to end: it is one of its user's last `count`."""
    from_end = np.repeat(np.cumsum(lengths), lengths) - np.arange(lengths.sum())
    recent: np.ndarray = from_end <= count
    return recent


def write_sequences(
    url: str,
    name: str,
    keys: pa.Array,
    lengths: np.ndarray,
    item_ids: np.ndarray,
    timestamps: np.ndarray,
    dropped: dict[str, int],
    events_in: int,
) -> ShardReport:
    """Write users' sequences, given end to end, to a shard's file; a user without any is left out."""
    if (lengths == 0).any():
        keys, lengths = keys.filter(pa.array(lengths > 0)), lengths[lengths > 0]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int64())
    table = pa.table(
        {
            "user_key": keys,
            "item_ids": pa.LargeListArray.from_arrays(offsets, pa.array(item_ids.astype(np.int32))),
            "timestamps": pa.LargeListArray.from_arrays(offsets, pa.array(timestamps)),
        }
    )
    entry = storage.write_table(storage.join(url, name), table, near=("timestamps.list.element",))
    summary = summarise(item_ids, timestamps)
    return ShardReport(
        name, entry, summary, LengthHistogram.of(lengths), {reason: n for reason, n in dropped.items() if n}, events_in
    )


def save_lengths(reports: list[ShardReport], url: str) -> dict[str, Any]:
    """Write the histogram of each shard's lengths below the dataset `url`; returns the manifest entry of the file.

    One row per shard and length: shard (its place among the sequence files, in order), length, users.
    """
    histograms = [report.histogram for report in sorted(reports, key=lambda report: report.file)]
    shard = np.repeat(np.arange(len(histograms)), [len(histogram.lengths) for histogram in histograms])
    lengths, users = (np.concatenate(parts) for parts in zip(*histograms, strict=True))
    return storage.write_table(storage.join(url, LENGTHS), pa.table({"shard": shard, "length": lengths, "users": users}))


def describe_shards(reports: list[ShardReport]) -> dict[str, Any]:
    """What a manifest says of users and interactions."""
    lengths, users = LengthHistogram.total(report.histogram for report in reports)
    at_most = np.cumsum(users)
    ranks = {p: max(1, -(-p * int(at_most[-1]) // 100)) for p in (0, 10, 50, 90, 99, 100)}
    items = [report.items for report in reports if report.items.num_rows]
    return {
        "interactions": int((lengths * users).sum()),
        "users": int(users.sum()),
        "users_evaluable": int(users[lengths >= MIN_EVALUABLE].sum()),
        "users_too_short_to_evaluate": int(users[lengths < MIN_EVALUABLE].sum()),
        "length_percentiles": {str(p): int(lengths[np.searchsorted(at_most, rank)]) for p, rank in ranks.items()},
        "time_range": [
            min(pc.min(table["first_seen"]).as_py() for table in items),
            max(pc.max(table["last_seen"]).as_py() for table in items),
        ],
    }


def _events_of(new: pa.Table, parent: pa.Table | None) -> tuple[pa.Array, np.ndarray, np.ndarray, np.ndarray]:
    """Distinct keys in ascending order, and for each event its place among them, item_id and timestamp."""
    user_keys = new["user_key"]
    item_ids = new["item_id"].cast(pa.int32()).to_numpy()
    timestamps = new["timestamp"].to_numpy()
    per_event = user_keys
    if parent is not None and parent.num_rows:
        items = parent["item_ids"].combine_chunks()
        lengths = np.diff(items.offsets.to_numpy())
        keys_before = parent["user_key"]
        if len(user_keys) == 0:
            user_keys = user_keys.cast(keys_before.type)
        user_keys = pa.chunked_array([*user_keys.chunks, *keys_before.chunks], keys_before.type)
        item_ids = np.concatenate([item_ids, items.flatten().to_numpy().astype(item_ids.dtype)])
        timestamps = np.concatenate([timestamps, parent["timestamps"].combine_chunks().flatten().to_numpy()])
        repeat = np.concatenate([np.ones(len(per_event), np.int64), lengths])
    else:
        repeat = None
    encoded = user_keys.combine_chunks().dictionary_encode()
    ascending = pc.sort_indices(encoded.dictionary).to_numpy()
    place = np.empty(len(ascending), dtype=np.int64)
    place[ascending] = np.arange(len(ascending))
    users = place[encoded.indices.to_numpy()]
    return (
        encoded.dictionary.take(pa.array(ascending)),
        users if repeat is None else np.repeat(users, repeat),
        item_ids,
        timestamps,
    )


def summarise(item_ids: np.ndarray, timestamps: np.ndarray) -> pa.Table:
    """One row per item that occurs: item_id, count, first_seen, last_seen."""
    size = int(item_ids.max(initial=0)) + 1
    counts = np.bincount(item_ids, minlength=size)
    first = np.full(size, np.iinfo(np.int64).max)
    last = np.full(size, np.iinfo(np.int64).min)
    np.minimum.at(first, item_ids, timestamps)
    np.maximum.at(last, item_ids, timestamps)
    present = np.flatnonzero(counts)
    return pa.table({"item_id": present, "count": counts[present], "first_seen": first[present], "last_seen": last[present]})
