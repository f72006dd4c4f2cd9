"""Why an attempt ended, read off what Ray raised and what the ranks said last."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.train import ControllerError, PreemptionError, TrainingFailedError, WorkerGroupError
from torch.distributed import DistError

from lrurec_dist.errors import LrurecError, TryAgainError
from lrurec_dist.train.heartbeats import BEAT_EVERY_S, Pulse
from lrurec_dist.train.presence import OVER, WAITING

_SILENT_S = 6 * BEAT_EVERY_S  # beats this late do not come from a process that is merely busy
_COLLECTIVE = ("gloo", "nccl", "connection closed by peer", "connection reset by peer", "timed out waiting")
_MEMORY = ("running low on memory", "can't allocate memory")  # as Ray's memory monitor and torch's allocator say it


@dataclass(frozen=True)
class Failure:
    """One attempt's end.

    `text` says what happened to whom. `final` is the error to raise where another attempt would
    end the same way. A `preempted` attempt was announced, and says nothing about the training.
    `memory`: it was for lack of memory, at `step`.
    """

    text: str
    final: LrurecError | None = None
    preempted: bool = False
    memory: bool = False
    step: int = 0


def is_collective(error: BaseException) -> bool:
    """Whether an exchange between ranks failed: mostly the consequence of what happened to another rank."""
    return isinstance(error, DistError) or (
        isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in _COLLECTIVE)
    )


def diagnose(error: TrainingFailedError, pulses: Sequence[Pulse], hung: Sequence[Pulse], timeout_s: float) -> Failure:
    """Name what ended an attempt.

    Args:
        error: what Ray Train raised.
        pulses: what each rank said last.
        hung: ranks that were ended by us, since they did not move for `timeout_s`.
    """
    step = max((pulse.step for pulse in pulses), default=0)
    if hung:
        return Failure(_hung_text(hung, timeout_s), step=step)
    if isinstance(error, PreemptionError):
        return Failure(
            f"{_ranks(error.preemption_info.preempted_ranks)} lost a node that was taken away", preempted=True, step=step
        )
    if isinstance(error, ControllerError):
        return Failure(f"workers did not start: {_line(error.controller_failure)}", step=step)
    causes = (
        {rank: _cause(failure) for rank, failure in sorted(error.worker_failures.items())}
        if isinstance(error, WorkerGroupError)
        else {}
    )
    place = {pulse.rank: pulse for pulse in pulses}
    for rank, cause in causes.items():
        if isinstance(cause, LrurecError) and not isinstance(cause, TryAgainError):
            return Failure(str(cause), final=type(cause)(f"rank {rank}: {cause}"), step=step)
    lost = {rank: cause for rank, cause in causes.items() if _is_system(cause)}
    for rank, cause in causes.items():
        if rank not in lost and not is_collective(cause) and not isinstance(cause, TryAgainError):
            text = f"rank {rank} failed: {type(cause).__name__}: {_line(cause)}"
            return Failure(text, final=LrurecError(text), step=step)
    if any(isinstance(cause, RayActorError) and cause.preempted for cause in lost.values()):
        return Failure(f"{_ranks(lost)} lost a node that was taken away", preempted=True, step=step)
    for rank, cause in sorted(lost.items(), key=lambda item: not _for_memory(item[1])):
        return Failure(_lost_text(rank, cause, place), memory=_for_memory(cause), step=step)
    for rank, cause in causes.items():
        if isinstance(cause, TryAgainError):
            return Failure(f"rank {rank}: {cause}", step=step)
    late = behind(pulses)
    if late:
        return Failure(_hung_text(late, timeout_s), step=step)
    for rank, cause in causes.items():
        return Failure(f"rank {rank} lost touch with the others ({_line(cause)})", step=step)
    text = f"{type(error).__name__}: {_line(error)}"
    return Failure(text, final=LrurecError(f"training failed: {text}"), step=step)


def behind(pulses: Sequence[Pulse]) -> list[Pulse]:
    """The ranks that the others wait for: silent ones, else those that finished fewer steps, else those not at work."""
    silent = [pulse for pulse in pulses if pulse.silent_s > _SILENT_S and pulse.doing not in OVER]
    if silent:
        return silent
    furthest = max(((pulse.step, pulse.doing != WAITING) for pulse in pulses), default=None)
    return [pulse for pulse in pulses if (pulse.step, pulse.doing != WAITING) != furthest]


def _hung_text(pulses: Sequence[Pulse], timeout_s: float) -> str:
    """Which ranks hung, where, and since which step."""
    parts = [
        f"rank {pulse.rank} on node {pulse.node} (process {pulse.pid}) hung after step {pulse.step:,}, {pulse.doing}, "
        + (f"silent for {pulse.silent_s:.0f} s" if pulse.silent_s > _SILENT_S else f"unmoved for {pulse.same_s:.0f} s")
        for pulse in pulses
    ]
    return f"{'; '.join(parts)} (train.collective_timeout_s={timeout_s:g})"


def _lost_text(rank: int, cause: BaseException, place: dict[int, Pulse]) -> str:
    where = f"rank {rank} on node {place[rank].node}" if rank in place else f"rank {rank}"
    message = str(cause).lower()
    if _for_memory(cause):
        return f"{where} died for lack of memory ({_line(cause)})"
    if "node" in message and any(
        sign in message for sign in ("node was terminated", "node has died", "node is dead", "node died")
    ):
        return f"{where} was lost with its node"
    if isinstance(cause, RayActorError):
        return f"{where} died (killed from outside, as by kill -9 or by the kernel for lack of memory, or crashed)"
    return f"{where} failed: {type(cause).__name__}: {_line(cause)}"


def _cause(failure: BaseException) -> BaseException:
    """What lies beneath Ray's wrappers."""
    while True:
        inner = getattr(failure, "health_check_failure", None) or (failure.cause if isinstance(failure, RayTaskError) else None)
        if not isinstance(inner, BaseException) or inner is failure:
            return failure
        failure = inner


def _is_system(cause: BaseException) -> bool:
    """Whether machines, processes or devices failed rather than the code that ran on them."""
    if _for_memory(cause):
        return True
    if isinstance(cause, RayError) and not isinstance(cause, RayTaskError):
        return True
    return type(cause).__name__.startswith("WorkerHealthCheck") or (
        isinstance(cause, torch.AcceleratorError) and "device-side assert" not in str(cause)
    )


def _for_memory(cause: BaseException) -> bool:
    message = str(cause).lower()
    return isinstance(cause, OutOfMemoryError | torch.OutOfMemoryError | MemoryError) or any(sign in message for sign in _MEMORY)


def _ranks(ranks: Sequence[int] | dict[int, BaseException]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
