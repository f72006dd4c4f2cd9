"""Filters that need all events: near duplicates, users above a cap, immediate repeats, rare items, short users.

What they remove today may belong to the sequences tomorrow: an item becomes frequent, a late event comes between two
repeats or before the first of some duplicates, which one stays then is another. So they do not touch the dataset that
nights are merged into; they make a second one of it.
"""

import functools
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.data.catalogue import DELETED, Catalogue, save_catalogue
from lrurec_dist.data.numbering import with_figures
from lrurec_dist.data.passes import Passes, passes_for
from lrurec_dist.data.sequences import LENGTHS, SequenceDataset, SequenceShard, read_shard, remove_leftovers
from lrurec_dist.data.shards import BEYOND_LAST, ShardReport, among_last, describe_shards, save_lengths, write_sequences
from lrurec_dist.errors import ConfigError, DataQualityError

ABOVE_CAP = "user above log.max_user_events"  # why a user's events were quarantined
_NEAR, _ABOVE, _BEYOND, _REPEAT = 1, 2, 3, 4  # outcomes of an interaction; 0: it may stay
_DROPPED = {_NEAR: "duplicate within log.duplicate_tolerance", _BEYOND: BEYOND_LAST, _REPEAT: "immediate repeat"}


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What is left out, one after the other.

    `duplicate_tolerance`: of a user's interactions with an item, those at most so long after the last
    that stays go; in the dataset's unit of time. `max_user_events`: a user with more than so many of what
    is left by then keeps the latest, or goes to quarantine as a whole (`users_above_cap`); 0 is no limit.
    `drop_repeats`: of one item several times in a row the first interaction stays. `min_item_count`:
    interactions an item needs, `min_user_events`: those a user needs, of items that stay. `k_core`:
    `once` looks at items, then at users; `until_stable` goes on until both hold.
    """

    duplicate_tolerance: int = 0
    max_user_events: int = 0
    users_above_cap: Literal["capped", "quarantined"] = "capped"
    drop_repeats: bool = False
    min_item_count: int = 0
    min_user_events: int = 0
    k_core: Literal["once", "until_stable"] = "once"

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        by_user = self.duplicate_tolerance > 0 or self.max_user_events > 0 or self.drop_repeats
        return by_user or self.min_item_count > 1 or self.min_user_events > 1


@dataclass(frozen=True)
class _Events:
    """A shard's interactions, whose they are, and what became of each before items and users are counted."""

    shard: SequenceShard
    user: np.ndarray  # (interactions,) int64
    outcome: np.ndarray  # (interactions,) int8

    def kept(self, stays: np.ndarray, filters: Filters) -> np.ndarray:
        """(interactions,) bool: of an item that stays, of a user who has enough of those."""
        kept = (self.outcome == 0) & stays[self.shard.item_ids]
        enough = np.bincount(self.user[kept], minlength=len(self.shard.lengths)) >= filters.min_user_events
        result: np.ndarray = kept & enough[self.user]
        return result


@dataclass(frozen=True)
class _Written:
    """A filtered shard, and the users who were quarantined from it."""

    shard: ShardReport
    users_quarantined: int
    events_quarantined: int
    files: dict[str, dict[str, Any]]


