"""The world of the simulator: time passes only where something waits, and nothing is left to chance."""

from __future__ import annotations

import asyncio
import random
import uuid
from datetime import UTC, timedelta
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ApprovalTicket, client

from .world import EPOCH, StuckError, VirtualLoop, deterministic, wall_clock_error

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator


@pytest.fixture
def loop() -> Iterator[VirtualLoop]:
    loop = VirtualLoop()
    yield loop
    loop.close()


def test_time_passes_at_once_and_exactly(loop: VirtualLoop) -> None:
    async def main() -> list[float]:
        times = []
        for seconds in (3600.0, 0.0, 0.25):
            await asyncio.sleep(seconds)
            times.append(loop.time())
        return times

    assert loop.run_until_complete(main()) == pytest.approx([3600.0, 3600.0, 3600.25])


async def wait_for_what_never_happens() -> None:
    await asyncio.get_running_loop().create_future()


async def run_in_circles() -> None:
    while True:  # noqa: ASYNC110  # that is the point
        await asyncio.sleep(0)


@pytest.mark.parametrize("main", [wait_for_what_never_happens, run_in_circles])
def test_what_never_ends_is_an_error_and_no_hang(
    loop: VirtualLoop, main: Callable[[], Coroutine[None, None, None]]
) -> None:
    task = loop.create_task(main())
    with pytest.raises(StuckError):
        loop.run_until_complete(task)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        loop.run_until_complete(task)


def test_timers_that_are_left_and_problems_of_the_loop_are_seen(loop: VirtualLoop) -> None:
    def fail() -> None:
        raise ValueError("a callback failed")

    loop.call_later(1.0, fail)
    loop.call_later(9.0, fail).cancel()
    assert len(loop.armed_timers()) == 1
    loop.run_until_complete(asyncio.sleep(2.0))
    assert loop.armed_timers() == []
    assert "a callback failed" in loop.problems[0]


def test_the_library_reads_the_wall_clock_of_its_process(loop: VirtualLoop) -> None:
    async def main() -> ApprovalTicket:
        await asyncio.sleep(10.0)
        wall_clock_error.set(lambda _: -4.0)
        ticket = ApprovalTicket.for_operation("op", user_id="AB")
        return ApprovalTicket.from_json(ticket.to_json())

    with deterministic(1):
        ticket = loop.run_until_complete(main())
    assert ticket.created_at == EPOCH + timedelta(seconds=6.0)
    assert ticket.created_at.tzinfo is UTC


def test_ids_and_random_numbers_depend_on_the_seed_and_are_given_back() -> None:
    random.seed(7)
    expected = random.random()  # noqa: S311
    random.seed(7)
    drawn = []
    for seed in (1, 1, 2):
        with deterministic(seed):
            drawn.append((random.random(), str(client.uuid.uuid4())))  # type: ignore[attr-defined]  # noqa: S311
    assert drawn[0] == drawn[1] != drawn[2]
    assert random.random() == expected  # noqa: S311
    assert client.uuid is uuid  # type: ignore[attr-defined]


def test_while_a_loop_stands_still_nothing_is_called(loop: VirtualLoop) -> None:
    called = list[float]()
    for when in (1.0, 2.0, 6.0):
        loop.call_at(when, lambda: called.append(loop.time()))
    loop.call_at(1.5, loop.stand_still, 5.0)
    loop.run_until_complete(asyncio.sleep(7.0))
    assert called == [1.0, 5.0, 6.0]
