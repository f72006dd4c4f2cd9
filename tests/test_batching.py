"""Requests that come together are answered together, and nobody waits without reason."""

import asyncio
import threading
from collections.abc import Sequence

import pytest

from lrurec_dist.errors import TryAgainError
from lrurec_dist.serve.batching import Batcher, BatchOptions


class Gate:
    """Doubles numbers, but not before it is opened; refuses odd ones with an error of their own."""

    def __init__(self) -> None:
        self.open, self.entered = threading.Event(), threading.Event()
        self.sizes: list[int] = []

    def __call__(self, numbers: Sequence[int]) -> list[int | Exception]:
        self.sizes.append(len(numbers))
        self.entered.set()
        assert self.open.wait(30)
        return [ValueError(str(number)) if number % 2 else 2 * number for number in numbers]


async def gathered(gate: Gate, count: int, **options: float) -> list[int | BaseException]:
    """One request that keeps the gate busy, then `count` more, then the gate opens."""
    batcher: Batcher[int, int] = Batcher(gate, BatchOptions(**{"size": 8, "wait_s": 0.0, "room": 100, **options}))
    first = asyncio.create_task(batcher(1000))
    await asyncio.to_thread(gate.entered.wait, 30)
    others = [asyncio.create_task(batcher(number)) for number in range(count)]
    await asyncio.sleep(0)  # all of them are waiting
    gate.open.set()
    found = await asyncio.gather(first, *others, return_exceptions=True)
    await batcher.close()
    return found


def test_what_comes_while_a_batch_is_answered_is_the_next_batch_and_each_gets_its_own_answer() -> None:
    gate = Gate()
    found = asyncio.run(gathered(gate, 10))
    assert gate.sizes == [1, 8, 2]
    assert found[0] == 2000
    for number, answer in enumerate(found[1:]):
        assert str(answer) == (str(number) if number % 2 else str(2 * number))
        assert isinstance(answer, ValueError) == bool(number % 2), "the error of one is not the other's"


def test_more_than_there_is_room_for_are_refused_and_the_others_answered() -> None:
    found = asyncio.run(gathered(Gate(), 10, room=4))
    assert [isinstance(answer, TryAgainError) for answer in found] == [False] * 5 + [True] * 6


def test_a_batch_waits_for_others_if_it_is_told_to_and_no_longer_than_until_it_is_full() -> None:
    gate = Gate()
    gate.open.set()

    async def both() -> list[int]:
        batcher: Batcher[int, int] = Batcher(gate, BatchOptions(size=2, wait_s=1000.0, room=100))
        first = asyncio.create_task(batcher(2))
        for _ in range(5):
            await asyncio.sleep(0)  # it is looked at, and waits
        return await asyncio.wait_for(asyncio.gather(first, batcher(4)), 60)

    assert asyncio.run(both()) == [4, 8]
    assert gate.sizes == [2]
    gate = Gate()
    gate.open.set()
    alone: Batcher[int, int] = Batcher(gate, BatchOptions(size=2, wait_s=0.01, room=100))
    assert asyncio.run(asyncio.wait_for(alone(2), 60)) == 4, "and for nobody for ever"


def test_nobody_is_answered_who_went_away() -> None:
    gate = Gate()

    async def one_leaves() -> int:
        batcher: Batcher[int, int] = Batcher(gate, BatchOptions(size=8, wait_s=0.0, room=100))
        first = asyncio.create_task(batcher(2))
        await asyncio.to_thread(gate.entered.wait, 30)
        leaving, staying = asyncio.create_task(batcher(4)), asyncio.create_task(batcher(6))
        await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        gate.open.set()
        await first
        return await staying

    assert asyncio.run(one_leaves()) == 12
    assert gate.sizes == [1, 1]


@pytest.mark.parametrize("count", [1, 3])
def test_closing_answers_what_waits_and_what_is_in_work(count: int) -> None:
    gate = Gate()

    async def closed() -> list[int]:
        batcher: Batcher[int, int] = Batcher(gate, BatchOptions(size=1, wait_s=0.0, room=100))
        asks = [asyncio.create_task(batcher(2 * number)) for number in range(count)]
        await asyncio.to_thread(gate.entered.wait, 30)
        closing = asyncio.create_task(batcher.close())
        await asyncio.sleep(0)
        gate.open.set()
        await closing
        return await asyncio.wait_for(asyncio.gather(*asks), 30)

    assert asyncio.run(closed()) == [4 * number for number in range(count)]
