"""Who trains on what and who is asked for what: a function of the stored sequences, not a copy of them.

A split cuts every user's sequence into three parts that follow each other: training [0, train_end),
validation [train_end, test_begin), test [test_begin, length). A user is evaluated once per part, on
its first interaction, with everything before it as history; so nobody's weight grows with activity.

`leave_last_out`: the last interaction tests, the one before it validates, users with fewer than
three only train. `global_time`: training ends at one moment for everybody, as in production; what
happened exactly at a cut belongs to the part that begins there.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

import numpy as np

from lrurec_dist.data.sequences import MIN_EVALUABLE, SequenceDataset, SequenceShard
from lrurec_dist.errors import ConfigError, LrurecError

Kind = Literal["leave_last_out", "global_time"]
Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_UNITS = {"d": timedelta(days=1), "h": timedelta(hours=1), "m": timedelta(minutes=1)}


@dataclass(frozen=True)
class SplitBounds:
    """Where each user's three parts lie, all (users,) int64 places within their sequence.

    0 <= train_end <= test_begin <= lengths.
    """

    train_end: np.ndarray
    test_begin: np.ndarray
    lengths: np.ndarray

    def part(self, part: Part) -> tuple[np.ndarray, np.ndarray]:
        """(begin, end) of each user's validation or test interactions; begin is the target's place unless begin == end."""
        return (self.train_end, self.test_begin) if part == "validation" else (self.test_begin, self.lengths)

    def evaluable(self, part: Part) -> np.ndarray:
        """(users,) bool: there is a target, and a history before it."""
        begin, end = self.part(part)
        return (begin < end) & (begin > 0)


@dataclass(frozen=True, kw_only=True)
class Split:
    """Which interactions train, validate and test; hashable, and small enough to travel.

    `train_until` and `test_from` are in the dataset's own time unit (microseconds since 1970 UTC,
    or positions) and mean something for `global_time` alone.
    """

    kind: Kind = "leave_last_out"
    train_until: int = 0
    test_from: int = 0

    @property
    def needs_timestamps(self) -> bool:
        """Whether shards have to be read with their timestamps."""
        return self.kind == "global_time"

    def bounds(self, shard: SequenceShard) -> SplitBounds:
        """Each user's parts.

        Raises:
            LrurecError: timestamps are needed and were not read.
        """
        if not self.needs_timestamps:
            return self.bounds_of_lengths(shard.lengths)
        if shard.timestamps is None:
            raise LrurecError("split.kind=global_time: this shard was read without timestamps")
        train_end, test_begin = (
            np.diff(np.cumsum(np.append(0, shard.timestamps < moment))[shard.offsets])  # as sequences are in time order
            for moment in (self.train_until, self.test_from)
        )
        return SplitBounds(train_end, test_begin, shard.lengths)

    def bounds_of_lengths(self, lengths: np.ndarray) -> SplitBounds:
        """The parts of sequences of which only the lengths are known; of a split that needs no timestamps."""
        assert not self.needs_timestamps
        evaluable = lengths >= MIN_EVALUABLE
        return SplitBounds(lengths - 2 * evaluable, lengths - evaluable, lengths)


def places(shard: SequenceShard) -> np.ndarray:
    """(interactions,) int64: place of each interaction within its user's sequence."""
    return np.arange(len(shard.item_ids)) - np.repeat(shard.offsets[:-1], shard.lengths)


def trains(shard: SequenceShard, bounds: SplitBounds) -> np.ndarray:
    """(interactions,) bool: whether each interaction is in its user's training part."""
    return places(shard) < np.repeat(bounds.train_end, shard.lengths)


def resolve_split(dataset: SequenceDataset, *, kind: Kind, train_until: str, test_from: str) -> Split:
    """The split that settings mean for a dataset.

    Args:
        dataset: whose time range and unit count.
        kind: as in `Split`.
        train_until: where training ends and validation begins, for `global_time`: an integer in
            the dataset's unit; a time such as `2026-11-20` or `2026-11-20T06:00:00+01:00`, in UTC
            unless it says otherwise; or how much of the end is cut off: `2d`, `12h`, `30m`, or `10%`
            of the time range. The end is just after the last interaction, so that `1d` is one day long.
        test_from: where validation ends and the test begins, likewise.

    Raises:
        ConfigError: a value means no moment of this dataset, or leaves a part without time.
    """
    if kind == "leave_last_out":
        return Split()
    first, last = dataset.manifest["time_range"]
    moments = {}
    for name, text in (("train_until", train_until), ("test_from", test_from)):
        moments[name] = _moment(f"split.{name}={text}", text, first, last, dataset.manifest["time_unit"])
        if not first < moments[name] <= last:
            raise ConfigError(
                f"split.{name}={text}: is {moments[name]} in the unit of {dataset.url}, whose interactions lie from {first} to {last}; "
                "choose a moment after the first and not after the last"
            )
    if moments["train_until"] >= moments["test_from"]:
        raise ConfigError(
            f"split.train_until={train_until}: is {moments['train_until']}, not before split.test_from={test_from}, {moments['test_from']}; "
            "nothing would validate"
        )
    return Split(kind="global_time", **moments)


def _moment(setting: str, text: str, first: int, last: int, time_unit: str) -> int:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    relative = re.fullmatch(r"(\d+(?:\.\d+)?)([dhm%])", text)
    if relative and relative[2] == "%":
        return last + 1 - round(float(relative[1]) / 100 * (last + 1 - first))
    if time_unit == "position":
        raise ConfigError(
            f"{setting}: this log has positions, not times; give a position from {first} to {last}, or a share such as 10%"
        )
    if relative:
        return last + 1 - float(relative[1]) * _UNITS[relative[2]] // timedelta(microseconds=1)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(
            f"{setting}: is no time; write 2026-11-20, 2026-11-20T06:00:00Z, microseconds, 2d, 12h, 30m or 10%"
        ) from None
    return ((moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)


def describe_split(split: Split, time_unit: str) -> str:
    """The split in words, with its moments as people write them."""
    if split.kind == "leave_last_out":
        return "leave_last_out"
    train_until, test_from = (
        str(moment) if time_unit == "position" else (_EPOCH + timedelta(microseconds=moment)).isoformat()
        for moment in (split.train_until, split.test_from)
    )
    return f"global_time, training before {train_until}, test from {test_from}"
