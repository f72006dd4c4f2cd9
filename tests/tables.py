"""Real Delta Lake and Iceberg tables of a few rows, and what their own writers do not do."""

import binascii
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pyiceberg.catalog
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.partitioning import UNPARTITIONED_PARTITION_SPEC
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update.snapshot import _FastAppendFiles
from pyiceberg.transforms import IdentityTransform
from pyiceberg.typedef import Record
from pyiceberg.utils.config import Config as IcebergSettings
from pyroaring import BitMap64

from tests.dirty_log import CLEAN, DIRTY, Row

COLUMNS = ("user", "item", "time")
ROWS = CLEAN + DIRTY
NIGHTS = [ROWS[0::3], ROWS[1::3], [*ROWS[2::3], *ROWS[3:6]]]  # each late for the others, and three events twice
DATES = ["2026-11-01", "2026-11-02", "a b:c/%é"]
RULES = {"drop_duplicates": True, "max_rejected_share": 1.0}


def night_of(rows: Sequence[Row], date: str | None = None) -> pa.Table:
    """Rows as a table writer takes them, with a column `date` if one is given."""
    columns = {name: pa.array([row[at] for row in rows], pa.int64()) for at, name in enumerate(COLUMNS)}
    return pa.table(columns | ({} if date is None else {"date": pa.array([date or None] * len(rows), pa.string())}))


def as_parquet(directory: Path, *nights: pa.Table) -> str:
    """Each night as a plain Parquet file."""
    directory.mkdir()
    for index, night in enumerate(nights):
        pq.write_table(night, directory / f"{index}.parquet")
    return str(directory)


def append_delta(url: str | Path, *nights: pa.Table, storage_options: dict[str, str] | None = None) -> str:
    """Append each night as a version of its own, partitioned by date if it has one."""
    for night in nights:
        by = ["date"] if "date" in night.column_names else None
        write_deltalake(str(url), night, mode="append", partition_by=by, storage_options=storage_options)
    return str(url)


def commit_delta(url: str | Path, *actions: dict[str, Any]) -> None:
    """Add a version with exactly these actions."""
    version = DeltaTable(str(url)).version() + 1
    lines = "".join(f"{json.dumps(action)}\n" for action in actions)
    (Path(url) / "_delta_log" / f"{version:020d}.json").write_text(lines)


def allow_in_delta(feature: str) -> dict[str, Any]:
    """The action that lets a table use a reader feature."""
    return {"protocol": {"minReaderVersion": 3, "minWriterVersion": 7, "readerFeatures": [feature], "writerFeatures": [feature]}}


def delete_row_of_delta(url: Path) -> None:
    """Delete the first row of the first file by a deletion vector."""
    added = next(
        json.loads(line)["add"]
        for log in sorted((url / "_delta_log").glob("*.json"))
        for line in log.read_text().splitlines()
        if line.startswith('{"add"')
    )
    bitmap = (1681511377).to_bytes(4, "little") + BitMap64([0]).serialize()
    vector = url / "deletion.bin"
    vector.write_bytes(b"\x01" + len(bitmap).to_bytes(4, "big") + bitmap + binascii.crc32(bitmap).to_bytes(4, "big"))
    removed = {"path": added["path"], "deletionTimestamp": 1, "dataChange": True}
    place = {"storageType": "p", "pathOrInlineDv": vector.as_uri(), "offset": 1, "sizeInBytes": len(bitmap), "cardinality": 1}
    commit_delta(url, allow_in_delta("deletionVectors"), {"remove": removed}, {"add": {**added, "deletionVector": place}})


def append_iceberg(catalogue: Catalog, name: str, *nights: pa.Table) -> Table:
    """Append each night as a snapshot of its own, partitioned by date if it has one."""
    catalogue.create_namespace_if_not_exists(name.partition(".")[0])
    if not catalogue.table_exists(name):
        table = catalogue.create_table(name, nights[0].schema)
        if "date" in nights[0].column_names:
            with table.update_spec() as update:
                update.add_field("date", IdentityTransform(), "date")
    table = catalogue.load_table(name)
    for night in nights:
        table.append(night)
    return table


class _DeleteWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class _RowDelete(_FastAppendFiles):
    def __init__(self, *, delete: DataFile, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._delete = delete

    def _manifests(self) -> list[ManifestFile]:
        spec, schema = UNPARTITIONED_PARTITION_SPEC, self._transaction.table_metadata.schema()
        output = self.new_manifest_output()
        with _DeleteWriter(spec, schema, output, self._snapshot_id, "null") as writer:
            writer.add(
                ManifestEntry.from_args(
                    status=ManifestEntryStatus.ADDED,
                    snapshot_id=self._snapshot_id,
                    sequence_number=None,
                    file_sequence_number=None,
                    data_file=self._delete,
                )
            )
        return [writer.to_manifest_file(), *self._existing_manifests()]


def delete_row_of_iceberg(table: Table, content: DataFileContent) -> None:
    """Delete a row of the table by a delete file: by its position, or by its user's key."""
    url = next(iter(table.scan().plan_files())).file.file_path
    rows = {"file_path": [url], "pos": [0]} if content == DataFileContent.POSITION_DELETES else {"user": [1]}
    path = f"{table.location().removeprefix('file://')}/data/{uuid.uuid4().hex}.parquet"
    pq.write_table(pa.table(rows), path)
    delete = DataFile.from_args(
        content=content,
        file_path=f"file://{path}",
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=1,
        file_size_in_bytes=Path(path).stat().st_size,
        equality_ids=[1] if content == DataFileContent.EQUALITY_DELETES else None,
    )
    with table.transaction() as transaction:
        _RowDelete(operation=Operation.OVERWRITE, transaction=transaction, io=table.io, delete=delete).commit()


@pytest.fixture
def catalogue(tmp_path, monkeypatch):
    """An Iceberg catalogue of the test's own, known to pyiceberg by its environment."""
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__URI", f"sqlite:///{tmp_path}/catalogue.db")
    monkeypatch.setenv("PYICEBERG_CATALOG__DEFAULT__WAREHOUSE", f"file://{tmp_path}/warehouse")
    monkeypatch.setattr(pyiceberg.catalog, "_ENV_CONFIG", IcebergSettings())  # pyiceberg reads it when it is imported
    return pyiceberg.catalog.load_catalog()
