"""Filters that need all events: rare items, short users, immediate repeats.

What they remove today may belong to the sequences tomorrow: an item becomes frequent, a late event comes between two
repeats. So they do not touch the dataset that nights are merged into; they make a second one of it.
"""

import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist import storage
from lrurec_dist.data.catalogue import DELETED, Catalogue, save_catalogue
from lrurec_dist.data.numbering import with_figures
from lrurec_dist.data.sequences import LENGTHS, SequenceDataset, SequenceShard
from lrurec_dist.data.shards import ShardReport, describe_shards, save_lengths, write_sequences
from lrurec_dist.errors import ConfigError, DataQualityError


@dataclass(frozen=True, kw_only=True)
class Filters:
    """What has to be frequent enough to stay.

    `drop_repeats`: of one item several times in a row the first interaction stays; done first.
    `min_item_count`: interactions an item needs, `min_user_events`: those a user needs, of items that
    stay. `k_core`: `once` looks at items, then at users; `until_stable` goes on until both hold.
    """

    drop_repeats: bool = False
    min_item_count: int = 0
    min_user_events: int = 0
    k_core: Literal["once", "until_stable"] = "once"

    @property
    def active(self) -> bool:
        """Whether there is anything to do."""
        return self.drop_repeats or self.min_item_count > 1 or self.min_user_events > 1


@dataclass(frozen=True)
class _Events:
    """A shard's interactions that are not repeats, and whose they are."""

    shard: SequenceShard
    first_of_run: np.ndarray  # (interactions,) bool
    user: np.ndarray  # (interactions,) int64

    def kept(self, stays: np.ndarray, filters: Filters) -> np.ndarray:
        """(interactions,) bool: of an item that stays, of a user who has enough of those."""
        kept = self.first_of_run & stays[self.shard.item_ids]
        enough = np.bincount(self.user[kept], minlength=len(self.shard.lengths)) >= filters.min_user_events
        result: np.ndarray = kept & enough[self.user]
        return result


def filter_dataset(url: str, base: SequenceDataset, filters: Filters, parent: Catalogue | None) -> tuple[SequenceDataset, bool]:
    """What of `base` passes the filters, as a committed dataset at `url`.

    Args:
        url: the dataset's directory.
        base: everything there is.
        filters: what is left out.
        parent: catalogue of an earlier filtered dataset, whose items keep their ids; items that stay now and had none
            get the next ids in the order of the base's. An item that stayed once and does not now
            keeps its id, without interactions.

    Returns:
        The dataset, and whether it was there already.

    Raises:
        ConfigError: another dataset lies at `url`.
        DataQualityError: nothing passes.
    """
    inputs = {
        **base.manifest["inputs"],
        "base": base.identity,
        "filters": asdict(filters),
        "ids_of": parent and parent.fingerprint,
    }
    if storage.is_committed(url):
        there = SequenceDataset(url, verify=True)
        if there.manifest["inputs"] != inputs:
            raise ConfigError(
                f"dataset.dir={url}: holds a dataset that was filtered in another way; choose another, or delete it"
            )
        return there, True
    started = time.perf_counter()
    storage.remove_tree(url)
    stays = _items_that_stay(base, filters)
    catalogue, new_id = _extended(base.catalogue, stays, parent)
    write = functools.partial(_write_filtered, url=url, base=base, filters=filters, stays=stays, new_id=new_id)
    with ThreadPoolExecutor(thread_name_prefix="filter") as pool:
        reports = list(pool.map(write, base.shard_names))
    if not any(len(report.histogram.lengths) for report in reports):
        raise DataQualityError(
            f"dataset.min_item_count={filters.min_item_count}, dataset.min_user_events={filters.min_user_events}: none of "
            f"{base.manifest['interactions']:,} interactions passes; lower them"
        )
    gone = pc.equal(base.catalogue.table["status"], DELETED)
    deleted = catalogue.ids_of(base.catalogue.keys.filter(gone))
    catalogue = with_figures(catalogue, reports, deleted[deleted > 0])
    known = {"catalogue/part-00000.parquet": save_catalogue(catalogue, storage.join(url, "catalogue"))}
    known |= {report.file: report.entry for report in reports}
    known[LENGTHS] = save_lengths(reports, url)
    figures = describe_shards(reports)
    dropped = dict(base.manifest["events_dropped"])
    for report in reports:
        for reason, count in report.dropped.items():
            dropped[reason] = dropped.get(reason, 0) + count
    seconds, filter_s = base.manifest["seconds"], round(time.perf_counter() - started, 3)
    description: dict[str, Any] = {name: value for name, value in base.manifest.items() if name != "files"}
    description |= figures | {
        "inputs": inputs,
        "events_dropped": dropped,
        "num_items": catalogue.num_items,
        "new_items": catalogue.num_items - (parent.num_items if parent else 0),
        "catalogue_fingerprint": catalogue.fingerprint,
        "bytes_read": base.manifest["bytes_read"] + base.sequence_bytes,
        "bytes_written": base.manifest["bytes_written"] + sum(entry["bytes"] for entry in known.values()),
        "seconds": seconds | {"filter": filter_s, "all": round(seconds["all"] + filter_s, 3)},
    }
    description.pop("same_as", None)
    storage.commit(url, description, known)
    return SequenceDataset(url), False


