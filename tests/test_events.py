"""Reading a log: blocks, units, filters, quarantine, and that every row is accounted for."""

import collections
import gzip
import json
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data import readers, text_readers
from lrurec_dist.data.events import read_unit
from lrurec_dist.data.sources import read_units
from lrurec_dist.errors import ConfigError, DataNotReadyError, DataQualityError
from tests.logs import events_of, filtered_of, read_blocks, reasons_of, rules, sources_of, write_parquet, write_text


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "_BATCH_ROWS", 7)
    monkeypatch.setattr(readers, "BLOCK_ROWS", 20)


def numbered(rows: int) -> dict[str, Any]:
    """Row i is user i, item i + 1000, i seconds; every tenth lacks the item."""
    items = pa.array([None if row % 10 == 3 else row + 1000 for row in range(rows)], pa.int32())
    return {"price": [row / 2 for row in range(rows)], "user_id": range(rows), "item_id": items, "time": range(rows)}


def expected_events(rows: int) -> list[tuple[int, int, int]]:
    return [(row, row + 1000, row * 1_000_000) for row in range(rows) if row % 10 != 3]


@pytest.mark.usefixtures("small_batches")
@pytest.mark.parametrize("row_group_size", [1, 6, 7, 30, 1000])
@pytest.mark.parametrize("unit_bytes", [1, 1000, 1 << 40])
def test_blocks_and_units_change_neither_events_nor_row_numbers(tmp_path, row_group_size, unit_bytes):
    path = write_parquet(tmp_path / "log.parquet", numbered(100), row_group_size=row_group_size)
    blocks = read_blocks(path, unit_bytes)
    assert events_of(blocks) == expected_events(100)
    assert reasons_of(blocks) == dict.fromkeys(range(3, 100, 10), "null_item_key")
    assert max(block.rows_read for block in blocks) <= 26
    original = pq.read_table(path)
    for block in blocks:
        quarantined = block.quarantined
        assert quarantined.drop_columns(["_reason", "_source", "_row"]).equals(original.take(quarantined["_row"])) or not len(
            quarantined
        )
        assert set(quarantined["_source"].to_pylist()) <= {path}


def test_a_block_ends_at_so_many_bytes_as_well(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "_BATCH_ROWS", 10)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    path = write_parquet(tmp_path / "log.parquet", {"user_id": ["u" * 50] * 100, "item_id": range(100), "time": range(100)})
    assert [block.rows_read for block in read_blocks(path)] == [20] * 5


def test_quarantined_rows_keep_all_columns_with_their_types(tmp_path):
    columns = {
        "user_id": pa.array([1, None, 3], pa.int16()),
        "item_id": pa.array(["a", "b", ""]).dictionary_encode(),
        "time": pa.array([1, 2, 3], pa.timestamp("ms", "UTC")),
        "tags": pa.array([["x"], None, []], pa.list_(pa.string())),
        "context": pa.array([{"page": 1}, {"page": None}, None], pa.struct([("page", pa.int8())])),
        "_reason": ["of", "an earlier", "night"],
    }
    path = write_parquet(tmp_path / "log.parquet", columns)
    (block,) = read_blocks(path)
    quarantined = block.quarantined
    assert quarantined["_reason"].to_pylist() == ["null_user_key", "null_item_key"]
    assert quarantined["_row"].to_pylist() == [1, 2]
    assert [quarantined.schema.field(name).type for name in ("_reason", "_source", "_row")] == [
        pa.string(),
        pa.large_string(),
        pa.int64(),
    ]
    for name in ("user_id", "item_id", "time", "tags", "context"):
        assert quarantined[name].type == columns[name].type
        assert quarantined[name].to_pylist() == columns[name].to_pylist()[1:]


def test_a_clean_file_is_read_without_its_other_columns(tmp_path):
    path = write_parquet(tmp_path / "log.parquet", {"user_id": [1], "item_id": [1], "time": [1], "price": [2.0]})
    with mock.patch.object(readers._Originals, "take", side_effect=AssertionError):
        (block,) = read_blocks(path)
    assert block.quarantined.column_names == ["_reason", "_source", "_row"]
    assert block.quarantined.num_rows == 0
    assert block.filtered == {}


