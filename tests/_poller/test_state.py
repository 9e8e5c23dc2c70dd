from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tenacity import wait_fixed
from yarl import URL

from aiokeyless._poller.state import Poll, PolledOperation, Wait

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture
def polled() -> PolledOperation:
    return PolledOperation(1, "op", URL("http://localhost/v2/operations/op"), 0.0)


def make_wait(polled: PolledOperation) -> Wait:
    return Wait(
        polled,
        asyncio.get_running_loop(),
        started_at=0.0,
        origin=0.0,
        deadline=10.0,
        schedule=wait_fixed(1),
        ticket=None,
        may_be_missing=False,
        updates=None,
    )


async def test_a_poll_is_cut_off_once(polled: PolledOperation) -> None:
    poll = Poll(polled, 0.0, final=False)
    poll.task = asyncio.create_task(asyncio.sleep(3600))
    poll.under_way = True
    poll.stop()
    poll.stop(overdue=True)
    assert poll.cut
    assert not poll.overdue  # the first reason stays
    assert poll.task.cancelling() == 1
    with pytest.raises(asyncio.CancelledError):
        await poll.task


async def test_a_poll_that_has_not_started_is_only_marked(polled: PolledOperation) -> None:
    poll = Poll(polled, 0.0, final=False)
    poll.task = asyncio.create_task(asyncio.sleep(0))
    poll.stop()
    await poll.task
    assert poll.cut


async def test_a_poll_serves_a_wait_in_time(polled: PolledOperation) -> None:
    assert Poll(polled, 0.0, final=False).serves(make_wait(polled))


async def test_a_poll_does_not_serve_a_wait_that_ended(polled: PolledOperation) -> None:
    wait = make_wait(polled)
    wait.cancel()
    assert not Poll(polled, 0.0, final=False).serves(wait)


async def test_past_the_deadline_only_the_final_poll_serves(polled: PolledOperation) -> None:
    wait, final, other = make_wait(polled), Poll(polled, 0.0, final=True), Poll(polled, 0.0, final=False)
    wait.deadline_passed = True
    wait.final = final
    assert final.serves(wait)
    assert not other.serves(wait)


async def test_a_polled_operation_keeps_its_waits_in_the_order_in_which_they_started(polled: PolledOperation) -> None:
    assert polled.all_waits() == []
    waits = [make_wait(polled) for _ in range(5)]
    for wait in waits:
        polled.add(wait)
    assert polled.all_waits() == waits
    waits[0].cancel()
    assert polled.active_waits() == waits[1:]


@pytest.mark.parametrize("order", [range(5), range(4, -1, -1), [2, 0, 4, 1, 3]], ids=["first", "last", "any"])
async def test_a_polled_operation_lets_go_of_waits_that_have_ended(
    polled: PolledOperation, order: Sequence[int]
) -> None:
    waits = [make_wait(polled) for _ in order]
    for wait in waits:
        polled.add(wait)
    for ended, k in enumerate(order, 1):
        waits[k].cancel()
        polled.remove(waits[k])
        assert (polled.live, polled.before_deadline) == (5 - ended, 5 - ended)
        assert polled.active_waits() == [wait for wait in waits if not wait.done()]
        assert len(polled.all_waits()) <= 2 * polled.live
    polled.add(another := make_wait(polled))
    assert polled.all_waits() == [another]


async def test_waits_and_polled_operations_hold_nothing_else(polled: PolledOperation) -> None:
    for thing in (polled, make_wait(polled), Poll(polled, 0.0, final=False)):
        assert not hasattr(thing, "__dict__")


async def test_of_those_due_at_the_same_time_the_first_to_come_is_first(polled: PolledOperation) -> None:
    later = PolledOperation(2, "other", polled.url, 0.0)
    assert polled < later
    assert not later < polled
    assert make_wait(polled) < make_wait(later)
