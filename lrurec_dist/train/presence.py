"""Where a rank stands and whether it should leave: what the training loop and its launcher tell each other."""

import time

import torch

from lrurec_dist import collectives

ASK_EVERY_S = 0.5

# What a rank does.
STARTING = "starting"
WAITING = "waiting for data"
TRAINING = "training"
VALIDATING = "validating and saving"
LEFT = "left, its checkpoint saved"
ENDED = "at the end"
FAILED = "failed"

AT_WORK = (WAITING, TRAINING, VALIDATING)
OVER = (LEFT, ENDED, FAILED)


class Presence:
    """One rank's side. The loop writes `step` and `doing`; whoever started it writes `leave`.

    Plain attributes, so that threads may read and write them at any time.
    """

    def __init__(self) -> None:
        self.step = 0  # finished
        self.doing = STARTING
        self.leave = ""  # why this rank should save a checkpoint and leave, if it should

    def at(self, step: int, doing: str) -> None:
        """Say what this rank does from now on."""
        self.step, self.doing = step, doing

    def asked_to_leave(self) -> bool:
        """Whether this rank should leave; every rank calls it after the same steps."""
        return bool(self.leave)


class Agreement:
    """Lets the ranks leave together: they ask each other after the same steps, about every `ASK_EVERY_S`.

    A step's time differs between machines and models, so the ranks also agree on how many steps lie
    between two questions; asking at each would cost an exchange and, on a GPU, a synchronisation.
    """

    def __init__(self, presence: Presence, device: torch.device) -> None:
        self._presence, self._device = presence, device
        self._steps_left = self._steps = 1
        self._asked = time.perf_counter()

    def to_leave(self) -> bool:
        """Whether all ranks leave now; called after each step."""
        self._steps_left -= 1
        if self._steps_left > 0:
            return False
        per_step = (time.perf_counter() - self._asked) / self._steps
        leaving = float(self._presence.asked_to_leave())
        wishes, seconds = collectives.all_reduce_sum(
            torch.tensor([leaving, per_step], dtype=torch.float64, device=self._device)
        ).tolist()
        self._steps = self._steps_left = max(1, int(ASK_EVERY_S * collectives.world_size() / seconds))
        self._asked = time.perf_counter()
        return wishes > 0
