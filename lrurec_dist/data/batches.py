"""From sequences to left-padded batches: splits, windows, a data order that is a function, the feed.

The order of training windows is a function of (seed, epoch) alone: shards are permuted and taken
in groups, the windows of a group are shuffled together and cut into global batches, and a rank
takes its slice of each. So any number of workers sees the same global batches, no rank runs out
before another, and no window is dropped or repeated within an epoch. The last batch of a group
may be short; the loss is weighted by targets, so that is no bias. `feed.py` decides where batches
are made.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lrurec_dist import PAD_ID
from lrurec_dist.data.sequences import MIN_EVALUABLE, SequenceDataset, SequenceShard
from lrurec_dist.errors import DataQualityError

Split = Literal["validation", "test"]


@dataclass(frozen=True, kw_only=True)
class DataOrder:
    """What fixes every training batch of every epoch, whatever the number of ranks.

    `seed` shuffles; `shards_mixed` sequence shards are shuffled together and held in memory;
    `global_batch_size` windows of at most `max_length` interactions make one batch of all ranks;
    `first_item_is_target`: a window's first item is predicted too, from padding.
    """

    seed: int
    shards_mixed: int
    global_batch_size: int
    max_length: int
    first_item_is_target: bool


@dataclass(frozen=True)
class TrainingBatch:
    """One rank's slice of a global batch.

    `item_ids` and `targets` are (batch, length) int64 with padding on the left, cut to the longest
    window of the slice; `targets[b, t]` is the item after `item_ids[b, t]`, or `PAD_ID` where
    nothing is predicted. `num_targets` counts the targets of the *global* batch. `epoch`, shard
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


def training_lengths(lengths: np.ndarray) -> np.ndarray:
    """How much of each sequence trains: all but the last two interactions, or all of a short one."""
    return np.where(lengths >= MIN_EVALUABLE, lengths - 2, lengths)


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


def untrained_targets(lengths: np.ndarray, max_length: int) -> int:
    """Interactions of the training part that no window has as a target."""
    _, begin, end = cut_windows(lengths, max_length)
    return int(lengths.sum() - (end - begin).sum())


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
        trained = training_lengths(np.concatenate([shard.lengths for shard in shards]))
        sequence, begin, end = cut_windows(trained, order.max_length)
        # A whole short history's last window knows the item before it; a cut one starts afresh, as in the paper.
        has_context = (begin > 0) & (trained[sequence] < 2 * order.max_length)
        targets = end - begin if order.first_item_is_target else end - begin - ~has_context
        useful = targets > 0
        self._first_input = (offsets[sequence] + begin - has_context)[useful]
        self._end = (offsets[sequence] + end)[useful]
        self.num_targets = targets[useful]

    def __len__(self) -> int:
        return len(self._end)

    def collate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(item_ids, targets) of the given windows, each (len(windows), longest) int64."""
        length = int(self.num_targets[windows].max(initial=1))
        target_at = self._end[windows, None] - np.arange(length, 0, -1)  # place of each target; its input is the one before
        is_target = target_at >= (self._end - self.num_targets)[windows, None]
        is_input = (target_at > self._first_input[windows, None]) & is_target
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


def count_windows(lengths: np.ndarray, order: DataOrder) -> int:
    """How many training windows with a target the sequences of these lengths give."""
    trained = training_lengths(lengths)
    sequence, begin, end = cut_windows(trained, order.max_length)
    alone = (end - begin == 1) & (begin == 0)  # a single interaction: a target only from padding
    return len(sequence) - (0 if order.first_item_is_target else int(alone.sum()))


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
                windows, held = TrainingWindows([dataset.read_shard(name) for name in names], order), names
            batches = -(-len(windows) // order.global_batch_size)
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
    shuffled = np.random.default_rng([order.seed, epoch, group]).permutation(len(windows))
    for batch in batches:
        members = shuffled[batch * order.global_batch_size : (batch + 1) * order.global_batch_size]
        low, high = (len(members) * bound // world_size for bound in (rank, rank + 1))
        item_ids, targets = windows.collate(members[low:high])
        yield TrainingBatch(item_ids, targets, int(windows.num_targets[members].sum()), epoch, group, batch)


def iter_evaluation_batches(shard: SequenceShard, *, split: Split, max_length: int, batch_size: int) -> Iterator[EvaluationBatch]:
    """Every evaluable user of a shard once: history and next item under leave-last-out.

    Test: the last item, after all others. Validation: the last but one, after those before it.
    Users with fewer than three interactions are not evaluable. Batches follow history length and
    depend on the shard alone, so the products, and with them every rank, are the same on any
    number of workers.
    """
    held_out = 1 if split == "test" else 2
    users = np.flatnonzero(shard.lengths >= MIN_EVALUABLE)
    users = users[np.argsort(shard.lengths[users], kind="stable")]
    for begin in range(0, len(users), batch_size):
        members = users[begin : begin + batch_size]
        ends = shard.offsets[members + 1] - held_out
        histories = [shard.item_ids[start:end] for start, end in zip(shard.offsets[members], ends, strict=True)]
        distinct = [np.unique(history) for history in histories]
        yield EvaluationBatch(
            item_ids=pad_left([history[-max_length:] for history in histories], min(max_length, max(map(len, histories)))),
            targets=shard.item_ids[ends],
            history_rows=np.repeat(np.arange(len(members)), [len(ids) for ids in distinct]),
            history_ids=np.concatenate(distinct),
            users=members,
        )
