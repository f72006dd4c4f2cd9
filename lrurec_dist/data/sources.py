"""Which files a log consists of, and how they are cut into units of work."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq

from lrurec_dist import storage
from lrurec_dist.errors import DataNotReadyError, DataQualityError

_COMPRESSED = ("", ".gz", ".zst", ".bz2")
_SUFFIXES = {
    "parquet": (".parquet", ".pq"),
    "csv": tuple(f".csv{suffix}" for suffix in _COMPRESSED),
    "jsonl": tuple(f"{name}{suffix}" for name in (".jsonl", ".ndjson", ".json") for suffix in _COMPRESSED),
}
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"  # where Hive and Spark put rows whose partition column is null
_FILES_AT_ONCE = 16  # footers and headers wait for the store, not for the CPU

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """One file of the log."""

    url: str
    format: str  # parquet | csv | jsonl
    version: str  # changes with the content
    size: int  # bytes
    partition: str  # value of the partition, "" where there is none


@dataclass(frozen=True)
class TableSnapshot:
    """One pinned snapshot of a table, and the Parquet files that it consists of."""

    format: str  # delta | iceberg
    location: str  # where the table lies, the same for all its snapshots
    snapshot: int  # Delta's version, or Iceberg's snapshot id
    versions: dict[str, str]  # URL of a file -> its version, see `table_file_version`
    partitions: dict[str, str | None]  # URL of a file -> its partition; "" for null, None where the table has no such one
    field_ids: dict[str, int]  # Iceberg, column -> id, if columns had other names once: see `tables.check_names`

    def owns(self, version: str) -> bool:
        """Whether the file with that version was read as one of this table."""
        return version.endswith(_of_table(self.location))


def table_file_version(size: int, location: str) -> str:
    """The version of a table's file: no writer changes one, so its size will do; and the table, which tells what is missing."""
    return f"{size} bytes{_of_table(location)}"


def _of_table(location: str) -> str:
    return f", of table {location}"


@dataclass(frozen=True)
class ReadUnit:
    """What one task reads: a file, or some consecutive row groups of a Parquet file."""

    source: Source
    row_groups: tuple[int, ...] | None  # None: the whole file
    first_row: int  # row number in the file of the unit's first row
    size: int  # estimated bytes in storage


def resolve_sources(
    path: str,
    *,
    log_format: str,
    partition_column: str,
    from_partition: str,
    to_partition: str,
    table: TableSnapshot | None = None,
) -> list[Source]:
    """The files behind `path`, sorted by (partition, url), each once.

    Args:
        path: a file, a directory, a glob, or several of them separated by commas; any fsspec URL.
        log_format: parquet, csv or jsonl; auto tells it by the names, which have to agree.
        partition_column: a directory `<partition_column>=<value>` gives its files that partition.
        from_partition: first value to read, compared as text; empty: no lower end.
        to_partition: first value that is not read any more; empty: no upper end. With either end
            rows of the null partition are left out, since null lies in no range.
        table: the files are those of this snapshot, and nothing is listed.

    Raises:
        DataNotReadyError: nothing matches a part of `path`, or no partition lies in the range.
        DataQualityError: the format cannot be told, the files are of several, or a range is asked
            of files without partition.
    """
    versions = table.versions if table else _list(path)
    partitions = table.partitions if table else {url: partition_of(url, partition_column) for url in versions}
    if from_partition or to_partition:
        versions = _prune(path, versions, partitions, partition_column, from_partition, to_partition)
    log_format = "parquet" if table else log_format
    kind = log_format if log_format != "auto" else _common_format(path, versions)
    sources = [Source(url, kind, version, int(version.split()[0]), partitions[url] or "") for url, version in versions.items()]
    return sorted(sources, key=lambda source: (source.partition, source.url))


def _list(path: str) -> dict[str, str]:
    versions: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in path.split(","))):
        found = storage.expand(part)
        if not found:
            raise DataNotReadyError(f"log.path={part}: no file there; give an existing file, directory or glob")
        versions |= found
    return versions


def partition_of(url: str, column: str) -> str | None:
    """The file's partition value; empty for the null partition, None where no directory names one."""
    for directory in reversed(url.split("/")[:-1]):
        name, equals, value = directory.partition("=")
        if equals and unquote(name) == column:
            return "" if value == _NULL_PARTITION else unquote(value)
    return None


