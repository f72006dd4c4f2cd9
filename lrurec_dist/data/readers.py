"""The rows of a log's files in bounded blocks, with the way back to what the file holds."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lrurec_dist.data.raw_blocks import Columns, RawBlock, malformed_lines
from lrurec_dist.data.sources import ReadUnit, Source, open_parquet, reading
from lrurec_dist.data.text_readers import csv_schema, jsonl_schema, read_csv, read_jsonl

BLOCK_ROWS = 1 << 20
BLOCK_BYTES = 64 << 20  # of the columns that are read
_BATCH_ROWS = 1 << 17


def read_blocks(unit: ReadUnit, columns: Columns) -> Iterator[RawBlock]:
    """The rows of a unit in order, in blocks that fit in memory whatever the file's size.

    Rows are numbered from 0 in the file; in text these are its lines, without the header of CSV.
    Blank lines are no rows.

    Raises:
        DataNotReadyError: the file is no longer there.
        DataQualityError: the file is not of its format or damaged, or lacks a column.
    """
    read = {"parquet": _read_parquet, "csv": read_csv, "jsonl": read_jsonl}[unit.source.format]
    with reading(unit.source):
        yield from read(unit, columns)


def read_schema(source: Source) -> pa.Schema:
    """A file's columns: all of Parquet and CSV, those of the first lines of JSON Lines (none if there is no line).

    Raises:
        DataNotReadyError, DataQualityError: as `read_blocks`.
    """
    with reading(source):
        if source.format == "parquet":
            with open_parquet(source) as file:
                return file.schema_arrow
        return csv_schema(source) if source.format == "csv" else jsonl_schema(source)


def _read_parquet(unit: ReadUnit, columns: Columns) -> Iterator[RawBlock]:
    with open_parquet(unit.source) as file:
        columns.check(unit.source.url, file.schema_arrow.names)
        groups = list(range(file.num_row_groups) if unit.row_groups is None else unit.row_groups)
        originals = _Originals(file, groups, unit.first_row)
        first_row, batches = unit.first_row, []
        for batch in file.iter_batches(_BATCH_ROWS, row_groups=groups, columns=columns.names):
            batches.append(batch)
            if sum(b.num_rows for b in batches) >= BLOCK_ROWS or sum(b.nbytes for b in batches) >= BLOCK_BYTES:
                yield _parquet_block(batches, first_row, originals, columns)
                first_row, batches = first_row + sum(b.num_rows for b in batches), []
        if batches:
            yield _parquet_block(batches, first_row, originals, columns)


def _parquet_block(batches: list[pa.RecordBatch], first_row: int, originals: "_Originals", columns: Columns) -> RawBlock:
    table = pa.Table.from_batches(batches).select(columns.names)
    rows = np.arange(first_row, first_row + table.num_rows)
    return RawBlock(table, rows, malformed_lines(), lambda positions: originals.take(rows[positions]))


class _Originals:
    """Rows of a Parquet file with all its columns, asked for in rising order; reads a row group at most once."""

    def __init__(self, file: pq.ParquetFile, groups: list[int], first_row: int) -> None:
        self._file, self._groups = file, groups
        lengths = [file.metadata.row_group(group).num_rows for group in groups]
        self._starts = first_row + np.cumsum([0, *lengths])
        self._group = -1
        self._batches: Iterator[pa.RecordBatch] = iter(())
        self._batch: pa.RecordBatch = None  # the one at hand, and its rows in the file
        self._start = self._stop = 0

    def take(self, rows: np.ndarray) -> pa.Table:
        parts = []
        while len(rows):
            self._advance(int(rows[0]))
            here = int(np.searchsorted(rows, self._stop))
            parts.append(pa.Table.from_batches([self._batch]).take(pa.array(rows[:here] - self._start)))
            rows = rows[here:]
        return pa.concat_tables(parts)

    def _advance(self, row: int) -> None:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        if group != self._group:
            self._group, self._stop = group, int(self._starts[group])
            self._batches = self._file.iter_batches(_BATCH_ROWS, row_groups=[self._groups[group]])
        while row >= self._stop:
            self._batch = next(self._batches)
            self._start, self._stop = self._stop, self._stop + self._batch.num_rows
