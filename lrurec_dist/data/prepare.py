"""From a log to a prepared dataset, anew or by merging new files into last night's."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from lrurec_dist import storage
from lrurec_dist.data.catalogue import save_catalogue
from lrurec_dist.data.events import EventRules, inspect_schemas
from lrurec_dist.data.numbering import catalogue_of, deleted_ids, keys_in, with_figures
from lrurec_dist.data.passes import PartReport, by_partition, passes_for
from lrurec_dist.data.sequences import LENGTHS, SCHEMA_VERSION, SequenceDataset, remove_leftovers
from lrurec_dist.data.shards import TIE_RULE, MergeRules, ShardReport, describe_shards, save_lengths
from lrurec_dist.data.sources import ReadUnit, Source, TableSnapshot, read_units, resolve_sources
from lrurec_dist.data.tables import check_merge, check_names, pin_table
from lrurec_dist.errors import ConfigError, DataQualityError
from lrurec_dist.reporting import Progress

UNIT_BYTES = 16 << 20  # of Parquet files, read by one task in some hundred MB
SHARD_BYTES = 64 << 20  # of files a shard, where the number of shards is not given
LEAST_SHARDS = 8


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What a dataset is made of. See `lrurec_dist.config` for the settings behind it.

    `parent` is an earlier dataset: its sequences are merged with the files of the log that it has
    not seen; with `rebuild` the whole log is read again and only its item ids are kept.
    `deleted_users` and `deleted_items` are files of keys, one a line, of whom nothing is kept.
    `first_ids`: without a parent, item ids follow the first appearance, or how often the rows that
    were read and are usable name an item, duplicates included. `resources` is what its Ray tasks reserve
    besides their CPUs; the dataset does not depend on it.
    """

    log_path: str
    log_format: str
    snapshot: str = ""
    partition_column: str = "date"
    from_partition: str = ""
    to_partition: str = ""
    rules: EventRules
    max_rejected_share: float
    drop_duplicates: bool = True
    max_user_events: int = 0
    shards: int = 0
    parent: str = ""
    rebuild: bool = False
    deleted_users: str = ""
    deleted_items: str = ""
    first_ids: Literal["appearance", "count"] = "appearance"
    resources: Mapping[str, float] | None = None


