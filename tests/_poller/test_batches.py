"""Very many waits that end or leave at once are handled over several turns of the loop, a batch in each."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from leaks import armed_timers

from aiokeyless import ClientClosedError, KeylessClient

if TYPE_CHECKING:
    from aiokeyless._poller.poller import Poller
    from aiokeyless._poller.state import Wait
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

MOST = 128  # waits in a turn
MANY = 500


def start(poller: Poller, operation_id: str, *, timeout: float = 60.0, missing: bool = True) -> Wait:
    return poller.start(operation_id, ticket=None, timeout=timeout, schedule=None, may_be_missing=missing)


@pytest.fixture
async def poller(client: KeylessClient) -> Poller:
    return client._open()[1]  # the batches are its own affair: nothing public shows turns of the loop


async def waiting_by_turn(poller: Poller) -> list[int]:
    """Return how many waits were under way before each turn of the loop, until there are none."""
    counts = [poller.statistics().waiting]
    while counts[-1]:
        await asyncio.sleep(0)
        counts.append(poller.statistics().waiting)
    return counts


def most_in_a_turn(counts: list[int]) -> int:
    return max(before - after for before, after in pairwise(counts))


class TestLeaving:
    async def test_the_first_ones_leave_at_once_and_the_others_in_the_next_turns(self, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(MANY)]
        for wait in waits:
            poller.leave(wait)
        assert all(wait.cancelled() for wait in waits)
        assert poller.statistics().waiting == MANY - MOST
        assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
        assert armed_timers() == []

    async def test_one_that_leaves_later_leaves_at_once(self, poller: Poller) -> None:
        for _ in range(3):
            for wait in [start(poller, f"op{k}") for k in range(MOST)]:
                poller.leave(wait)
            assert poller.statistics().waiting == 0
            for _ in range(2):
                await asyncio.sleep(0)

    async def test_those_of_one_caller_leave_in_batches_too(self, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(MANY)]
        poller.leave_all(waits)
        assert poller.statistics().waiting == MANY - MOST
        assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
        assert all(wait.cancelled() for wait in waits)
        poller.leave_all(waits)  # they have left: harmless

    async def test_one_that_ends_before_its_turn_keeps_its_result(self, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(MOST + 2)]
        poller.leave_all(waits)
        await poller.aclose()
        assert [type(wait.result()) for wait in waits[MOST:]] == [ClientClosedError] * 2
        await waiting_by_turn(poller)

    async def test_no_poll_is_made_for_callers_that_are_gone(self, sandbox: Sandbox, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(40) for _ in range(3)]
        poller.leave(waits[0])
        for wait in waits:
            wait.cancel()  # as asyncio does with a task's future, a turn before the task leaves
        await waiting_by_turn(poller)
        assert sandbox.requests == []
        assert armed_timers() == []

    async def test_closing_the_client_does_not_wait_for_callers_that_are_gone(self, poller: Poller) -> None:
        waits = [start(poller, "op") for _ in range(3)]
        waits[0].cancel()
        await poller.aclose()
        assert poller.statistics().waiting == 0

    async def test_a_wait_for_the_same_operation_goes_on(self, sandbox: Sandbox, poller: Poller) -> None:
        waits = [start(poller, "op") for _ in range(MANY)]
        poller.leave_all(waits)
        another = start(poller, "op")
        sandbox.approve("op", user_id="AB")
        assert getattr(await another, "is_approved", False)
        assert poller.statistics().waiting == 0