@pytest.mark.usefixtures("small_batches")
def test_a_row_group_is_read_again_at_most_once_however_many_rows_are_rejected(tmp_path):
    path = write_parquet(tmp_path / "log.parquet", numbered(100), row_group_size=50)
    with mock.patch.object(pq.ParquetFile, "iter_batches", autospec=True, side_effect=pq.ParquetFile.iter_batches) as read:
        blocks = read_blocks(path)
    assert len(blocks) > 2
    assert read.call_count == 3  # the file, then each of its two row groups with all columns


LOG = {
    "user_id": ["a", "b", "c", "d", None, "f", "g"],
    "item_id": ["x", "x", None, "x", "x", "x", None],
    "time": [10, 20, 30, 40, 50, 60, 70],
    "event": ["click", "view", "view", "click", "click", None, "click"],
    "rating": ["5", "five", "4", "2", "", "5", "five"],
}


@pytest.mark.parametrize("suffix", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("changed", "users", "filtered", "reasons"),
    [
        ({}, "abdf", {}, {2: "null_item_key", 4: "null_user_key", 6: "null_item_key"}),
        (
            {"keep": ("event == click",)},
            "ad",
            {"keep: event == click": 3},
            {4: "null_user_key", 6: "null_item_key"},
        ),
        (
            {"keep": ("rating >= 4", "event == click")},
            "a",
            {"keep: rating >= 4": 1, "keep: event == click": 2},
            {1: "unreadable_condition", 4: "unreadable_condition", 6: "unreadable_condition"},
        ),
        (
            {"keep": ("event == click", "rating >= 4")},
            "a",
            {"keep: rating >= 4": 1, "keep: event == click": 3},
            {4: "unreadable_condition", 6: "unreadable_condition"},
        ),
        (
            {"since": 20_000_000, "until": 60_000_000},
            "bd",
            {"before log.since": 1, "from log.until on": 1},
            {2: "null_item_key", 4: "null_user_key", 6: "null_item_key"},
        ),
        ({"since": 61_000_000}, "", {"before log.since": 4}, {2: "null_item_key", 4: "null_user_key", 6: "null_item_key"}),
    ],
    ids=["all", "event", "number, then event", "event, then number", "window", "nothing left"],
)
def test_a_row_is_kept_filtered_or_quarantined_by_the_first_rule_it_fails(tmp_path, suffix, changed, users, filtered, reasons):
    rows = [dict(zip(LOG, row, strict=True)) for row in zip(*LOG.values(), strict=True)]
    path = tmp_path / f"log.{suffix}"
    if suffix == "parquet":
        write_parquet(path, LOG)
    elif suffix == "csv":
        lines = [",".join("" if value is None else str(value) for value in row.values()) for row in rows]
        write_text(path, "\n".join([",".join(LOG), *lines]) + "\n")
    else:
        write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
    blocks = read_blocks(path, **changed)
    if suffix == "csv":  # text knows no empty value besides null, which satisfies nothing
        empty = "keep: rating >= 4"
        if reasons.get(4) == "unreadable_condition":
            reasons, filtered = {row: why for row, why in reasons.items() if row != 4}, filtered | {empty: filtered[empty] + 1}
    assert "".join(user for user, _, _ in events_of(blocks)) == users
    assert filtered_of(blocks) == filtered
    assert reasons_of(blocks) == reasons


def test_a_condition_may_name_a_mapped_column(tmp_path):
    path = write_parquet(tmp_path / "log.parquet", numbered(20))
    blocks = read_blocks(path, keep=("user_id not in [0, 1]", "time < 5"))
    assert [user for user, _, _ in events_of(blocks)] == [2, 4]
    assert filtered_of(blocks) == {"keep: user_id not in [0, 1]": 2, "keep: time < 5": 15}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("column", ["user_id", "item_id", "time", "event"])
