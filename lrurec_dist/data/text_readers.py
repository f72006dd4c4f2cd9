"""CSV and JSON Lines, compressed or not, in bounded blocks.

A line is a row, and whether it can be parsed depends on that line alone: a value does not go on in
the next line, so a quote or a brace left open spoils its own line and no other. Whole blocks are
parsed by Arrow; where Arrow's rows are not the lines, or it gives up, the lines are looked at.
"""

import csv
import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json

from lrurec_dist import storage
from lrurec_dist.data.raw_blocks import Columns, RawBlock, malformed_lines, raw_lines
from lrurec_dist.data.sources import ReadUnit, Source
from lrurec_dist.errors import DataQualityError

_FIRST_BYTES = 1 << 20  # what tells the columns; also the first block that is read
_BLOCK_BYTES = 16 << 20  # a line is several times the columns that are read of it
_MAX_LINE_BYTES = 64 << 20
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
_FIELD = r'(?:[^",][^,]*|"(?:[^"]|"")*"(?:[^",][^,]*)?)?'  # a quote is special at the start of a field only, as for Arrow
_CLOSED_LINE = rf"^{_FIELD}(?:,{_FIELD})*$"


def _blocks(source: Source) -> Iterator[bytes]:
    """The decompressed content in pieces of whole lines; the last line may lack its end."""
    filesystem, path = storage.arrow_filesystem(source.url)
    codec = _CODECS.get(os.path.splitext(path)[1].lower())
    with filesystem.open_input_stream(path, compression=codec) as stream:
        begun = stream.read(_FIRST_BYTES).removeprefix(b"\xef\xbb\xbf")
        while True:
            end = begun.rfind(b"\n") + 1
            if end:
                yield begun[:end]
                begun = begun[end:]
            elif len(begun) > _MAX_LINE_BYTES:
                raise DataQualityError(
                    f"{source.url} cannot be read as {source.format}: a line has more than {_MAX_LINE_BYTES:,} bytes; write one event per line"
                )
            piece = stream.read(_BLOCK_BYTES)
            if not piece:
                break
            begun += piece
        if begun:
            yield begun


