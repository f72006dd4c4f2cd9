"""From sequences to left-padded batches: splits, windows, a data order that is a function, the feed.

The order of training windows is a function of (seed, epoch) alone: shards are permuted and taken
in groups, the windows of a group are shuffled together and cut into global batches, and a rank
takes its slice of each. So any number of workers sees the same global batches, no rank runs out
before another, and no window is dropped or repeated within an epoch. The last batch of a group
may be short; the loss is weighted by targets, so that is no bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np

from lrurec_dist import PAD_ID
from lrurec_dist.data.sequences import MIN_EVALUABLE, SequenceDataset, SequenceShard

Split = Literal["validation", "test"]


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

    def __init__(self, shards: list[SequenceShard], *, max_length: int, first_item_is_target: bool) -> None:
        self._items = np.concatenate([shard.item_ids for shard in shards])
        starts = np.cumsum([0, *(len(shard.item_ids) for shard in shards)])
        offsets = np.concatenate([shard.offsets[:-1] + start for shard, start in zip(shards, starts, strict=False)])
        trained = training_lengths(np.concatenate([shard.lengths for shard in shards]))
        sequence, begin, end = cut_windows(trained, max_length)
        # A whole short history's last window knows the item before it; a cut one starts afresh, as in the paper.
        self._has_context = (begin > 0) & (trained[sequence] < 2 * max_length)
        self._begin, self._end = offsets[sequence] + begin, offsets[sequence] + end
        self._first_item_is_target = first_item_is_target
        self.num_targets = self._end - self._begin
        if not first_item_is_target:
            self.num_targets = self.num_targets - ~self._has_context
        useful = self.num_targets > 0
        self._begin, self._end, self._has_context, self.num_targets = (
            values[useful] for values in (self._begin, self._end, self._has_context, self.num_targets)
        )

    def __len__(self) -> int:
        return len(self._begin)

    def collate(self, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(item_ids, targets) of the given windows, each (len(windows), longest) int64."""
        inputs, targets = [], []
        for window in windows:
            begin, end, context = self._begin[window], self._end[window], self._has_context[window]
            target = self._items[begin:end]
            if context:
                item_ids = self._items[begin - 1 : end - 1]
            elif self._first_item_is_target:
                item_ids = np.concatenate([[PAD_ID], target[:-1]])
            else:
                item_ids, target = target[:-1], target[1:]
            inputs.append(item_ids)
            targets.append(target)
        length = max((len(row) for row in targets), default=1)
        return pad_left(inputs, length), pad_left(targets, length)


def group_shards(names: list[str], *, seed: int, epoch: int, shards_mixed: int) -> list[list[str]]:
    """The epoch's groups of shards, in order; a function of its arguments."""
    order = np.random.default_rng([seed, epoch]).permutation(len(names))
    return [[names[index] for index in order[begin : begin + shards_mixed]] for begin in range(0, len(order), shards_mixed)]


def count_windows(lengths: np.ndarray, *, max_length: int, first_item_is_target: bool) -> int:
    """How many training windows with a target the sequences of these lengths give."""
    trained = training_lengths(lengths)
    sequence, begin, end = cut_windows(trained, max_length)
    alone = (end - begin == 1) & (begin == 0)  # a single interaction: a target only from padding
    return len(sequence) - (0 if first_item_is_target else int(alone.sum()))


def iter_group_batches(
    dataset: SequenceDataset,
    *,
    epoch: int,
    group: int,
    seed: int,
    shards_mixed: int,
    global_batch_size: int,
    max_length: int,
    first_item_is_target: bool,
    rank: int,
    world_size: int,
) -> Iterator[TrainingBatch]:
    """One rank's batches of one group of shards, in the epoch's order. Pure numpy, no Ray."""
    names = group_shards(dataset.shard_names, seed=seed, epoch=epoch, shards_mixed=shards_mixed)[group]
    windows = TrainingWindows(
        [dataset.read_shard(name) for name in names], max_length=max_length, first_item_is_target=first_item_is_target
    )
    batches = range(-(-len(windows) // global_batch_size))
    yield from cut_batches(windows, batches, epoch, group, seed, global_batch_size, rank, world_size)


def cut_batches(
    windows: TrainingWindows,
    batches: range,
    epoch: int,
    group: int,
    seed: int,
    global_batch_size: int,
    rank: int,
    world_size: int,
) -> Iterator[TrainingBatch]:
    order = np.random.default_rng([seed, epoch, group]).permutation(len(windows))
    for batch in batches:
        members = order[batch * global_batch_size : (batch + 1) * global_batch_size]
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
