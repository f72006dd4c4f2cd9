"""A Delta Lake table's files at one version. Needs the extra `delta`."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pyarrow as pa

from lrurec_dist import storage
from lrurec_dist.data.sources import TableSnapshot, table_file_version
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError, TryAgainError

if TYPE_CHECKING:
    from deltalake import DeltaTable

LOG_DIRECTORY = "_delta_log"
_MAPPED = "delta.columnMapping.physicalName"


def pin_delta(path: str, version: int | None, partition_column: str) -> TableSnapshot:
    """The files of a version, or of the newest one; see `lrurec_dist.data.tables.pin_table`."""
    location = storage.canonical(path).rstrip("/")
    if not storage.exists(storage.join(location, LOG_DIRECTORY)):
        raise DataNotReadyError(f"log.path={path}: no Delta table there, {LOG_DIRECTORY} is missing; give an existing table")
    with _errors(location):
        table = _open(location, version)
        _refuse_what_files_do_not_tell(table, location)
        actions = pa.table(table.get_add_actions(flatten=True))
    versions, partitions = {}, {}
    known = f"partition.{partition_column}"
    values = actions[known].to_pylist() if known in actions.column_names else [None] * len(actions)
    for written, size, value in zip(actions["path"].to_pylist(), actions["size_bytes"].to_pylist(), values, strict=True):
        relative = unquote(written)  # the log holds URLs, and a partition's directory is escaped once more
        url = storage.canonical(relative) if "://" in relative else storage.join(location, relative)
        versions[url] = table_file_version(size, location)
        partitions[url] = None if known not in actions.column_names else "" if value is None else str(value)
    if not versions:
        raise DataNotReadyError(f"log.path={path}: version {table.version()} of the Delta table has no rows")
    return TableSnapshot("delta", location, table.version(), versions, partitions, {})


def _open(location: str, version: int | None) -> "DeltaTable":
    from deltalake import DeltaTable
    from deltalake.exceptions import DeltaError

    # deltalake refuses plain HTTP, which s3fs takes: one AWS_ENDPOINT_URL shall do for both.
    plain = os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://")
    options = {"allow_http": "true"} if plain else None
    newest = DeltaTable(location, storage_options=options)
    if version is None or version == newest.version():
        return newest
    if version > newest.version():
        raise ConfigError(f"log.snapshot={version}: {location} has versions up to {newest.version()}; give one of them")
    try:
        return DeltaTable(location, version=version, storage_options=options)
    except DeltaError as error:
        raise ConfigError(
            f"log.snapshot={version}: {location} cannot be read at that version any more ({_reason(error)}); "
            f"its newest one is {newest.version()}"
        ) from None


@contextmanager
def _errors(location: str) -> Iterator[None]:
    """What deltalake raises, after its own attempts, as errors of ours; the first that it may raise is that it is missing."""
    try:
        from deltalake.exceptions import DeltaError
    except ImportError as error:
        raise ConfigError(f"log.path={location}: is a Delta table, and {error}; pip install 'lrurec_dist[delta]'") from None
    try:
        yield
    except OSError as error:
        reason = _reason(error)
        if "privileges" in reason or "Unauthenticated" in reason:
            raise ConfigError(
                f"{location}: refuses to read ({reason}); check its rights, and credentials in the environment"
            ) from None
        raise TryAgainError(f"{location}: could not read the Delta log: {reason}; try again later") from None
    except DeltaError as error:
        raise DataQualityError(f"log.path={location}: cannot be read as a Delta table: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What went wrong, in one line: deltalake draws a coloured tree."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m|↳", " ", str(error)).split())[:300]


def _refuse_what_files_do_not_tell(table: "DeltaTable", location: str) -> None:
    mapped = next((field for field in table.schema().fields if field.metadata.get(_MAPPED, field.name) != field.name), None)
    if mapped is not None:
        raise DataQualityError(
            f"log.path={location}: the Delta table maps columns ({mapped.name} is {mapped.metadata[_MAPPED]} in its files), "
            "so that its files cannot be read by themselves; set delta.columnMapping.mode=none there, or read a copy of it"
        )
    if "deletionVectors" not in (table.protocol().reader_features or []):
        return
    for batch in pa.RecordBatchReader.from_stream(table.deletion_vectors()):
        if batch.num_rows:
            raise DataQualityError(
                f"log.path={location}: the Delta table has deletion vectors at version {table.version()} ({batch['filepath'][0]}), so "
                "that its files hold rows that were deleted; apply them there: REORG TABLE … APPLY (PURGE)"
            )
