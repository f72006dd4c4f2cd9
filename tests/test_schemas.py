import json
from typing import Any

import pyarrow as pa
import pytest

from lrurec_dist.data.events import inspect_schemas
from lrurec_dist.errors import ConfigError, DataQualityError
from tests.logs import rules, sources_of, write_parquet, write_text

DAYS = ["date=2026-11-01", "date=2026-11-02", "date=2026-11-03"]


def write_days(root: Any, *columns: dict[str, Any]) -> list[str]:
    return [write_parquet(root / day / "a.parquet", table) for day, table in zip(DAYS, columns, strict=False)]


def columns(user: Any = (1,), item: Any = (1,), time: Any = (1,), **others: Any) -> dict[str, Any]:
    return {"user_id": user, "item_id": item, "time": time, **others}


def test_files_of_one_schema_have_no_notes(tmp_path):
    write_days(tmp_path, columns(price=[1.0]), columns(price=[1.0]), columns(price=[1.0]))
    assert inspect_schemas(sources_of(tmp_path), rules()) == []


def test_columns_that_are_not_read_may_come_and_go_and_are_noted_once(tmp_path):
    urls = write_days(tmp_path, columns(price=[1.0], a=[1]), columns(price=["1"], coupon=["x"]), columns(price=[1.0], a=[1]))
    assert inspect_schemas(sources_of(tmp_path), rules()) == [
        f"column a is missing from {urls[1]} on",
        f"column coupon appears from {urls[1]} on",
        f"column price changes from double to string from {urls[1]} on",
        f"column a appears from {urls[2]} on",
        f"column coupon is missing from {urls[2]} on",
    ]


def test_what_a_writer_may_choose_freely_is_no_change(tmp_path):
    write_days(
        tmp_path,
        columns(pa.array([1], pa.int32()), pa.array(["a"]), note=["a"]),
        columns(pa.array([1], pa.int64()), pa.array(["a"]).dictionary_encode(), note=pa.array(["a"]).dictionary_encode()),
        columns(pa.array([1], pa.uint8()), pa.array(["a"], pa.large_string()), note=pa.array(["a"], pa.large_string())),
    )
    assert inspect_schemas(sources_of(tmp_path), rules()) == []


@pytest.mark.parametrize("column", ["user", "item"])
def test_keys_of_another_kind_in_another_file_are_an_error_naming_both(tmp_path, column):
    urls = write_days(tmp_path, columns(**{column: pa.nulls(1)}), columns(**{column: [1]}), columns(**{column: ["1"]}))
    with pytest.raises(DataQualityError) as error:
        inspect_schemas(sources_of(tmp_path), rules())
    assert str(error.value).startswith(
        f"log.{column}_column={column}_id: keys are integers in {urls[1]} and strings (string) in {urls[2]}; "
    )


def test_keys_of_csv_are_strings_and_do_not_go_with_integers_of_parquet(tmp_path):
    parquet = write_parquet(tmp_path / "a.parquet", columns())
    csv = write_text(tmp_path / "b.csv", "user_id,item_id,time\n1,1,1\n")
    with pytest.raises(DataQualityError, match=r"keys are integers in .*a\.parquet and strings \(string\) in .*b\.csv"):
        inspect_schemas(sources_of(parquet) + sources_of(csv), rules())


def test_times_may_change_their_type_since_each_says_what_it_is(tmp_path):
    urls = write_days(tmp_path, columns(), columns(time=pa.array([1], pa.timestamp("us"))))
    assert inspect_schemas(sources_of(tmp_path), rules()) == [
        f"column time changes from int64 to timestamp[us] from {urls[1]} on"
    ]


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ({"user_id": [1], "time": [1]}, r"^log\.item_column=item_id: {url} has no column item_id; it has user_id, time$"),
        (columns(), r"^log\.keep=event == click: {url} has no column event; it has user_id, item_id, time$"),
        (columns([1.5], event=["click"]), r"^{url}: column user_id is double; keys are integers or strings"),
        (columns(time=[1.5], event=["click"]), r"^{url}: column time is double; a time is an integer"),
        (columns(event=[1]), r"^{url}: log\.keep=event == click: column event is int64; compare it with a number"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_before_anything_is_read(tmp_path, broken, message):
    urls = write_days(tmp_path, columns(event=["click"]), broken)
    with pytest.raises(DataQualityError, match=message.format(url=urls[1])):
        inspect_schemas(sources_of(tmp_path), rules(keep=("event == click",)))


def test_a_damaged_file_is_named(tmp_path):
    write_days(tmp_path, columns())
    path = write_text(tmp_path / DAYS[1] / "a.parquet", "no parquet")
    with pytest.raises(DataQualityError, match=rf"^{path} cannot be read as parquet: "):
        inspect_schemas(sources_of(tmp_path), rules())


def test_a_wrong_condition_is_an_error():
    with pytest.raises(ConfigError, match=r"^log\.keep=event: a condition is"):
        inspect_schemas([], rules(keep=("event",)))


def write_json(path: Any, *rows: dict[str, Any]) -> str:
    return write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def test_json_lines_are_known_by_their_first_lines(tmp_path):
    first = write_json(tmp_path / "a.jsonl", {"user_id": None, "item_id": "i", "time": 1}, {"user_id": 7})
    write_text(tmp_path / "b.jsonl", "")
    last = write_json(tmp_path / "c.jsonl", {"user_id": 8, "item_id": "i", "time": 1, "tags": [], "context": {"a": 1}})
    assert inspect_schemas(sources_of(tmp_path), rules()) == [
        f"column context appears from {last} on",
        f"column tags appears from {last} on",
    ]
    write_json(tmp_path / "d.jsonl", {"user_id": "9", "item_id": "i", "time": 1})
    with pytest.raises(DataQualityError, match=rf"keys are integers in {first} and strings \(string\) in .*d\.jsonl"):
        inspect_schemas(sources_of(tmp_path), rules())


def test_a_condition_on_json_lines_may_miss_in_some_files_and_not_in_all(tmp_path):
    row = {"user_id": 1, "item_id": 1, "time": 1}
    write_json(tmp_path / "a.jsonl", row)
    with pytest.raises(
        DataQualityError,
        match=r"^log\.keep=bot == true: every JSON Lines file, such as .*a\.jsonl, has no column bot; it has item_id",
    ):
        inspect_schemas(sources_of(tmp_path), rules(keep=("bot == true",)))
    write_json(tmp_path / "b.jsonl", row | {"bot": True})
    assert len(inspect_schemas(sources_of(tmp_path), rules(keep=("bot == true",)))) == 1
    with pytest.raises(
        DataQualityError, match=r"^log\.item_column=item: .*a\.jsonl has no column item; it has user_id, item_id, time"
    ):
        inspect_schemas(sources_of(tmp_path), rules(item_column="item"))
