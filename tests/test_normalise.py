"""What becomes of keys and times, by their types and values. All go through a real Parquet file."""

import datetime
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from lrurec_dist.data.events import parse_time
from lrurec_dist.errors import ConfigError, DataQualityError
from tests.logs import COLUMNS, read_blocks, reasons_of, write_parquet

INSTANT = 1_577_836_800_000_000  # 2020-01-01 in microseconds since 1970
NEW_YEAR = datetime.datetime(2020, 1, 1)


@pytest.fixture
def normalise(tmp_path: Path) -> Any:
    """The events and the reason of each row (None: an event), of a file with three columns."""

    def read(user: Any, item: Any, time: Any, unit: str = "s", **changed: Any) -> tuple[pa.Table, list[str | None]]:
        path = write_parquet(tmp_path / "log.parquet", dict(zip(COLUMNS, (user, item, time), strict=True)))
        blocks = read_blocks(path, timestamp_unit=unit, **changed)
        reasons = reasons_of(blocks)
        events = pa.concat_tables([block.events for block in blocks])
        return events, [reasons.get(row) for row in range(sum(block.rows_read for block in blocks))]

    return read


@pytest.fixture
def normalise_keys(normalise: Any) -> Any:
    return lambda keys, **changed: normalise(keys, keys, pa.array([0] * len(keys), pa.int64()), **changed)


@pytest.fixture
def normalise_times(normalise: Any) -> Any:
    def read(times: Any, unit: str = "s") -> tuple[list[int], list[str | None]]:
        ones = pa.array([1] * len(times), pa.int64())
        events, reasons = normalise(ones, ones, times, unit)
        assert events["timestamp"].type == pa.int64()
        return events["timestamp"].to_pylist(), reasons

    return read


@pytest.mark.parametrize("kind", [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint32(), pa.uint64()], ids=str)
def test_integer_keys_become_int64(kind, normalise_keys):
    events, reasons = normalise_keys(pa.array([1, None, 100], kind))
    assert reasons == [None, "null_user_key", None]
    for name in ("user_key", "item_key"):
        assert events[name].type == pa.int64()
        assert events[name].to_pylist() == [1, 100]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_string_keys_become_large_strings_and_stay_what_they_are(kind, normalise_keys):
    events, reasons = normalise_keys(pa.array(["007", "7", "é", None, " "], kind))
    assert reasons == [None, None, None, "null_user_key", None]
    for name in ("user_key", "item_key"):
        assert events[name].type == pa.large_string()
        assert events[name].to_pylist() == ["007", "7", "é", " "]


@pytest.mark.parametrize("keys", [[5, None, 7, 5], ["a", None, "b", "a"]], ids=["integers", "strings"])
def test_dictionary_encoded_keys_are_the_keys_they_encode(keys, normalise_keys):
    plain = pa.array(keys)
    assert normalise_keys(plain.dictionary_encode()) == normalise_keys(plain)


def test_keys_above_two_to_the_24_stay_exact(normalise_keys):
    keys = [2**24 + 1, 2**53 + 1, 2**63 - 1]
    assert normalise_keys(pa.array(keys))[0]["item_key"].to_pylist() == keys


@pytest.mark.parametrize("kind", [pa.float32(), pa.float64(), pa.bool_(), pa.binary(), pa.date32()], ids=str)
@pytest.mark.parametrize("position", [0, 1])
def test_a_key_of_another_type_is_an_error_naming_file_column_and_way_out(kind, position, normalise):
    columns = [pa.array([1]), pa.array([1]), pa.array([1])]
    columns[position] = pa.nulls(1, kind)
    column = rf"column {COLUMNS[position]} is {re.escape(str(kind))}; keys are integers or strings, so cast it"
    with pytest.raises(DataQualityError, match=rf"log\.parquet: {column}"):
        normalise(*columns)


def test_an_unsigned_key_above_two_to_the_63_is_an_error_naming_column_and_way_out(normalise_keys):
    with pytest.raises(DataQualityError, match=r"column user_id holds unsigned keys above 2\^63; store them as strings"):
        normalise_keys(pa.array([1, 2**63], pa.uint64()))


def test_a_key_is_too_long_by_its_bytes_in_utf8(normalise_keys):
    events, reasons = normalise_keys(pa.array(["aaaa", "aaaaa", "éé", "ééé"]), max_key_bytes=4)
    assert reasons == [None, "oversized_key", None, "oversized_key"]
    assert events["user_key"].to_pylist() == ["aaaa", "éé"]


@pytest.mark.parametrize(
    ("unit", "value", "microseconds"),
    [
        ("s", 1_577_836_800, INSTANT),
        ("ms", 1_577_836_800_001, INSTANT + 1_000),
        ("us", INSTANT + 1, INSTANT + 1),
        ("ns", INSTANT * 1000 + 1999, INSTANT + 1),
        ("position", 12, 12),
        ("s", -1, -1_000_000),
        ("s", 0, 0),
    ],
)
def test_integer_times_are_read_in_their_unit_as_numbers_or_as_text(unit, value, microseconds, normalise_times):
    for times in (pa.array([value]), pa.array([str(value)])):
        assert normalise_times(times, unit) == ([microseconds], [None])


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
def test_arrow_times_know_their_unit(times, unit, normalise_times):
    assert normalise_times(times, unit) == ([INSTANT], [None])


