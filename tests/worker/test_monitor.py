"""What a worker says of its fleet, and what keeps it from being ready, on a broker that says what the test wants."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest

from aiokeyless.errors import BrokerError
from aiokeyless.events import Inspection
from aiokeyless.worker.broker import Broker, RefusedError, UnavailableError
from aiokeyless.worker.monitor import Monitor

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless.worker.broker import Message

pytestmark = pytest.mark.looptime

NOW = datetime(2026, 11, 27, tzinfo=UTC)


class FakeBroker:
    """The broker, as it is inspected."""

    def __init__(self) -> None:
        self.losses: list[BrokerError] = []
        self.is_paused = False
        self.told: Inspection | UnavailableError | BrokerError = Inspection()
        self.inspections = 0
        self.told_of = 0

    def count_inspection(self) -> None:
        self.told_of += 1

    def now(self) -> datetime:
        return NOW

    async def inspect(self) -> Inspection:
        self.inspections += 1
        if not isinstance(self.told, Inspection):
            raise self.told
        return self.told


@pytest.fixture
def broker() -> FakeBroker:
    return FakeBroker()


@asynccontextmanager
async def monitoring(broker: FakeBroker) -> AsyncGenerator[Monitor]:
    """Run a monitor; the body starts between two inspections."""
    loop = asyncio.get_running_loop()
    monitor = Monitor(
        cast("Broker", broker),
        loop.time,
        is_paused=lambda: broker.is_paused,
        inspected=broker.count_inspection,
        lost=broker.losses.append,
    )
    running = asyncio.create_task(monitor.run())
    await asyncio.sleep(1)
    yield monitor
    running.cancel()


def delivery(*, number: int = 1, waited: float = 0.0) -> Message:
    return cast("Message", SimpleNamespace(number=number, stored_at=NOW - timedelta(seconds=waited)))


async def test_a_broker_that_is_well_is_no_problem_and_is_asked_every_5_seconds(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        await asyncio.sleep(100)
        assert broker.inspections == 21
        assert [*monitor.problems()] == []


async def test_a_broker_that_is_gone_for_good_ends_the_worker(broker: FakeBroker) -> None:
    async with monitoring(broker):
        error = broker.told = BrokerError("the file is gone")
        await asyncio.sleep(5)
        assert broker.losses == [error]


async def test_a_silent_broker_is_a_problem_until_it_answers(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        broker.told = UnavailableError("nats: timeout")
        await asyncio.sleep(5)
        assert [*monitor.problems()] == ["the broker does not answer: nats: timeout"]
        broker.told = Inspection(waiting=3)
        await asyncio.sleep(5)
        assert [*monitor.problems()] == []
        assert monitor.last.waiting == 3


async def test_what_the_broker_names_are_problems(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        broker.told = Inspection(problems=("a stream is gone", "another one is full"))
        await asyncio.sleep(5)
        assert [*monitor.problems()] == ["a stream is gone", "another one is full"]


async def test_an_event_that_is_refused_is_a_problem_until_one_is_stored(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        monitor.on_refusal(RefusedError("insufficient storage"))
        assert [*monitor.problems()] == ["the broker refuses outcomes or claims: insufficient storage"]
        monitor.on_stored()
        assert [*monitor.problems()] == []


async def test_a_refusal_is_forgotten_where_nothing_is_stored_any_more(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        monitor.on_refusal(RefusedError("insufficient storage"))
        await asyncio.sleep(59)
        assert [*monitor.problems()] != []
        await asyncio.sleep(2)
        assert [*monitor.problems()] == []


async def test_requests_that_wait_while_nothing_is_delivered_are_a_problem_after_half_a_minute(
    broker: FakeBroker,
) -> None:
    async with monitoring(broker) as monitor:
        broker.told = Inspection(waiting=9, backlog=7)
        await asyncio.sleep(5 + 28)
        assert [*monitor.problems()] == []
        await asyncio.sleep(2)
        assert [*monitor.problems()] == ["7 requests wait, and none was delivered to this worker for 31 s"]
        monitor.on_delivery(delivery())
        await asyncio.sleep(5)
        assert [*monitor.problems()] == []


@pytest.mark.parametrize("reason", ["deliveries come", "nothing waits", "Keyless fares badly"])
async def test_requests_that_wait_for_a_reason_are_none(broker: FakeBroker, reason: str) -> None:
    async with monitoring(broker) as monitor:
        broker.told = Inspection(waiting=9, backlog=0 if reason == "nothing waits" else 7)
        broker.is_paused = reason == "Keyless fares badly"
        for _ in range(20):
            if reason == "deliveries come":
                monitor.on_delivery(delivery(number=2))
            await asyncio.sleep(5)
        assert [*monitor.problems()] == []


async def test_lateness_is_the_longest_wait_for_a_first_delivery_between_two_inspections(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        assert monitor.lateness == 0
        for message in (delivery(waited=3), delivery(waited=7), delivery(waited=4), delivery(number=2, waited=60)):
            monitor.on_delivery(message)
        await asyncio.sleep(5)
        assert monitor.lateness == 7
        await asyncio.sleep(5)
        assert monitor.lateness == 0


async def test_a_request_that_comes_from_the_future_is_not_early(broker: FakeBroker) -> None:
    async with monitoring(broker) as monitor:
        monitor.on_delivery(delivery(waited=-3))
        await asyncio.sleep(5)
        assert monitor.lateness == 0
