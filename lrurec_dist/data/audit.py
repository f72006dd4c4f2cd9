"""The audit of a split: proof, shard by shard, that nothing of a later part trains, kept beside the dataset it is about."""

import functools
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lrurec_dist import __version__, storage
from lrurec_dist.data.passes import Passes, passes_for
from lrurec_dist.data.sequences import AUDITS, MIN_EVALUABLE, LengthHistogram, SequenceDataset, SequenceShard
from lrurec_dist.data.splits import PARTS, Part, Split, SplitBounds, places, trains
from lrurec_dist.errors import DataQualityError
from lrurec_dist.reporting import Progress


@dataclass(frozen=True)
class SplitAudit:
    """What an audit found.

    Of `counts`, `<part>_targets` are the users evaluated; among them `<part>_new_users` have no
    training part, `<part>_new_items` are asked for an item that no training part holds, and
    `<part>_ties` for one of the same time as the interaction before it, so that not time but
    item_id decided which is the target. `<part>_without_history` users are not evaluated: their
    first interaction is the part's. `<part>_interactions` lie at or after the part's cut and
    before the next. `items_never_trained` occur in the dataset, but in no training part.
    `interactions_at_<cut>` happened exactly at a cut of `global_time`. `training` is the histogram
    of the lengths of training parts.
    """

    counts: dict[str, int]
    training: LengthHistogram


@dataclass(frozen=True)
class ShardAudit:
    """What the audit of one shard adds to that of the dataset.

    `trained` and `held_out` are the distinct items of the training parts and of what comes after
    them. `asked` gives for each part the distinct items that are targets, and of how many users each.
    """

    counts: dict[str, int]
    trained: np.ndarray
    held_out: np.ndarray
    asked: dict[Part, tuple[np.ndarray, np.ndarray]]
    training: LengthHistogram


def stored_audit(
    dataset: SequenceDataset,
    split: Split,
    progress: Progress,
    connect: Callable[[], None],
    resources: Mapping[str, float] | None = None,
) -> tuple[SplitAudit, bool]:
    """The audit of a split, kept in `<dataset>/audits` for whoever asks for the same split again.

    Args:
        dataset: which interactions,
        split: and how they are split.
        progress: told of each shard that is done.
        connect: called before Ray is used, which is where the sequences exceed LOCAL_BYTES.
        resources: what its Ray tasks reserve besides their CPUs.

    Returns:
        The audit, and whether it was there. One that was made of other bytes, or by another version
        of this package, does not count.

    Raises:
        DataQualityError: as `audit_split`.
    """
    about = {"dataset": dataset.identity, "split": asdict(split), "lrurec_dist": __version__}
    name = f"{AUDITS}/{storage.fingerprint(about['split'])}.json"
    for place in dict.fromkeys((dataset.url, dataset.place)):
        found: Any = None
        with suppress(FileNotFoundError, ValueError):  # ValueError: it is not JSON
            found = storage.read_json(storage.join(place, name))
        if isinstance(found, dict) and found.get("about") == about:
            lengths, users = (np.array(found["training"][what], dtype=np.int64) for what in ("lengths", "users"))
            return SplitAudit(found["counts"], LengthHistogram(lengths, users)), True
    audit = audit_split(dataset, split, passes_for(dataset.sequence_bytes, connect, resources), progress)
    training = {"lengths": audit.training.lengths.tolist(), "users": audit.training.users.tolist()}
    storage.write_json(storage.join(dataset.url, name), {"about": about, "counts": audit.counts, "training": training})
    return audit, False


def audit_split(dataset: SequenceDataset, split: Split, passes: Passes, progress: Progress) -> SplitAudit:
    """Prove that a split leaks nothing, and count what it does, shard by shard.

    Raises:
        DataQualityError: an interaction of the validation or test part would train, one of the
            training part would not, a history reaches its target, or sequences are not in time order.
    """
    names = dataset.shard_names
    trained, held_out = np.zeros((2, dataset.num_items + 1), dtype=bool)
    asked = {part: np.zeros(dataset.num_items + 1, dtype=np.int64) for part in PARTS}
    counts: dict[str, int] = {}
    training = LengthHistogram.total([])
    progress("audited", 0, len(names), "shards")
    reports = passes.each(functools.partial(audit_shard, dataset=dataset, split=split), [(name,) for name in names])
    for done, report in enumerate(reports, start=1):
        trained[report.trained] = True
        held_out[report.held_out] = True
        for part, (items, users) in report.asked.items():
            asked[part][items] += users
        counts = {what: counts.get(what, 0) + count for what, count in report.counts.items()}
        training = LengthHistogram.total([training, report.training])
        progress("audited", done, len(names), "shards")
    counts["items_never_trained"] = int((held_out & ~trained).sum())
    for part in PARTS:
        counts[f"{part}_new_items"] = int(asked[part][~trained].sum())
    return SplitAudit(counts, training)


def audit_shard(name: str, dataset: SequenceDataset, split: Split) -> ShardAudit:
    """Check the parts of one shard's users against their timestamps and lengths, and count.

    Raises:
        DataQualityError: as `audit_split`.
    """
    shard = dataset.read_shard(name, timestamps=True)
    times = shard.timestamps
    assert times is not None
    bounds = split.bounds(shard)
    _check_shard(f"{dataset.url}, {name}", shard, split, bounds)
    in_training = trains(shard, bounds)
    counts = {
        "users": len(shard.lengths),
        "interactions": len(shard.item_ids),
        "train_users": int((bounds.train_end > 0).sum()),
        "train_interactions": int(in_training.sum()),
        "items_never_trained": 0,  # which the other shards decide, as what is new
    }
    asked: dict[Part, tuple[np.ndarray, np.ndarray]] = {}
    for part in PARTS:
        begin, end = bounds.part(part)
        evaluated = bounds.evaluable(part)
        target = (shard.offsets[:-1] + begin)[evaluated]
        asked[part] = np.unique(shard.item_ids[target], return_counts=True)
        counts |= {
            f"{part}_interactions": int((end - begin).sum()),
            f"{part}_targets": int(evaluated.sum()),
            f"{part}_new_users": int((evaluated & (bounds.train_end == 0)).sum()),
            f"{part}_new_items": 0,
            f"{part}_without_history": int(((begin < end) & (begin == 0)).sum()),
            f"{part}_ties": int((times[target] == times[target - 1]).sum()),
        }
    cuts = {"train_until": split.train_until, "test_from": split.test_from} if split.kind == "global_time" else {}
    counts |= {f"interactions_at_{cut}": int(np.count_nonzero(times == moment)) for cut, moment in cuts.items()}
    return ShardAudit(
        counts,
        trained=np.unique(shard.item_ids[in_training]),
        held_out=np.unique(shard.item_ids[~in_training]),
        asked=asked,
        training=LengthHistogram.of(bounds.train_end),
    )


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
