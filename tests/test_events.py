import datetime
import gzip
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrurec_dist import storage
from lrurec_dist.data.events import normalise_block, read_events, resolve_log
from lrurec_dist.errors import DataNotReadyError, DataQualityError

INSTANT = 1_577_836_800_000_000  # 2020-01-01 in microseconds since 1970
NEW_YEAR = datetime.datetime(2020, 1, 1)
COLUMNS = ["user_id", "item_id", "time"]


def normalise(user: Any, item: Any, time: Any, unit: str = "s") -> pa.Table:
    return normalise_block(pa.table(dict(zip(COLUMNS, (user, item, time), strict=True))), columns=COLUMNS, timestamp_unit=unit)


def normalise_keys(keys: Any) -> pa.Table:
    return normalise(keys, keys, pa.array([0] * len(keys), pa.int64()))


def normalise_times(times: Any, unit: str = "s") -> pa.Table:
    ones = pa.array([1] * len(times), pa.int64())
    return normalise(ones, ones, times, unit)


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()], ids=str)
def test_integer_keys_become_int64(kind):
    events = normalise_keys(pa.array([1, None, 100], kind))
    for name in ("user_key", "item_key"):
        assert events[name].type == pa.int64()
        assert events[name].to_pylist() == [1, None, 100]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_string_keys_become_large_strings_and_stay_what_they_are(kind):
    events = normalise_keys(pa.array(["007", "7", "é", None], kind))
    for name in ("user_key", "item_key"):
        assert events[name].type == pa.large_string()
        assert events[name].to_pylist() == ["007", "7", "é", None]


@pytest.mark.parametrize("keys", [[5, None, 7, 5], ["a", None, "b", "a"]], ids=["integers", "strings"])
def test_dictionary_encoded_keys_are_the_keys_they_encode(keys):
    plain, encoded = pa.chunked_array([keys[:1], keys[1:]]), pa.chunked_array([keys[:1], keys[1:]]).dictionary_encode()
    assert normalise_keys(encoded).equals(normalise_keys(plain))


def test_keys_above_two_to_the_24_stay_exact():
    assert normalise_keys(pa.array([2**24 + 1, 2**53 + 1, 2**63 - 1]))["item_key"].to_pylist() == [
        2**24 + 1,
        2**53 + 1,
        2**63 - 1,
    ]


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.bool_(), pa.binary(), pa.date32()], ids=str)
@pytest.mark.parametrize("position", [0, 1])
def test_a_key_of_another_type_is_an_error_naming_column_and_way_out(kind, position):
    columns = [pa.array([1]), pa.array([1]), pa.array([1])]
    columns[position] = pa.nulls(1, kind)
    with pytest.raises(
        DataQualityError, match=rf"column {COLUMNS[position]} is {re.escape(str(kind))}; keys are integers or strings, so cast it"
    ):
        normalise(*columns)


def test_an_unsigned_key_above_two_to_the_63_is_an_error_naming_column_and_way_out():
    with pytest.raises(DataQualityError, match=r"column user_id holds unsigned keys above 2\^63; store them as strings"):
        normalise_keys(pa.array([1, 2**63], pa.uint64()))


@pytest.mark.parametrize(
    ("unit", "value", "microseconds"),
    [
        ("s", 1_577_836_800, INSTANT),
        ("ms", 1_577_836_800_001, INSTANT + 1_000),
        ("us", INSTANT + 1, INSTANT + 1),
        ("ns", INSTANT * 1000 + 1999, INSTANT + 1),
        ("position", 12, 12),
        ("s", -1, -1_000_000),
    ],
)
def test_integer_times_are_read_in_their_unit_as_numbers_or_as_text(unit, value, microseconds):
    for times in (pa.array([value]), pa.array([str(value)])):
        events = normalise_times(times, unit)
        assert events["timestamp"].type == pa.int64()
        assert events["timestamp"].to_pylist() == [microseconds]
        assert events["reason"].to_pylist() == [None]


