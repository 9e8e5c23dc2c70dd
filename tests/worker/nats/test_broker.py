"""What becomes of the broker's object when its connection is opened, lost or closed."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
from nats_server import CONSUMER, OUTCOMES, REQUEST_SUBJECT, REQUESTS, NatsServer, change_consumer, jetstream
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import ExchangeResult, UnavailableError
from aiokeyless.worker.clock import BrokerClock
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.nats.failures import broker_errors
from aiokeyless.worker.nats.intake import Intake, NatsMessage
from aiokeyless.worker.nats.load_shedding import LoadShedding

from ..conformance.brokers import decide, new_request, submit, take_n  # noqa: TID252

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client

SERVICE = "https://keyless.test"


@pytest.fixture
async def opened(connection: Client) -> AsyncGenerator[NatsBroker]:
    """A broker on the connection, prepared by a worker."""
    async with NatsBroker(connection) as opened:
        await opened.prepare(lease=30.0, service=SERVICE)
        yield opened


async def test_a_connection_of_the_applications_stays_open(opened: NatsBroker, connection: Client) -> None:
    await opened.prepare(lease=30.0, service=SERVICE)  # a second worker
    await opened.aclose()
    assert connection.is_connected


async def test_a_reader_that_got_nothing_yet_is_closed_with_its_broker(connection: Client) -> None:
    async with NatsBroker(connection) as opened:
        with pytest.raises(BrokerError, match="there is no stream"):
            await opened.next_outcome("shop")


async def test_a_connection_that_is_lost_is_waited_for(broker: NatsServer) -> None:
    async with NatsBroker(broker.url) as opened:
        await opened.prepare(lease=30.0, service=SERVICE)
        assert opened._connection is not None
        connection = opened._connection
        broker.kill()
        await until(lambda: not connection.is_connected)
        for call in (opened.inspect(), opened.take(1, 0.1), opened.take_overdue(1, 1.0)):
            with pytest.raises(UnavailableError, match="no connection"):
                await call
        await broker.start()
        await until(lambda: connection.is_connected)
        assert (await opened.inspect()).waiting == 0


async def test_a_stream_of_others_gets_neither_a_request_nor_an_outcome(
    opened: NatsBroker, connection: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause = Mock(return_value=0.0)
    monkeypatch.setattr("aiokeyless.worker.nats.broker.error_delay", pause)
    stream = jetstream(connection)
    await submit(opened, "txn-1")
    [message] = await take_n(opened, 1)
    for name in (REQUESTS, OUTCOMES):
        await stream.delete_stream(name)
    await stream.add_stream(name="THEIRS", subjects=["keyless.approvals.*"])
    for call in (opened.submit(new_request("txn-2")), decide(opened, message)):
        with pytest.raises(UnavailableError, match="expected stream does not match"):
            await call
    assert [each.args for each in pause.mock_calls] == [(1,), (2,)]  # of a submission


async def test_delays_are_stretched_while_new_requests_wait_but_not_past_a_deadline(
    opened: NatsBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadShedding, "factor", 16.0)
    delays: list[float] = []

    async def put_off(_intake: Intake, _message: NatsMessage, delay: float) -> None:
        delays.append(delay)

    monkeypatch.setattr(Intake, "put_off", put_off)
    await opened.submit(new_request("txn-1", expires_in=3600.0))
    [message] = await take_n(opened, 1)
    answered, failed = ExchangeResult.ANSWERED, ExchangeResult.FAILED
    for delay, result in ((1.0, answered), (1800.0, answered), (1.0, failed)):
        await opened.put_off(message, delay, result)
    assert (delays[0], delays[2]) == (16.0, 1.0)
    assert 1800.0 < delays[1] <= 3600.0


async def test_the_time_is_the_brokers(connection: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    ahead = BrokerClock(lambda: datetime.now(UTC) + timedelta(hours=1))
    monkeypatch.setattr("aiokeyless.worker.nats.broker.BrokerClock", lambda: ahead)
    async with NatsBroker(connection) as opened:
        await opened.prepare(lease=30.0, service=SERVICE)
        assert abs(opened.now() - datetime.now(UTC)) < timedelta(seconds=PATIENCE)
        assert (await opened.inspect()).clock_ahead == pytest.approx(-3600.0, abs=PATIENCE)


async def test_a_consumer_that_refuses_every_pull_is_a_problem_of_the_fleet(opened: NatsBroker) -> None:
    assert opened._intake is not None
    opened._intake._refusals, opened._intake._refusal = 5, "409 that"
    assert (await opened.inspect()).problems == ("the broker refuses each pull: 409 that",)


@pytest.mark.parametrize(
    ("changed", "difference"),
    [
        ({"max_expires": 1_000_000}, "max_expires is 0.001 s, and must be unset"),
        ({"headers_only": True}, "headers_only is True, and must be unset"),  # or requests would seem invalid
    ],
    ids=str,
)
async def test_a_worker_goes_on_once_a_consumer_that_was_changed_so_that_nothing_can_be_read_is_deleted(
    opened: NatsBroker,
    connection: Client,
    monkeypatch: pytest.MonkeyPatch,
    changed: dict[str, Any],
    difference: str,
) -> None:
    monkeypatch.setattr("aiokeyless.worker.nats.intake.error_delay", lambda _failures: 0.05)
    await change_consumer(connection, **changed)
    await submit(opened, "txn-1")
    for _ in range(10):  # pulls are refused, or deliver no body
        assert not await opened.take(1, 0.03)
    (problem,) = (line for line in (await opened.inspect()).problems if "has other settings" in line)
    assert f"has other settings: {difference}" in problem
    await connection.jetstream().delete_consumer(REQUESTS, CONSUMER)
    async with asyncio.timeout(PATIENCE):
        while not (taken := await opened.take(1, 0.1)):
            pass
    assert b"txn-1" in taken[0].body


async def test_what_the_machine_raises_is_an_error_of_the_broker() -> None:
    with pytest.raises(UnavailableError, match="ConnectionResetError: gone"), broker_errors():
        raise ConnectionResetError("gone")


@pytest.fixture
async def given_back(connection: Client) -> AsyncGenerator[NatsBroker]:
    """A broker of the next release, at which a worker of this one has given a request back."""
    broker = NatsBroker(connection)
    broker.request_version = 2
    async with broker:
        await broker.prepare(lease=30.0, service=SERVICE)
        await jetstream(connection).publish(REQUEST_SUBJECT, b'{"version":2,"operation_id":"txn-1"}')
        async with NatsBroker(connection) as old:
            await old.prepare(lease=30.0, service=SERVICE)
            [message] = await take_n(old, 1)
            assert not await old.has_claim(message)
            await old.put_off(message, 0.0, ExchangeResult.NONE)
        yield broker


async def test_a_take_reads_no_claims(given_back: NatsBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(given_back, "_claims", None)
    [message] = await take_n(given_back, 1)
    assert message.is_untried


async def test_what_names_no_operation_holds_none(given_back: NatsBroker, connection: Client) -> None:
    await jetstream(connection).publish(REQUEST_SUBJECT, b'{"version":3}')
    messages = await take_n(given_back, 2)
    assert [await given_back.has_claim(message) for message in messages if b"3" in message.body] == [False]
