import bz2
import gzip
import json
from typing import Any

import pyarrow as pa
import pytest

from lrurec_dist.data import text_readers
from lrurec_dist.errors import DataQualityError
from tests.logs import events_of, filtered_of, read_blocks, reasons_of, write_text


def zstd(data: bytes) -> bytes:
    return pa.compress(data, codec="zstd", asbytes=True)


def lines_of(*rows: Any) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def event(user: Any, item: Any = "i", time: Any = 5, **others: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "time": time, **others}


CONTENTS = {
    "csv": (b"price,item_id,time,user_id\n", b"1,i,5,u\n2,i,6\n3,,7,w\n"),
    "jsonl": (b"", lines_of(event("u"), {"item_id": "i"}, event("w", None, 7))),
    "ndjson": (b"", lines_of(event("u"), {"item_id": "i"}, event("w", None, 7))),
}


@pytest.mark.parametrize(
    ("suffix", "compress"), [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".zst", zstd), (".GZ", gzip.compress)]
)
@pytest.mark.parametrize("kind", CONTENTS)
def test_compressed_text_reads_as_plain_text(tmp_path, kind, suffix, compress):
    blocks = read_blocks(write_text(tmp_path / f"log.{kind}{suffix}", compress(b"".join(CONTENTS[kind]))))
    assert events_of(blocks) == [("u", "i", 5_000_000)]
    assert reasons_of(blocks) == {1: "malformed_row" if kind == "csv" else "null_user_key", 2: "null_item_key"}


def test_gzip_members_written_one_after_the_other_are_all_read(tmp_path):
    parts = [b"user_id,item_id,time\n", b"1,2,3\n" * 1000, b"4,5,6\n" * 1000]
    blocks = read_blocks(write_text(tmp_path / "log.csv.gz", b"".join(map(gzip.compress, parts))))
    assert len(events_of(blocks)) == 2000


@pytest.mark.parametrize("suffix", ["csv.gz", "jsonl.gz"])
def test_text_whose_compressed_end_is_missing_is_named(tmp_path, suffix):
    content = b"user_id,item_id,time\n1,2,3\n" if suffix == "csv.gz" else lines_of(event("u"))
    path = write_text(tmp_path / f"log.{suffix}", gzip.compress(content * 1000)[:-20])
    with pytest.raises(DataQualityError, match=rf"^{path} cannot be read as {suffix[:-3]}: "):
        read_blocks(path)


@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
@pytest.mark.parametrize("last", [True, False])
def test_byte_order_mark_line_ends_and_blank_lines_say_nothing(tmp_path, ending, last):
    lines = [b"user_id,item_id,time", b"007,i,5", b"", b'"a,b","i ""x""",6']
    path = write_text(tmp_path / "log.csv", b"\xef\xbb\xbf" + ending.join(lines) + ending * last)
    assert events_of(read_blocks(path)) == [("007", "i", 5_000_000), ("a,b", 'i "x"', 6_000_000)]


def test_ragged_lines_of_csv_are_quarantined_as_they_stand_and_others_with_all_columns(tmp_path):
    text = b'user_id,item_id,time,price\nu,i,5,1\nu,i\n,i,5,2.50\nu,"i,5,1\nu,i,5,1\xff\nv,i,6,1\n\nu,i,5,1,9\n'
    (block,) = read_blocks(write_text(tmp_path / "log.csv", text))
    assert [user for user, _, _ in events_of([block])] == ["u", "v"]
    none = dict.fromkeys(("user_id", "item_id", "time", "price"))
    rows = block.quarantined.drop_columns(["_source"]).sort_by("_row").to_pylist()
    assert rows == [
        {**none, "_line": "u,i", "_reason": "malformed_row", "_row": 1},
        {"user_id": None, "item_id": "i", "time": "5", "price": "2.50", "_line": None, "_reason": "null_user_key", "_row": 2},
        {**none, "_line": 'u,"i,5,1', "_reason": "malformed_row", "_row": 3},
        {**none, "_line": "u,i,5,1\\xff", "_reason": "malformed_row", "_row": 4},
        {**none, "_line": "u,i,5,1,9", "_reason": "malformed_row", "_row": 7},
    ]


@pytest.mark.parametrize("content", [b"\n1,2,3\n", b"\xff,item_id\n", b"a" * 2000])
def test_csv_without_a_usable_header_is_an_error(tmp_path, content, monkeypatch):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", 100)
    monkeypatch.setattr(text_readers, "_MAX_LINE_BYTES", 1000)
    with pytest.raises(DataQualityError, match=r"log\.csv cannot be read as csv: (its first line is no header|a line has more)"):
        read_blocks(write_text(tmp_path / "log.csv", content))