def filter_dataset(
    url: str,
    base: SequenceDataset,
    filters: Filters,
    parent: Catalogue | None,
    connect: Callable[[], None],
    first_ids: Literal["appearance", "count"] = "appearance",
    resources: Mapping[str, float] | None = None,
) -> tuple[SequenceDataset, bool]:
    """What of `base` passes the filters, as a committed dataset at `url`.

    A task holds one shard and a few numbers an item; the result depends on `base` alone, not on how it came about.
    Users above the cap lie in `quarantine/`: user_key, item_key, timestamp, _reason.

    Args:
        url: the dataset's directory.
        base: everything there is.
        filters: what is left out.
        parent: catalogue of an earlier filtered dataset, whose items keep their ids; items that stay now and had none
            get the next ids in the order of the base's. An item that stayed once and does not now
            keeps its id, without interactions.
        connect: called before Ray is used, which is where the sequences exceed LOCAL_BYTES.
        first_ids: without a parent, ids in the order of the base's, or by the count of what is kept, ties in that order.
        resources: what its Ray tasks reserve besides their CPUs.

    Returns:
        The dataset, and whether it was there already.

    Raises:
        ConfigError: another dataset lies at `url`, or something that is none.
        DataQualityError: nothing passes.
    """
    inputs = {
        **base.manifest["inputs"],
        "base": base.identity,
        "filters": asdict(filters),
        "ids_of": parent and parent.fingerprint,
        "first_ids": first_ids,
    }
    if storage.is_committed(url):
        there = SequenceDataset(url, verify=True)
        if there.manifest["inputs"] != inputs:
            raise ConfigError(
                f"dataset.dir={url}: holds a dataset that was filtered in another way; choose another, or delete it"
            )
        return there, True
    started = time.perf_counter()
    remove_leftovers(url)
    passes = passes_for(base.sequence_bytes, connect, resources)
    stays = _items_that_stay(passes, base, filters)
    counts = _counts(passes, base, filters, stays) if first_ids == "count" and parent is None else None
    catalogue, new_id = _extended(base.catalogue, stays, counts, parent)
    keys = base.catalogue.keys if filters.users_above_cap == "quarantined" else None
    write = functools.partial(
        _write_filtered, url=url, place=base.place, filters=filters, stays=stays, new_id=new_id, base_keys=keys
    )
    written = list(passes.each(write, [(name,) for name in base.shard_names]))
    reports = [each.shard for each in written]
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    quarantined = sum(each.events_quarantined for each in written)
    before = base.manifest["interactions"]
    if not any(len(report.histogram.lengths) for report in reports):
        raise DataQualityError(
            f"dataset.min_item_count={filters.min_item_count}, dataset.min_user_events={filters.min_user_events}: none of "
            f"{before:,} interactions passes; {quarantined:,} are quarantined, dropped are {dict(dropped)}; lower them, or raise "
            "log.max_user_events"
        )
    gone = pc.equal(base.catalogue.table["status"], DELETED)
    deleted = catalogue.ids_of(base.catalogue.keys.filter(gone))
    catalogue = with_figures(catalogue, reports, deleted[deleted > 0])
    figures = describe_shards(reports)
    if before != figures["interactions"] + dropped.total() + quarantined:
        raise DataQualityError(f"{url}: the counts of interactions do not add up; this is a bug, please report it")
    known = {"catalogue/part-00000.parquet": save_catalogue(catalogue, storage.join(url, "catalogue"))}
    for each in written:
        known |= {each.shard.file: each.shard.entry, **each.files}
    known[LENGTHS] = save_lengths(reports, url)
    seconds, filter_s = base.manifest["seconds"], round(time.perf_counter() - started, 3)
    description: dict[str, Any] = {name: value for name, value in base.manifest.items() if name != "files"}
    description |= figures | {
        "inputs": inputs,
        "tie_rule": f"{base.manifest['tie_rule']} of the unfiltered dataset",
        "events_dropped": dict(sorted((Counter(base.manifest["events_dropped"]) + dropped).items())),
        "events_quarantined": {ABOVE_CAP: quarantined} if quarantined else {},
        "users_quarantined": sum(each.users_quarantined for each in written),
        "num_items": catalogue.num_items,
        "new_items": catalogue.num_items - (parent.num_items if parent else 0),
        "catalogue_fingerprint": catalogue.fingerprint,
        "bytes_read": base.manifest["bytes_read"] + base.sequence_bytes,
        "bytes_written": base.manifest["bytes_written"] + sum(entry["bytes"] for entry in known.values()),
        "seconds": seconds | {"filter": filter_s, "all": round(seconds["all"] + filter_s, 3)},
        "filtered": passes.place,
    }
    description.pop("same_as", None)
    storage.commit(url, description, known)
    return SequenceDataset(url), False


def _items_that_stay(passes: Passes, base: SequenceDataset, filters: Filters) -> np.ndarray:
    """(num_items + 1,) bool; passes over the shards until nothing changes, or the two that `once` takes."""
    stays = np.ones(base.num_items + 1, dtype=bool)
    stays[0] = False
    asked = filters if filters.k_core == "until_stable" else replace(filters, min_user_events=0)
    while True:
        still = stays & (_counts(passes, base, asked, stays) >= max(1, filters.min_item_count))
        if filters.k_core == "once" or (still == stays).all():
            return still
        stays = still


def _counts(passes: Passes, base: SequenceDataset, filters: Filters, stays: np.ndarray) -> np.ndarray:
    """(num_items + 1,) int64: interactions of each item that are kept."""
    counts = np.zeros(base.num_items + 1, dtype=np.int64)
    count = functools.partial(_count_kept, place=base.place, filters=filters, stays=stays)
    for ids, found in passes.each(count, [(name,) for name in base.shard_names]):
        counts[ids] += found
    return counts


