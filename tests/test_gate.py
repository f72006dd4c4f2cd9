"""The gate's checks on numbers: what passes, what does not, and what is missing passes nothing."""

import math

import pytest

from lrurec_dist.serve import gate
from lrurec_dist.serve.gate import Check

METRICS = ["recall@10"]


def difference(value: float, low: float | None, high: float | None) -> dict[str, dict[str, float | None]]:
    return {"recall@10": {"value": value, "low": low, "high": high}}


@pytest.mark.parametrize(("value", "passed"), [(0.1, True), (0.11, True), (0.0999, False), (None, False), (math.nan, False)])
def test_a_floor_holds_and_what_is_no_number_is_below_it(value: float | None, passed: bool) -> None:
    assert gate.at_least("floor", value, 0.1).passed is passed


@pytest.mark.parametrize(
    ("value", "limit", "passed"),
    [(5.0, 5.0, True), (5.1, 5.0, False), (5.1, 0, True), (None, 0, False), (None, 5.0, False), (math.nan, 5.0, False)],
)
def test_a_limit_of_zero_is_none_but_something_has_to_be_measured(value: float | None, limit: float, passed: bool) -> None:
    assert gate.at_most("limit", value, limit).passed is passed


def test_a_floor_of_a_metric_that_was_not_measured_refuses_and_says_what_there_is() -> None:
    first, second = gate.floors({"recall@10": 0.2}, {"recall@10": 0.1, "recall@11": 0.1})
    assert first == Check("floor of recall@10", 0.2, 0.1, True)
    assert (second.passed, second.reason) == (False, "not measured; there are recall@10")


@pytest.mark.parametrize(
    ("low", "passed"), [(-0.0101, False), (-0.01, True), (0.0, True), (0.2, True), (None, False), (math.nan, False)]
)
def test_a_candidate_whose_interval_reaches_below_the_margin_is_refused(low: float | None, passed: bool) -> None:
    (check,) = gate.no_worse(difference(0.02, low, 0.05), METRICS, 0.01, 1234)
    assert (check.value, check.limit, check.passed) == (low, -0.01, passed)
    assert "1,234 users" in check.reason


def test_a_baseline_has_to_be_exceeded_beyond_noise() -> None:
    found = {"popularity": difference(0.02, 0.001, 0.04), "markov": difference(0.02, 0.0, 0.04)}
    checks = gate.above_baselines(found, ["popularity", "markov", "recent_popularity"], METRICS)
    assert [(check.name, check.passed) for check in checks] == [
        ("recall@10 above popularity", True),
        ("recall@10 above markov", False),
        ("recall@10 above recent_popularity", True),
    ]
    assert checks[2].reason == "not measured: the log has no times"


def test_a_segment_refuses_only_where_it_is_worse_beyond_margin_and_noise_and_large_enough() -> None:
    def segments(value: float, high: float | None, users: int) -> list[dict[str, object]]:
        head = {"scheme": "target's popularity", "segment": "decile 1"}
        return [{**head, "users": users, "differences": difference(value, -0.9, high)}]

    def head_passes(*of_segment: object) -> bool:
        checks = gate.segments_no_worse(segments(*of_segment), METRICS, 0.02, 100)  # type: ignore[arg-type]
        assert len(checks) == len(gate.SEGMENTS)
        assert [check.reason for check in checks if "decile 1" not in check.name.split(": ")] == ["no users"] * (len(checks) - 1)
        return next(check.passed for check in checks if check.name.endswith(": decile 1"))

    assert head_passes(-0.3, -0.019, 100), "within noise of the margin"
    assert not head_passes(-0.3, -0.021, 100)
    assert head_passes(-0.3, -0.021, 99), "too few users"
    assert not head_passes(-0.3, None, 100)


@pytest.mark.parametrize(
    ("candidate", "champion", "passed"),
    [
        ({"coverage@10": 0.2}, {"coverage@10": 0.4}, True),
        ({"coverage@10": 0.19}, {"coverage@10": 0.4}, False),
        ({}, {"coverage@10": 0.4}, False),
        ({"coverage@10": 0.4}, {}, False),
    ],
)
def test_coverage_that_collapses_is_refused(candidate: dict[str, float], champion: dict[str, float], passed: bool) -> None:
    assert gate.coverage_kept(candidate, champion, 10, 0.5).passed is passed


@pytest.mark.parametrize(
    ("items", "alike", "passed"), [(40, True, True), (41, True, True), (39, True, False), (41, False, False)]
)
def test_a_catalogue_has_to_begin_with_the_champions(items: int, alike: bool, passed: bool) -> None:
    assert gate.catalogue_extends(items, 40, alike).passed is passed


def test_the_table_shows_every_check_with_its_numbers() -> None:
    checks = [
        gate.at_least("floor of recall@10", 0.2, 0.1),
        gate.at_most("GB", 3.0, 2.0, "too large"),
        Check("x", None, None, True),
    ]
    table = gate.checks_table([vars(check) for check in checks]).splitlines()
    assert [line.split() for line in table[2:]] == [
        ["floor", "of", "recall@10", "0.20000", "0.10000", "passed"],
        ["GB", "3.00000", "2.00000", "REFUSED", "too", "large"],
        ["x", "–", "–", "passed"],
    ]
    assert gate.refused(checks) == [checks[1]]
