"""From sequences to left-padded batches: windows, a data order that is a function, evaluation batches.

The order of training windows is a function of (seed, epoch) alone: shards are permuted and taken
in groups, the windows of a group are shuffled together and cut into global batches, and a rank
takes its slice of each. So any number of workers sees the same global batches, no rank runs out
before another, and no window is dropped or repeated within an epoch. The last batch of a group
may be short; the loss is weighted by targets, so that is no bias. Where a state is carried from
window to window, users are shuffled and not their windows (`lanes.py`). `splits.py` says what
trains, `windows.py` where it is cut, `feed.py` decides where batches are made.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np

from lrurec_dist import PAD_ID
from lrurec_dist.data.lanes import NO_WINDOW, count_lane_batches, fill_lanes
from lrurec_dist.data.sequences import LengthHistogram, SequenceDataset, SequenceShard
from lrurec_dist.data.splits import Part, Split
from lrurec_dist.data.windows import chain_windows, cut_windows, slide_windows
from lrurec_dist.errors import DataQualityError

BATCHES_SORTED = 256  # full-length batches whose windows are sorted by length together, under a token budget


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What fixes every training batch of every epoch, whatever the number of ranks.

    `seed` shuffles; `shards_mixed` sequence shards are shuffled together and held in memory;
    `global_batch_size` windows of at most `max_length` interactions make one batch of all ranks;
    `first_item_is_target`: a window's first item is predicted too, from padding. `windows`: `paper`
    as `cut_windows`, `sliding` as `slide_windows` with `stride`, `carried` as `chain_windows` in
    `global_batch_size` lanes, each of which goes through one user after the other. `tokens` above 0
    replaces the fixed number of windows: windows of similar length, as many as fit windows x longest
    <= tokens. `split` says what trains.
    """

    seed: int
    shards_mixed: int
    global_batch_size: int
    max_length: int
    first_item_is_target: bool
    windows: Literal["paper", "sliding", "carried"] = "paper"
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
    `group` and `batch` within them are the batch's address. With `carried` windows row b is that of
    a lane, the same in all batches, `goes_on` (batch,) bool says whether it continues the lane's
    row of the batch before, and a lane that has run out has a row of padding; else it is None.
    """

    item_ids: np.ndarray
    targets: np.ndarray
    num_targets: int
    epoch: int
    group: int
    batch: int
    goes_on: np.ndarray | None = None


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
    skipped = 0 if order.first_item_is_target else 1  # the first interaction is input alone
    if order.windows == "carried":
        sequence, begin, end = chain_windows(np.maximum(lengths - skipped, 0), order.max_length)
        first_input = np.maximum(begin + skipped - 1, 0)
        return Windows(sequence, first_input, end + skipped, end - begin, end - begin)
    if order.windows == "sliding":
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
        self._carried = order.windows == "carried"
        self._begins_user = windows.first_input == 0
        self.positions = windows.positions
        self.num_targets = windows.num_targets
        self.sizes = _sizes(windows, order)

    def __len__(self) -> int:
        return len(self._end)

    def goes_on(self, windows: np.ndarray) -> np.ndarray | None:
        """(len(windows),) bool: there is a window, and it is not its user's first; None where no state is carried."""
        return (windows != NO_WINDOW) & ~self._begins_user[windows] if self._carried else None

    def collate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(item_ids, targets) of the given windows, each (len(windows), longest) int64; `NO_WINDOW` gives padding."""
        exists = windows != NO_WINDOW
        length = int(self.positions[windows[exists]].max(initial=1))
        end = self._end[windows, None]
        target_at = end - np.arange(length, 0, -1)  # place of each position's target; its input is the one before
        is_target = exists[:, None] & (target_at >= end - self.num_targets[windows, None])
        is_input = exists[:, None] & (target_at > self._first_input[windows, None])
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


def plan_sizes(shard: SequenceShard, order: DataOrder) -> np.ndarray:
    """What `plan_batches` asks for of a shard's windows, in a type as small as the values allow."""
    sizes = _sizes(training_windows(order.split.bounds(shard).train_end, order), order)
    return sizes.astype(np.min_scalar_type(int(sizes.max(initial=0))))


def _sizes(windows: Windows, order: DataOrder) -> np.ndarray:
    if order.windows == "carried":
        return np.unique(windows.sequence, return_counts=True)[1]
    return windows.positions


