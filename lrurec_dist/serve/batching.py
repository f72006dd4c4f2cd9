"""Requests that come together are answered together: one product for many users."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

from lrurec_dist.errors import TryAgainError

Ask = TypeVar("Ask")
Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How requests are gathered.

    Attributes:
        size: requests answered together, at most.
        wait_s: how long the first one waits for others.
        room: requests that may wait; more are refused.
    """

    size: int
    wait_s: float
    room: int


class Batcher(Generic[Ask, Answer]):
    """Gathers requests of one event loop and answers them in one thread, a batch after the other.

    While a batch is answered the next one gathers, so that batches grow with the load and nobody waits without reason.
    """

    def __init__(self, work: Callable[[Sequence[Ask]], Sequence[Answer | Exception]], options: BatchOptions) -> None:
        self._work, self._options = work, options
        self._waiting: deque[tuple[Ask, asyncio.Future[Answer]]] = deque()
        self._open: set[asyncio.Future[Answer]] = set()
        self._came, self._full = asyncio.Event(), asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._task: asyncio.Task[None] | None = None
        self.requests = 0
        self.batches = 0

    async def __call__(self, ask: Ask) -> Answer:
        """The answer to one request.

        Raises:
            TryAgainError: too many wait already.
            Exception: what `work` gave or raised instead of an answer.
        """
        if len(self._waiting) >= self._options.room:
            raise TryAgainError(f"{len(self._waiting):,} requests wait already, as many as serve.max_waiting allows; try again")
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((ask, future))
        self._open.add(future)
        self._came.set()
        if len(self._waiting) >= self._options.size:
            self._full.set()
        try:
            return await future
        finally:
            self._open.discard(future)

    async def close(self) -> None:
        """Answer what waits and what is in work, then end."""
        if self._open:
            await asyncio.wait(self._open)
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._came.wait()
            if self._options.wait_s and len(self._waiting) < self._options.size:
                self._full.clear()
                with suppress(TimeoutError):
                    await asyncio.wait_for(self._full.wait(), self._options.wait_s)
            taken = [self._waiting.popleft() for _ in range(min(self._options.size, len(self._waiting)))]
            if not self._waiting:
                self._came.clear()
            batch = [(ask, future) for ask, future in taken if not future.done()]  # done: nobody waits for it any more
            if not batch:
                continue
            self.batches += 1
            self.requests += len(batch)
            found: Sequence[Answer | Exception]
            try:
                found = await loop.run_in_executor(self._thread, self._work, [ask for ask, _ in batch])
            except Exception as error:  # of all of them
                found = [error] * len(batch)
            for (_, future), answer in zip(batch, found, strict=True):
                if future.done():
                    continue
                if isinstance(answer, Exception):
                    future.set_exception(answer)
                else:
                    future.set_result(answer)
