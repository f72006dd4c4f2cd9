"""Batches on their way to the device: micro-batches, indices computed on the host, copies ahead of their use."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lrurec_dist.data.batches import TrainingBatch


@dataclass(frozen=True)
class MicroBatch:
    """Rows of a rank's batch that go forward together, with what a device would have to wait for to find out.

    `item_ids` (rows, length) int64 and `keep` (rows, length) bool are as `LRURec.forward` takes
    them, `kept` are the places of keep in row-major order. `targets` (targets,) int64 are those of
    the kept positions `predicted`; None: of all of them. Where a state is carried, `goes_on` (rows,)
    bool says which rows continue the same row of the batch before; `first_row` is the number of the
    first one among the rank's rows.
    """

    item_ids: Tensor
    keep: Tensor
    kept: Tensor
    predicted: Tensor | None
    targets: Tensor
    goes_on: Tensor | None
    first_row: int

    def to(self, device: torch.device) -> "MicroBatch":
        """The same on a GPU, by copies from pinned memory that the host does not wait for."""
        moved: dict[str, Any] = {name: x.pin_memory().to(device, non_blocking=True) for name, x in self.tensors()}
        return replace(self, **moved)

    def tensors(self) -> list[tuple[str, Tensor]]:
        """Its tensors by name."""
        return [(name, value) for name, value in vars(self).items() if isinstance(value, Tensor)]


@dataclass(frozen=True)
class StepBatch:
    """One rank's part of an update; `num_targets` counts the targets of the global batch, all ranks and micro-batches."""

    micro_batches: list[MicroBatch]
    num_targets: int
    epoch: int
    group: int  # of shards, within the epoch
    batch: int  # within the group


def iter_step_batches(batches: Iterator[TrainingBatch], *, accumulation: int, device: torch.device) -> Iterator[StepBatch]:
    """The batches on the device, each in `accumulation` micro-batches; some are empty where rows are few.

    On a GPU the next batch is copied on a stream of its own while the current one is computed.
    """
    on_host = (_split(batch, accumulation) for batch in batches)
    return on_host if device.type == "cpu" else _copied_ahead(on_host, device)


def _split(batch: TrainingBatch, accumulation: int) -> StepBatch:
    bounds = [len(batch.item_ids) * part // accumulation for part in range(accumulation + 1)]
    rows = itertools.pairwise(bounds)
    return StepBatch(
        [_micro_batch(batch, slice(begin, end)) for begin, end in rows], batch.num_targets, batch.epoch, batch.group, batch.batch
    )


def _micro_batch(batch: TrainingBatch, rows: slice) -> MicroBatch:
    item_ids, targets = batch.item_ids[rows], batch.targets[rows]
    keep = (targets > 0) | (item_ids > 0)  # what is input alone drives the recurrence
    kept = np.flatnonzero(keep)
    kept_targets = targets.ravel()[kept]
    predicted = np.flatnonzero(kept_targets)
    everywhere = len(predicted) == len(kept)
    return MicroBatch(
        torch.from_numpy(item_ids),
        torch.from_numpy(keep),
        torch.from_numpy(kept),
        None if everywhere else torch.from_numpy(predicted),
        torch.from_numpy(kept_targets if everywhere else kept_targets[predicted]),
        None if batch.goes_on is None else torch.from_numpy(batch.goes_on[rows]),
        rows.start,
    )


def _copied_ahead(batches: Iterator[StepBatch], device: torch.device) -> Iterator[StepBatch]:
    copies = torch.cuda.Stream(device)
    ahead: tuple[StepBatch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(copies):
            moved = replace(batch, micro_batches=[micro.to(device) for micro in batch.micro_batches])
            arrived = copies.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = moved, arrived
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: StepBatch, arrived: torch.cuda.Event) -> StepBatch:
    """The batch, usable on the current stream, whose allocator must not reuse it before that stream is done."""
    stream = torch.cuda.current_stream()
    stream.wait_event(arrived)
    for micro in batch.micro_batches:
        for _, tensor in micro.tensors():
            tensor.record_stream(stream)
    return batch
