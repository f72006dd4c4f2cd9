"""From the files of a log to events: three typed columns, and every other row accounted for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist.data.conditions import Condition, parse_condition
from lrurec_dist.data.normalise import Mask, either, is_text, mask_of, normalise_keys, normalise_times, nulls_of
from lrurec_dist.data.raw_blocks import Columns, RawBlock, malformed_lines
from lrurec_dist.data.readers import read_blocks, read_schema
from lrurec_dist.data.sources import ReadUnit, Source, each
from lrurec_dist.errors import ConfigError, DataQualityError

_ORIGIN = ("_reason", "_source", "_row")


@dataclass(frozen=True, kw_only=True)
class EventRules:
    """Which columns of a log make an event, and which rows are read."""

    user_column: str
    item_column: str
    timestamp_column: str
    timestamp_unit: str  # of integers: s, ms, us, ns, position
    keep: tuple[str, ...] = ()  # conditions that a row has to satisfy, all of them; see `parse_condition`
    since: int | None = None  # first stored time to read (microseconds since 1970, or position)
    until: int | None = None  # first stored time that is not read any more
    late_before: int | None = None  # rows of an earlier stored time come too late and are rejected
    future_from: int | None = None  # rows of this stored time or a later one cannot be and are rejected
    max_key_bytes: int = 256

    @property
    def columns(self) -> list[str]:
        """Every column that is read, once."""
        return _columns(self, [parse_condition(text) for text in self.keep]).names


@dataclass(frozen=True)
class EventBlock:
    """Some consecutive rows of a file: `rows_read` are the events, the quarantined and the filtered ones."""

    events: pa.Table  # user_key, item_key (int64 or large_string), timestamp int64 (microseconds since 1970, or positions)
    quarantined: pa.Table  # all columns of the rejected rows, or _line for text that is no row; _reason, _source, _row
    rows_read: int
    filtered: dict[str, int]  # why rows were left out on purpose -> how many


def read_unit(unit: ReadUnit, rules: EventRules) -> Iterator[EventBlock]:
    """The rows of a unit as events, in blocks that fit in memory whatever the file's size.

    A row that fails a condition is filtered, whatever else is wrong with it: another kind of event
    need not have an item. A row that satisfies all and is unusable is quarantined as it stands in the
    file, with its number there and the first of these reasons: malformed_row, unreadable_condition,
    wrong_type, null_user_key, null_item_key, oversized_key, null_timestamp, unparsable_timestamp,
    out_of_range_timestamp, late, future. Of JSON Lines it is the line (`_line`), since values of one name may be of
    several types. A usable row outside the time window is filtered.

    Keys of Parquet and JSON Lines are integers or strings as they are there; those of CSV are strings.
    A block without usable rows tells nothing by the type of its keys.

    Raises:
        ConfigError: a condition is none.
        DataNotReadyError: the file is no longer there.
        DataQualityError: the file cannot be read, lacks a column, or has one of an unusable type.
    """
    conditions = [parse_condition(text) for text in rules.keep]
    for raw in read_blocks(unit, _columns(rules, conditions)):
        yield _event_block(raw, unit.source.url, rules, conditions)


def _columns(rules: EventRules, conditions: Sequence[Condition]) -> Columns:
    by_text = {condition.text: condition.column for condition in conditions}
    return Columns(rules.user_column, rules.item_column, rules.timestamp_column, by_text)


def _event_block(raw: RawBlock, url: str, rules: EventRules, conditions: Sequence[Condition]) -> EventBlock:
    try:
        events, verdicts = _judge(raw, rules, conditions)
    except DataQualityError as error:
        raise DataQualityError(f"{url}: {error}") from None
    outcome = np.zeros(raw.table.num_rows, np.int16)  # 0: an event, else 1 + position of its verdict
    for code, (_, _, mask) in reversed(list(enumerate(verdicts, 1))):
        outcome[mask] = code
    if verdicts:
        events = events.filter(pa.array(outcome == 0))
    counts = np.bincount(outcome, minlength=len(verdicts) + 1)[1:]
    filtered: dict[str, int] = {}
    for (reason, rejects, _), count in zip(verdicts, counts.tolist(), strict=True):
        if count and not rejects:
            filtered[reason] = filtered.get(reason, 0) + count
    rejecting = np.array([False, *(rejects for _, rejects, _ in verdicts)])
    rejected = np.flatnonzero(rejecting[outcome]) if rejecting.any() else np.empty(0, np.int64)
    names = pa.array(["", *(reason for reason, _, _ in verdicts)], pa.string())
    quarantined = _quarantine(raw, url, rejected, names.take(pa.array(outcome[rejected])))
    return EventBlock(events, quarantined, raw.table.num_rows + raw.malformed.num_rows, filtered)


def _judge(
    raw: RawBlock, rules: EventRules, conditions: Sequence[Condition]
) -> tuple[pa.Table, list[tuple[str, bool, np.ndarray]]]:
    """All rows as events, and the verdicts on those that are none: reason, whether it rejects, where; the first one counts."""
    verdicts: list[tuple[str, bool, Mask]] = []
    for condition in conditions:
        unsatisfied, unreadable = condition.evaluate(raw.table[condition.column])
        verdicts += [("unreadable_condition", True, unreadable), (f"keep: {condition.text}", False, unsatisfied)]
    users, no_user, long_user = normalise_keys(raw.table[rules.user_column], rules.user_column, rules.max_key_bytes)
    items, no_item, long_item = normalise_keys(raw.table[rules.item_column], rules.item_column, rules.max_key_bytes)
    written = raw.table[rules.timestamp_column]
    times, unparsable, out_of_range = normalise_times(written, rules.timestamp_column, rules.timestamp_unit)
    verdicts += [
        ("wrong_type", True, raw.wrong_type),
        ("null_user_key", True, no_user),
        ("null_item_key", True, no_item),
        ("oversized_key", True, either(long_user, long_item)),
        ("null_timestamp", True, nulls_of(written)),
        ("unparsable_timestamp", True, unparsable),
        ("out_of_range_timestamp", True, out_of_range),
    ]
    if rules.late_before is not None:
        verdicts.append(("late", True, mask_of(pc.less(times, rules.late_before))))
    if rules.future_from is not None:
        verdicts.append(("future", True, mask_of(pc.greater_equal(times, rules.future_from))))
    if rules.since is not None:
        verdicts.append(("before log.since", False, mask_of(pc.less(times, rules.since))))
    if rules.until is not None:
        verdicts.append(("from log.until on", False, mask_of(pc.greater_equal(times, rules.until))))
    events = pa.table({"user_key": users, "item_key": items, "timestamp": times})
    return events, [(reason, rejects, mask) for reason, rejects, mask in verdicts if mask is not None]


def _quarantine(raw: RawBlock, url: str, positions: np.ndarray, reasons: pa.Array) -> pa.Table:
    parts = []
    if len(positions) or not raw.malformed.num_rows:
        rows = raw.originals(positions) if len(positions) else pa.table({})
        # Rows that were quarantined once, mended in part and read again bring these columns along.
        rows = rows.drop_columns([name for name in _ORIGIN if name in rows.column_names])
        parts.append(_with_origin(rows, reasons, url, pa.array(raw.rows[positions])))
    if raw.malformed.num_rows:
        malformed = raw.malformed.drop_columns(["_row"])
        parts.append(_with_origin(malformed, pa.repeat("malformed_row", len(malformed)), url, raw.malformed["_row"]))
    quarantined = pa.concat_tables(parts, promote_options="default")
    return quarantined.select([*(name for name in quarantined.column_names if name not in _ORIGIN), *_ORIGIN])


def _with_origin(rows: pa.Table, reasons: pa.Array, url: str, numbers: pa.Array | pa.ChunkedArray) -> pa.Table:
    return (
        rows.append_column("_reason", reasons)
        .append_column("_source", pa.repeat(pa.scalar(url, pa.large_string()), len(reasons)))
        .append_column("_row", numbers)
    )


def inspect_schemas(sources: Sequence[Source], rules: EventRules) -> list[str]:
    """Look at every file's columns before reading, and say how they change along the log.

    Reads footers of Parquet, headers of CSV, first lines of JSON Lines.

    Returns:
        What changes among the columns that may: `column coupon appears from <url> on`, is missing,
        or changes its type; each such change once.

    Raises:
        ConfigError: a condition is none.
        DataNotReadyError: a file is no longer there.
        DataQualityError: a file cannot be read, lacks a column, has one of an unusable type, or has
            integer keys where an earlier file has strings. A column of a condition may be missing in
            JSON Lines, which leave out what is null, but not in all files.
    """
    conditions = [parse_condition(text) for text in rules.keep]
    columns = _columns(rules, conditions)
    key_kinds: dict[str, tuple[str, str]] = {}  # key column -> kind and file that showed it first
    notes: dict[tuple[str, str], str] = {}
    before: pa.Schema | None = None
    sampled: dict[str, set[str]] = {}  # JSON Lines file -> columns of its first lines
    for source, schema in zip(sources, each(read_schema, sources), strict=True):
        if source.format == "jsonl":
            if not schema.names:
                continue
            sampled[source.url] = set(schema.names)
        columns.check(source.url, schema.names, conditions=source.format != "jsonl")
        empty = schema.empty_table()
        for name in set(columns.names) - set(schema.names):
            empty = empty.append_column(name, pa.nulls(0))
        _event_block(_without_rows(empty.select(columns.names)), source.url, rules, conditions)
        for setting, name in (("log.user_column", columns.user), ("log.item_column", columns.item)):
            _check_kind(f"{setting}={name}", source.url, schema.field(name).type, key_kinds)
        if before is not None:
            _note_changes(before, schema, source.url, {columns.user, columns.item}, notes)
        before = schema
    if sampled:
        columns.check(f"every JSON Lines file, such as {next(iter(sampled))},", sorted(set().union(*sampled.values())))
    return list(notes.values())


def _without_rows(table: pa.Table) -> RawBlock:
    return RawBlock(table, np.empty(0, np.int64), malformed_lines(), lambda _: table)


def _check_kind(setting: str, url: str, kind: pa.DataType, first: dict[str, tuple[str, str]]) -> None:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_null(kind):
        return
    name = "strings" if is_text(kind) else "integers"
    known, known_url = first.setdefault(setting, (name, url))
    if name != known:
        raise DataQualityError(
            f"{setting}: keys are {known} in {known_url} and {name} ({kind}) in {url}; store one type, or read one part"
        )


def _note_changes(before: pa.Schema, after: pa.Schema, url: str, keys: set[str], notes: dict[tuple[str, str], str]) -> None:
    old, new = (dict(zip(schema.names, map(_plain, schema.types), strict=True)) for schema in (before, after))
    for name in sorted(old.keys() | new.keys()):
        if name not in old:
            notes.setdefault((name, "appears"), f"column {name} appears from {url} on")
        elif name not in new:
            notes.setdefault((name, "misses"), f"column {name} is missing from {url} on")
        elif old[name] != new[name] and name not in keys:
            notes.setdefault((name, "changes"), f"column {name} changes from {old[name]} to {new[name]} from {url} on")


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type without what a writer may choose freely: dictionaries, and which of the string types."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.string() if is_text(kind) else kind


def parse_time(text: str, unit: str, setting: str) -> int | None:
    """The stored time (microseconds since 1970, or position) that a setting spells; None for an empty one.

    Args:
        text: an integer in `unit`, or an ISO 8601 time, which is UTC unless it says otherwise.
        unit: s, ms, us, ns or position, which takes integers alone.
        setting: its name, for the error.

    Raises:
        ConfigError: `text` is no time, or one that does not fit in 64 bits of microseconds.
    """
    if not text:
        return None
    times, _, _ = normalise_times(pa.chunked_array([[text]]), setting, unit)
    if times.null_count:
        raise ConfigError(
            f"{setting}={text}: give an integer of log.timestamp_unit={unit}"
            + ("" if unit == "position" else " or an ISO 8601 time such as 2026-11-01T00:00:00Z, in the years 1678 to 9999")
        )
    return int(times[0].as_py())
