"""The learning rate as a function of the step."""

import itertools

import pytest

from lrurec_dist.train.schedule import Schedule, learning_rate_schedule


def rates(
    schedule: Schedule, *, warmup_steps: int = 0, final_share: float = 0.0, max_steps: int = 10, steps: int = 12
) -> list[float]:
    rate = learning_rate_schedule(
        schedule=schedule, learning_rate=2.0, warmup_steps=warmup_steps, max_steps=max_steps, final_share=final_share
    )
    return [rate(step) for step in range(steps)]


def test_a_constant_rate_without_warm_up_is_the_rate() -> None:
    assert rates("constant") == [2.0] * 12


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_by_equal_steps_to_the_rate(schedule: Schedule) -> None:
    assert rates(schedule, warmup_steps=4)[:4] == [0.5, 1.0, 1.5, 2.0]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup_steps", [0, 1, 4])
def test_after_warm_up_the_rate_falls_to_its_final_share_at_the_last_step_and_stays(
    schedule: Schedule, warmup_steps: int
) -> None:
    found = rates(schedule, warmup_steps=warmup_steps, final_share=0.1)
    falling = found[max(0, warmup_steps - 1) : 10]
    assert falling[0] == 2.0
    assert all(after < before for before, after in itertools.pairwise(falling))
    assert found[9:] == pytest.approx([0.2] * 3)


def test_linear_falls_by_equal_steps_and_cosine_slowly_at_both_ends() -> None:
    linear = [before - after for before, after in itertools.pairwise(rates("linear")[:10])]
    assert linear == pytest.approx([2 / 9] * 9)
    cosine = [before - after for before, after in itertools.pairwise(rates("cosine")[:10])]
    assert max(cosine) == pytest.approx(cosine[4])
    assert cosine[0] == pytest.approx(cosine[-1])
    assert cosine[0] < 2 / 9 < cosine[4]


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize(("warmup_steps", "max_steps"), [(1, 1), (0, 1), (3, 3)])
def test_a_budget_that_leaves_no_step_to_fall_in_still_has_rates(schedule: Schedule, warmup_steps: int, max_steps: int) -> None:
    found = rates(schedule, warmup_steps=warmup_steps, max_steps=max_steps, steps=max_steps)
    assert found[-1] == 2.0
