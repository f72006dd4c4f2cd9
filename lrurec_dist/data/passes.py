"""The two passes of a preparation over its data, in this process or as Ray tasks; the results are the same.

Pass one reads a part of the log, judges its rows and deals the events to shards. Pass two merges
what each shard was dealt with what it held before. Whatever else goes over shards one by one goes through `each`.
"""

import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray.exceptions import RayTaskError

from lrurec_dist import storage
from lrurec_dist.data.events import EventRules, read_unit
from lrurec_dist.data.shards import MergeRules, ShardReport, partition, shard_of, summarise, write_shard
from lrurec_dist.data.sources import ReadUnit, Source
from lrurec_dist.errors import LrurecError

LOCAL_BYTES = 512 << 20  # a night whose files are smaller is prepared in one process, in about six times their size
TASKS_AHEAD = 4  # Ray tasks that wait for a core, so that a slow driver leaves none idle


@dataclass(frozen=True)
class PartReport:
    """What became of the rows of one read unit.

    `items` has one row per item: item_key, count, first_seen, last_seen. `files` are the manifest
    entries of what was written to quarantine. rows_read = events + rejected + filtered.
    `user_type` is the type of user keys, None where there are no events.
    """

    rows_read: int
    events: int
    rejected: dict[str, int]
    filtered: dict[str, int]
    items: pa.Table
    files: dict[str, dict[str, Any]]
    user_type: str | None


def by_partition(sources: Iterable[Source], units: Sequence[ReadUnit], parts: Sequence[PartReport]) -> dict[str, dict[str, Any]]:
    """What was read of each partition: files, bytes, and what became of its rows.

    rows_read = events + rows_rejected, by reason, + rows_filtered; a log without partitions is one called "".
    """
    found: dict[str, dict[str, Any]] = {}
    for source in sources:
        counts = {"files": 0, "bytes": 0, "rows_read": 0, "events": 0, "rows_rejected": {}, "rows_filtered": 0}
        of_partition = found.setdefault(source.partition, counts)
        of_partition["files"] += 1
        of_partition["bytes"] += source.size
    for unit, part in zip(units, parts, strict=True):
        of_partition = found[unit.source.partition]
        of_partition["rows_read"] += part.rows_read
        of_partition["events"] += part.events
        of_partition["rows_filtered"] += sum(part.filtered.values())
        for reason, count in part.rejected.items():
            of_partition["rows_rejected"][reason] = of_partition["rows_rejected"].get(reason, 0) + count
    return dict(sorted(found.items()))


def read_part(index: int, unit: ReadUnit, rules: EventRules, shards: int, url: str) -> tuple[PartReport, list[pa.Table]]:
    """Read one unit; returns the report, and per shard its events: user_key, code (place in `items`), timestamp."""
    blocks = list(read_unit(unit, rules))
    rows_read, rejected = 0, []
    filtered: dict[str, int] = {}
    for block in blocks:
        rows_read += block.rows_read
        for reason, count in block.filtered.items():
            filtered[reason] = filtered.get(reason, 0) + count
        if block.quarantined.num_rows:
            rejected.append(block.quarantined)
    events = _concat([block.events for block in blocks], ("user_key", "item_key", "timestamp"))
    items = events["item_key"].combine_chunks().dictionary_encode()
    codes, timestamps = items.indices.to_numpy(), events["timestamp"].to_numpy()
    summary = summarise(codes, timestamps).drop_columns(["item_id"]).add_column(0, "item_key", items.dictionary)
    users = events["user_key"].combine_chunks()
    dealt = pa.table({"user_key": users, "code": codes, "timestamp": timestamps})
    report = PartReport(rows_read, events.num_rows, {}, filtered, summary, {}, str(users.type) if len(users) else None)
    if rejected:
        table = pa.concat_tables(rejected, promote_options="permissive")
        name = f"quarantine/part-{index:05d}.parquet"
        report.files[name] = storage.write_table(storage.join(url, name), table)
        counts = table["_reason"].combine_chunks().value_counts()
        report.rejected.update(zip(counts.field(0).to_pylist(), counts.field(1).to_pylist(), strict=True))
    return report, partition(dealt, shard_of(users, shards), shards)


def merge_part(
    shard: int, pieces: list[pa.Table], ids: list[np.ndarray], parent_url: str | None, rules: MergeRules, url: str
) -> ShardReport:
    """Merge what one shard was dealt; `ids[i]` gives the item_id of each code of `pieces[i]`."""
    name = f"sequences/part-{shard:05d}.parquet"
    new = _concat(
        [
            piece.set_column(1, "item_id", pa.array(mapping[piece["code"].to_numpy()]))
            for piece, mapping in zip(pieces, ids, strict=True)
            if piece.num_rows
        ],
        ("user_key", "item_id", "timestamp"),
    )
    parent = None
    if parent_url is not None and storage.exists(storage.join(parent_url, name)):
        parent = storage.read_table(storage.join(parent_url, name))
    return write_shard(url, name, new, parent, rules)


def _concat(tables: list[pa.Table], names: tuple[str, str, str]) -> pa.Table:
    """Those with rows, one after the other; what has none does not know the type of its keys."""
    filled = [table for table in tables if table.num_rows]
    if filled:
        return pa.concat_tables(filled)
    return pa.table({name: pa.array([], kind) for name, kind in zip(names, (pa.null(), pa.null(), pa.int64()), strict=True)})