def _lines(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    return [line.removesuffix(b"\r") for line in (lines if lines[-1] else lines[:-1])]


def _count_lines(block: bytes) -> int:
    # NumPy counts a byte several times faster than bytes.count where it is frequent.
    return int(np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n"))) + (not block.endswith(b"\n"))


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- CSV: everything is text, since text cannot say whether 007 is a number ---


def csv_schema(source: Source) -> pa.Schema:
    """The columns that the header names."""
    return pa.schema([(name, pa.string()) for name in _header(source, next(_blocks(source), b""))])


def read_csv(unit: ReadUnit, columns: Columns) -> Iterator[RawBlock]:
    """The rows of a CSV file with a header; see `lrurec_dist.data.readers.read_blocks`."""
    blocks = _blocks(unit.source)
    first = next(blocks, b"")
    header = _header(unit.source, first)
    columns.check(unit.source.url, header)
    first_row = 0
    for block in itertools.chain([first.partition(b"\n")[2]], blocks):
        if block:
            yield _csv_block(block, first_row, header, columns.names)
            first_row += _count_lines(block)


def _header(source: Source, block: bytes) -> list[str]:
    line = block.partition(b"\n")[0].strip()
    if not line or not _is_utf8(line):
        raise DataQualityError(f"{source.url} cannot be read as csv: its first line is no header")
    return next(csv.reader([line.decode()]))


def _csv_block(block: bytes, first_row: int, header: list[str], wanted: list[str]) -> RawBlock:
    rows = np.arange(_count_lines(block))
    table, ragged = _parse_csv(block, header, wanted) if _one_row_per_line(block) else (None, [])
    if table is None or table.num_rows + len(ragged) != len(rows):
        lines = _lines(block)
        rows = np.flatnonzero(_are_closed(lines))
        table, ragged = _parse_csv(b"\n".join(lines[row] for row in rows), header, wanted)
        written = np.array([row for row, line in enumerate(lines) if line], np.int64)  # not blank
        malformed = np.setdiff1d(written, np.delete(rows, ragged))
    else:
        malformed = rows[ragged]
    parsed = np.delete(rows, ragged)

    def originals(positions: np.ndarray) -> pa.Table:
        lines = _lines(block)
        names = [name if name not in header[:index] else f"{name}_{index}" for index, name in enumerate(header)]
        return _parse_csv(b"\n".join(lines[row] for row in parsed[positions]), names, names)[0]

    lines = _lines(block) if len(malformed) else []
    return RawBlock(
        table, first_row + parsed, malformed_lines([lines[row] for row in malformed], first_row + malformed), originals
    )


def _one_row_per_line(block: bytes) -> bool:
    """Whether Arrow can make fewer rows than lines (by an open quote), never more; its count then tells that each is one."""
    last = block[block.rfind(b"\n", 0, -1) + 1 :]
    ends_alone = b"\r" in block and block.count(b"\r") != block.count(b"\r\n")
    return not ends_alone and _is_utf8(block) and bool(_are_closed(_lines(last))[0])


def _are_closed(lines: list[bytes]) -> np.ndarray:
    """Which lines can be parsed on their own: UTF-8, not blank, each quote closed."""
    text = pa.array([line.decode() if line and b"\r" not in line and _is_utf8(line) else None for line in lines], pa.string())
    return pc.fill_null(pc.match_substring_regex(text, _CLOSED_LINE), False).to_numpy(zero_copy_only=False)


def _parse_csv(data: bytes, header: list[str], wanted: list[str]) -> tuple[pa.Table, list[int]]:
    """The rows with as many fields as the header, and the positions of the others."""
    if not data:
        return pa.table({name: pa.array([], pa.string()) for name in wanted}), []
    ragged: list[int] = []

    def skip(row: pa.csv.InvalidRow) -> str:
        ragged.append(row.number - 1)
        return "skip"

    table = pa.csv.read_csv(
        pa.BufferReader(data),
        # One chunk on one thread: only then rows are numbered, and no chunk starts within quotes.
        read_options=pa.csv.ReadOptions(column_names=header, block_size=len(data) + 1, use_threads=False),
        parse_options=pa.csv.ParseOptions(invalid_row_handler=skip, newlines_in_values=True),
        convert_options=pa.csv.ConvertOptions(
            include_columns=wanted, column_types=dict.fromkeys(wanted, pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )
    return table, ragged


# --- JSON Lines: integers are integers, strings are strings ---


def jsonl_schema(source: Source) -> pa.Schema:
    """The columns of the first lines, each with the type of its first value that could be a key, else null."""
    values = [value for value in map(_json_object, _lines(next(_blocks(source), b""))) if value is not None]
    names = dict.fromkeys(itertools.chain.from_iterable(values))
    return pa.schema([(name, _json_type([value.get(name) for value in values]) or pa.null()) for name in names])


def read_jsonl(unit: ReadUnit, columns: Columns) -> Iterator[RawBlock]:
    """The rows of a JSON Lines file; see `lrurec_dist.data.readers.read_blocks`.

    A key column has the type of its first value in the file; values of other types are wrong.
    """
    types: dict[str, pa.DataType] = {}
    first_row = 0
    for block in _blocks(unit.source):
        table = _parse_json(block, columns, types)
        yield _json_block(block, table, first_row) if table is not None else _json_lines(block, first_row, columns, types)
        first_row += _count_lines(block)


def _parse_json(block: bytes, columns: Columns, types: dict[str, pa.DataType]) -> pa.Table | None:
    """A block whose lines all hold one object with values of the known types; else None."""
    lines = _count_lines(block)
    # Objects alone may reach Arrow: it makes rows of what shares a line or spans two, and crashes on a null first.
    opened = block.startswith(b"{") + block.count(b"\n{")
    closed = block.count(b"}\n") + block.count(b"}\r\n") + block.endswith(b"}")
    if not types or opened != lines or closed != lines or not _is_utf8(block):
        return None
    schema = pa.schema([(name, types.get(name, pa.string())) for name in columns.names])
    try:
        table = pa.json.read_json(
            pa.BufferReader(block),
            parse_options=pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
    except pa.ArrowInvalid:
        return None
    for name in columns.names:
        if name not in types and table[name].null_count < len(table):
            types[name] = pa.string()
    return table if len(table) == lines else None


def _json_block(block: bytes, table: pa.Table, first_row: int) -> RawBlock:
    def originals(positions: np.ndarray) -> pa.Table:
        lines = _lines(block)
        return raw_lines([lines[row] for row in positions])

    return RawBlock(table, np.arange(first_row, first_row + len(table)), malformed_lines(), originals)


def _json_lines(block: bytes, first_row: int, columns: Columns, types: dict[str, pa.DataType]) -> RawBlock:
    """A block line by line; learns the types of columns that had no value so far."""
    lines = _lines(block)
    objects = [_json_object(line) for line in lines]
    rows = np.array([row for row, value in enumerate(objects) if value is not None], np.int64)
    malformed = [row for row, value in enumerate(objects) if value is None and lines[row].strip()]
    wrong = np.zeros(len(rows), bool)
    table = {}
    for name in columns.names:
        values = [value.get(name) for value in objects if value is not None]
        is_key, is_time = name in (columns.user, columns.item), name == columns.time
        if name not in types and (kind := _json_type(values)) in _parsable(is_key or is_time):
            types[name] = (
                pa.float64() if kind == pa.int64() and not (is_key or is_time) else kind
            )  # a price of 1 may be followed by 1.5
        if is_key or is_time:
            kinds = {pa.int64(), pa.string()} if is_time else {types.get(name, pa.string())}
            usable = [_key_type(value) in kinds for value in values]
            wrong |= np.array([not good and value is not None for good, value in zip(usable, values, strict=True)], bool)
            values = [value if good else None for good, value in zip(usable, values, strict=True)]
        if is_key:
            table[name] = pa.array(values, types.get(name, pa.string()))
        else:  # digits are integers, numbers in text are compared as numbers: text loses nothing
            table[name] = pa.array([_json_text(value) for value in values], pa.string())

    def originals(positions: np.ndarray) -> pa.Table:
        return raw_lines([lines[row] for row in rows[positions]])

    bad = malformed_lines([lines[row] for row in malformed], [first_row + row for row in malformed])
    return RawBlock(pa.table(table), first_row + rows, bad, originals, wrong if wrong.any() else None)


def _json_object(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None where there is none, or one that is no text (a lone surrogate)."""
    try:
        value = json.loads(line.decode())
        if b"\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parsable(key_or_time: bool) -> tuple[pa.DataType, ...]:
    return (pa.int64(), pa.string()) if key_or_time else (pa.int64(), pa.string(), pa.float64(), pa.bool_())


def _key_type(value: Any) -> pa.DataType | None:
    if isinstance(value, str):
        return pa.string()
    return pa.int64() if type(value) is int and -(2**63) <= value < 2**63 else None


def _json_type(values: list[Any]) -> pa.DataType | None:
    """The type of the first value that could be a key or a time, else of the first at all; None without any."""
    present = [value for value in values if value is not None]
    key_type = next(filter(None, map(_key_type, present)), None)
    if key_type is not None or not present:
        return key_type
    by_type = {bool: pa.bool_(), int: pa.float64(), float: pa.float64(), list: pa.list_(pa.null()), dict: pa.struct([])}
    return by_type[type(present[0])]


def _json_text(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else json.dumps(value)