def prepare_dataset(
    url: str, options: PrepareOptions, progress: Progress, connect: Callable[[], None]
) -> tuple[SequenceDataset, bool]:
    """Turn a log into a committed dataset at `url`, or find it there.

    Args:
        url: the dataset's directory.
        options: what it is made of.
        progress: told of each part that was read and each shard that was merged.
        connect: called before Ray is used, which is where the log's files exceed LOCAL_BYTES.

    Returns:
        The dataset, and whether it was there already, prepared from the same files in the same way.

    Raises:
        ConfigError: another dataset lies at `url`, or the parent was prepared in another way.
        DataNotReadyError: the log does not exist.
        DataQualityError: the log is empty, lacks a column, changed after the parent read it, or too
            many rows are unusable.
    """
    table = pin_table(
        options.log_path,
        log_format=options.log_format,
        snapshot=options.snapshot,
        partition_column=options.partition_column,
    )
    sources = resolve_sources(
        options.log_path,
        log_format=options.log_format,
        partition_column=options.partition_column,
        from_partition=options.from_partition,
        to_partition=options.to_partition,
        table=table,
    )
    parent = SequenceDataset(options.parent) if options.parent else None
    base = None if options.rebuild else parent
    inputs = _inputs(options, sources, table, parent, base)
    if storage.is_committed(url):
        return _found(url, options, inputs), True
    remove_leftovers(url)
    laps = _Laps()
    fresh = sources if base is None else _unseen(sources, table, base, inputs)
    if table is not None:
        check_names(table, fresh, options.rules.columns)
    shards = inputs["shards"]
    if base is not None and not fresh and not inputs["deleted"]:
        return _unchanged(url, base, inputs), False
    notes = inspect_schemas(fresh, options.rules) if fresh else []
    units = read_units(fresh, UNIT_BYTES)
    merged_bytes = base.sequence_bytes if base else 0
    passes = passes_for(sum(map(_size_of, units)) + merged_bytes, connect, options.resources)

    parts: list[PartReport] = []
    progress("read", 0, len(units), "parts")
    for part in passes.read(units, options.rules, shards, url):
        parts.append(part)
        progress("read", len(parts), len(units), "parts", f"{sum(part.rows_read for part in parts):,} rows")
    laps.end("read")
    rejected = _summed(part.rejected for part in parts)
    rows_read = sum(part.rows_read for part in parts)
    _check_quality(options, rows_read, rejected, sum(part.events for part in parts), merged=base is not None)

    user_type = _one_type("user", [part.user_type for part in parts], base)
    _one_type("item", [str(part.items["item_key"].type) if part.items.num_rows else None for part in parts], None)
    catalogue, ids = catalogue_of(parts, parent.catalogue if parent else None, options.first_ids)
    merge_rules = MergeRules(
        drop_duplicates=options.drop_duplicates,
        max_user_events=options.max_user_events,
        deleted_users=keys_in(options.deleted_users),
        deleted_items=deleted_ids(options.deleted_items, catalogue),
    )
    laps.end("number")
    merged: list[ShardReport] = []
    progress("merged", 0, shards, "shards")
    for report in passes.merge(ids, shards, base.place if base else None, merge_rules, url):
        merged.append(report)
        progress("merged", len(merged), shards, "shards")
    laps.end("merge")
    catalogue = with_figures(catalogue, merged, merge_rules.deleted_items)
    known = {"catalogue/part-00000.parquet": save_catalogue(catalogue, storage.join(url, "catalogue"))}
    known |= {report.file: report.entry for report in merged}
    known[LENGTHS] = save_lengths(merged, url)
    for part in parts:
        known |= part.files
    dropped = _summed(report.dropped for report in merged)
    if not any(len(report.histogram.lengths) for report in merged):
        raise DataQualityError(f"{url}: no interaction is left; dropped were {dropped}")
    figures = describe_shards(merged)
    before = int(base.manifest["interactions"]) if base else 0
    if rows_read != sum(part.events for part in parts) + sum(rejected.values()) + sum(
        sum(part.filtered.values()) for part in parts
    ) or figures["interactions"] != before + sum(part.events for part in parts) - sum(dropped.values()):
        raise DataQualityError(f"{url}: the counts of rows do not add up; this is a bug, please report it")
    laps.end("commit")
    description = {
        "schema_version": SCHEMA_VERSION,
        "inputs": inputs,
        "schema_notes": notes,
        "tie_rule": TIE_RULE,
        "user_key_type": user_type,
        "time_unit": "position" if options.rules.timestamp_unit == "position" else "us",
        "rows_read": rows_read,
        "rows_rejected": rejected,
        "rows_filtered": _summed(part.filtered for part in parts),
        "partitions": by_partition(fresh, units, parts),
        "events_dropped": dropped,
        "events_quarantined": {},
        "users_quarantined": 0,
        "interactions_of_parent": before,
        **figures,
        "num_items": catalogue.num_items,
        "new_items": catalogue.num_items - (parent.num_items if parent else 0),
        "catalogue_fingerprint": catalogue.fingerprint,
        "seconds": laps.seconds,
        "bytes_read": sum(source.size for source in fresh) + merged_bytes,
        "bytes_written": sum(entry["bytes"] for entry in known.values()),
        "prepared": passes.place,
    }
    storage.commit(url, description, known)
    return SequenceDataset(url), False


