"""Where the time between two reports went."""

import time

import pytest
import torch

from lrurec_dist.train.engine import ClipResult
from lrurec_dist.train.window import PHASES, Window
from tests.processes import run_ranks

CPU = torch.device("cpu")
SPENT = (0.01, 0.02, 0.03, 0.04, 0.05)


def clipped(norm: float, skipped: float = 0.0) -> ClipResult:
    return ClipResult(torch.tensor(norm), torch.tensor(1.0), torch.tensor(skipped))


def spend(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_shares_are_those_of_the_time_spent_in_each_phase() -> None:
    window = Window(CPU)
    for name, seconds in zip(PHASES, SPENT, strict=True):
        with window.phase(name):
            spend(seconds)
    spend(0.1)  # in no phase
    window.leave_out(0.0)
    totals, seconds = window.totals(), window.seconds
    found = [totals[f"{name}_share"] * seconds for name in PHASES]
    # a share never counts less than was spent in it; more, where other processes had the core meanwhile
    assert all(least <= share for least, share in zip(SPENT, found, strict=True))
    assert sum(found) <= seconds - 0.1 + 0.01


def test_sums_are_over_steps_and_the_norm_is_the_last_steps() -> None:
    window = Window(CPU)
    window.add(torch.tensor(5.0), clipped(2.0), 3, 4, 6)
    window.add(torch.tensor(7.0), clipped(float("nan"), skipped=1.0), 2, 2, 6)
    window.add(torch.tensor(1.0), clipped(3.0), 1, 1, 1)
    totals = window.totals()
    assert {name: value for name, value in totals.items() if not name.endswith("_share")} == pytest.approx(
        {"loss_sum": 13, "skipped_steps": 1, "num_targets": 6, "real": 7, "padded": 13}
    )
    assert (window.steps, window.gradient_norm.item()) == (3, 3.0)


def totals_of_a_rank() -> dict[str, float]:
    from lrurec_dist import collectives

    window = Window(CPU)
    window.add(torch.tensor(1.0 + collectives.rank()), clipped(1.0, skipped=1.0), 10, 20, 30)
    return window.totals()


def test_ranks_add_up_and_a_step_all_of_them_skipped_counts_once() -> None:
    for totals in run_ranks(2, totals_of_a_rank):
        assert (totals["loss_sum"], totals["num_targets"], totals["skipped_steps"]) == (3.0, 20, 1.0)
