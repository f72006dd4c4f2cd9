"""A log that is a Delta Lake or Iceberg table: one snapshot of it, pinned, as the files it consists of."""

import glob

from lrurec_dist import storage, stores
from lrurec_dist.data.delta import LOG_DIRECTORY, pin_delta
from lrurec_dist.data.iceberg import pin_iceberg
from lrurec_dist.data.sources import Source, TableSnapshot, each, open_parquet, reading
from lrurec_dist.errors import ConfigError, DataQualityError


def pin_table(path: str, *, log_format: str, snapshot: str, partition_column: str) -> TableSnapshot | None:
    """The snapshot of the table that `path` names, or None where it names files.

    Args:
        path: a Delta table's URL; an Iceberg table's identifier in the catalogue that pyiceberg's own
            settings describe, its metadata file or its directory.
        log_format: delta or iceberg; auto takes a directory with `_delta_log` for a Delta table.
        snapshot: Delta's version or Iceberg's snapshot id; empty: the newest.
        partition_column: whose values the snapshot gives for each file.

    Raises:
        ConfigError: there is no such snapshot, the package that reads the format is not installed, or
            the catalogue is not configured.
        DataNotReadyError: there is no such table, or it has no rows.
        DataQualityError: the table needs more than reading its files: deletes of single rows, renamed
            columns, files that are no Parquet.
        TryAgainError: the catalogue or the store fails for a reason that passes.
    """
    if log_format == "auto":
        parts = [stripped for part in path.split(",") if (stripped := part.strip())]
        table = next((part for part in parts if _is_delta(part)), None)
        if table is not None and len(parts) > 1:
            raise ConfigError(f"log.path={path}: {table} is a Delta table, and a table stands alone; prepare the others apart")
        log_format = "delta" if table is not None else "files"
    if log_format in ("delta", "iceberg"):
        if stores.scheme_of(path) not in ("file", *stores.OBJECT_STORES):
            raise ConfigError(
                f"log.path={path}: tables are found on local disk, s3, gs and abfs; elsewhere give an Iceberg catalogue's"
            )
        pin = pin_delta if log_format == "delta" else pin_iceberg
        return pin(path, int(snapshot) if snapshot else None, partition_column)
    if snapshot:
        raise ConfigError(
            f"log.snapshot={snapshot}: log.path={path} is no Delta table; leave it empty, or set log.format=iceberg"
        )
    return None


def _is_delta(path: str) -> bool:
    return not glob.has_magic(path) and storage.exists(storage.join(path, LOG_DIRECTORY))


def check_merge(table: TableSnapshot, seen: dict[str, str], parent: str) -> None:
    """See that the table still has every file of it that the parent read: others may hold their rows, too.

    Args:
        table: what is to be merged.
        seen: the parent's sources, URL -> version.
        parent: its URL, for the message.

    Raises:
        DataQualityError: a file is gone.
    """
    gone = sorted(url for url, version in seen.items() if table.owns(version) and url not in table.versions)
    if gone:
        raise DataQualityError(
            f"{gone[0]} was read by {parent} and is not in snapshot {table.snapshot} of {table.location} ({len(gone):,} such files); "
            "compaction, an overwrite or a delete puts rows into other files, which a merge would count twice; set dataset.rebuild=true"
        )


def check_names(table: TableSnapshot, sources: list[Source], names: list[str]) -> None:
    """See that columns have the same names in the files as in the table, where the table changed some.

    Raises:
        DataQualityError: a file knows a column by another name, or has another one by its name.
    """

    def check(source: Source) -> None:
        with reading(source), open_parquet(source) as file:
            fields = [(field.name, (field.metadata or {}).get(b"PARQUET:field_id")) for field in file.schema_arrow]
        ids = {name: int(number) for name, number in fields if number is not None}
        for name in names:
            wanted = table.field_ids.get(name)
            here = next((known for known, number in ids.items() if number == wanted), name)
            if wanted is not None and (here != name or ids.get(name, wanted) != wanted):
                raise DataQualityError(
                    f"{source.url}: column {name} of {table.location} is "
                    + (f"named {here} in this file" if here != name else "another one of that name in this file")
                    + "; rewrite the table's data files (rewrite_data_files), or read a copy of it"
                )

    if table.field_ids:
        each(check, sources)
