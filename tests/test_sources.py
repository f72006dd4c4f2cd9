from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lrurec_dist import storage
from lrurec_dist.data.sources import ReadUnit, Source, read_units, resolve_sources
from lrurec_dist.errors import DataNotReadyError, DataQualityError


def resolve(path: Any, log_format: str = "auto", start: str = "", stop: str = "", column: str = "date") -> list[Source]:
    return resolve_sources(str(path), log_format=log_format, partition_column=column, from_partition=start, to_partition=stop)


def touch(*paths: str | Path) -> None:
    for path in paths:
        storage.write_bytes(str(path), b"123")


@pytest.mark.parametrize(
    ("names", "pattern", "log_format"),
    [
        (["a.parquet", "b.pq"], "", "parquet"),
        (["a.PARQUET"], "", "parquet"),
        (["a.csv", "b.csv.gz", "c.csv.zst", "d.csv.bz2"], "", "csv"),
        (["a.jsonl", "b.ndjson.gz", "c.json", "d.json.ZST"], "", "jsonl"),
        (["a.csv", "b.parquet"], "/*.csv", "csv"),
        (["a.csv", "b.parquet"], "/b.parquet", "parquet"),
        (["a.parquet", "_SUCCESS", ".crc"], "", "parquet"),
    ],
)
def test_the_format_follows_from_the_names(tmp_path, names, pattern, log_format):
    touch(*(tmp_path / name for name in names))
    sources = resolve(f"{tmp_path}{pattern}")
    assert {source.format for source in sources} == {log_format}
    assert {source.url: source.version for source in sources} == storage.expand(f"{tmp_path}{pattern}")
    assert {source.size for source in sources} == {3}


@pytest.mark.parametrize("names", [["a.csv", "b.parquet"], ["a.csv", "b.txt"], ["a"], ["a.csv.lzma"]])
def test_mixed_or_unknown_names_are_an_error_unless_the_format_is_given(tmp_path, names):
    touch(*(tmp_path / name for name in names))
    with pytest.raises(DataQualityError, match=r"does not tell one common format.*set log\.format=parquet, log\.format=csv or"):
        resolve(tmp_path)
    assert [source.format for source in resolve(tmp_path, "csv")] == ["csv"] * len(names)


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.csv", "empty", "a.csv,nowhere"])
@pytest.mark.parametrize("log_format", ["auto", "csv"])
def test_a_log_that_is_not_there_is_not_ready_and_named(tmp_path, path, log_format):
    (tmp_path / "empty").mkdir()
    touch(tmp_path / "a.csv")
    parts = ",".join(f"{tmp_path}/{part}" for part in path.split(","))
    with pytest.raises(DataNotReadyError, match=rf"^log\.path={parts.split(',')[-1].replace('*', '.')}: no file there"):
        resolve(parts, log_format)


def test_several_paths_with_commas_give_each_file_once(tmp_path):
    touch(tmp_path / "a" / "1.csv", tmp_path / "a" / "2.csv", tmp_path / "b.csv")
    sources = resolve(f"{tmp_path}/b.csv, {tmp_path}/a/*.csv,{tmp_path}/a,{tmp_path}/a/1.csv")
    assert [source.url for source in sources] == [f"{tmp_path}/a/1.csv", f"{tmp_path}/a/2.csv", f"{tmp_path}/b.csv"]


DAYS = ["2026-10-31", "2026-11-01", "2026-11-02", "2026-11-10"]


def write_days(root: Path) -> None:
    # The names within a day count down: the order by partition is not the order by name.
    touch(*(root / f"hour={index % 2}" / f"date={day}" / f"part-{9 - index}.parquet" for index, day in enumerate(DAYS)))


@pytest.mark.parametrize(
    ("start", "stop", "days"),
    [
        ("", "", DAYS),
        ("2026-11-01", "", DAYS[1:]),
        ("", "2026-11-02", DAYS[:2]),
        ("2026-11-01", "2026-11-10", DAYS[1:3]),
        ("2026-11-02", "2026-11-03", ["2026-11-02"]),
    ],
)
def test_partitions_are_read_from_the_first_to_before_the_last_in_their_order(tmp_path, start, stop, days):
    write_days(tmp_path)
    assert [source.partition for source in resolve(tmp_path, start=start, stop=stop)] == days


def test_an_empty_range_names_the_partitions_there_are(tmp_path):
    write_days(tmp_path)
    with pytest.raises(DataNotReadyError, match=r"log\.from_partition=2027.*there are 4, from 2026-10-31 to 2026-11-10"):
        resolve(tmp_path, start="2027")


