"""From when readers and workers search for what is due, on a clock that the tests move."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from aiokeyless.worker.postgres import PostgresConnection, floors
from aiokeyless.worker.postgres.adapters import adapter_for
from aiokeyless.worker.postgres.adapters.driver import _floors_of as floors_of
from aiokeyless.worker.postgres.floors import Floor
from worker.conformance.brokers import submit, take_n

from .shop import decide_all

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.worker.postgres import PostgresBroker

    from .shop import Connection


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(floors, "time", clock)
    return clock


def search(floor: Floor, clock: Clock, seconds: float = 0.0, oldest: float | None = None) -> float | None:
    """Search for so many seconds; return from when."""
    with floor.search() as started:
        clock.now += seconds
        started.oldest = oldest
    return started.floor


def test_a_search_starts_a_second_before_the_oldest_that_the_last_one_left(clock: Clock) -> None:
    floor = Floor()
    assert search(floor, clock, oldest=500.0) is None
    assert search(floor, clock, oldest=501.5) == 499.0
    assert search(floor, clock) == 500.5
    assert search(floor, clock) == 500.5  # if nothing was due


def test_a_search_that_fails_changes_nothing(clock: Clock) -> None:
    floor = Floor()
    search(floor, clock, oldest=500.0)
    with pytest.raises(ZeroDivisionError), floor.search():
        raise ZeroDivisionError
    assert search(floor, clock) == 499.0


@pytest.mark.parametrize(("seconds", "every"), [(0.001, 1.0), (0.1, 2.0), (3.0, 10.0)])
def test_everything_is_searched_each_second_and_less_often_while_that_is_slow(
    clock: Clock, seconds: float, every: float
) -> None:
    floor, found = Floor(), []
    while clock.now < 1100.0:
        began = clock.now
        if search(floor, clock, seconds, oldest=500.0) is None:
            found.append(began)
        clock.now = max(clock.now, began + 0.05)
    gaps = [later - earlier for earlier, later in pairwise(found)]
    assert all(every - 0.01 < gap < every + max(0.1, 2 * seconds) for gap in gaps)
    assert gaps


@pytest.mark.parametrize("made", [object, Floor])
def test_a_connection_keeps_its_floors_if_it_can_be_referred_to(made: Callable[[], object]) -> None:
    connection = made()
    assert (floors_of(connection) is floors_of(connection)) is (made is Floor)
    assert floors_of(connection)["keyless", "shop"] is not None


def test_sessions_of_one_engine_share_their_floors() -> None:
    engine = create_engine("postgresql+psycopg2://")
    first, second = (adapter_for(Session(engine), "keyless") for _ in range(2))
    assert first is not None
    assert second is not None
    assert first.floors is second.floors


async def test_what_is_due_before_its_floor_is_found_by_the_next_search_of_everything(
    broker: PostgresBroker, admin: Connection, connection: Connection, clock: Clock
) -> None:
    await decide_all(broker, "a")
    await (await PostgresConnection(connection).next_outcome("shop")).mark_handled()
    await decide_all(broker, "b")
    await submit(broker, "c")
    for table in ("waiting", "unread"):
        await admin.execute(f"UPDATE keyless.{table} SET due_at = due_at - interval '1 h'")  # noqa: S608  # names of ours
    reading = asyncio.create_task(PostgresConnection(connection).next_outcome("shop"))
    assert not await broker.take(1, 0.3)
    assert not reading.done()
    clock.now += 1.0
    assert len(await take_n(broker, 1)) == 1
    await (await reading).mark_handled()
