"""How many workers the cluster can hold, asked of Ray's own scheduler."""

import time
from collections.abc import Callable

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from lrurec_dist.errors import WorkersError

_AT_ONCE_S = 5.0  # what a scheduler that has the room needs at most


def count_places(
    bundle: dict[str, float], *, workers: int, min_workers: int, wait_s: float, waiting: Callable[[str], object]
) -> int:
    """How many workers find room now: all, or after a wait for them as many as do.

    Args:
        bundle: what one worker reserves.
        workers: how many there should be.
        min_workers: fewest to go on with.
        wait_s: how long to wait for all; a waiting request makes an autoscaler add nodes.
        waiting: told once, when not all find room at once.

    Raises:
        WorkersError: there is no room for `min_workers`.
    """
    whole = placement_group([bundle] * workers)
    try:
        if whole.wait(min(wait_s, _AT_ONCE_S)):
            return workers
        waiting(f"{workers} workers of {_text(bundle)} do not find room; waiting up to {wait_s:g} s (train.wait_for_workers_s)")
        if whole.wait(max(0.0, wait_s - _AT_ONCE_S)):
            return workers
    finally:
        remove_placement_group(whole)
    fits, fits_not = 0, workers
    while fits_not - fits > 1:
        middle = (fits + fits_not) // 2
        part = placement_group([bundle] * middle)
        fits, fits_not = (middle, fits_not) if part.wait(_AT_ONCE_S) else (fits, middle)
        remove_placement_group(part)
    if fits < min_workers:
        raise WorkersError(
            f"train.workers={workers}: the cluster has room for {fits} workers of {_text(bundle)}, after {wait_s:g} s of waiting "
            f"(train.wait_for_workers_s); add nodes and run the same command, or set train.min_workers={max(1, fits)}"
        )
    return fits


class MorePlaces:
    """Requests for the workers that are missing, held until there is room; an autoscaler sees them."""

    def __init__(self, bundle: dict[str, float], missing: int, wait_s: float) -> None:
        self._requests: list[PlacementGroup] = [placement_group([bundle]) for _ in range(missing)]
        self._ready = [request.ready() for request in self._requests]
        self._wait_s = wait_s
        self._since: float | None = None

    def found(self) -> bool:
        """Whether all missing workers would find room, or some did `wait_s` ago and no more came."""
        if not self._ready:
            return False
        ready, _ = ray.wait(self._ready, num_returns=len(self._ready), timeout=0)
        if not ready:
            self._since = None
            return False
        self._since = self._since or time.monotonic()
        return len(ready) == len(self._ready) or time.monotonic() - self._since > self._wait_s

    def release(self) -> None:
        """Give back what was requested."""
        for request in self._requests:
            remove_placement_group(request)
        self._requests, self._ready = [], []


def _text(bundle: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