class _Laps:
    """Seconds by stage, one after the other, and of all so far."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def end(self, stage: str) -> None:
        """What was done since the last end was this stage."""
        now = time.perf_counter()
        self.seconds |= {stage: round(now - self._last, 3), "all": round(now - self._started, 3)}
        self._last = now


def _inputs(
    options: PrepareOptions,
    sources: list[Source],
    table: TableSnapshot | None,
    parent: SequenceDataset | None,
    base: SequenceDataset | None,
) -> dict[str, Any]:
    """Everything that decides what the dataset holds; another preparation with the same finds it done."""
    rules = options.rules
    accepted = (rules.late_before, rules.future_from)
    seen = base.manifest["inputs"]["sources"] if base else {}
    if base:
        shards = int(base.manifest["inputs"]["shards"])
        if options.shards not in (0, shards):
            raise ConfigError(
                f"dataset.shards={options.shards}: the parent {base.url} has {shards}, and a merge keeps them; "
                "set dataset.shards=0, or dataset.rebuild=true"
            )
    else:
        shards = options.shards or max(LEAST_SHARDS, -(-sum(source.size for source in sources) // SHARD_BYTES))
    return {
        "columns": [rules.user_column, rules.item_column, rules.timestamp_column],
        "timestamp_unit": rules.timestamp_unit,
        "keep": list(rules.keep),
        "window": [rules.since, rules.until],
        **({} if accepted == (None, None) else {"accepted": list(accepted)}),  # of the files read now: a merge may have others
        "max_key_bytes": rules.max_key_bytes,
        "drop_duplicates": options.drop_duplicates,
        "max_user_events": options.max_user_events,
        "deleted": {path: storage.file_sha256(path) for path in (options.deleted_users, options.deleted_items) if path},
        "parent": parent.identity if parent else None,
        "merged": base is not None,
        "first_ids": options.first_ids,
        "shards": shards,
        "sources": {**seen, **{source.url: source.version for source in sources}},
        "table": {"format": table.format, "location": table.location, "snapshot": table.snapshot} if table else None,
    }


def _found(url: str, options: PrepareOptions, inputs: dict[str, Any]) -> SequenceDataset:
    dataset = SequenceDataset(url, verify=True)
    before = dataset.manifest["inputs"]
    # Two snapshots with the same files are the same log: tables have commits that change none.
    names = (inputs.keys() | before.keys()) - {"table"}
    differing = sorted(name for name in names if before.get(name) != inputs.get(name))
    if differing:
        grown = before.get("table") and differing == ["sources"]
        raise ConfigError(
            f"dataset.dir={url}: holds a dataset prepared with other {', '.join(differing)}; choose another dataset.dir or run_dir, or delete it"
            + (f"; or set log.snapshot={before['table']['snapshot']}, which it was prepared from" if grown else "")
        )
    facts = dataset.manifest
    _check_quality(options, facts["rows_read"], facts["rows_rejected"], facts["interactions"], merged=facts["inputs"]["merged"])
    return dataset


def _unseen(sources: list[Source], table: TableSnapshot | None, base: SequenceDataset, inputs: dict[str, Any]) -> list[Source]:
    """The files that the parent has not read, after a look whether they may be merged with what it has."""
    before = base.manifest["inputs"]
    if "filters" in before:
        raise ConfigError(
            f"dataset.parent={base.url}: was filtered, so what it lacks is not known; give the same log.duplicate_tolerance, "
            "log.users_above_cap, dataset.drop_repeats, dataset.min_item_count, dataset.min_user_events and dataset.k_core, or set "
            "dataset.rebuild=true"
        )
    same = ("columns", "timestamp_unit", "keep", "window", "max_key_bytes", "drop_duplicates", "max_user_events")
    differing = [name for name in same if before[name] != inputs[name]]
    if differing:
        raise ConfigError(
            f"dataset.parent={base.url}: was prepared with other {', '.join(differing)}, so a merge would mix two kinds of "
            "events; give the same settings, or set dataset.rebuild=true"
        )
    changed = [source.url for source in sources if before["sources"].get(source.url, source.version) != source.version]
    if changed:
        raise DataQualityError(
            f"{changed[0]} changed after {base.url} was prepared from it ({len(changed):,} such files), and a merge cannot take "
            "events back; set dataset.rebuild=true"
        )
    if table is not None:
        check_merge(table, before["sources"], base.url)
    return [source for source in sources if source.url not in before["sources"]]


def _unchanged(url: str, base: SequenceDataset, inputs: dict[str, Any]) -> SequenceDataset:
    """Commit a dataset that has nothing of its own, at the cost of a manifest."""
    nothing_new = {
        "rows_read": 0,
        "rows_rejected": {},
        "rows_filtered": {},
        "partitions": {},
        "events_dropped": {},
        "events_quarantined": {},
        "users_quarantined": 0,
        "new_items": 0,
        "schema_notes": [],
        "seconds": dict.fromkeys(base.manifest["seconds"], 0.0),
        "bytes_read": 0,
        "bytes_written": 0,
        "prepared": "from its parent",
        "inputs": inputs,
    }
    description = {name: value for name, value in base.manifest.items() if name != "files"} | nothing_new
    same = {"same_as": base.place, "same_as_identity": base.identity, "interactions_of_parent": base.manifest["interactions"]}
    storage.commit(url, description | same)
    return SequenceDataset(url)


def _check_quality(options: PrepareOptions, rows_read: int, rejected: dict[str, int], events: int, *, merged: bool) -> None:
    if rows_read == 0 and not merged:
        raise DataQualityError(f"log.path={options.log_path}: the log is empty; there is nothing to train on")
    share = sum(rejected.values()) / max(1, rows_read)
    if share > options.max_rejected_share or (events == 0 and not merged):
        reasons = ", ".join(f"{name} {count:,}" for name, count in sorted(rejected.items(), key=lambda pair: -pair[1])[:5])
        raise DataQualityError(
            f"log.max_rejected_share={options.max_rejected_share}: {share:.2%} of {rows_read:,} rows are unusable ({reasons}); "
            "mend the log or raise the share"
            if rejected
            else f"log.path={options.log_path}: none of {rows_read:,} rows passes log.keep, log.since and log.until"
        )


def _one_type(what: str, types: list[str | None], base: SequenceDataset | None) -> str:
    """The type of all keys of a kind, those of the sequences to merge with included."""
    known = {kind for kind in types if kind} | ({base.manifest["user_key_type"]} if base else set())
    if len(known) > 1:
        raise DataQualityError(
            f"{what} keys are {' in some files and '.join(sorted(known))} in others"
            + (f", {base.url} has {base.manifest['user_key_type']}" if base else "")
            + "; store one type"
        )
    return next(iter(known), "")


def _summed(counts: Any) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _size_of(unit: ReadUnit) -> int:
    """Bytes of a unit's file; compressed text holds about four times the events of Parquet of its size."""
    return unit.size * (4 if unit.source.url.lower().endswith((".gz", ".zst", ".bz2")) else 1)
