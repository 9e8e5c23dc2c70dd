from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from aiokeyless.worker import batches as module
from aiokeyless.worker.batches import Batches

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.looptime


class Executed:
    """Records each batch, and doubles numbers."""

    def __init__(self, error: Exception | None = None) -> None:
        self.batches: list[list[int]] = []
        self.error = error

    async def __call__(self, calls: list[int]) -> Sequence[int]:
        self.batches.append(calls)
        await asyncio.sleep(1)
        if self.error is not None:
            raise self.error
        return [2 * call for call in calls]


async def test_calls_of_one_turn_are_one_batch_and_each_gets_its_own_result() -> None:
    batches = Batches(executed := Executed())
    assert await asyncio.gather(*(batches.call(number) for number in range(5))) == [0, 2, 4, 6, 8]
    assert executed.batches == [[0, 1, 2, 3, 4]]


async def test_calls_that_come_while_a_batch_runs_are_the_next_one() -> None:
    batches = Batches(executed := Executed())
    first = asyncio.create_task(batches.call(1))
    await asyncio.sleep(0.5)
    later = [asyncio.create_task(batches.call(number)) for number in (2, 3)]
    assert await asyncio.gather(first, *later) == [2, 4, 6]
    assert executed.batches == [[1], [2, 3]]


async def test_a_batch_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 2)
    batches = Batches(executed := Executed())
    await asyncio.gather(*(batches.call(number) for number in range(5)))
    assert executed.batches == [[0, 1], [2, 3], [4]]


async def test_a_batch_that_fails_fails_all_of_its_calls_and_no_later_one() -> None:
    batches = Batches(executed := Executed(OSError("the disk is away")))
    calls = [asyncio.create_task(batches.call(number)) for number in (0, 1, 2)]
    await asyncio.sleep(0.5)
    calls[0].cancel()
    _, *results = await asyncio.gather(*calls, return_exceptions=True)
    assert [str(result) for result in results] == ["the disk is away"] * 2
    executed.error = None
    assert await batches.call(3) == 6


async def test_a_caller_that_is_cancelled_takes_nothing_from_the_others() -> None:
    batches = Batches(Executed())
    calls = [asyncio.create_task(batches.call(number)) for number in (1, 2)]
    await asyncio.sleep(0.5)
    calls[0].cancel()
    assert await calls[1] == 4
    assert calls[0].cancelled()


async def test_closing_waits_until_all_calls_have_their_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGEST", 1)
    batches = Batches(Executed())
    calls = [asyncio.create_task(batches.call(number)) for number in (1, 2)]
    await asyncio.sleep(0)
    await batches.aclose()
    assert all(call.done() for call in calls)
    await batches.aclose()


def cancel_all(*first: asyncio.Task[int]) -> None:
    """Cancel all other tasks, some of them first, as `asyncio.run` does in any order at its end."""
    for task in (*first, *(asyncio.all_tasks() - {asyncio.current_task(), *first})):
        task.cancel()


@pytest.mark.parametrize("turns", [1, 2], ids=["before the batch begins", "during the batch"])
async def test_a_call_of_a_clean_up_gets_its_result_if_all_tasks_are_cancelled(turns: int) -> None:
    batches = Batches(Executed())

    async def clean_up() -> int:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        return await batches.call(2)

    cleaning, calling = asyncio.create_task(clean_up()), asyncio.create_task(batches.call(1))
    for _ in range(turns):
        await asyncio.sleep(0)
    cancel_all(cleaning)
    async with asyncio.timeout(10):
        assert await cleaning == 4
        await batches.aclose()
    assert calling.cancelled()


async def test_a_call_whose_batch_is_cancelled_is_cancelled_too() -> None:
    batches = Batches(Executed())
    calling = asyncio.create_task(batches.call(1))
    await asyncio.sleep(0.5)
    (running,) = asyncio.all_tasks() - {asyncio.current_task(), calling}
    running.cancel()
    await asyncio.wait({calling}, timeout=10)
    assert calling.cancelled()
    assert await batches.call(3) == 6
