"""From a log file to events: three typed columns, and a reason where a row cannot be used."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayError

from lrurec_dist import storage
from lrurec_dist.errors import DataNotReadyError, DataQualityError, LrurecError

# Integer timestamps become microseconds since 1970; positions stay what they are.
MICROSECONDS_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001, "position": 1}
_SUFFIXES = {"parquet": (".parquet", ".pq"), "csv": (".csv", ".csv.gz", ".csv.zst")}


def resolve_log(path: str, log_format: str) -> tuple[dict[str, str], str]:
    """The log's files as a map from URL to version, and their format.

    Raises:
        DataNotReadyError: no file matches.
        DataQualityError: the format cannot be told, or the files are of several.
    """
    files = storage.expand(path)
    if not files:
        raise DataNotReadyError(f"log.path={path}: no file there; give an existing file, directory or glob")
    if log_format != "auto":
        return files, log_format
    formats = {url: next((name for name, ends in _SUFFIXES.items() if url.lower().endswith(ends)), "") for url in files}
    kinds = set(formats.values())
    if len(kinds) != 1 or "" in kinds:
        odd = next(url for url in formats if formats[url] == "" or len(kinds) > 1)
        raise DataQualityError(
            f"log.path={path}: {odd} does not tell one common format by its name "
            f"({', '.join(sum(_SUFFIXES.values(), ()))}); set log.format=parquet or log.format=csv"
        )
    return files, kinds.pop()


def read_events(
    files: Sequence[str], *, log_format: str, user_column: str, item_column: str, timestamp_column: str, timestamp_unit: str
) -> ray.data.Dataset:
    """The rows of a log as events.

    Columns: `user_key` and `item_key` (int64 or large_string), `timestamp` int64 (microseconds
    since 1970, or positions), `reason` string: null for a usable row, else why it is not
    (`null_user_key`, `null_item_key`, `null_timestamp`, `unparsable_timestamp`). No row is dropped.

    Keys in Parquet keep their type. Keys in CSV are strings, since text cannot say whether `007`
    is a number.

    Raises:
        DataQualityError: a column is missing from the first file. What other files hold is seen
            when they are read: a column of a type that is no key or time, or of another type than
            in the first, fails there (`reading_errors`); one that is missing reads as nulls.
    """
    columns = [user_column, item_column, timestamp_column]
    filesystem, _ = storage.arrow_filesystem(files[0])
    paths = [storage.arrow_filesystem(url)[1] for url in files]
    _check_columns(files[0], log_format, columns)
    if log_format == "parquet":
        dataset = ray.data.read_parquet(paths, filesystem=filesystem).select_columns(columns)
    else:
        as_text = pa.csv.ConvertOptions(
            include_columns=columns, column_types=dict.fromkeys(columns, pa.string()), null_values=[""], strings_can_be_null=True
        )
        dataset = ray.data.read_csv(paths, filesystem=filesystem, convert_options=as_text, file_extensions=None)
    normalise = functools.partial(normalise_block, columns=columns, timestamp_unit=timestamp_unit)
    return dataset.map_batches(normalise, batch_format="pyarrow", batch_size=None)


def _check_columns(url: str, log_format: str, columns: list[str]) -> None:
    filesystem, path = storage.arrow_filesystem(url)
    try:
        if log_format == "parquet":
            present = pq.read_schema(path, filesystem=filesystem).names
        else:
            with filesystem.open_input_stream(path) as stream:  # decompresses by file name
                present = pa.csv.open_csv(stream).schema.names
    except pa.ArrowInvalid as reason:
        raise DataQualityError(f"{url} cannot be read as {log_format}: {str(reason).splitlines()[0]}") from None
    for setting, column in zip(("user_column", "item_column", "timestamp_column"), columns, strict=True):
        if column not in present:
            raise DataQualityError(f"log.{setting}={column}: {url} has no such column; it has {', '.join(present)}")


def normalise_block(block: pa.Table, *, columns: Sequence[str], timestamp_unit: str) -> pa.Table:
    """One block of log rows as events; see `read_events`."""
    user, item, time = (_single_chunk(block[name]) for name in columns)
    user, item = _keys(user, columns[0]), _keys(item, columns[1])
    timestamp, unparsable = _timestamps(time, columns[2], timestamp_unit)
    reason = pc.case_when(
        pc.make_struct(_is_empty(user), _is_empty(item), time.is_null(), unparsable),
        "null_user_key",
        "null_item_key",
        "null_timestamp",
        "unparsable_timestamp",
        pa.scalar(None, pa.string()),
    )
    return pa.table({"user_key": user, "item_key": item, "timestamp": timestamp, "reason": reason})


def _single_chunk(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _keys(column: pa.Array, name: str) -> pa.Array:
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid:
            raise DataQualityError(f"column {name} holds unsigned keys above 2^63; store them as strings") from None
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) or pa.types.is_null(column.type):
        return column.cast(pa.large_string())  # offsets of 64 bits: a block of keys may pass 2 GB
    raise DataQualityError(f"column {name} is {column.type}; keys are integers or strings, so cast it where the log is written")


def _is_empty(keys: pa.Array) -> pa.Array:
    if pa.types.is_large_string(keys.type):
        return pc.fill_null(pc.equal(pc.binary_length(keys), 0), True)
    return keys.is_null()


def _timestamps(column: pa.Array, name: str, unit: str) -> tuple[pa.Array, pa.Array]:
    """int64 times, and where a value that is not null could not be read as one."""
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if unit == "position":
            raise DataQualityError(f"log.timestamp_unit=position, but column {name} is {kind}; set another unit")
        instants = column.cast(pa.timestamp("s")) if pa.types.is_date(kind) else column
        return _scale(instants.cast(pa.int64()), instants.type.unit)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _parse_text(column, unit)
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        too_far = pc.fill_null(pc.greater(column, pa.scalar(2**63 - 1, pa.uint64())), False) if pa.types.is_uint64(kind) else None
        signed = pc.if_else(too_far, None, column) if too_far is not None else column
        values, beyond = _scale(signed.cast(pa.int64()), unit)
        return values, beyond if too_far is None else pc.or_(beyond, too_far)
    raise DataQualityError(
        f"column {name} is {kind}; a time is an integer with a unit, an Arrow timestamp, or text that spells one of them"
    )


def _scale(values: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    factor = MICROSECONDS_PER_UNIT[unit]
    if factor < 1:
        return pc.divide(values, round(1 / factor)), pa.array(np.zeros(len(values), bool))
    limit = (2**63 - 1) // int(factor)
    too_far = pc.fill_null(pc.or_(pc.greater(values, limit), pc.less(values, -limit)), False)
    return pc.multiply(pc.if_else(too_far, None, values), int(factor)), too_far


def _parse_text(column: pa.Array, unit: str) -> tuple[pa.Array, pa.Array]:
    """Digits are integers in the configured unit; anything else has to be an ISO 8601 time, which is no position."""
    magnitude = pc.utf8_ltrim(column, "-")
    fits = pc.or_(pc.less(pc.utf8_length(magnitude), 19), pc.less_equal(magnitude, "9223372036854775807"))
    digits = pc.fill_null(pc.and_(pc.match_substring_regex(column, r"^-?\d{1,19}$"), fits), False)
    scaled, too_far = _scale(pc.cast(pc.if_else(digits, column, None), pa.int64()), unit)
    spelled_out = pc.and_(pc.invert(digits), column.is_valid())
    if unit == "position" or not pc.any(spelled_out, min_count=0).as_py():
        return scaled, pc.or_(too_far, spelled_out)
    text = pc.if_else(digits, None, column).to_pandas()
    spelled = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).astype("datetime64[us, UTC]")
    instants = pa.Array.from_pandas(spelled).cast(pa.int64())
    timestamps = pc.coalesce(scaled, instants)
    return timestamps, pc.and_(timestamps.is_null(), column.is_valid())


@contextmanager
def reading_errors() -> Iterator[None]:
    """Turn what reading raised, here or in a task, into the error it stands for: ours as it is, the reader's as bad data."""
    try:
        yield
    except (RayError, pa.ArrowException) as error:
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, LrurecError):
                raise cause from None
            if isinstance(cause, pa.ArrowException | KeyError | ValueError) and not isinstance(cause, RayError):
                raise DataQualityError(f"the log cannot be read: {str(cause).splitlines()[0]}") from error
            cause = getattr(cause, "cause", None) or cause.__cause__
        raise


