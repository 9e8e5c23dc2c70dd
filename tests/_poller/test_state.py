from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from tenacity import wait_fixed
from yarl import URL

from aiokeyless._poller.state import Look, Wait, Watch

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture
def watch() -> Watch:
    return Watch(1, "op", URL("http://localhost/v2/operations/op"), 0.0)


def make_wait(watch: Watch) -> Wait:
    return Wait(
        watch,
        asyncio.get_running_loop(),
        began=0.0,
        origin=0.0,
        deadline=10.0,
        schedule=wait_fixed(1),
        ticket=None,
        may_be_missing=False,
        updates=None,
    )


async def test_a_look_is_cut_off_once(watch: Watch) -> None:
    look = Look(watch, 0.0, final=False)
    look.task = asyncio.create_task(asyncio.sleep(3600))
    look.under_way = True
    look.stop()
    look.stop(overdue=True)
    assert look.cut
    assert not look.overdue  # the first reason stays
    assert look.task.cancelling() == 1
    with pytest.raises(asyncio.CancelledError):
        await look.task


async def test_a_look_that_has_not_begun_is_only_marked(watch: Watch) -> None:
    look = Look(watch, 0.0, final=False)
    look.task = asyncio.create_task(asyncio.sleep(0))
    look.stop()
    await look.task
    assert look.cut


async def test_a_look_serves_a_wait_in_time(watch: Watch) -> None:
    assert Look(watch, 0.0, final=False).serves(make_wait(watch))


async def test_a_look_does_not_serve_a_wait_that_ended(watch: Watch) -> None:
    wait = make_wait(watch)
    wait.cancel()
    assert not Look(watch, 0.0, final=False).serves(wait)


async def test_in_overtime_only_the_final_look_serves(watch: Watch) -> None:
    wait, final, other = make_wait(watch), Look(watch, 0.0, final=True), Look(watch, 0.0, final=False)
    wait.overtime = True
    wait.final = final
    assert final.serves(wait)
    assert not other.serves(wait)


async def test_a_watch_knows_its_waits_in_the_order_of_their_coming(watch: Watch) -> None:
    assert watch.waits() == []
    waits = [make_wait(watch) for _ in range(5)]
    for wait in waits:
        watch.join(wait)
    assert watch.waits() == waits
    waits[0].cancel()
    assert watch.current() == waits[1:]


@pytest.mark.parametrize("order", [range(5), range(4, -1, -1), [2, 0, 4, 1, 3]], ids=["first", "last", "any"])
async def test_a_watch_lets_go_of_waits_that_have_ended(watch: Watch, order: Sequence[int]) -> None:
    waits = [make_wait(watch) for _ in order]
    for wait in waits:
        watch.join(wait)
    for ended, k in enumerate(order, 1):
        waits[k].cancel()
        watch.part(waits[k])
        assert (watch.live, watch.patient) == (5 - ended, 5 - ended)
        assert watch.current() == [wait for wait in waits if not wait.done()]
        assert len(watch.waits()) <= 2 * watch.live
    watch.join(another := make_wait(watch))
    assert watch.waits() == [another]


async def test_waits_and_watches_hold_nothing_else(watch: Watch) -> None:
    for thing in (watch, make_wait(watch), Look(watch, 0.0, final=False)):
        assert not hasattr(thing, "__dict__")


async def test_of_those_due_at_the_same_time_the_first_to_come_is_first(watch: Watch) -> None:
    later = Watch(2, "other", watch.url, 0.0)
    assert watch < later
    assert not later < watch
    assert make_wait(watch) < make_wait(later)