def test_a_file_without_a_column_is_an_error_naming_setting_file_and_what_there_is(tmp_path, suffix, column):
    names = [name for name in ("user_id", "item_id", "time", "event", "price") if name != column]
    path = f"{tmp_path}/log.{suffix}"
    if suffix == "parquet":
        write_parquet(path, {name: [1] for name in names})
    else:
        write_text(path, ",".join(names) + "\n")
    with pytest.raises(DataQualityError, match=rf"^log\..*: {path} has no column {column}; it has {', '.join(names)}$"):
        read_blocks(path, keep=("event == 1",))


@pytest.mark.parametrize(
    ("suffix", "content"), [("parquet", b"user,item\n"), ("parquet", b""), ("csv", b""), ("csv.gz", b"a,b\n")]
)
def test_a_file_that_is_not_of_its_format_is_named(tmp_path, suffix, content):
    path = write_text(tmp_path / f"log.{suffix}", content)
    with pytest.raises(DataQualityError, match=rf"^{path} cannot be read as {suffix.split('.')[0]}: "):
        read_blocks(path)


def test_a_file_that_is_gone_is_not_ready(tmp_path):
    path = write_parquet(tmp_path / "log.parquet", numbered(3))
    (unit,) = read_units(sources_of(path), 1 << 40)
    Path(path).unlink()
    with pytest.raises(DataNotReadyError, match=r"log\.parquet disappeared after the log was listed"):
        list(read_unit(unit, rules()))


def test_a_wrong_condition_is_an_error_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match=r"^log\.keep=event = click: a condition is"):
        read_blocks(write_text(tmp_path / "log.parquet", b""), keep=("event = click",))


@pytest.mark.parametrize("suffix", ["parquet", "csv.gz", "jsonl"])
def test_a_log_on_another_filesystem_reads_as_one_on_disk(tmp_path, suffix):
    local = f"{tmp_path}/log.{suffix}"
    if suffix == "parquet":
        write_parquet(local, numbered(50), row_group_size=20)
    else:
        lines = ['{"user_id": 1, "item_id": 2, "time": 3}', "{"] if suffix == "jsonl" else ["user_id,item_id,time", "1,2,3", "1"]
        text = "\n".join(lines).encode()
        write_text(local, text if suffix == "jsonl" else gzip.compress(text))
    remote = f"memory://test-events/log.{suffix}"
    storage.write_bytes(remote, Path(local).read_bytes())
    here, there = read_blocks(local), read_blocks(remote)
    assert events_of(here) == events_of(there) != []
    assert reasons_of(here) == reasons_of(there) != {}


# --- every row is accounted for, whatever the log holds ---

FIRST = {"user_id": 1, "item_id": "i", "time": 5, "event": "click"}  # tells the types of JSON Lines
KEEP = ("event in [click, 7]",)
LIMITS = {"keep": KEEP, "since": 0, "until": 10**12, "max_key_bytes": 3}

words = st.sampled_from([None, "", "a", "007", "é", "aaaa", "click", "7"])
moments = st.one_of(
    words, st.sampled_from(["2000-01-01", "1970-01-01T00:01Z", "1.5", "-1"]), st.integers(-(10**13), 10**20).map(str)
)
text_rows = st.lists(st.tuples(words, words, moments, words), max_size=40)
csv_lines = st.lists(
    st.one_of(
        st.tuples(words, words, moments, words).map(lambda row: ",".join(value or "" for value in row).encode()),
        st.text(alphabet='a1,"\r é', max_size=12).map(str.encode),
        st.sampled_from([b"\xff,i,5,click", b'"u","i","5","click"', b'u,"i,5,click', b'u,i,5,"click', b'"u""",i"x,5,click\r', b"\0,i,5,click"]),
    ),
    max_size=30,
)  # fmt: skip
anything = st.recursive(
    st.one_of(words, st.integers(-5, 5), st.sampled_from([2**63, 1.5, True, float("nan"), "\ud800"])),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.sampled_from("ab"), inner, max_size=2)),
    max_leaves=3,
)
json_lines = st.lists(
    st.one_of(
        st.fixed_dictionaries({}, optional=dict.fromkeys(FIRST, anything) | {"other": anything}).map(lambda row: json.dumps(row).encode()),
        st.just(json.dumps(FIRST).encode()),
        st.sampled_from([b"", b"  ", b"{", b"{}{}", b'{"user_id":', b"1}", b"[1]", b"null", b'{"user_id": "\xff"}', b'{"time": 1, "time": 2}', b"{}\r"]),
    ),
    max_size=30,
)  # fmt: skip