def _count_kept(name: str, place: str, filters: Filters, stays: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The items of which a shard keeps interactions, and how many."""
    events = _events_of(read_shard(place, name, timestamps=filters.duplicate_tolerance > 0), filters)
    counts = np.bincount(events.shard.item_ids[events.kept(stays, filters)])
    ids = np.flatnonzero(counts)
    return ids, counts[ids]


def _events_of(shard: SequenceShard, filters: Filters) -> _Events:
    user = np.repeat(np.arange(len(shard.lengths)), shard.lengths)
    outcome = np.zeros(len(user), dtype=np.int8)
    if filters.duplicate_tolerance:
        assert shard.timestamps is not None
        outcome[near_duplicates(user, shard.item_ids, shard.timestamps, filters.duplicate_tolerance)] = _NEAR
    if filters.max_user_events:
        left = np.flatnonzero(outcome == 0)
        lengths = np.bincount(user[left], minlength=len(shard.lengths))
        if filters.users_above_cap == "quarantined":
            outcome[left[(lengths > filters.max_user_events)[user[left]]]] = _ABOVE
        else:
            outcome[left[~among_last(lengths, filters.max_user_events)]] = _BEYOND
    if filters.drop_repeats:
        left = np.flatnonzero(outcome == 0)
        whose, what = user[left], shard.item_ids[left]
        outcome[left[1:][(whose[1:] == whose[:-1]) & (what[1:] == what[:-1])]] = _REPEAT
    return _Events(shard, user, outcome)


def near_duplicates(user: np.ndarray, item_ids: np.ndarray, timestamps: np.ndarray, tolerance: int) -> np.ndarray:
    """Which interactions come at most `tolerance` after the last one of the same user and item that is none of these.

    Args:
        user: (interactions,) int64, ascending.
        item_ids: (interactions,) int64.
        timestamps: (interactions,) int64, ascending within a user.
        tolerance: in the unit of `timestamps`.

    Returns:
        int64 positions.
    """
    order = np.lexsort((item_ids, user))  # stable: what a user did with an item stays in the order of time
    same = (np.diff(user[order]) == 0) & (np.diff(item_ids[order]) == 0)
    # What comes later than that after its predecessor stays, whatever became of the predecessor. The others depend on
    # each other in a row; they are few. A difference that overflows is negative, so the exact integers below decide.
    close = np.flatnonzero(same & (np.diff(timestamps[order]) <= tolerance)) + 1
    times, times_before = timestamps[order[close]].tolist(), timestamps[order[close - 1]].tolist()
    found, last = [], 0
    previous = -1
    for at, now, before in zip(close.tolist(), times, times_before, strict=True):
        if at - 1 != previous:
            last = before
        if now - last <= tolerance:
            found.append(at)
        else:
            last = now
        previous = at
    return order[found]


def _extended(
    base: Catalogue, stays: np.ndarray, counts: np.ndarray | None, parent: Catalogue | None
) -> tuple[Catalogue, np.ndarray]:
    """The catalogue of what stays, by count where counts are given, and (num_items + 1,) int32 its id of each of the base's."""
    ids = np.flatnonzero(stays)
    if counts is not None:
        ids = ids[np.argsort(-counts[ids], kind="stable")]
    table = base.table.take(pa.array(ids - 1))
    if parent is not None:
        table = pa.concat_tables([parent.table, table.filter(pa.array(parent.ids_of(table["item_key"]) == 0))])
    numbers = pa.array(np.arange(1, table.num_rows + 1, dtype=np.int64))
    catalogue = Catalogue(table.set_column(0, "item_id", numbers).combine_chunks())
    return catalogue, np.append(0, catalogue.ids_of(base.keys)).astype(np.int32)


def _write_filtered(
    name: str, url: str, place: str, filters: Filters, stays: np.ndarray, new_id: np.ndarray, base_keys: pa.Array | None
) -> _Written:
    events = _events_of(read_shard(place, name, timestamps=True), filters)
    shard, kept = events.shard, events.kept(stays, filters)
    assert shard.timestamps is not None
    rare = (events.outcome == 0) & ~stays[shard.item_ids]
    dropped = {reason: int((events.outcome == outcome).sum()) for outcome, reason in _DROPPED.items()} | {
        "of a rare item": int(rare.sum()),
        "of a short user": int(((events.outcome == 0) & ~rare & ~kept).sum()),
    }
    above = np.flatnonzero(events.outcome == _ABOVE)
    files = {}
    if len(above):
        assert base_keys is not None
        table = pa.table(
            {
                "user_key": shard.user_keys.take(pa.array(events.user[above])),
                "item_key": base_keys.take(pa.array(shard.item_ids[above] - 1)),
                "timestamp": shard.timestamps[above],
                "_reason": pa.repeat(ABOVE_CAP, len(above)),
            }
        )
        place_there = name.replace("sequences/", "quarantine/")
        files[place_there] = storage.write_table(storage.join(url, place_there), table)
    lengths = np.bincount(events.user[kept], minlength=len(shard.lengths))
    report = write_sequences(
        url, name, shard.user_keys, lengths, new_id[shard.item_ids[kept]], shard.timestamps[kept], dropped, len(kept)
    )
    return _Written(report, len(np.unique(events.user[above])), len(above), files)
