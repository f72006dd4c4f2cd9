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
from lrurec_dist.errors import ConfigError, DataQualityError, LrurecError

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
        lengths = shard.lengths
        if self.kind == "leave_last_out":
            evaluable = lengths >= MIN_EVALUABLE
            return SplitBounds(lengths - 2 * evaluable, lengths - evaluable, lengths)
        if shard.timestamps is None:
            raise LrurecError("split.kind=global_time: this shard was read without timestamps")
        train_end, test_begin = (
            np.diff(np.cumsum(np.append(0, shard.timestamps < moment))[shard.offsets])  # as sequences are in time order
            for moment in (self.train_until, self.test_from)
        )
        return SplitBounds(train_end, test_begin, lengths)


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


def audit_split(dataset: SequenceDataset, split: Split) -> dict[str, int]:
    """Prove that a split leaks nothing, and count what it does; one shard in memory at a time.

    Returns:
        Counts. `<part>_targets` are the users evaluated; among them `<part>_new_users` have no
        training part, `<part>_new_items` are asked for an item that no training part holds, and
        `<part>_ties` for one of the same time as the interaction before it, so that not time but
        item_id decided which is the target. `<part>_without_history` users are not evaluated: their
        first interaction is the part's. `<part>_interactions` lie at or after the part's cut and
        before the next. `items_never_trained` occur in the dataset, but in no training part.
        `interactions_at_<cut>` happened exactly at a cut of `global_time`.

    Raises:
        DataQualityError: an interaction of the validation or test part would train, one of the
            training part would not, a history reaches its target, or sequences are not in time order.
    """
    counts = dict.fromkeys(["users", "interactions", "train_users", "train_interactions", "items_never_trained"], 0)
    for part in PARTS:
        counts |= dict.fromkeys((f"{part}_{what}" for what in _OF_A_PART), 0)
    cuts = {"train_until": split.train_until, "test_from": split.test_from} if split.kind == "global_time" else {}
    counts |= dict.fromkeys((f"interactions_at_{cut}" for cut in cuts), 0)
    trained, held_out = np.zeros((2, dataset.num_items + 1), dtype=np.int64)
    asked = {part: np.zeros(dataset.num_items + 1, dtype=np.int64) for part in PARTS}
    for name in dataset.shard_names:
        shard = dataset.read_shard(name, timestamps=True)
        times = shard.timestamps
        assert times is not None
        bounds = split.bounds(shard)
        _check_shard(f"{dataset.url}, {name}", shard, split, bounds)
        in_training = trains(shard, bounds)
        trained += np.bincount(shard.item_ids[in_training], minlength=len(trained))
        held_out += np.bincount(shard.item_ids[~in_training], minlength=len(trained))
        counts["users"] += len(shard.lengths)
        counts["interactions"] += len(shard.item_ids)
        counts["train_users"] += int((bounds.train_end > 0).sum())
        counts["train_interactions"] += int(in_training.sum())
        for cut, moment in cuts.items():
            counts[f"interactions_at_{cut}"] += int(np.count_nonzero(times == moment))
        for part in PARTS:
            begin, end = bounds.part(part)
            evaluated = bounds.evaluable(part)
            target = (shard.offsets[:-1] + begin)[evaluated]
            asked[part] += np.bincount(shard.item_ids[target], minlength=len(trained))
            found = {
                "interactions": end - begin,
                "targets": evaluated,
                "new_users": evaluated & (bounds.train_end == 0),
                "without_history": (begin < end) & (begin == 0),
                "ties": times[target] == times[target - 1],
            }
            for what, values in found.items():
                counts[f"{part}_{what}"] += int(values.sum())
    counts["items_never_trained"] = int(((trained == 0) & (held_out > 0)).sum())
    for part in PARTS:
        counts[f"{part}_new_items"] = int(asked[part][trained == 0].sum())
    return counts


_OF_A_PART = ("interactions", "targets", "new_users", "new_items", "without_history", "ties")


def _check_shard(where: str, shard: SequenceShard, split: Split, bounds: SplitBounds) -> None:
    """Compare a shard's bounds with what timestamps and lengths themselves say."""
    lengths, times, place = shard.lengths, shard.timestamps, places(shard)
    assert times is not None
    outside = (bounds.train_end < 0) | (bounds.train_end > bounds.test_begin) | (bounds.test_begin > lengths)
    if outside.any():
        raise DataQualityError(
            f"{where}: split.kind={split.kind}: the parts of {int(outside.sum()):,} users lie outside their sequences; "
            "this is a bug, please report it"
        )
    is_first = np.zeros(len(times), dtype=bool)
    is_first[shard.offsets[:-1][lengths > 0]] = True
    backwards = int((np.diff(times, prepend=times[:1]) < 0)[~is_first].sum())
    if backwards:
        raise DataQualityError(
            f"{where}: {backwards:,} interactions are older than the one before them; prepare the dataset again"
        )
    train_end, test_begin = np.repeat(bounds.train_end, lengths), np.repeat(bounds.test_begin, lengths)
    if split.kind == "global_time":
        before_cut, before_test = times < split.train_until, times < split.test_from
    else:
        from_end = np.repeat(lengths, lengths) - place
        short = np.repeat(lengths < MIN_EVALUABLE, lengths)
        before_cut, before_test = short | (from_end > 2), short | (from_end > 1)
    leaks = {
        "interactions of the validation or test part would train": (place < train_end) & ~before_cut,
        "interactions of the training part would not train": (place >= train_end) & before_cut,
        "interactions of the test part would be history or target of validation": (place < test_begin) & ~before_test,
        "interactions from before the test part would be its target": (place >= test_begin) & before_test,
    }
    for what, found in leaks.items():
        if found.any():
            raise DataQualityError(
                f"{where}: split.kind={split.kind}: {int(found.sum()):,} {what}; this is a bug, please report it"
            )