def fates(path: str, **changed: Any) -> collections.Counter[Any]:
    """What became of the rows of a file, without their order."""
    blocks = read_blocks(path, **(LIMITS | changed))
    reasons = [row for block in blocks for row in block.quarantined["_reason"].to_pylist()]
    assert len(reasons_of(blocks)) == len(reasons), "two rows with one number"
    return collections.Counter([*events_of(blocks), *reasons]) + collections.Counter(filtered_of(blocks))


@settings(deadline=None)  # a loaded machine is slow now and then
@given(rows=text_rows, row_group_size=st.integers(1, 20), batch_rows=st.integers(1, 9), block_rows=st.integers(1, 30))
def test_no_parquet_row_is_lost_or_judged_by_its_neighbours(rows, row_group_size, batch_rows, block_rows):
    def table(part: list[Any]) -> pa.Table:
        return pa.table({name: pa.array([row[i] for row in part], pa.string()) for i, name in enumerate(FIRST)})

    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(readers, "_BATCH_ROWS", batch_rows),
        mock.patch.object(readers, "BLOCK_ROWS", block_rows),
    ):
        whole = fates(write_parquet(f"{directory}/whole.parquet", table(rows), row_group_size=row_group_size))
        alone = [fates(write_parquet(f"{directory}/row.parquet", table([row]))) for row in rows]
    assert whole == sum(alone, collections.Counter())
    assert whole.total() == len(rows)


def check_lines(first: bytes, lines: list[bytes], suffix: str, block_bytes: int) -> None:
    blank = [not line.strip() if suffix == "jsonl" else not line.removesuffix(b"\r") for line in lines]
    with (
        tempfile.TemporaryDirectory() as directory,
        mock.patch.object(text_readers, "_FIRST_BYTES", max(len(first) + 1, 20)),
        mock.patch.object(text_readers, "_BLOCK_BYTES", block_bytes),
    ):
        whole = fates(write_text(f"{directory}/whole.{suffix}", b"\n".join([first, *lines])))
        alone = [fates(write_text(f"{directory}/line.{suffix}", b"\n".join([first, line]))) for line in lines]
        nothing = fates(write_text(f"{directory}/line.{suffix}", first))
    assert whole == sum((fate - nothing for fate in alone), nothing)
    assert whole.total() == nothing.total() + blank.count(False)


@settings(deadline=None)
@given(lines=csv_lines, block_bytes=st.integers(1, 100))
@example(lines=[b'u,"i,5,click', b'u,i",5,click', b'u,i,5,"click'], block_bytes=100)
def test_no_csv_line_is_lost_or_judged_by_its_neighbours(lines, block_bytes):
    check_lines(",".join(FIRST).encode(), lines, "csv", block_bytes)


@settings(deadline=None)
@given(lines=json_lines, block_bytes=st.integers(1, 300))
@example(lines=[b'{"user_id":', b"1}", b"{}{}"], block_bytes=300)
def test_no_json_line_is_lost_or_judged_by_its_neighbours(lines, block_bytes):
    check_lines(json.dumps(FIRST).encode(), lines, "jsonl", block_bytes)


def test_a_million_rows_come_in_several_blocks_and_add_up(tmp_path):
    rows = 2_500_000
    path = write_parquet(tmp_path / "log.parquet", dict.fromkeys(("user_id", "item_id", "time"), np.arange(rows)))
    blocks = read_blocks(path)
    assert [block.rows_read for block in blocks] == [1 << 20, 1 << 20, rows - (2 << 20)]
    assert sum(int(block.events["item_key"].to_numpy().sum()) for block in blocks) == rows * (rows - 1) // 2
