"""What a bundle has to pass before it serves: plain functions of numbers, each with its numbers in the record.

A number that is missing or not a number passes nothing.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lrurec_dist.reporting import format_table

# Scheme and segment of `evaluate.segments`: new users and items, head and tail.
SEGMENTS = (
    ("user", "new"),
    ("user", "trained"),
    ("target's popularity", "never trained"),
    ("target's popularity", "decile 1"),
    ("target's popularity", "decile 10"),
)


@dataclass(frozen=True)
class Check:
    """One check: `value` against `limit`, None where it is not about one; `reason` says what the numbers do not."""

    name: str
    value: float | None
    limit: float | None
    passed: bool
    reason: str = ""


def at_least(name: str, value: float | None, limit: float, reason: str = "") -> Check:
    """Passed if the value reaches the limit."""
    return Check(name, value, limit, value is not None and value >= limit, reason)


def at_most(name: str, value: float | None, limit: float, reason: str = "") -> Check:
    """Passed if the value does not exceed the limit; a limit of 0 is none."""
    return Check(name, value, limit or None, value is not None and (limit == 0 or value <= limit), reason)


def floors(values: Mapping[str, float], limits: Mapping[str, float]) -> list[Check]:
    """The least value of each metric that has one; a metric that was not measured does not pass."""
    return [
        at_least(
            f"floor of {name}", values.get(name), limit, "" if name in values else f"not measured; there are {', '.join(values)}"
        )
        for name, limit in limits.items()
    ]


def above_baselines(
    differences: Mapping[str, Mapping[str, Mapping[str, Any]]], baselines: Sequence[str], metrics: Sequence[str]
) -> list[Check]:
    """Passed where the whole interval of the model minus the baseline lies above 0.

    Args:
        differences: by baseline and metric, as `summary.differences` has them.
        baselines: which have to be exceeded; one that the evaluation lacks is said to be and passes: a
            log of positions has no recent part.
    """
    checks = []
    for baseline in baselines:
        for metric in metrics:
            name = f"{metric} above {baseline}"
            if baseline not in differences:
                checks.append(Check(name, None, None, True, "not measured: the log has no times"))
                continue
            low = differences[baseline][metric]["low"]
            checks.append(Check(name, low, 0.0, low is not None and low > 0, "lower end of the difference"))
    return checks


def no_worse(differences: Mapping[str, Mapping[str, Any]], metrics: Sequence[str], margin: float, users: int) -> list[Check]:
    """Passed where the interval of candidate minus champion, paired on the same users, stays above -margin."""
    return [
        at_least(
            f"{metric} against the champion",
            differences[metric]["low"],
            -margin,
            f"lower end; difference {_number(differences[metric]['value'])} of {users:,} users",
        )
        for metric in metrics
    ]


def segments_no_worse(
    segments: Iterable[Mapping[str, Any]], metrics: Sequence[str], margin: float, least_users: int
) -> list[Check]:
    """Passed where candidate minus champion is not below -margin beyond noise: its interval's upper end reaches -margin.

    Args:
        segments: with scheme, segment, users and differences by metric; those of SEGMENTS are looked at.
        least_users: a segment of fewer is recorded and passes.
    """
    found = {(segment["scheme"], segment["segment"]): segment for segment in segments}
    checks = []
    for key in SEGMENTS:
        for metric in metrics:
            name = f"{metric}, {key[0]}: {key[1]}"
            segment = found.get(key)
            if segment is None:
                checks.append(Check(name, None, -margin, True, "no users"))
                continue
            high, users = segment["differences"][metric]["high"], segment["users"]
            difference = f"upper end; difference {_number(segment['differences'][metric]['value'])} of {users:,} users"
            if users < least_users:
                checks.append(Check(name, high, -margin, True, f"{difference}, too few to refuse"))
            else:
                checks.append(at_least(name, high, -margin, difference))
    return checks


def coverage_kept(candidate: Mapping[str, float], champion: Mapping[str, float], k: int, share: float) -> Check:
    """Passed if the candidate's lists hold such a share of the items that the champion's hold.

    Args:
        candidate, champion: `lists` of their evaluations. Items, not shares of their catalogue, which
            differ; both were evaluated on one dataset, so its size is that of both.
    """
    name = f"coverage@{k}"
    before = champion.get(name)
    if before is None:
        return Check(name, candidate.get(name), None, False, "the champion's was not measured")
    return at_least(name, candidate.get(name), share * before, f"{share:g} of the champion's {before:.5f}")


def catalogue_extends(items: int, champion_items: int, begins_alike: bool) -> Check:
    """Passed if the champion's items are the first of the candidate's, each with the same id."""
    passed = begins_alike and items >= champion_items
    reason = (
        "begins with the champion's items" if passed else "an id means another item than in the champion; nothing was compared"
    )
    return Check("items of the catalogue", items, champion_items, passed, reason)


def refused(checks: Iterable[Check]) -> list[Check]:
    """The checks that were not passed."""
    return [check for check in checks if not check.passed]


def checks_table(checks: Iterable[Mapping[str, Any]]) -> str:
    """All checks of a decision's record for a person to read."""
    rows = [
        [
            check["name"],
            _number(check["value"]),
            _number(check["limit"]),
            "passed" if check["passed"] else "REFUSED",
            check["reason"],
        ]
        for check in checks
    ]
    width = max(len(row[-1]) for row in rows)
    table = format_table(
        ["check", "value", "limit", "", "what".ljust(width)], [[*row[:-1], row[-1].ljust(width)] for row in rows]
    )
    return "\n".join(line.rstrip() for line in table.splitlines())


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.5f}"