@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
@pytest.mark.parametrize(
    "times",
    [
        pa.array([NEW_YEAR], pa.timestamp("s")),
        pa.array([NEW_YEAR], pa.timestamp("ms")),
        pa.array([NEW_YEAR], pa.timestamp("us")),
        pa.array([NEW_YEAR], pa.timestamp("ns")),
        pa.array([INSTANT // 1_000_000], pa.timestamp("s", "Asia/Tokyo")),
        pa.array([INSTANT], pa.timestamp("us", "UTC")),
        pa.array([NEW_YEAR.date()], pa.date32()),
        pa.array([NEW_YEAR.date()], pa.date64()),
    ],
    ids=lambda times: str(times.type),
)
def test_arrow_times_know_their_unit(times, unit):
    events = normalise_times(times, unit)
    assert events["timestamp"].type == pa.int64()
    assert events["timestamp"].to_pylist() == [INSTANT]


@pytest.mark.parametrize(
    "text",
    ["2020-01-01", "2020-01-01T00:00:00", "2020-01-01 00:00:00.000000", "2020-01-01T00:00:00Z", "2020-01-01T01:30:00+01:30"],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_spells_a_time_is_read_as_utc_unless_it_says_otherwise(text, kind):
    assert normalise_times(pa.array([text], kind))["timestamp"].to_pylist() == [INSTANT]


def test_digits_and_spelled_times_may_stand_in_one_column():
    events = normalise_times(pa.array(["2020-01-01", "5", "soon", None, "2020-01-02"]).dictionary_encode())
    assert events["timestamp"].to_pylist() == [INSTANT, 5_000_000, None, None, INSTANT + 86_400_000_000]
    assert events["reason"].to_pylist() == [None, None, "unparsable_timestamp", "null_timestamp", None]


@pytest.mark.parametrize("text", ["soon", "", " ", "1.5", "1577836800.5", "01/02/2020", "2020-13-01", "9" * 25, "1e9", "NaN"])
def test_text_that_is_no_time_is_counted_as_unparsable(text):
    events = normalise_times(pa.array([text, "7"]))
    assert events["reason"].to_pylist() == ["unparsable_timestamp", None]
    assert events["timestamp"].to_pylist() == [None, 7_000_000]


LAST_SECOND = (2**63 - 1) // 1_000_000


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (pa.array([LAST_SECOND, LAST_SECOND + 1]), "s"),
        (pa.array([-LAST_SECOND, -LAST_SECOND - 1]), "s"),
        (pa.array([1, 2**62]), "ms"),
        (pa.array([str(LAST_SECOND), str(LAST_SECOND + 1)]), "s"),
        (pa.array([1, 2**63 + 5], pa.uint64()), "s"),
        (pa.array([1, 2**63 + 5], pa.uint64()), "us"),
        (pa.array([1, 2**55]).cast(pa.timestamp("s")), "s"),
    ],
    ids=["s", "negative s", "ms", "text", "unsigned s", "unsigned us", "Arrow s"],
)
def test_a_time_too_far_away_for_microseconds_is_unparsable_and_does_not_wrap_around(times, unit):
    events = normalise_times(times, unit)
    assert events["reason"].to_pylist() == [None, "unparsable_timestamp"]
    assert events["timestamp"].is_null().to_pylist() == [False, True]


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.time64("us"), pa.duration("s")], ids=str)
def test_a_time_of_another_type_is_an_error_naming_column_and_way_out(kind):
    with pytest.raises(
        DataQualityError, match=r"column time is .*; a time is an integer with a unit, an Arrow timestamp, or text"
    ):
        normalise_times(pa.nulls(1, kind))


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("s", "UTC"), pa.date32()], ids=str)
def test_positions_cannot_be_arrow_times(kind):
    with pytest.raises(DataQualityError, match=r"log\.timestamp_unit=position, but column time is .*; set another unit"):
        normalise_times(pa.array([0], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind), "position")


def test_each_unusable_row_has_one_reason_and_the_user_comes_first():
    users = ["u", None, "", "u", "u", "u", "u", None]
    items = ["i", "i", "i", None, "", "i", "i", None]
    times = ["1", "1", "1", "1", "1", None, "soon", None]
    reasons = [None, *["null_user_key"] * 2, *["null_item_key"] * 2, "null_timestamp", "unparsable_timestamp", "null_user_key"]
    assert normalise(users, items, times)["reason"].to_pylist() == reasons


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_column_without_any_value_makes_every_row_unusable(column):
    columns = [pa.array([1, 2]), pa.array([1, 2]), pa.array([1, 2])]
    columns[column] = pa.nulls(2)
    assert normalise(*columns)["reason"].to_pylist() == [["null_user_key", "null_item_key", "null_timestamp"][column]] * 2


@pytest.mark.parametrize("kind", [pa.int64(), pa.string()], ids=str)
def test_a_block_without_rows_keeps_its_columns(kind):
    events = normalise(pa.array([], kind), pa.array([], kind), pa.array([], kind))
    assert events.num_rows == 0
    assert events.column_names == ["user_key", "item_key", "timestamp", "reason"]


keys = st.one_of(st.none(), st.sampled_from(["", "a", "007", "é"]))
times = st.one_of(st.none(), st.sampled_from(["", "soon", "2020-01-01", "1.5"]), st.integers(-(10**13), 10**18).map(str))