def _prune(
    path: str, versions: dict[str, str], values: dict[str, str | None], column: str, start: str, stop: str
) -> dict[str, str]:
    without = next((url for url, value in values.items() if value is None), None)
    if without is not None:
        raise DataQualityError(
            f"log.from_partition={start}, log.to_partition={stop}: {without} lies in no partition {column}=…; "
            "set log.partition_column to the partition's name, or leave both ends empty"
        )
    kept = {
        url: version
        for url, version in versions.items()
        if (value := values[url]) and start <= value and (not stop or value < stop)
    }
    if not kept:
        known = sorted(filter(None, values.values()))
        raise DataNotReadyError(
            f"log.from_partition={start}, log.to_partition={stop}: no partition {column} of log.path={path} lies in that range; "
            f"there are {len(set(known))}" + (f", from {known[0]} to {known[-1]}" if known else "")
        )
    return kept


def _common_format(path: str, urls: Iterable[str]) -> str:
    formats = {url: next((name for name, ends in _SUFFIXES.items() if url.lower().endswith(ends)), "") for url in urls}
    kinds = set(formats.values())
    if len(kinds) == 1 and "" not in kinds:
        return kinds.pop()
    odd = next((url for url in formats if not formats[url]), next(iter(formats)))
    raise DataQualityError(
        f"log.path={path}: {odd} does not tell one common format by its name "
        f"({', '.join(sum(_SUFFIXES.values(), ()))}); set log.format=parquet, log.format=csv or log.format=jsonl"
    )


def read_units(sources: list[Source], unit_bytes: int) -> list[ReadUnit]:
    """The sources as units of about `unit_bytes`, in the same order.

    Larger Parquet files are cut between row groups, of which a unit holds at least one. Text has
    no place to start in the middle and stays whole.
    """

    def units_of(source: Source) -> list[ReadUnit]:
        if source.format != "parquet" or source.size <= unit_bytes:
            return [ReadUnit(source, None, 0, source.size)]
        return _cut_at_row_groups(source, unit_bytes)

    return [unit for units in each(units_of, sources) for unit in units]


def each(function: Callable[[Source], T], sources: Iterable[Source]) -> list[T]:
    """`function` of every source, in order; several at once, for functions that wait for storage."""
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        return list(pool.map(function, sources))


@contextmanager
def reading(source: Source) -> Iterator[None]:
    """Name the file in what a reader raises, as data that cannot be used or as a file that is gone.

    Raises:
        DataNotReadyError: the file is no longer there.
        DataQualityError: the file is not of its format, or damaged.
    """
    try:
        yield
    except FileNotFoundError:
        raise DataNotReadyError(
            f"{source.url} disappeared after the log was listed; list it again when its writer is done"
        ) from None
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the store failed; what Arrow cannot decode has no errno
            raise
        raise DataQualityError(f"{source.url} cannot be read as {source.format}: {str(error).splitlines()[0]}") from None


def open_parquet(source: Source) -> pq.ParquetFile:
    """The Parquet file behind a source; from a remote store its column chunks are fetched in large pieces ahead of use."""
    filesystem, path = storage.arrow_filesystem(source.url)
    return pq.ParquetFile(path, filesystem=filesystem, pre_buffer=not isinstance(filesystem, pa.fs.LocalFileSystem))


def _cut_at_row_groups(source: Source, unit_bytes: int) -> list[ReadUnit]:
    with reading(source), open_parquet(source) as file:
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
    uncompressed = sum(group.total_byte_size for group in groups) or 1
    units: list[ReadUnit] = []
    members: list[int] = []
    unit_size = unit_row = row = 0
    for index, group in enumerate(groups):
        size = source.size * group.total_byte_size // uncompressed
        if members and unit_size + size > unit_bytes:
            units.append(ReadUnit(source, tuple(members), unit_row, unit_size))
            members, unit_size, unit_row = [], 0, row
        members.append(index)
        unit_size += size
        row += group.num_rows
    return (
        [*units, ReadUnit(source, tuple(members), unit_row, unit_size)] if members else [ReadUnit(source, None, 0, source.size)]
    )