class LocalPasses:
    """Both passes in threads of this process, with all events in memory."""

    place = "in one process"

    def __init__(self, threads: int) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prepare")
        self._pieces: list[list[pa.Table]] = []

    def each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]]) -> Iterator[Any]:
        """`function(*arguments[i])` for every i, in their order."""
        return self._pool.map(lambda each: function(*each), arguments)

    def read(self, units: list[ReadUnit], rules: EventRules, shards: int, url: str) -> Iterator[PartReport]:
        """Pass one; reports in the order of the units."""
        read = functools.partial(read_part, rules=rules, shards=shards, url=url)
        for report, pieces in self.each(read, list(enumerate(units))):
            self._pieces.append(pieces)
            yield report

    def merge(
        self, ids: list[np.ndarray], shards: int, parent_url: str | None, rules: MergeRules, url: str
    ) -> Iterator[ShardReport]:
        """Pass two; reports in the order of the shards."""
        pieces = [[part[shard] for part in self._pieces] for shard in range(shards)]
        self._pieces.clear()
        merge = functools.partial(merge_part, ids=ids, parent_url=parent_url, rules=rules, url=url)
        yield from self.each(merge, list(enumerate(pieces)))


class RayPasses:
    """Both passes as Ray tasks; what is dealt lies in the object store, which spills to disk.

    Args:
        resources: what each task reserves besides its CPUs, which decides on which nodes it may run.
    """

    place = "by Ray tasks"

    def __init__(self, resources: Mapping[str, float] | None = None) -> None:
        self._resources = dict(resources or {})
        self._pieces: list[list[ray.ObjectRef[pa.Table]]] = []

    def each(self, function: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], *, num_cpus: float = 1.0) -> Iterator[Any]:
        """`function(*arguments[i])` for every i, in their order; each a task that reserves `num_cpus` logical CPUs."""
        stored = ray.put(function)  # once, with all that is bound to it
        task = _each_task.options(num_cpus=num_cpus, resources=self._resources)
        yield from _in_order(lambda index: task.remote(stored, *arguments[index]), len(arguments))

    def read(self, units: list[ReadUnit], rules: EventRules, shards: int, url: str) -> Iterator[PartReport]:
        """Pass one; reports in the order of the units."""

        def submit(index: int) -> "ray.ObjectRef[PartReport]":
            task = _read_task.options(num_returns=shards + 1, resources=self._resources)
            refs: Any = task.remote(index, units[index], rules, shards, url)
            self._pieces.append(refs[1:])
            report: ray.ObjectRef[PartReport] = refs[0]
            return report

        yield from _in_order(submit, len(units))

    def merge(
        self, ids: list[np.ndarray], shards: int, parent_url: str | None, rules: MergeRules, url: str
    ) -> Iterator[ShardReport]:
        """Pass two; reports in the order of the shards."""
        mappings = ray.put(ids)

        def submit(shard: int) -> "ray.ObjectRef[ShardReport]":
            pieces = [part[shard] for part in self._pieces]
            for part in self._pieces:
                part[shard] = None  # type: ignore[call-overload]  # the task holds what it needs: free it with the task
            task = _merge_task.options(resources=self._resources)
            report: ray.ObjectRef[ShardReport] = task.remote(shard, pieces, mappings, parent_url, rules, url)
            return report

        yield from _in_order(submit, shards)


Passes = LocalPasses | RayPasses


def passes_for(size: int, connect: Callable[[], None], resources: Mapping[str, float] | None = None) -> Passes:
    """Threads of this process for files of up to LOCAL_BYTES, else Ray tasks, after `connect`, on nodes with `resources`."""
    if size <= LOCAL_BYTES:
        return LocalPasses(threads=os.cpu_count() or 1)
    connect()
    return RayPasses(resources)


@ray.remote(max_retries=3)
def _each_task(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@ray.remote(max_retries=3)
def _read_task(index: int, unit: ReadUnit, rules: EventRules, shards: int, url: str) -> tuple[Any, ...]:
    report, pieces = read_part(index, unit, rules, shards, url)
    return (report, *pieces)


@ray.remote(max_retries=3)
def _merge_task(
    shard: int,
    pieces: "list[ray.ObjectRef[pa.Table]]",
    ids: list[np.ndarray],
    parent_url: str | None,
    rules: MergeRules,
    url: str,
) -> ShardReport:
    return merge_part(shard, ray.get(pieces), ids, parent_url, rules, url)


def _in_order(submit: "Callable[[int], ray.ObjectRef[Any]]", count: int) -> Iterator[Any]:
    """Results 0..count-1, with no more tasks under way than have cores or wait next for one."""
    ahead = int(ray.cluster_resources().get("CPU", 1)) + TASKS_AHEAD
    waiting = [submit(index) for index in range(min(ahead, count))]
    for index in range(count):
        try:
            result = ray.get(waiting.pop(0))
        except RayTaskError as error:
            raise error.cause if isinstance(error.cause, LrurecError) else error from None
        if index + ahead < count:
            waiting.append(submit(index + ahead))
        yield result
