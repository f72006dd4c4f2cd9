"""Keys and times of a log in the types the rest of the package knows, and where they are unusable."""

from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from lrurec_dist.errors import DataQualityError

# Integer timestamps become microseconds since 1970; positions stay what they are.
MICROSECONDS_PER_UNIT = {"s": 1_000_000, "ms": 1_000, "us": 1, "ns": 0.001, "position": 1}
INT64_MAX = 2**63 - 1

Mask: TypeAlias = np.ndarray | None  # bool per row; None: nowhere, which costs no pass over the rows


def mask_of(values: pa.ChunkedArray) -> Mask:
    """Booleans as a mask; null is False."""
    mask = pc.fill_null(values, False).to_numpy()
    return mask if mask.any() else None


def nulls_of(column: pa.ChunkedArray) -> Mask:
    """Where a column is null."""
    return column.is_null().to_numpy() if column.null_count else None


def decoded(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A dictionary-encoded column as the values it encodes; others as they are."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def is_text(kind: pa.DataType) -> bool:
    """Whether a type is one of the string types."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def normalise_keys(column: pa.ChunkedArray, name: str, max_bytes: int) -> tuple[pa.ChunkedArray, Mask, Mask]:
    """Keys as int64 or large_string, where there is none (null or empty), and where one is too long.

    Raises:
        DataQualityError: the column is neither integers nor text, or holds integers beyond int64.
    """
    column = decoded(column)
    if pa.types.is_integer(column.type):
        try:
            return column.cast(pa.int64()), nulls_of(column), None
        except pa.ArrowInvalid:
            raise DataQualityError(f"column {name} holds unsigned keys above 2^63; store them as strings") from None
    if not (is_text(column.type) or pa.types.is_null(column.type)):
        raise DataQualityError(
            f"column {name} is {column.type}; keys are integers or strings, so cast it where the log is written"
        )
    keys = column.cast(pa.large_string())  # offsets of 64 bits: a shuffle may bring more than 2 GB of keys together
    lengths = pc.binary_length(keys)
    shortest, longest = pc.min_max(lengths).values()
    empty = nulls_of(keys) if shortest.as_py() != 0 else mask_of(pc.equal(pc.fill_null(lengths, 0), 0))
    return keys, empty, mask_of(pc.greater(lengths, max_bytes)) if (longest.as_py() or 0) > max_bytes else None


def normalise_times(column: pa.ChunkedArray, name: str, unit: str) -> tuple[pa.ChunkedArray, Mask, Mask]:
    """Times as int64 microseconds since 1970 or positions, where one cannot be read, and where one is out of range.

    Text is digits in `unit` or an ISO 8601 time, UTC unless it says otherwise. A null stays null.

    Raises:
        DataQualityError: the column is of a type that is no time, or Arrow times are given for positions.
    """
    column = decoded(column)
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        if unit == "position":
            raise DataQualityError(f"log.timestamp_unit=position, but column {name} is {kind}; set another unit")
        instants = column.cast(pa.timestamp("s")) if pa.types.is_date(kind) else column
        values, too_far = _scale(instants.cast(pa.int64()), instants.type.unit)
        return values, None, too_far
    if is_text(kind):
        return _parse_text(column.cast(pa.large_string()), unit)
    if pa.types.is_uint64(kind):
        beyond = mask_of(pc.greater(column, pa.scalar(INT64_MAX, pa.uint64())))
        signed = column if beyond is None else pc.if_else(pc.less_equal(column, pa.scalar(INT64_MAX, pa.uint64())), column, None)
        values, too_far = _scale(signed.cast(pa.int64()), unit)
        return values, None, either(beyond, too_far)
    if pa.types.is_integer(kind) or pa.types.is_null(kind):
        values, too_far = _scale(column.cast(pa.int64()), unit)
        return values, None, too_far
    raise DataQualityError(
        f"column {name} is {kind}; a time is an integer with a unit, an Arrow timestamp, or text that spells one of them"
    )


def either(first: Mask, second: Mask) -> Mask:
    """Where one mask or the other is True."""
    if first is None or second is None:
        return second if first is None else first
    return first | second


def _scale(values: pa.ChunkedArray, unit: str) -> tuple[pa.ChunkedArray, Mask]:
    factor = MICROSECONDS_PER_UNIT[unit]
    if factor <= 1:
        return values if factor == 1 else pc.divide(values, round(1 / factor)), None
    limit = INT64_MAX // int(factor)
    lowest, highest = (value.as_py() or 0 for value in pc.min_max(values).values())
    if -limit <= lowest and highest <= limit:
        return pc.multiply(values, int(factor)), None
    too_far = pc.or_(pc.greater(values, limit), pc.less(values, -limit))
    return pc.multiply(pc.if_else(too_far, None, values), int(factor)), mask_of(too_far)


def _parse_text(column: pa.ChunkedArray, unit: str) -> tuple[pa.ChunkedArray, Mask, Mask]:
    """Digits are integers in the unit; anything else has to be an ISO 8601 time, which is no position."""
    digits = pc.fill_null(pc.match_substring_regex(column, r"^-?\d+$"), False)
    magnitude = pc.utf8_ltrim(column, "-0")
    length = pc.binary_length(magnitude)
    fits = pc.and_(digits, pc.or_(pc.less(length, 19), pc.and_(pc.equal(length, 19), pc.less_equal(magnitude, str(INT64_MAX)))))
    scaled, too_far = _scale(pc.if_else(fits, column, None).cast(pa.int64()), unit)
    too_far = either(too_far, mask_of(pc.and_(digits, pc.invert(fits))))
    spelled_out = mask_of(pc.and_(pc.invert(digits), column.is_valid()))
    if spelled_out is None or unit == "position":
        return scaled, spelled_out, too_far
    text = pc.if_else(digits, None, column).to_pandas()
    spelled = pd.to_datetime(text, format="ISO8601", errors="coerce", utc=True).astype("datetime64[us, UTC]")
    instants = pa.chunked_array([pa.Array.from_pandas(spelled).cast(pa.int64())])
    unparsable = mask_of(pc.and_(pa.chunked_array([pa.array(spelled_out)]), instants.is_null()))
    return pc.coalesce(scaled, instants), unparsable, too_far
