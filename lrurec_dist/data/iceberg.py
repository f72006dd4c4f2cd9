"""An Apache Iceberg table's files at one snapshot. Needs the extra `iceberg`."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lrurec_dist import storage
from lrurec_dist.data.sources import TableSnapshot, table_file_version
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError, TryAgainError
from lrurec_dist.stores import retried

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile
    from pyiceberg.table import FileScanTask, Table

_REFUSED = "so that its files cannot be read by themselves; rewrite them there (rewrite_data_files)"


def pin_iceberg(path: str, snapshot: int | None, partition_column: str) -> TableSnapshot:
    """The files of a snapshot, or of the newest one; see `lrurec_dist.data.tables.pin_table`.

    A path with a slash is a metadata file or a table's directory, any other a catalogue's identifier.
    """
    table = retried("read", path, lambda: _open(path))
    pinned = table.current_snapshot() if snapshot is None else table.snapshot_by_id(snapshot)
    if snapshot is not None and pinned is None:
        known = ", ".join(str(each.snapshot_id) for each in sorted(table.snapshots(), key=lambda each: -each.timestamp_ms)[:5])
        raise ConfigError(f"log.snapshot={snapshot}: {path} has no such snapshot; it has {known or 'none'}")
    tasks = retried("read", path, lambda: _plan(table, path, pinned.snapshot_id)) if pinned is not None else []
    if pinned is None or not tasks:
        raise DataNotReadyError(f"log.path={path}: the Iceberg table has no rows")
    location = storage.canonical(table.location()).rstrip("/")
    versions, partitions = {}, {}
    for task in tasks:
        file = task.file
        if task.delete_files:
            raise DataQualityError(
                f"log.path={path}: snapshot {pinned.snapshot_id} of the Iceberg table deletes single rows of {file.file_path}, {_REFUSED}"
            )
        if file.file_format.value != "PARQUET":
            raise DataQualityError(f"log.path={path}: {file.file_path} is {file.file_format.value}, {_REFUSED} as Parquet")
        url = storage.canonical(file.file_path)
        versions[url] = table_file_version(file.file_size_in_bytes, location)
        partitions[url] = _partition_of(table, file, partition_column)
    return TableSnapshot("iceberg", location, pinned.snapshot_id, versions, partitions, _changed_names(table, snapshot))


def _open(path: str) -> "Table":
    try:
        from pyiceberg.catalog import load_catalog
        from pyiceberg.exceptions import NotInstalledError
        from pyiceberg.table import StaticTable
    except ImportError as reason:
        raise ConfigError(f"log.format=iceberg: {reason}; pip install 'lrurec_dist[iceberg]'") from None
    with _errors(path):
        if "/" in path:
            # Through fsspec, as everything else: pyarrow's own driver knows no AWS_ENDPOINT_URL.
            return StaticTable.from_metadata(path, {"py-io-impl": "pyiceberg.io.fsspec.FsspecFileIO"})
        try:
            catalogue = load_catalog()
        except (ValueError, NotInstalledError) as reason:
            raise ConfigError(
                f"log.path={path}: no Iceberg catalogue can be opened ({reason}); describe it in .pyiceberg.yaml or the environment, "
                "e.g. PYICEBERG_CATALOG__DEFAULT__URI, or give the URL of a table's metadata file"
            ) from None
        if "." not in path:
            raise ConfigError(f"log.path={path}: is no table of an Iceberg catalogue; give namespace.table")
        return catalogue.load_table(path)


def _plan(table: "Table", path: str, snapshot: int) -> "list[FileScanTask]":
    with _errors(path):
        try:
            return list(table.scan(snapshot_id=snapshot).plan_files())
        except ValueError as error:
            if "equality deletes" not in str(error):
                raise
            raise DataQualityError(
                f"log.path={path}: snapshot {snapshot} of the Iceberg table deletes rows by their values, {_REFUSED}"
            ) from None


@contextmanager
def _errors(path: str) -> Iterator[None]:
    """What pyiceberg raises, where it is about the table; the rest is for `retried` to judge."""
    from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError

    try:
        yield
    except (NoSuchTableError, NoSuchNamespaceError, FileNotFoundError) as reason:
        raise DataNotReadyError(f"log.path={path}: no such Iceberg table ({reason}); give an existing one") from None
    except OSError as error:  # pyarrow's driver for S3 tells by its text alone, after attempts of its own
        if "AWS Error ACCESS_DENIED" in str(error):
            raise ConfigError(
                f"{path}: refuses to read ({error}); check its rights, and the catalogue's s3.* properties"
            ) from None
        if "AWS Error" in str(error):
            raise TryAgainError(f"{path}: could not read: {error}; try again later") from None
        raise


def _partition_of(table: "Table", file: "DataFile", column: str) -> str | None:
    """The file's partition value as Iceberg spells it for people; empty for null, None without such a partition."""
    spec = table.specs()[file.spec_id]
    kinds = spec.partition_type(table.schema()).fields
    for at, (field, kind) in enumerate(zip(spec.fields, kinds, strict=True)):
        if field.name == column:
            value: Any = file.partition[at]
            return "" if value is None else field.transform.to_human_string(kind.field_type, value)
    return None


def _changed_names(table: "Table", snapshot: int | None) -> dict[str, int]:
    """Column -> field id, if the table ever renamed a column or used a name again; else nothing.

    An older snapshot has the names of its time, the newest one the table's: a renaming makes no snapshot.
    """
    names: dict[int, set[str]] = defaultdict(set)
    numbers: dict[str, set[int]] = defaultdict(set)
    for schema in table.schemas().values():
        for field in schema.fields:
            names[field.field_id].add(field.name)
            numbers[field.name].add(field.field_id)
    if len(names) == len(numbers) == sum(map(len, names.values())):
        return {}
    return {field.name: field.field_id for field in table.scan(snapshot_id=snapshot).projection().fields}
