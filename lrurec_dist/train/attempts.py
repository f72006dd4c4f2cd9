"""Training as a series of attempts: what ends one, whether there is another, and with how many workers."""

import threading
from collections.abc import Callable

import ray.exceptions
from ray.train import TrainingFailedError

from lrurec_dist.config import TrainConfig
from lrurec_dist.errors import StoppedError, WorkersError
from lrurec_dist.reporting import MetricsFile
from lrurec_dist.signals import on_sigterm
from lrurec_dist.train.checkpoint_index import last_step
from lrurec_dist.train.failures import Failure, diagnose
from lrurec_dist.train.heartbeats import Heartbeats, Pulse
from lrurec_dist.train.placing import MorePlaces, count_places
from lrurec_dist.train.presence import AT_WORK, LEFT, OVER, WAITING

_LOOK_EVERY_S = 0.25
_LOWER_MEMORY = "lower batch.tokens or batch.global_batch_size, or take more train.workers"

Attempt = Callable[[int, int, Heartbeats], str]
"""(number, workers, heartbeats) -> why the workers left before the end of training; empty at its end."""


def train_in_attempts(
    attempt: Attempt, options: TrainConfig, run_dir: str, bundle: dict[str, float], metrics: MetricsFile
) -> None:
    """Run attempts until one ends training.

    A failure that another attempt would repeat is final. Others are counted: more than
    `train.max_failures` in a row end training, and a new checkpoint ends the row, so that a run of
    many days outlives any number of losses that are far enough apart. Announced preemptions, and
    attempts that end in order to go on with more workers, are not counted.

    Args:
        attempt: runs one on the given number of workers.
        options: limits.
        run_dir: whose checkpoints say where training stands.
        bundle: what one worker reserves.
        metrics: takes a note about each attempt but an undisturbed first.

    Raises:
        LrurecError: a final failure.
        WorkersError: too many failures in a row, or no room for the workers.
        StoppedError: SIGTERM arrived; if training was under way, a checkpoint was saved first.
    """
    number, happened, reached = 1, "", 0
    row = _Row(options.max_failures, last_step(run_dir))
    while True:
        workers = count_places(
            bundle,
            workers=options.workers,
            min_workers=options.min_workers or options.workers,
            wait_s=options.wait_for_workers_s,
            waiting=lambda text: metrics.write("note", text=text),
        )
        if workers < options.workers and not happened:
            happened = f"the cluster has room for {workers} of train.workers={options.workers}"
        if happened:
            step = last_step(run_dir)
            repeated = f", {max(0, reached - step):,} steps are repeated" if reached else ""
            goes_on = f"{workers} worker{'s go' if workers > 1 else ' goes'} on from step {step:,}{repeated}"
            metrics.write("note", text=f"attempt {number}: {happened}; {goes_on}")
        watch = _Watch(options, bundle, workers)
        with on_sigterm(watch.stop):
            outcome = watch.over(attempt, number)
        if not outcome:
            return
        happened = row.add(outcome, last_step(run_dir)) if isinstance(outcome, Failure) else outcome
        reached = watch.reached
        number += 1


class _Row:
    """Failures since the last new checkpoint."""

    def __init__(self, limit: int, saved_step: int) -> None:
        self._limit, self._count, self._saved_step = limit, 0, saved_step
        self._memory_at = -1

    def add(self, failure: Failure, saved_step: int) -> str:
        """Count a failure and return what to say of it.

        Raises:
            LrurecError: it is final.
            WorkersError: it is one too many.
        """
        if failure.final:
            raise failure.final
        text = failure.text
        if failure.memory:
            if self._memory_at == failure.step:
                text += f"; for the second time after step {failure.step:,}: {_LOWER_MEMORY}"
            self._memory_at = failure.step
        if failure.preempted:
            return text
        if saved_step > self._saved_step:
            self._count, self._saved_step = 0, saved_step
        self._count += 1
        if self._count > self._limit:
            raise WorkersError(
                f"train.max_failures={self._limit}: {self._count} failures without a checkpoint after step {saved_step:,}, "
                f"the last: {text}; the same command goes on from there"
            )
        return text


class _Watch:
    """The driver's eyes on one attempt, which runs on a thread of its own: Python runs signal handlers on the main one."""

    def __init__(self, options: TrainConfig, bundle: dict[str, float], workers: int) -> None:
        self._options, self._bundle, self._workers = options, bundle, workers
        self._heartbeats = Heartbeats()
        self._more: MorePlaces | None = None
        self._pulses: list[Pulse] = []
        self._hung: list[Pulse] = []
        self._stopping = False
        self._asked = False

    @property
    def reached(self) -> int:
        """The furthest step any rank finished."""
        return max((pulse.step for pulse in self._pulses), default=0)

    def stop(self) -> None:
        """Answer SIGTERM: a checkpoint first where training is under way, an end at once elsewhere and at the second."""
        if self._stopping or not any(pulse.doing in AT_WORK for pulse in self._pulses):
            raise KeyboardInterrupt
        self._stopping = True

    def over(self, attempt: Attempt, number: int) -> str | Failure:
        """Run an attempt, and look after it until it ends; why its workers left early, or its failure; else empty.

        Raises:
            StoppedError: it left because of SIGTERM.
        """
        outcome: list[str | BaseException] = []

        def run() -> None:
            try:
                outcome.append(attempt(number, self._workers, self._heartbeats))
            except BaseException as error:  # raised again where the outcome is read
                outcome.append(error)

        thread = threading.Thread(target=run, name=f"attempt-{number}", daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(_LOOK_EVERY_S)
                self._look()
                if self._stopping and any(pulse.doing == LEFT for pulse in self._pulses if pulse.rank == 0):
                    break  # the checkpoint is there; whoever sent SIGTERM may not have the patience for the rest
        finally:
            if self._more:
                self._more.release()
        if self._stopping and (not outcome or outcome[0] != ""):
            raise StoppedError(f"SIGTERM: stopped after step {self.reached:,}; the same command goes on from the last checkpoint")
        if isinstance(outcome[0], TrainingFailedError):
            return diagnose(outcome[0], self._pulses, self._hung, self._options.collective_timeout_s)
        if isinstance(outcome[0], BaseException):
            raise outcome[0]
        return outcome[0]

    def _look(self) -> None:
        try:
            self._pulses = self._heartbeats.pulses()
            self._end_hung()
            if self._asked:
                return
            if self._stopping:
                self._asked = True
                self._heartbeats.ask_to_leave("SIGTERM")
            elif self._room_for_more():
                self._asked = True
                self._heartbeats.ask_to_leave("there is room for more workers")
        except ray.exceptions.RayError:  # what looking cannot tell, the attempt's own end will
            return

    def _end_hung(self) -> None:
        timeout_s = self._options.collective_timeout_s
        known = {pulse.rank for pulse in self._hung}
        for pulse in self._pulses:
            if pulse.doing in OVER or pulse.rank in known:
                continue
            if pulse.silent_s > timeout_s or (pulse.doing == WAITING and pulse.same_s > timeout_s):
                self._hung.append(pulse)
                self._heartbeats.kill(pulse.rank)

    def _room_for_more(self) -> bool:
        missing = self._options.workers - self._workers
        if not missing or len(self._pulses) < self._workers:  # what this attempt still needs is not to be taken from it
            return False
        if self._more is None:
            self._more = MorePlaces(self._bundle, missing, self._options.wait_for_workers_s)
        return self._more.found()
