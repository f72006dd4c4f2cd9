"""The learning rate as a function of the step, so that a continued run needs no state of it."""

import math
from collections.abc import Callable
from typing import Literal

Schedule = Literal["constant", "linear", "cosine"]


def learning_rate_schedule(
    *, schedule: Schedule, learning_rate: float, warmup_steps: int, max_steps: int, final_share: float
) -> Callable[[int], float]:
    """A function from a step, the first being 0, to its learning rate.

    Over `warmup_steps` steps the rate rises linearly to `learning_rate`, which the last of them
    has. After that it stays (`constant`), or falls linearly or along half a cosine to `learning_rate` x
    `final_share`, which step `max_steps` - 1, the last one, has, and every step after it.
    """

    def rate(step: int) -> float:
        if step < warmup_steps:
            return learning_rate * (step + 1) / warmup_steps
        if schedule == "constant":
            return learning_rate
        steps = max(1, max_steps - max(1, warmup_steps))  # from the highest rate to the lowest
        passed = min(1.0, (step - max(0, warmup_steps - 1)) / steps)
        share_left = 1 - passed if schedule == "linear" else (1 + math.cos(math.pi * passed)) / 2
        return learning_rate * (final_share + (1 - final_share) * share_left)

    return rate