def test_a_range_of_files_without_the_partition_is_refused_and_one_of_them_named(tmp_path):
    write_days(tmp_path)
    touch(tmp_path / "other.parquet")
    assert resolve(tmp_path)[0].partition == ""
    with pytest.raises(
        DataQualityError, match=rf"{tmp_path}/other\.parquet lies in no partition date=…; set log\.partition_column"
    ):
        resolve(tmp_path, start="2026-11-01")


def test_the_null_partition_is_read_unless_a_range_is_asked(tmp_path):
    write_days(tmp_path)
    touch(tmp_path / "date=__HIVE_DEFAULT_PARTITION__" / "part-0.parquet")
    assert [source.partition for source in resolve(tmp_path)] == ["", *DAYS]
    assert [source.partition for source in resolve(tmp_path, start="0")] == DAYS


def test_partition_values_are_percent_decoded(tmp_path):
    touch(tmp_path / "date=2026-11-01 00%3A00%3A00" / "a.csv")
    assert resolve(tmp_path, start="2026-11-01 00:00", stop="2026-11-01 00:00:01")[0].partition == "2026-11-01 00:00:00"


def test_another_partition_column_can_be_named(tmp_path):
    write_days(tmp_path)
    assert {source.partition for source in resolve(tmp_path, column="hour", stop="1")} == {"0"}


def write_row_groups(path: Path, rows: int, per_group: int) -> None:
    pq.write_table(pa.table({"a": np.random.default_rng(0).integers(0, 2**60, rows)}), path, row_group_size=per_group)


@pytest.mark.parametrize(("rows", "per_group", "unit_groups"), [(1000, 100, 3), (1000, 250, 1), (1000, 1000, 1), (950, 100, 4)])
def test_a_large_parquet_file_is_cut_between_row_groups_into_units_of_about_the_size(tmp_path, rows, per_group, unit_groups):
    path = tmp_path / "a.parquet"
    write_row_groups(path, rows, per_group)
    groups = -(-rows // per_group)
    limit = int(path.stat().st_size / rows * per_group * (unit_groups + 0.5))
    units = read_units(resolve(path), limit)
    assert [group for unit in units for group in unit.row_groups or range(groups)] == list(range(groups))
    assert [unit.first_row for unit in units] == list(range(0, rows, per_group * unit_groups))
    assert all(0 < unit.size <= limit for unit in units)
    assert path.stat().st_size - len(units) * groups <= sum(unit.size for unit in units) <= path.stat().st_size


def test_a_row_group_above_the_size_is_a_unit_of_its_own(tmp_path):
    write_row_groups(tmp_path / "a.parquet", 100, 10)
    assert [unit.row_groups for unit in read_units(resolve(tmp_path), 1)] == [(group,) for group in range(10)]


def test_small_files_and_text_stay_whole_in_their_order(tmp_path):
    write_row_groups(tmp_path / "a.parquet", 100, 10)
    for name in ("b.parquet", "c.parquet"):
        write_row_groups(tmp_path / name, 10, 10)
    assert read_units(resolve(tmp_path), 1 << 20) == [ReadUnit(s, None, 0, s.size) for s in resolve(tmp_path)]
    storage.write_bytes(f"{tmp_path}/text/log.csv", b"a\n" * 100)
    assert [unit.row_groups for unit in read_units(resolve(tmp_path / "text"), 1)] == [None]


@pytest.mark.parametrize("content", [b"user,item,time\n", b"", b"PAR1xxxxxxxxxxxxPAR1"])
def test_a_file_that_is_no_parquet_is_named_when_it_has_to_be_cut(tmp_path, content):
    storage.write_bytes(f"{tmp_path}/log.parquet", content)
    (source,) = resolve(tmp_path)
    with pytest.raises(DataQualityError, match=rf"{tmp_path}/log\.parquet cannot be read as parquet: "):
        read_units([source], -1)


def test_a_file_that_is_gone_is_not_ready(tmp_path):
    write_row_groups(tmp_path / "a.parquet", 10, 5)
    sources = resolve(tmp_path)
    (tmp_path / "a.parquet").unlink()
    with pytest.raises(DataNotReadyError, match=r"a\.parquet disappeared after the log was listed"):
        read_units(sources, 1)


def test_files_of_another_filesystem_are_resolved_and_cut(tmp_path):
    write_row_groups(tmp_path / "a.parquet", 100, 10)
    storage.write_bytes("memory://test-sources/date=1/a.parquet", (tmp_path / "a.parquet").read_bytes())
    (source,) = resolve("memory://test-sources/*/*.parquet")
    assert (source.url, source.partition) == ("memory:///test-sources/date=1/a.parquet", "1")
    assert len(read_units([source], 1)) == 10