def expected_reason(user: str | None, item: str | None, time: str | None) -> str | None:
    if not user:
        return "null_user_key"
    if not item:
        return "null_item_key"
    if time is None:
        return "null_timestamp"
    in_range = time.lstrip("-").isdigit() and abs(int(time)) <= LAST_SECOND
    return None if in_range or time == "2020-01-01" else "unparsable_timestamp"


@settings(deadline=None)  # a loaded machine is slow now and then
@given(rows=st.lists(st.tuples(keys, keys, times)), cut=st.integers(0, 10))
def test_no_row_of_a_dirty_log_is_lost_or_judged_by_its_neighbours(rows, cut):
    def events_of(part: list[tuple[str | None, str | None, str | None]]) -> pa.Table:
        return normalise(*(pa.array([row[column] for row in part], pa.string()) for column in range(3)))

    whole = events_of(rows)
    reasons = whole["reason"].to_pylist()
    assert reasons == [expected_reason(*row) for row in rows]
    usable = whole.filter(whole["reason"].is_null())
    assert usable.num_rows + sum(reason is not None for reason in reasons) == len(rows)
    assert [usable[name].null_count for name in ("user_key", "item_key", "timestamp")] == [0, 0, 0]
    assert whole.to_pylist() == events_of(rows[:cut]).to_pylist() + events_of(rows[cut:]).to_pylist()


@pytest.mark.parametrize(
    ("names", "pattern", "log_format"),
    [
        (["a.parquet", "b.pq"], "", "parquet"),
        (["a.PARQUET"], "", "parquet"),
        (["a.csv", "b.csv.gz", "c.csv.zst"], "", "csv"),
        (["a.csv", "b.parquet"], "/*.csv", "csv"),
        (["a.csv", "b.parquet"], "/b.parquet", "parquet"),
        (["a.parquet", "_SUCCESS", ".crc"], "", "parquet"),
    ],
)
def test_the_format_follows_from_the_names(tmp_path, names, pattern, log_format):
    for name in names:
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    files, found = resolve_log(f"{tmp_path}{pattern}", "auto")
    assert found == log_format
    assert files == storage.expand(f"{tmp_path}{pattern}")


@pytest.mark.parametrize("names", [["a.csv", "b.parquet"], ["a.csv", "b.txt"], ["a"], ["a.csv.bz2"]])
def test_mixed_or_unknown_names_are_an_error_unless_the_format_is_given(tmp_path, names):
    for name in names:
        storage.write_bytes(f"{tmp_path}/{name}", b"")
    with pytest.raises(DataQualityError, match=r"does not tell one common format.*set log\.format=parquet or log\.format=csv"):
        resolve_log(str(tmp_path), "auto")
    files, found = resolve_log(str(tmp_path), "csv")
    assert (len(files), found) == (len(names), "csv")


@pytest.mark.parametrize("path", ["nowhere", "nowhere/*.csv", "empty"])
@pytest.mark.parametrize("log_format", ["auto", "csv"])
def test_a_log_that_is_not_there_is_not_ready(tmp_path, path, log_format):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataNotReadyError, match=rf"log\.path={tmp_path}/.*: no file there"):
        resolve_log(f"{tmp_path}/{path}", log_format)


@pytest.mark.parametrize("suffix", ["parquet", "csv", "csv.gz"])
@pytest.mark.parametrize("missing", ["user", "item", "timestamp"])
def test_a_missing_column_names_setting_file_and_present_columns(tmp_path, suffix, missing):
    path = f"{tmp_path}/log.{suffix}"
    if suffix == "parquet":
        pq.write_table(pa.table({"user": [1], "item": [1], "timestamp": [1], "price": [1]}), path)
    else:
        text = b"user,item,timestamp,price\n1,1,1,1\n"
        storage.write_bytes(path, gzip.compress(text) if suffix == "csv.gz" else text)
    columns = {f"{name}_column": "absent" if name == missing else name for name in ("user", "item", "timestamp")}
    message = rf"log\.{missing}_column=absent: {path} has no such column; it has user, item, timestamp, price"
    with pytest.raises(DataQualityError, match=message):
        read_events([path], log_format=suffix.split(".")[0], timestamp_unit="s", **columns)


@pytest.mark.parametrize(("log_format", "content"), [("parquet", b"user,item,time\n"), ("parquet", b""), ("csv", b"")])
def test_a_file_that_is_not_of_its_format_is_named(tmp_path, log_format, content):
    storage.write_bytes(f"{tmp_path}/log", content)
    with pytest.raises(DataQualityError, match=rf"{tmp_path}/log cannot be read as {log_format}"):
        read_events(
            [f"{tmp_path}/log"],
            log_format=log_format,
            user_column="user",
            item_column="item",
            timestamp_column="time",
            timestamp_unit="s",
        )
