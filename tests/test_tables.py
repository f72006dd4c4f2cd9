"""Logs that are Delta Lake or Iceberg tables, against the same rows in Parquet files."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyiceberg.types
import pytest
from deltalake import DeltaTable
from pyiceberg.manifest import DataFileContent

from lrurec_dist import storage
from lrurec_dist.data.sources import resolve_sources
from lrurec_dist.data.tables import pin_table
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError
from tests.dirty_log import CLEAN, kept_files, prepare
from tests.tables import (
    DATES,
    NIGHTS,
    RULES,
    allow_in_delta,
    append_delta,
    append_iceberg,
    as_parquet,
    commit_delta,
    delete_row_of_delta,
    delete_row_of_iceberg,
    night_of,
)
from tests.tables import catalogue as catalogue


@dataclass(frozen=True)
class Lake:
    """A table and what may happen to it."""

    path: str
    format: str
    append: Callable[..., Any]  # nights
    compact: Callable[[], Any]
    snapshots: Callable[[], list[int]]

    def prepare(self, url: Path, **changes: Any) -> Any:
        return prepare(url, self.path, log_format=self.format, **(RULES | changes))[0]


@pytest.fixture(params=["delta", "iceberg"])
def lake(request, tmp_path) -> Lake:
    if request.param == "delta":
        url = str(tmp_path / "a lake" / "events")
        return Lake(
            url,
            "auto",
            lambda *nights: append_delta(url, *nights),
            lambda: DeltaTable(url).optimize.compact(),
            lambda: list(range(DeltaTable(url).version() + 1)),
        )
    found, name = request.getfixturevalue("catalogue"), "shop.events"
    return Lake(
        name,
        "iceberg",
        lambda *nights: append_iceberg(found, name, *nights),
        lambda: found.load_table(name).overwrite(found.load_table(name).scan().to_arrow()),
        lambda: [each.snapshot_id for each in found.load_table(name).snapshots()],
    )


def test_a_table_and_its_older_snapshot_give_what_the_same_rows_give_as_parquet(lake, tmp_path):
    nights = [night_of(night) for night in NIGHTS]
    lake.append(*nights)
    for count, snapshot in ((3, ""), (2, str(lake.snapshots()[1]))):
        dataset = lake.prepare(tmp_path / f"table-{count}", snapshot=snapshot)
        plain, _ = prepare(tmp_path / f"plain-{count}", as_parquet(tmp_path / f"log-{count}", *nights[:count]), **RULES)
        assert kept_files(dataset) == kept_files(plain)
        for fact in ("rows_read", "rows_rejected", "events_dropped", "interactions"):
            assert dataset.manifest[fact] == plain.manifest[fact]
        inputs = dataset.manifest["inputs"]
        assert inputs["table"]["snapshot"] == lake.snapshots()[count - 1]
        assert inputs["sources"].keys() <= storage.expand(f"{tmp_path}/**/*.parquet").keys(), "named as a listing names them"
        assert len(inputs["sources"]) == count


def test_partitions_of_a_table_are_pruned_by_their_values_whatever_their_directories_are_called(lake, tmp_path):
    lake.append(*(night_of(night, date) for night, date in zip(NIGHTS, DATES, strict=True)), night_of(NIGHTS[0], ""))
    table = pin_table(lake.path, log_format=lake.format, snapshot="", partition_column="date")

    def partitions(start: str, stop: str) -> list[str]:
        options = {"log_format": "auto", "partition_column": "date", "from_partition": start, "to_partition": stop}
        sources = resolve_sources(lake.path, **options, table=table)
        assert all(storage.exists(source.url) for source in sources)
        return [source.partition for source in sources]

    assert partitions("", "") == ["", *DATES]
    assert partitions("2026-11-02", "") == DATES[1:]
    assert partitions("0", "2026-11-02") == DATES[:1]
    with pytest.raises(DataNotReadyError, match="there are 3, from 2026-11-01 to a b:c/%é"):
        partitions("b", "")
    ranged = lake.prepare(tmp_path / "night", from_partition="2026-11-02")
    plain, _ = prepare(tmp_path / "plain", as_parquet(tmp_path / "log", *map(night_of, NIGHTS[1:])), **RULES)
    assert kept_files(ranged) == kept_files(plain)
    with pytest.raises(DataQualityError, match=r"lies in no partition hour=…; set log\.partition_column"):
        lake.prepare(tmp_path / "hours", from_partition="0", partition_column="hour")


def test_a_night_reads_the_new_files_of_a_table_alone_and_equals_a_rebuild_to_the_byte(lake, tmp_path):
    parent = ""
    for index, night in enumerate(NIGHTS):
        lake.append(night_of(night, DATES[index]))
        merged = lake.prepare(tmp_path / f"night-{index}", parent=parent)
        assert merged.manifest["rows_read"] == len(night)
        parent = merged.url
    quiet = lake.prepare(tmp_path / "quiet", parent=parent)
    assert (quiet.manifest["rows_read"], quiet.place) == (0, merged.url)
    rebuilt = lake.prepare(tmp_path / "rebuilt", parent=parent, rebuild=True)
    assert rebuilt.manifest["rows_read"] == sum(map(len, NIGHTS))
    assert kept_files(rebuilt) == kept_files(merged)


def test_a_merge_with_a_table_whose_files_were_rewritten_is_refused_and_a_rebuild_works(lake, tmp_path):
    lake.append(*map(night_of, NIGHTS[:2]))
    parent = lake.prepare(tmp_path / "parent")
    lake.compact()
    lake.append(night_of(NIGHTS[2]))
    with pytest.raises(
        DataQualityError, match=rf"was read by {parent.url} and is not in snapshot .* \(2 such files\).*set dataset\.rebuild=true"
    ):
        lake.prepare(tmp_path / "merged", parent=parent.url)
    rebuilt = lake.prepare(tmp_path / "rebuilt", parent=parent.url, rebuild=True)
    plain, _ = prepare(
        tmp_path / "plain", as_parquet(tmp_path / "log", *map(night_of, NIGHTS)), parent=parent.url, rebuild=True, **RULES
    )
    assert kept_files(rebuilt) == kept_files(plain)
    assert lake.prepare(tmp_path / "next", parent=rebuilt.url).manifest["rows_read"] == 0


def test_files_outside_the_range_that_is_read_do_not_count_as_rewritten(lake, tmp_path):
    lake.append(*map(night_of, NIGHTS[:2], DATES))
    parent = lake.prepare(tmp_path / "parent")
    merged = lake.prepare(tmp_path / "merged", parent=parent.url, from_partition=DATES[1])
    assert (merged.manifest["rows_read"], merged.identity) == (0, parent.identity)


def test_the_same_command_finds_its_dataset_and_names_the_snapshot_if_the_table_has_grown(lake, tmp_path):
    lake.append(night_of(NIGHTS[0]))
    first = lake.prepare(tmp_path / "night")
    assert prepare(tmp_path / "night", lake.path, log_format=lake.format, **RULES)[1]
    lake.append(night_of(NIGHTS[1]))
    pinned = lake.snapshots()[0]
    with pytest.raises(ConfigError, match=rf"prepared with other sources; .*set log\.snapshot={pinned}, which it was"):
        lake.prepare(tmp_path / "night")
    again, was_there = prepare(tmp_path / "night", lake.path, log_format=lake.format, snapshot=str(pinned), **RULES)
    assert (was_there, again.identity) == (True, first.identity)


def test_a_commit_that_changes_no_file_leaves_the_dataset_found(tmp_path):
    url = append_delta(tmp_path / "events", night_of(NIGHTS[0]))
    prepare(tmp_path / "night", url, **RULES)
    DeltaTable(url).alter.set_table_properties({"delta.appendOnly": "true"})
    assert DeltaTable(url).version() == 1
    assert prepare(tmp_path / "night", url, **RULES)[1]


def test_a_missing_table_is_not_ready_and_an_unknown_snapshot_a_wrong_setting(lake, tmp_path):
    with pytest.raises(DataNotReadyError, match=r"no (Delta table there|such Iceberg table)"):
        lake.prepare(tmp_path / "night") if lake.format == "iceberg" else prepare(tmp_path / "n", lake.path, log_format="delta")
    lake.append(night_of(CLEAN))
    with pytest.raises(ConfigError, match=rf"^log\.snapshot=77: .* (to|it has) {lake.snapshots()[-1]}"):
        lake.prepare(tmp_path / "night", snapshot="77")


def test_a_table_without_rows_is_not_ready(lake, tmp_path):
    lake.append(night_of([]))
    with pytest.raises(DataNotReadyError, match="has no rows"):
        lake.prepare(tmp_path / "night")


def test_a_snapshot_of_files_is_refused_and_so_is_a_table_among_other_paths(tmp_path):
    files = as_parquet(tmp_path / "files", night_of(CLEAN))
    with pytest.raises(ConfigError, match=r"^log\.snapshot=3: log\.path=.* is no Delta table"):
        prepare(tmp_path / "night", files, snapshot="3")
    table = append_delta(tmp_path / "table", night_of(CLEAN))
    with pytest.raises(ConfigError, match=rf"{table} is a Delta table, and a table stands alone"):
        prepare(tmp_path / "night", f"{files},{table}")


def test_a_clone_of_a_delta_table_is_read_where_its_files_lie(tmp_path):
    url = append_delta(tmp_path / "a lake", night_of(NIGHTS[0]))
    clone = append_delta(tmp_path / "clone", night_of(NIGHTS[1]))
    (source,) = Path(url).glob("*.parquet")
    add = {"path": source.as_uri(), "size": source.stat().st_size, "modificationTime": 1}
    commit_delta(clone, {"add": {**add, "partitionValues": {}, "dataChange": True}})
    dataset, _ = prepare(tmp_path / "night", clone, **RULES)
    assert dataset.manifest["rows_read"] == len(NIGHTS[0]) + len(NIGHTS[1])
    assert str(source) in dataset.manifest["inputs"]["sources"]


@pytest.mark.parametrize(("path", "log_format"), [("memory://lake/events", "delta"), ("hdfs://lake/1.metadata.json", "iceberg")])
def test_a_table_on_a_store_that_its_package_does_not_know_is_a_wrong_setting(path, log_format):
    with pytest.raises(ConfigError, match=rf"^log\.path={path}: tables are found on local disk, s3, gs and abfs"):
        pin_table(path, log_format=log_format, snapshot="", partition_column="date")


def test_an_older_version_whose_log_was_cleaned_up_is_a_wrong_setting(tmp_path):
    url = append_delta(tmp_path / "events", *map(night_of, NIGHTS))
    DeltaTable(url).create_checkpoint()
    (tmp_path / "events" / "_delta_log" / f"{0:020d}.json").unlink()
    with pytest.raises(ConfigError, match=r"^log\.snapshot=1: .* cannot be read at that version any more .* newest one is 2"):
        prepare(tmp_path / "night", url, snapshot="1", **RULES)


def test_row_level_deletes_of_delta_are_refused_and_an_earlier_version_is_read(tmp_path):
    url = append_delta(tmp_path / "events", night_of(CLEAN))
    delete_row_of_delta(tmp_path / "events")
    with pytest.raises(DataQualityError, match=rf"{url}: the Delta table has deletion vectors at version 1 .*REORG TABLE"):
        prepare(tmp_path / "night", url)
    assert prepare(tmp_path / "night", url, snapshot="0")[0].manifest["rows_read"] == len(CLEAN)


@pytest.mark.parametrize("content", [DataFileContent.POSITION_DELETES, DataFileContent.EQUALITY_DELETES], ids=lambda c: c.name)
def test_row_level_deletes_of_iceberg_are_refused_and_an_earlier_snapshot_is_read(catalogue, tmp_path, content):
    table = append_iceberg(catalogue, "shop.events", night_of(CLEAN))
    before = table.current_snapshot().snapshot_id
    delete_row_of_iceberg(table, content)
    with pytest.raises(DataQualityError, match=r"shop\.events: snapshot .* deletes (single )?rows .*rewrite_data_files"):
        prepare(tmp_path / "night", "shop.events", log_format="iceberg")
    earlier, _ = prepare(tmp_path / "night", "shop.events", log_format="iceberg", snapshot=str(before))
    assert earlier.manifest["rows_read"] == len(CLEAN)


def test_mapped_columns_of_delta_are_refused(tmp_path):
    url = append_delta(tmp_path / "events", night_of(CLEAN))
    mapping = {"delta.columnMapping.id": 1, "delta.columnMapping.physicalName": "col-1"}
    fields = [{"name": "user", "type": "long", "nullable": True, "metadata": mapping}]
    metadata = {
        "id": "0",
        "format": {"provider": "parquet", "options": {}},
        "schemaString": f'{{"type": "struct", "fields": {fields}}}'.replace("'", '"').replace("True", "true"),
        "partitionColumns": [],
        "configuration": {"delta.columnMapping.mode": "name", "delta.columnMapping.maxColumnId": "1"},
    }
    commit_delta(url, allow_in_delta("columnMapping"), {"metaData": metadata})
    with pytest.raises(DataQualityError, match=r"maps columns \(user is col-1 in its files\).*columnMapping\.mode=none"):
        prepare(tmp_path / "night", url)


def test_a_renamed_column_of_iceberg_is_refused_where_it_is_read(catalogue, tmp_path):
    table = append_iceberg(catalogue, "shop.events", night_of(CLEAN, "2026-11-01"))
    with table.update_schema() as update:
        update.rename_column("date", "day")
    prepare(tmp_path / "unconcerned", "shop.events", log_format="iceberg")
    with table.update_schema() as update:
        update.rename_column("item", "product")
    with pytest.raises(DataQualityError, match=r"column product of .* is named item in this file; rewrite"):
        prepare(tmp_path / "renamed", "shop.events", log_format="iceberg", item_column="product")
    with table.update_schema() as update:
        update.add_column("item", pyiceberg.types.LongType())
    with pytest.raises(DataQualityError, match=r"column item of .* is another one of that name in this file"):
        prepare(tmp_path / "again", "shop.events", log_format="iceberg")
    table.overwrite(table.scan().to_arrow())
    rewritten, _ = prepare(tmp_path / "rewritten", "shop.events", log_format="iceberg", item_column="product")
    assert rewritten.manifest["rows_read"] == len(CLEAN)


def test_iceberg_is_read_without_a_catalogue_from_a_metadata_file(catalogue, tmp_path):
    table = append_iceberg(catalogue, "shop.events", night_of(NIGHTS[0]))
    first = table.metadata_location
    parent, _ = prepare(tmp_path / "first", first.removeprefix("file://"), log_format="iceberg", **RULES)
    table = append_iceberg(catalogue, "shop.events", night_of(NIGHTS[1]))
    merged, _ = prepare(tmp_path / "second", table.metadata_location, log_format="iceberg", parent=parent.url, **RULES)
    assert [dataset.manifest["rows_read"] for dataset in (parent, merged)] == [len(NIGHTS[0]), len(NIGHTS[1])]


@pytest.mark.parametrize(("package", "log_format"), [("deltalake", "auto"), ("pyiceberg.catalog", "iceberg")])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package, log_format):
    path = append_delta(tmp_path / "events", night_of(CLEAN))
    for name in [name for name in sys.modules if name.startswith(package)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    extra = package.removesuffix("lake").partition(".")[0].removeprefix("py")
    with pytest.raises(ConfigError, match=rf"pip install 'lrurec_dist\[{extra}\]'"):
        prepare(tmp_path / "night", path, log_format=log_format)
