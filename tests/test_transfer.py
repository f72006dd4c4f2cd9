"""Micro-batches and what the host finds out for the device."""

import numpy as np
import pytest
import torch

from lrurec_dist.data.batches import TrainingBatch
from lrurec_dist.train.transfer import iter_step_batches

CPU = torch.device("cpu")
ITEM_IDS = np.array([[0, 0, 1, 2], [3, 4, 5, 6], [0, 0, 0, 0], [0, 7, 8, 9], [0, 0, 0, 1]])
# the second row has context before its targets, the third predicts its first item from padding
TARGETS = np.array([[0, 1, 2, 3], [0, 0, 6, 7], [0, 0, 0, 5], [7, 8, 9, 1], [0, 0, 1, 2]])
BATCH = TrainingBatch(ITEM_IDS, TARGETS, num_targets=40, epoch=3, group=0, batch=0)


@pytest.mark.parametrize("accumulation", [1, 2, 3, 5, 8])  # 8: some have no row
def test_micro_batches_hold_each_row_once_in_order(accumulation: int) -> None:
    (step,) = iter_step_batches(iter([BATCH]), accumulation=accumulation, device=CPU)
    assert (len(step.micro_batches), step.num_targets, step.epoch) == (accumulation, 40, 3)
    assert torch.cat([micro.item_ids for micro in step.micro_batches]).tolist() == ITEM_IDS.tolist()
    assert torch.cat([micro.targets for micro in step.micro_batches]).tolist() == TARGETS[TARGETS > 0].tolist()


def test_indices_are_those_that_masks_give() -> None:
    (step,) = iter_step_batches(iter([BATCH]), accumulation=1, device=CPU)
    (micro,) = step.micro_batches
    keep = torch.from_numpy((ITEM_IDS > 0) | (TARGETS > 0))
    assert torch.equal(micro.keep, keep)
    assert micro.kept.tolist() == keep.flatten().nonzero().squeeze(1).tolist()
    targets = torch.from_numpy(TARGETS)[keep]
    assert micro.predicted is not None
    assert micro.predicted.tolist() == (targets > 0).nonzero().squeeze(1).tolist()


def test_where_every_kept_position_predicts_nothing_is_selected() -> None:
    batch = TrainingBatch(ITEM_IDS[3:], TARGETS[3:], 6, 0, 0, 0)
    (step,) = iter_step_batches(iter([batch]), accumulation=2, device=CPU)
    assert [micro.predicted for micro in step.micro_batches] == [None, None]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_copied_ahead_arrive_as_they_were() -> None:
    on_host = list(iter_step_batches(iter([BATCH] * 3), accumulation=2, device=CPU))
    on_gpu = list(iter_step_batches(iter([BATCH] * 3), accumulation=2, device=torch.device("cuda", 0)))
    assert len(on_gpu) == 3
    for mine, theirs in zip(on_gpu, on_host, strict=True):
        for moved, micro in zip(mine.micro_batches, theirs.micro_batches, strict=True):
            for name, tensor in vars(micro).items():
                assert tensor is None if vars(moved)[name] is None else torch.equal(vars(moved)[name].cpu(), tensor)