def _items_that_stay(base: SequenceDataset, filters: Filters) -> np.ndarray:
    """(num_items + 1,) bool; passes over the shards until nothing changes, or the two that `once` takes."""
    stays = np.ones(base.num_items + 1, dtype=bool)
    stays[0] = False
    no_user_leaves = Filters(drop_repeats=filters.drop_repeats)
    while True:
        asked = filters if filters.k_core == "until_stable" else no_user_leaves
        counts = np.zeros(base.num_items + 1, dtype=np.int64)
        for events in _shards_of(base, filters):
            counts += np.bincount(events.shard.item_ids[events.kept(stays, asked)], minlength=len(counts))
        still = stays & (counts >= max(1, filters.min_item_count))
        if filters.k_core == "once" or (still == stays).all():
            return still
        stays = still


def _shards_of(base: SequenceDataset, filters: Filters) -> Iterator[_Events]:
    for name in base.shard_names:
        yield _events_of(base.read_shard(name), filters)


def _events_of(shard: SequenceShard, filters: Filters) -> _Events:
    user = np.repeat(np.arange(len(shard.lengths)), shard.lengths)
    first_of_run = np.ones(len(user), dtype=bool)
    if filters.drop_repeats:
        first_of_run[1:] = (user[1:] != user[:-1]) | (shard.item_ids[1:] != shard.item_ids[:-1])
    return _Events(shard, first_of_run, user)


def _extended(base: Catalogue, stays: np.ndarray, parent: Catalogue | None) -> tuple[Catalogue, np.ndarray]:
    """The catalogue of what stays, and (num_items + 1,) int32 its id of each of the base's."""
    table = base.table.filter(pa.array(stays[1:]))
    if parent is not None:
        table = pa.concat_tables([parent.table, table.filter(pa.array(parent.ids_of(table["item_key"]) == 0))])
    ids = pa.array(np.arange(1, table.num_rows + 1, dtype=np.int64))
    catalogue = Catalogue(table.set_column(0, "item_id", ids).combine_chunks())
    return catalogue, np.append(0, catalogue.ids_of(base.keys)).astype(np.int32)


def _write_filtered(
    name: str, url: str, base: SequenceDataset, filters: Filters, stays: np.ndarray, new_id: np.ndarray
) -> ShardReport:
    events = _events_of(base.read_shard(name, timestamps=True), filters)
    shard, kept = events.shard, events.kept(stays, filters)
    assert shard.timestamps is not None
    rare = events.first_of_run & ~stays[shard.item_ids]
    dropped = {
        "immediate repeat": int((~events.first_of_run).sum()),
        "of a rare item": int(rare.sum()),
        "of a short user": int((events.first_of_run & ~rare & ~kept).sum()),
    }
    lengths = np.bincount(events.user[kept], minlength=len(shard.lengths))
    return write_sequences(
        url, name, shard.user_keys, lengths, new_id[shard.item_ids[kept]], shard.timestamps[kept], dropped, len(kept)
    )
