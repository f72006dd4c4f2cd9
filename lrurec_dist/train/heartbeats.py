"""Heartbeats: what the driver knows of each training worker, and how it asks them to leave."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
import ray.train
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from lrurec_dist.train.presence import FAILED, Presence

BEAT_EVERY_S = 0.5


@dataclass(frozen=True)
class Pulse:
    """What a rank said last. Seconds count back from the moment the table was asked for."""

    rank: int
    node: str  # IP address
    pid: int
    step: int
    doing: str
    silent_s: float  # since its last beat
    same_s: float  # since step or doing changed


class _Heartbeats:
    """The table of all ranks; an actor beside the driver."""

    def __init__(self) -> None:
        self._facts: dict[int, tuple[str, int, Any]] = {}
        self._beats: dict[int, tuple[int, str, float, float]] = {}
        self._wish = ""

    def join(self, rank: int, node: str, pid: int, worker: Any) -> None:
        self._facts[rank] = (node, pid, worker)

    def beat(self, rank: int, step: int, doing: str) -> str:
        now = time.monotonic()
        before = self._beats.get(rank)
        changed = now if before is None or before[:2] != (step, doing) else before[3]
        self._beats[rank] = (step, doing, now, changed)
        return self._wish

    def ask(self, wish: str) -> None:
        self._wish = wish

    def pulses(self) -> list[Pulse]:
        now = time.monotonic()
        return [
            Pulse(rank, *self._facts[rank][:2], step, doing, now - seen, now - changed)
            for rank, (step, doing, seen, changed) in sorted(self._beats.items())
        ]

    def worker(self, rank: int) -> Any:
        return self._facts[rank][2]


class Heartbeats:
    """The driver's side of a table that lives as long as this object."""

    def __init__(self) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self.actor: Any = ray.remote(_Heartbeats).options(num_cpus=0, scheduling_strategy=here).remote()

    def pulses(self) -> list[Pulse]:
        """What each rank said last, in the order of ranks; ranks that never said anything are not in it."""
        return ray.get(self.actor.pulses.remote())

    def ask_to_leave(self, why: str) -> None:
        """Ask all ranks to save a checkpoint and leave."""
        ray.get(self.actor.ask.remote(why))

    def kill(self, rank: int) -> None:
        """End a rank's process, whatever state it is in."""
        ray.kill(ray.get(self.actor.worker.remote(rank)))


class BeatingPresence(Presence):
    """A presence that a thread carries to the driver's table, and that hears of nodes being drained."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self._table = table
        self._rank = ray.train.get_context().get_world_rank()

    def asked_to_leave(self) -> bool:
        """As asked by the driver, or since a node of this attempt is drained."""
        preemption = ray.train.get_preemption_info()  # rank 0's answer, on every rank
        if preemption is not None:
            ranks = ", ".join(map(str, preemption.preempted_ranks))
            self.leave = f"the node of rank {ranks} is being taken away"
        return bool(self.leave)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Beat while the context is open."""
        ray.get(
            self._table.join.remote(
                self._rank, ray.util.get_node_ip_address(), os.getpid(), ray.get_runtime_context().current_actor
            )
        )
        closing = threading.Event()

        def beat() -> None:
            while True:
                try:
                    wish = ray.get(self._table.beat.remote(self._rank, self.step, self.doing))
                except ray.exceptions.RayError:  # the driver is gone, and this process with it
                    return
                self.leave = self.leave or wish
                if closing.wait(BEAT_EVERY_S):
                    return

        thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        except BaseException:
            self.doing = FAILED
            raise
        finally:
            closing.set()
            thread.join()
            ray.get(self._table.beat.remote(self._rank, self.step, self.doing))