@pytest.mark.parametrize(
    "text",
    ["2020-01-01", "2020-01-01T00:00:00", "2020-01-01 00:00:00.000000", "2020-01-01T00:00:00Z", "2020-01-01T01:30:00+01:30"],
)
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_text_that_spells_a_time_is_read_as_utc_unless_it_says_otherwise(text, kind, normalise_times):
    assert normalise_times(pa.array([text], kind)) == ([INSTANT], [None])
    assert parse_time(text, "s", "log.since") == INSTANT


def test_digits_and_spelled_times_may_stand_in_one_column(normalise_times):
    times, reasons = normalise_times(pa.array(["2020-01-01", "5", "soon", None, "2020-01-02"]).dictionary_encode())
    assert times == [INSTANT, 5_000_000, INSTANT + 86_400_000_000]
    assert reasons == [None, None, "unparsable_timestamp", "null_timestamp", None]


@pytest.mark.parametrize("text", ["soon", "", " ", "1.5", "1577836800.5", "01/02/2020", "2020-13-01", "1e9", "NaN", "--5", "+5"])
def test_text_that_is_no_time_is_unparsable_and_no_setting(text, normalise_times):
    assert normalise_times(pa.array([text, "7"])) == ([7_000_000], ["unparsable_timestamp", None])
    if text:
        with pytest.raises(
            ConfigError, match=rf"^log\.until={re.escape(text)}: give an integer of log\.timestamp_unit=s or an ISO"
        ):
            parse_time(text, "s", "log.until")


def test_leading_zeros_of_digits_say_nothing(normalise_times):
    assert normalise_times(pa.array(["0" * 30 + "7", "-007", "000"])) == ([7_000_000, -7_000_000, 0], [None] * 3)


LAST_SECOND = (2**63 - 1) // 1_000_000


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        (pa.array([LAST_SECOND, LAST_SECOND + 1]), "s"),
        (pa.array([-LAST_SECOND, -LAST_SECOND - 1]), "s"),
        (pa.array([1, 2**62]), "ms"),
        (pa.array([str(LAST_SECOND), str(LAST_SECOND + 1)]), "s"),
        (pa.array(["1", "9" * 25]), "us"),
        (pa.array([str(2**63 - 1), str(2**63)]), "position"),
        (pa.array([1, 2**63 + 5], pa.uint64()), "s"),
        (pa.array([1, 2**63 + 5], pa.uint64()), "us"),
        (pa.array([1, 2**55]).cast(pa.timestamp("ms")), "s"),
    ],
    ids=["s", "negative s", "ms", "text", "many digits", "position", "unsigned s", "unsigned us", "Arrow ms"],
)
def test_a_time_too_far_away_for_microseconds_is_out_of_range_and_does_not_wrap_around(times, unit, normalise_times):
    read, reasons = normalise_times(times, unit)
    assert reasons == [None, "out_of_range_timestamp"]
    assert len(read) == 1


@pytest.mark.parametrize("kind", [pa.float64(), pa.bool_(), pa.time64("us"), pa.duration("s")], ids=str)
def test_a_time_of_another_type_is_an_error_naming_column_and_way_out(kind, normalise_times):
    with pytest.raises(
        DataQualityError, match=r"column time is .*; a time is an integer with a unit, an Arrow timestamp, or text"
    ):
        normalise_times(pa.nulls(1, kind))


@pytest.mark.parametrize("kind", [pa.timestamp("us"), pa.timestamp("s", "UTC"), pa.date32()], ids=str)
def test_positions_cannot_be_arrow_times(kind, normalise_times):
    with pytest.raises(DataQualityError, match=r"log\.timestamp_unit=position, but column time is .*; set another unit"):
        normalise_times(pa.array([0], pa.int32() if kind == pa.date32() else pa.int64()).cast(kind), "position")


def test_positions_cannot_be_spelled_times(normalise_times):
    assert normalise_times(pa.array(["2020-01-01", "3"]), "position") == ([3], ["unparsable_timestamp", None])
    with pytest.raises(ConfigError, match=r"^log\.since=2020-01-01: give an integer of log\.timestamp_unit=position$"):
        parse_time("2020-01-01", "position", "log.since")


def test_each_unusable_row_has_one_reason_and_the_user_comes_first(normalise):
    users = ["u", None, "", "u", "u", "u", "u", None, "u", "u" * 300]
    items = ["i", "i", "i", None, "", "i", "i", None, "i", "i"]
    times = ["1", "1", "1", "1", "1", None, "soon", None, "9" * 20, None]
    reasons = [None, *["null_user_key"] * 2, *["null_item_key"] * 2, "null_timestamp", "unparsable_timestamp", "null_user_key"]
    assert normalise(users, items, times)[1] == [*reasons, "out_of_range_timestamp", "oversized_key"]


@pytest.mark.parametrize("column", [0, 1, 2])
def test_a_column_without_any_value_makes_every_row_unusable(column, normalise):
    columns = [pa.array([1, 2]), pa.array([1, 2]), pa.array([1, 2])]
    columns[column] = pa.nulls(2)
    assert normalise(*columns)[1] == [["null_user_key", "null_item_key", "null_timestamp"][column]] * 2


def test_settings_of_time_are_read_as_the_times_of_the_log():
    assert parse_time("", "s", "log.since") is None
    assert parse_time("1577836800", "s", "log.since") == INSTANT
    assert parse_time("-7", "position", "log.since") == -7
    with pytest.raises(ConfigError, match=r"^log\.since=99999999999999999999: "):
        parse_time("99999999999999999999", "us", "log.since")