def summarise_items(events: ray.data.Dataset) -> tuple[pa.Table, dict[str, int]]:
    """One pass over the events: each item's count, first and last time; each reason's row count.

    Returns:
        A table (item_key, count, first_seen, last_seen) of the usable rows, and a map from reason
        to rejected rows.

    Raises:
        DataQualityError: item keys are of several types.
    """
    summaries = events.map_batches(_summarise_block, batch_format="pyarrow", batch_size=None)
    parts = [part for part in ray.get(summaries.to_arrow_refs()) if part.num_rows]
    types = {str(part.schema.field("item_key").type) for part in parts}
    if len(types) > 1:
        raise DataQualityError(f"item keys are {' in some files and '.join(sorted(types))} in others; store one type")
    if not parts:
        return pa.table({"item_key": pa.array([], pa.large_string()), "count": [], "first_seen": [], "last_seen": []}), {}
    merged = (
        pa.concat_tables(parts)
        .group_by(["item_key", "reason"], use_threads=False)
        .aggregate([("count", "sum"), ("first_seen", "min"), ("last_seen", "max")])
        .rename_columns(["item_key", "reason", "count", "first_seen", "last_seen"])
    )
    usable = merged.filter(merged["reason"].is_null()).drop_columns(["reason"])
    rejected = merged.filter(merged["reason"].is_valid())
    return usable, dict(zip(rejected["reason"].to_pylist(), rejected["count"].to_pylist(), strict=True))


def _summarise_block(events: pa.Table) -> pa.Table:
    usable = events["reason"].is_null()
    keyed = events.set_column(events.schema.get_field_index("item_key"), "item_key", pc.if_else(usable, events["item_key"], None))
    return (
        keyed.group_by(["item_key", "reason"], use_threads=False)
        .aggregate([([], "count_all"), ("timestamp", "min"), ("timestamp", "max")])
        .rename_columns(["item_key", "reason", "count", "first_seen", "last_seen"])
    )