class BatchPlan(NamedTuple):
    """Which windows make which global batch.

    Batch b holds windows[bounds[b, 0]:bounds[b, 1]]; in their `lanes`, of which there are
    `num_lanes`, where a state is carried.
    """

    windows: np.ndarray
    bounds: np.ndarray
    lanes: np.ndarray | None = None
    num_lanes: int = 0

    def members(self, batch: int) -> np.ndarray:
        """(rows,) window of each row of a global batch; `NO_WINDOW` in a lane that has run out."""
        part = slice(*self.bounds[batch])
        if self.lanes is None:
            return self.windows[part]
        rows = np.full(self.num_lanes, NO_WINDOW)
        rows[self.lanes[part]] = self.windows[part]
        return rows


def plan_batches(sizes: np.ndarray, order: DataOrder, epoch: int, group: int) -> BatchPlan:
    """How the windows of a group become global batches; a function of its arguments.

    Args:
        sizes: positions of each window of the group, (windows,); of `carried` windows, how many
            each user has, (users,), all above 0.
        order: how many windows, or with how many positions, make a batch.
        epoch: of which this is
        group: the how-manieth group of shards.

    Under a token budget, windows are shuffled, sorted by length within large chunks, cut from the
    longest down, and the batches shuffled: windows of one length meet others every epoch, and a
    chunk's last batch may be short.
    """
    draw = np.random.default_rng([order.seed, epoch, group])
    if order.windows == "carried":
        return BatchPlan(*fill_lanes(sizes, order.global_batch_size, draw), order.global_batch_size)
    windows = draw.permutation(len(sizes))
    if order.tokens == 0:
        begins = np.arange(0, len(windows), order.global_batch_size)
        return BatchPlan(windows, np.stack([begins, np.minimum(begins + order.global_batch_size, len(windows))], axis=1))
    chunk = BATCHES_SORTED * order.tokens // order.max_length
    windows = windows[np.lexsort((-sizes[windows].astype(np.int64), np.arange(len(windows)) // chunk))]
    bounds = []
    begin = 0
    while begin < len(windows):
        end_of_chunk = min((begin // chunk + 1) * chunk, len(windows))
        end = min(begin + max(1, order.tokens // int(sizes[windows[begin]])), end_of_chunk)
        bounds.append((begin, end))
        begin = end
    return BatchPlan(windows, draw.permutation(np.array(bounds, dtype=np.int64).reshape(-1, 2)))


def count_batches(sizes: np.ndarray, order: DataOrder, epoch: int, group: int) -> int:
    """How many batches `plan_batches` makes."""
    if order.windows == "carried":
        return count_lane_batches(sizes, order.global_batch_size)
    if order.tokens == 0:
        return -(-len(sizes) // order.global_batch_size)
    return len(plan_batches(sizes, order, epoch, group).bounds)


def rows_of_rank(rows: int, rank: int, world_size: int) -> range:
    """Which of the rows of a global batch a rank has: its contiguous share."""
    return range(rows * rank // world_size, rows * (rank + 1) // world_size)


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
            plan = plan_batches(windows.sizes, order, at_epoch, group)
            begin = max(0, first_batch - batches_before) if at_epoch == epoch else 0
            yield from cut_batches(windows, plan, range(begin, len(plan.bounds)), at_epoch, group, rank, world_size)
            batches_before += len(plan.bounds)
        require_windows(dataset, batches_before)


def require_windows(dataset: SequenceDataset, windows: int) -> None:
    """Refuse a dataset that an epoch of training would find empty."""
    if windows == 0:
        raise DataQualityError(
            f"{dataset.url}: no user has an interaction to train on, of {dataset.manifest['interactions']:,}; prepare a longer log"
        )


def cut_batches(
    windows: TrainingWindows, plan: BatchPlan, batches: range, epoch: int, group: int, rank: int, world_size: int
) -> Iterator[TrainingBatch]:
    """One rank's slice of the given batches of one group of shards."""
    for batch in batches:
        members = plan.members(batch)
        mine = rows_of_rank(len(members), rank, world_size)
        rows = members[mine.start : mine.stop]
        num_targets = int(windows.num_targets[members[members != NO_WINDOW]].sum())
        yield TrainingBatch(*windows.collate(rows), num_targets, epoch, group, batch, windows.goes_on(rows))


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