def test_a_name_twice_in_the_header_matters_only_if_it_is_asked_for(tmp_path):
    path = write_text(tmp_path / "log.csv", "user_id,item_id,time,x,x\nu,i,1,2,3\n,i,1,2,3\n")
    (block,) = read_blocks(path)
    assert block.quarantined.column_names[:5] == ["user_id", "item_id", "time", "x", "x_4"]
    with pytest.raises(DataQualityError, match=rf"^log\.keep=x == 1: {path} has several columns x"):
        read_blocks(path, keep=("x == 1",))


def test_integers_of_json_stay_integers_and_strings_stay_strings(tmp_path, monkeypatch):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", 200)  # the rest is parsed by Arrow
    rows = [event(user, item="2020-01-01", time="1970-01-01T00:00:05Z") for user in range(2**53, 2**53 + 100)]
    blocks = read_blocks(write_text(tmp_path / "log.jsonl", lines_of(*rows)))
    assert len(blocks) > 1
    assert events_of(blocks) == [(user, "2020-01-01", 5_000_000) for user in range(2**53, 2**53 + 100)]


@pytest.mark.parametrize("first_bytes", [1, 1 << 20])  # the first block line by line, then all
def test_values_of_json_that_are_no_key_or_time_are_of_a_wrong_type(tmp_path, monkeypatch, first_bytes):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", first_bytes)
    rows = [event(1)] + [event(user) for user in ("1", 1.0, 1.5, True, [1], {"a": 1}, 2**63)]
    rows += [event(1, item) for item in (7, False)] + [event(1, time=time) for time in (5.0, True, "5", {})] + [event(2)]
    path = write_text(tmp_path / "log.jsonl", lines_of(*rows))
    blocks = read_blocks(path)
    assert events_of(blocks) == [(1, "i", 5_000_000), (1, "i", 5_000_000), (2, "i", 5_000_000)]
    assert reasons_of(blocks) == dict.fromkeys([*range(1, 12), 13], "wrong_type")
    for block in blocks:
        for row in block.quarantined.to_pylist():
            assert json.loads(row["_line"]) == rows[row["_row"]]


def test_broken_lines_of_json_are_quarantined_as_they_stand(tmp_path):
    lines = [lines_of(event("u")).strip(), b"{", b"", b"[1]", b'{"user_id": "\xff"}', b"7", lines_of(event("v")).strip()]
    (block,) = read_blocks(write_text(tmp_path / "log.json", b"\n".join([*lines, b""])))
    assert [user for user, _, _ in events_of([block])] == ["u", "v"]
    assert block.quarantined["_line"].to_pylist() == ["{", "[1]", '{"user_id": "\\xff"}', "7"]
    assert reasons_of([block]) == dict.fromkeys([1, 3, 4, 5], "malformed_row")


def test_nulls_and_objects_that_share_or_span_lines_are_no_rows_in_blocks_that_arrow_parses(tmp_path, monkeypatch):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", 1)
    one = lines_of(event(1)).strip()
    for lines in ([b"null", one], [one + one, b'{"user_id":', b"1}"], [b"null"]):
        blocks = read_blocks(write_text(tmp_path / "log.jsonl", b"\n".join([one, *lines, one])))
        good = lines.count(one) + 2
        assert events_of(blocks) == [(1, "i", 5_000_000)] * good
        assert list(reasons_of(blocks).values()) == ["malformed_row"] * (len(lines) + 2 - good)


@pytest.mark.parametrize("first_bytes", [1, 1 << 20])
def test_conditions_on_json_compare_what_stands_there(tmp_path, monkeypatch, first_bytes):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", first_bytes)
    prices = [1, 1.5, 0, None, -2, 3, 1e3]
    rows = [event(user, price=price, bot=user % 2 == 0) for user, price in enumerate(prices)]
    path = write_text(tmp_path / "log.jsonl", lines_of(*rows))
    blocks = read_blocks(path, keep=("price > 0", "bot == false"))
    assert [user for user, _, _ in events_of(blocks)] == [1, 5]
    assert filtered_of(blocks) == {"keep: price > 0": 3, "keep: bot == false": 2}


def test_a_key_column_of_json_takes_the_type_of_its_first_value_wherever_that_is(tmp_path, monkeypatch):
    monkeypatch.setattr(text_readers, "_FIRST_BYTES", 1)
    monkeypatch.setattr(text_readers, "_BLOCK_BYTES", 100)
    rows = [event(None)] * 10 + [event(1.5)] + [event(7)] * 10 + [event("8")]
    blocks = read_blocks(write_text(tmp_path / "log.jsonl", lines_of(*rows)))
    assert events_of(blocks) == [(7, "i", 5_000_000)] * 10
    assert reasons_of(blocks) == dict.fromkeys(range(10), "null_user_key") | {10: "wrong_type", 21: "wrong_type"}
