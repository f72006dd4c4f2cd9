"""What happened since the last report: losses, counts, and where the time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lrurec_dist import collectives
from lrurec_dist.train.engine import ClipResult

PHASES = ("waiting", "forward", "backward", "communication", "update")  # of a step; the last: clipping and AdamW


class Window:
    """Sums since the last report.

    On the CPU every step's phases are timed. A GPU works behind the host, so there only steps that
    are `sampled` are, by events on its stream; the one step stands for all of the window.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)  # loss, skipped steps
        self._counts = [0, 0, 0]  # targets, real positions, positions with padding
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._started = time.perf_counter()
        self.sampled = False
        self.steps = 0
        self.gradient_norm = torch.zeros((), device=device)  # of the last step, before clipping

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what happens inside as time of a phase."""
        if not self._on_gpu or name == "waiting":
            started = time.perf_counter()
            yield
            self._seconds[name] += time.perf_counter() - started
        elif self.sampled:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            yield

    def add(self, loss_sum: Tensor, clipped: ClipResult, num_targets: int, real: int, padded: int) -> None:
        """Count one step of this rank; nothing is waited for."""
        self._sums += torch.stack([loss_sum.double(), clipped.skipped.double() / collectives.world_size()])
        for place, count in enumerate((num_targets, real, padded)):
            self._counts[place] += count
        self.gradient_norm = clipped.norm
        self.steps += 1

    def totals(self) -> dict[str, float]:
        """Sums over all ranks, the same on each: `loss_sum`, `skipped_steps`, `num_targets`, `real`, `padded`, and the
        mean over ranks of each phase's share of the time as `<phase>_share`; all ranks must call."""
        seconds = self.seconds
        shares = [self._phase_seconds(name) / seconds / collectives.world_size() for name in PHASES]
        values = torch.cat([self._sums, self._sums.new_tensor([*self._counts, *shares])])
        names = ("loss_sum", "skipped_steps", "num_targets", "real", "padded", *(f"{name}_share" for name in PHASES))
        return dict(zip(names, collectives.all_reduce_sum(values).tolist(), strict=True))

    def _phase_seconds(self, name: str) -> float:
        sampled_ms = 0.0
        for phase, begin, end in self._events:
            if phase == name:
                end.synchronize()
                sampled_ms += begin.elapsed_time(end)
        return self._seconds[name] + sampled_ms / 1e3 * self.steps

    def leave_out(self, seconds: float) -> None:
        """Do not count the last so many seconds: they were not spent on steps."""
        self._started += seconds

    @property
    def seconds(self) -> float:
        """Since the window began."""
        return max(1e-9, time.perf_counter() - self._started)
