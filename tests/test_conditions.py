import datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrurec_dist.data.conditions import parse_condition
from lrurec_dist.errors import ConfigError, DataQualityError


def verdicts(text: str, values: Any, kind: pa.DataType | None = None) -> str:
    """One letter per row: k kept, f filtered, u unreadable."""
    column = pa.chunked_array([pa.array(values, kind)])
    unsatisfied, unreadable = parse_condition(text).evaluate(column)
    filtered = [False] * len(column) if unsatisfied is None else unsatisfied.tolist()
    unclear = [False] * len(column) if unreadable is None else unreadable.tolist()
    assert not any(f and u for f, u in zip(filtered, unclear, strict=True))
    return "".join("f" if f else "u" if u else "k" for f, u in zip(filtered, unclear, strict=True))


@pytest.mark.parametrize(
    ("text", "column", "operator", "values"),
    [
        ("event == click", "event", "==", ("click",)),
        ("  rating>=4 ", "rating", ">=", (4,)),
        ("price > -0.5e1", "price", ">", (-5.0,)),
        ("country in [DE, FR]", "country", "in", ("DE", "FR")),
        ("country not  in [\"DE\", FR , 'a, b']", "country", "not in", ("DE", "FR", "a, b")),
        ("code in[7]", "code", "in", (7,)),
        ('code == "7"', "code", "==", ("7",)),
        ("city == New York", "city", "==", ("New York",)),
        ('"user agent" != ""', "user agent", "!=", ("",)),
        ("in == 3", "in", "==", (3,)),
        ("day < 2026-11-01", "day", "<", ("2026-11-01",)),
        ("mixed in [1, b]", "mixed", "in", ("1", "b")),
        ("ctx.device <= 2", "ctx.device", "<=", (2,)),
    ],
)
def test_a_condition_is_column_operator_and_values(text, column, operator, values):
    condition = parse_condition(text)
    assert (condition.column, condition.operator, condition.values) == (column, operator, values)
    assert list(map(type, condition.values)) == list(map(type, values))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "event",
        "event = click",
        "event click",
        "== click",
        "event ==",
        "a == b == c",
        "a in b",
        "a in [b",
        "a in []",
        "a == [b]",
        "a in [b c,]",
        "a == b, c",
        'a == "b',
        "a in [b] x",
        "a == 'b'c",
        "a not [b]",
        "a == <b",
    ],
)
def test_what_is_no_condition_is_a_config_error_with_the_text_and_an_example(text):
    with pytest.raises(ConfigError) as error:
        parse_condition(text)
    assert str(error.value).startswith(f"log.keep={text}: ")
    assert "event == click" in str(error.value) or "in quotes" in str(error.value)


@given(st.text(alphabet="ab1 =!<>in[]\"',.", max_size=20))
def test_any_text_is_a_condition_or_a_config_error(text):
    try:
        condition = parse_condition(text)
    except ConfigError:
        return
    assert condition.column in text
    assert condition.values


NUMBERS = [3, 4, 5, None]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("x == 4", "fkff"),
        ("x != 4", "kfkf"),
        ("x >= 4", "fkkf"),
        ("x > 4", "ffkf"),
        ("x <= 4", "kkff"),
        ("x < 4", "kfff"),
        ("x in [3, 5]", "kfkf"),
        ("x not in [3, 5]", "fkff"),
        ("x in [3.0, 4.5]", "kfff"),
        ("x < 4.5", "kkff"),
    ],
)
@pytest.mark.parametrize(
    "kind", [pa.int8(), pa.uint64(), pa.int64(), pa.float32(), pa.decimal128(9, 2), pa.string(), pa.large_string()], ids=str
)
def test_numbers_are_compared_as_numbers_also_in_text_and_null_satisfies_nothing(text, expected, kind):
    values = [None if x is None else f"{x:.1f}" if x == 4 else str(x) for x in NUMBERS] if pa.types.is_string(kind) else NUMBERS
    if pa.types.is_large_string(kind):
        values = [None if x is None else f"0{x}" for x in NUMBERS]
    assert verdicts(text, values, kind) == expected


def test_text_that_is_no_number_cannot_be_compared_with_one():
    assert verdicts("x >= 4", ["4", "four", "", None, "1e1", "nan", "-7", "4 "]) == "kuufkufu"
    assert verdicts("x not in [4, 5]", ["4", "four", "6"]) == "fuk"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("x == a", "kfff"), ("x != a", "fkkf"), ("x >= b", "fkkf"), ("x in [a, c]", "kfkf"), ("x not in [a, c]", "fkff")],
)
def test_text_is_compared_as_text(text, expected):
    for kind in (pa.string(), pa.large_string()):
        assert verdicts(text, ["a", "b", "c", None], kind) == expected
    assert verdicts(text, pa.array(["a", "b", "c", None]).dictionary_encode()) == expected


def test_integers_are_compared_exactly():
    assert verdicts(f"x == {2**53 + 1}", [2**53, 2**53 + 1]) == "fk"
    assert verdicts(f"x in [{2**53 + 1}]", [2**53, 2**53 + 1]) == "fk"


def test_dates_and_booleans_are_compared_as_the_text_they_print():
    assert verdicts("day >= 2026-11-01", [datetime.date(2026, 10, 31), datetime.date(2026, 11, 1), None]) == "fkf"
    assert verdicts("bot == false", [True, False, None]) == "fkf"


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.list_(pa.int64()), pa.binary()], ids=str)
def test_a_column_that_cannot_be_compared_is_an_error_naming_the_condition(kind):
    with pytest.raises(DataQualityError, match=r"log\.keep=x == four: column x is .*; compare"):
        verdicts("x == four", [None], kind)


def test_a_column_without_any_value_satisfies_nothing():
    assert verdicts("x == 4", [None, None], pa.null()) == "ff"
    assert verdicts("x != a", [None, None], pa.null()) == "ff"
