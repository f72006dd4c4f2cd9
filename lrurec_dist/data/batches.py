"""From sequences to left-padded batches: windows, a data order that is a function, evaluation batches.

The order of training windows is a function of (seed, epoch) alone: shards are permuted and taken
in groups, the windows of a group are shuffled together and cut into global batches, and a rank
takes its slice of each. So any number of workers sees the same global batches, no rank runs out
before another, and no window is dropped or repeated within an epoch. The last batch of a group
may be short; the loss is weighted by targets, so that is no bias. `splits.py` says what trains,
`feed.py` decides where batches are made.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from lrurec_dist import PAD_ID
from lrurec_dist.data.sequences import LengthHistogram, SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Part, Split
from lrurec_dist.errors import DataQualityError

BATCHES_SORTED = 256  # full-length batches whose windows are sorted by length together, under a token budget


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What fixes every training batch of every epoch, whatever the number of ranks.

    `seed` shuffles; `shards_mixed` sequence shards are shuffled together and held in memory;
    `global_batch_size` windows of at most `max_length` interactions make one batch of all ranks;
    `first_item_is_target`: a window's first item is predicted too, from padding. `windows`: `paper`
    as `cut_windows`, `sliding` as `slide_windows` with `stride`. `tokens` above 0 replaces the fixed
    number of windows: windows of similar length, as many as fit windows x longest <= tokens.
    `split` says what trains.
    """

    seed: int
    shards_mixed: int
    global_batch_size: int
    max_length: int
    first_item_is_target: bool
    windows: Literal["paper", "sliding"] = "paper"
    stride: int = 0
    tokens: int = 0
    split: Split = field(default_factory=Split)


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's slice of a global batch.

    `item_ids` and `targets` are (batch, length) int64 with padding on the left, cut to the longest
    window of the slice; `targets[b, t]` is the item after `item_ids[b, t]`, or `PAD_ID` where
    nothing is predicted: a row's targets are a suffix, and before them may lie items that are
    input alone. `num_targets` counts the targets of the *global* batch. `epoch`, shard
    `group` and `batch` within them are the batch's address.
    """

    item_ids: np.ndarray
    targets: np.ndarray
    num_targets: int
    epoch: int
    group: int
    batch: int


@dataclass(frozen=True)
class EvaluationBatch:
    """Users of one shard with similar history lengths.

    `item_ids` (batch, length) int64 is the last part of each history, padded on the left. `targets`
    (batch,) is the next item. `history_rows`, `history_ids` (pairs,) list every distinct item of
    each *full* history, for those who remove it from the candidates. `users` are row numbers in
    the shard.
    """

    item_ids: np.ndarray
    targets: np.ndarray
    history_rows: np.ndarray
    history_ids: np.ndarray
    users: np.ndarray


def cut_windows(lengths: np.ndarray, max_length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Training windows as the paper cuts them: (sequence, begin, end) with targets begin..end-1.

    A sequence shorter than 2 * max_length gives one window, its last max_length interactions. A
    longer one is cut from its end in steps of max_length; what is left at its start, fewer than
    max_length interactions, is no target (`untrained_targets` counts it).
    """
    cuts = np.where(lengths < 2 * max_length, np.minimum(lengths, 1), lengths // max_length)
    sequence = np.repeat(np.arange(len(lengths)), cuts)
    nth_from_end = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    end = lengths[sequence] - nth_from_end * max_length
    return sequence, np.maximum(end - max_length, 0), end


def slide_windows(lengths: np.ndarray, max_length: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Overlapping windows that leave no target out: (sequence, end, targets), targets end-targets..end-1.

    Windows end at a sequence's end and every `stride` before it, and each predicts its last
    `stride` positions from a full window of max_length; the earliest, that has no more than
    max_length before its end, predicts all it has. So every interaction is a target exactly once,
    and all but the earliest max_length of a sequence are predicted from at least max_length - stride.
    """
    cuts = np.where(lengths <= max_length, np.minimum(lengths, 1), 1 - (max_length - lengths) // stride)
    sequence = np.repeat(np.arange(len(lengths)), cuts)
    nth_from_end = np.arange(len(sequence)) - np.repeat(np.cumsum(cuts) - cuts, cuts)
    end = lengths[sequence] - nth_from_end * stride
    return sequence, end, np.where(end <= max_length, end, stride)


class Windows(NamedTuple):
    """Training windows that have a target, each array (windows,), places within the training part of a sequence.

    A window's positions are the last `positions` places before `end`; the last `num_targets` of
    them are predicted, each from the place before it, or from padding where that is before `first_input`.
    """

    sequence: np.ndarray
    first_input: np.ndarray
    end: np.ndarray
    positions: np.ndarray
    num_targets: np.ndarray


def training_windows(lengths: np.ndarray, order: DataOrder) -> Windows:
    """The windows of training parts of the given lengths."""
    if order.windows == "sliding":
        skipped = 0 if order.first_item_is_target else 1  # the first interaction is input alone
        sequence, end, num_targets = slide_windows(np.maximum(lengths - skipped, 0), order.max_length, order.stride)
        positions = np.minimum(end, order.max_length)
        end = end + skipped
        return Windows(sequence, np.maximum(end - positions - 1, 0), end, positions, num_targets)
    sequence, begin, end = cut_windows(lengths, order.max_length)
    # A whole short history's last window knows the item before it; a cut one starts afresh, as in the paper.
    has_context = (begin > 0) & (lengths[sequence] < 2 * order.max_length)
    num_targets = end - begin if order.first_item_is_target else end - begin - ~has_context
    windows = Windows(sequence, begin - has_context, end, num_targets, num_targets)
    return Windows(*(values[num_targets > 0] for values in windows))


def untrained_targets(training: LengthHistogram, order: DataOrder) -> int:
    """Interactions of training parts of the given lengths that no window has as a target."""
    windows = training_windows(training.lengths, order)
    return int(training.lengths @ training.users - training.users[windows.sequence] @ windows.num_targets)


def count_windows(training: LengthHistogram, order: DataOrder) -> int:
    """How many windows training parts of the given lengths give."""
    return int(training.users[training_windows(training.lengths, order).sequence].sum())


def pad_left(rows: list[np.ndarray], length: int) -> np.ndarray:
    """(len(rows), length) int64 with each row at the right edge."""
    padded = np.full((len(rows), length), PAD_ID, dtype=np.int64)
    for index, row in enumerate(rows):
        if len(row):
            padded[index, length - len(row) :] = row
    return padded


class TrainingWindows:
    """All training windows of a group of shards, in memory."""

    def __init__(self, shards: list[SequenceShard], order: DataOrder) -> None:
        self._items = np.concatenate([shard.item_ids for shard in shards])
        starts = np.cumsum([0, *(len(shard.item_ids) for shard in shards)])
        offsets = np.concatenate([shard.offsets[:-1] + start for shard, start in zip(shards, starts, strict=False)])
        windows = training_windows(np.concatenate([order.split.bounds(shard).train_end for shard in shards]), order)
        self._first_input = offsets[windows.sequence] + windows.first_input
        self._end = offsets[windows.sequence] + windows.end
        self.positions = windows.positions
        self.num_targets = windows.num_targets

    def __len__(self) -> int:
        return len(self._end)

    def collate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(item_ids, targets) of the given windows, each (len(windows), longest) int64."""
        length = int(self.positions[windows].max(initial=1))
        end = self._end[windows, None]
        target_at = end - np.arange(length, 0, -1)  # place of each position's target; its input is the one before
        is_target = target_at >= end - self.num_targets[windows, None]
        is_input = target_at > self._first_input[windows, None]
        return (
            np.where(is_input, self._items[target_at - 1], PAD_ID),
            np.where(is_target, self._items[target_at], PAD_ID),
        )


def group_shards(names: list[str], order: DataOrder, epoch: int) -> list[list[str]]:
    """The epoch's groups of shards, in order; a function of its arguments.

    Within a group names are sorted: its windows are shuffled anyway, and a dataset of one group
    then stays in memory from epoch to epoch.
    """
    shuffled = np.random.default_rng([order.seed, epoch]).permutation(len(names))
    return [
        sorted(names[index] for index in shuffled[begin : begin + order.shards_mixed])
        for begin in range(0, len(names), order.shards_mixed)
    ]


def read_for_training(dataset: SequenceDataset, name: str, order: DataOrder) -> SequenceShard:
    """A shard with what its split needs."""
    return dataset.read_shard(name, timestamps=order.split.needs_timestamps)


def window_positions(shard: SequenceShard, order: DataOrder) -> np.ndarray:
    """Positions of each training window of a shard, in a type as small as they allow: what `plan_batches` asks for."""
    positions = training_windows(order.split.bounds(shard).train_end, order).positions
    return positions.astype(np.min_scalar_type(order.max_length))


def plan_batches(positions: np.ndarray, order: DataOrder, epoch: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    """How the windows of a group become global batches; a function of its arguments.

    Args:
        positions: (windows,) of each window of the group.
        order: how many windows, or with how many positions, make a batch.
        epoch: of which this is
        group: the how-manieth group of shards.

    Returns:
        (windows,) window numbers and (batches, 2) bounds: batch b holds windows[bounds[b, 0]:bounds[b, 1]].

    Under a token budget, windows are shuffled, sorted by length within large chunks, cut from the
    longest down, and the batches shuffled: windows of one length meet others every epoch, and a
    chunk's last batch may be short.
    """
    draw = np.random.default_rng([order.seed, epoch, group])
    windows = draw.permutation(len(positions))
    if order.tokens == 0:
        begins = np.arange(0, len(windows), order.global_batch_size)
        return windows, np.stack([begins, np.minimum(begins + order.global_batch_size, len(windows))], axis=1)
    chunk = BATCHES_SORTED * order.tokens // order.max_length
    windows = windows[np.lexsort((-positions[windows].astype(np.int64), np.arange(len(windows)) // chunk))]
    bounds = []
    begin = 0
    while begin < len(windows):
        end_of_chunk = min((begin // chunk + 1) * chunk, len(windows))
        end = min(begin + max(1, order.tokens // int(positions[windows[begin]])), end_of_chunk)
        bounds.append((begin, end))
        begin = end
    return windows, draw.permutation(np.array(bounds, dtype=np.int64).reshape(-1, 2))


def count_batches(positions: np.ndarray, order: DataOrder, epoch: int, group: int) -> int:
    """How many batches `plan_batches` makes."""
    if order.tokens == 0:
        return -(-len(positions) // order.global_batch_size)
    return len(plan_batches(positions, order, epoch, group)[1])


def iter_batches(
    dataset: SequenceDataset, order: DataOrder, *, epoch: int, first_batch: int, rank: int, world_size: int
) -> Iterator[TrainingBatch]:
    """One rank's batches from a place in an epoch on, epoch after epoch without end. Pure numpy.

    Raises:
        DataQualityError: the dataset has no training window.
    """
    windows, held = None, [""]
    for at_epoch in itertools.count(epoch):
        batches_before = 0
        for group, names in enumerate(group_shards(dataset.shard_names, order, at_epoch)):
            if windows is None or names != held:
                windows = None  # before the next group is read: only one is held
                windows, held = TrainingWindows([read_for_training(dataset, name, order) for name in names], order), names
            batches = count_batches(windows.positions, order, at_epoch, group)
            begin = max(0, first_batch - batches_before) if at_epoch == epoch else 0
            yield from cut_batches(windows, range(begin, batches), order, at_epoch, group, rank, world_size)
            batches_before += batches
        require_windows(dataset, batches_before)


def require_windows(dataset: SequenceDataset, windows: int) -> None:
    """Refuse a dataset that an epoch of training would find empty."""
    if windows == 0:
        raise DataQualityError(
            f"{dataset.url}: no user has an interaction to train on, of {dataset.manifest['interactions']:,}; prepare a longer log"
        )


def cut_batches(
    windows: TrainingWindows, batches: range, order: DataOrder, epoch: int, group: int, rank: int, world_size: int
) -> Iterator[TrainingBatch]:
    """One rank's slice of the given batches of one group of shards."""
    shuffled, bounds = plan_batches(windows.positions, order, epoch, group)
    for batch in batches:
        members = shuffled[slice(*bounds[batch])]
        low, high = (len(members) * bound // world_size for bound in (rank, rank + 1))
        item_ids, targets = windows.collate(members[low:high])
        yield TrainingBatch(item_ids, targets, int(windows.num_targets[members].sum()), epoch, group, batch)


def iter_evaluation_batches(
    shard: SequenceShard, *, split: Split, part: Part, max_length: int, batch_size: int
) -> Iterator[EvaluationBatch]:
    """Every evaluable user of a shard once: the target of a part, and everything before it as history.

    A user without a target, or without anything before it, is not evaluable. Batches follow
    history length and depend on the shard alone, so the products, and with them every rank, are
    the same on any number of workers.
    """
    bounds = split.bounds(shard)
    history_lengths, _ = bounds.part(part)
    users = np.flatnonzero(bounds.evaluable(part))
    users = users[np.argsort(history_lengths[users], kind="stable")]
    for begin in range(0, len(users), batch_size):
        members = users[begin : begin + batch_size]
        starts = shard.offsets[members]
        ends = starts + history_lengths[members]
        histories = [shard.item_ids[start:end] for start, end in zip(starts, ends, strict=True)]
        distinct = [np.unique(history) for history in histories]
        yield EvaluationBatch(
            item_ids=pad_left([history[-max_length:] for history in histories], min(max_length, max(map(len, histories)))),
            targets=shard.item_ids[ends],
            history_rows=np.repeat(np.arange(len(members)), [len(ids) for ids in distinct]),
            history_ids=np.concatenate(distinct),
            users=members,
        )
