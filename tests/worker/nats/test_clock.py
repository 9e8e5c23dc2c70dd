"""The broker's clock: a machine whose clock is wrong keeps the deadlines of the others."""

from __future__ import annotations

import asyncio
import logging
from contextlib import aclosing, suppress
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import pytest
from nats_server import REQUESTS, prepare, until
from tenacity import wait_fixed

from aiokeyless.worker import ApprovalWorker, Outcome, submit_approval
from aiokeyless.worker.nats import clock
from aiokeyless.worker.nats.clock import BrokerClock

from ..reading import outcomes  # noqa: TID252

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats_server import NatsServer

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.platform

SUBJECT = f"$JS.API.STREAM.INFO.{REQUESTS}"


def off_by(seconds: float) -> BrokerClock:
    return BrokerClock(lambda: datetime.now(UTC) + timedelta(seconds=seconds))


class Steps:
    """A wall clock that somebody sets while a worker runs."""

    def __init__(self) -> None:
        self.by = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.by


STEPS = [pytest.param(timedelta(hours=1), id="ahead"), pytest.param(timedelta(hours=-1), id="back")]


def error_of(of: BrokerClock) -> float:
    return abs((of.now() - datetime.now(UTC)).total_seconds())


@pytest.mark.parametrize("seconds", [150.0, -130.0, 0.0])
async def test_a_clock_that_is_off_is_corrected_and_told(
    connection: Client, caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    await prepare(connection.jetstream(), ack_wait=60)
    wrong = off_by(seconds)
    assert error_of(wrong) == pytest.approx(abs(seconds), abs=20)
    await wrong.measure(connection, SUBJECT, 60)
    assert error_of(wrong) < 20  # half of the time that the broker took
    if seconds:
        assert "worker.clock_differs" in caplog.text


@pytest.mark.parametrize("step", STEPS)
async def test_a_wall_clock_that_steps_moves_no_deadline_and_is_told(
    connection: Client, caplog: pytest.LogCaptureFixture, step: timedelta
) -> None:
    await prepare(connection.jetstream(), ack_wait=60)
    wall = Steps()
    measured = BrokerClock(wall)
    await measured.measure(connection, SUBJECT, 60)
    wall.by = step
    assert error_of(measured) < 20
    assert measured.ahead == pytest.approx(-step.total_seconds(), abs=20)
    assert "worker.clock_differs" not in caplog.text
    await measured.measure(connection, SUBJECT, 60)
    assert error_of(measured) < 20
    assert "worker.clock_differs" in caplog.text


async def test_a_broker_that_does_not_tell_its_time_changes_nothing(connection: Client) -> None:
    async def answer_nonsense(message: object) -> None:
        await connection.publish(message.reply, b"{}")  # type: ignore[attr-defined]  # nats-py's Msg

    await connection.subscribe("nonsense", cb=answer_nonsense)
    wrong = off_by(150)
    for subject in ("nobody.answers", "nonsense"):
        await wrong.measure(connection, subject, 60)
    assert error_of(wrong) == pytest.approx(150, abs=20)


@pytest.mark.parametrize(("took", "off", "left"), [(4, 0, 0), (4, -150, 2), (0, 0.5, 0)])
async def test_a_slow_answer_moves_no_deadline_by_what_it_cannot_tell(took: int, off: float, left: int) -> None:
    began_at = moment = datetime(2026, 11, 27, tzinfo=UTC)

    class Slow:
        async def request(self, _subject: str, _data: bytes, **_options: float) -> SimpleNamespace:
            nonlocal moment
            moment += timedelta(seconds=took)
            return SimpleNamespace(data=f'{{"ts": "{(moment + timedelta(seconds=off)).isoformat()}"}}'.encode())

    measured = BrokerClock(lambda: moment, lambda: (moment - began_at) / timedelta(seconds=1))
    await measured.measure(cast("Client", Slow()), SUBJECT, 60)
    assert abs(measured.now() - (moment + timedelta(seconds=off))) == timedelta(seconds=left)


async def test_a_difference_is_logged_once_and_again_only_when_it_has_changed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    off = 0.0

    class Broker:
        async def request(self, *_: object, **_options: float) -> SimpleNamespace:
            told = datetime.now(UTC) + timedelta(hours=off)
            return SimpleNamespace(data=f'{{"ts": "{told.isoformat()}"}}'.encode())

    caplog.set_level(logging.INFO)
    measured = BrokerClock()
    for off in (0.0, 1.0, 1.0, 1.0, -1.0, -1.0, 0.0, 0.0):  # noqa: B007  # read by the broker
        await measured.measure(cast("Client", Broker()), SUBJECT, 60)
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING", "INFO"]


async def test_it_is_measured_again_as_the_worker_runs(connection: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "_EVERY", 0.01)
    await prepare(connection.jetstream(), ack_wait=60)
    wrong = off_by(150)
    keeping = asyncio.create_task(wrong.keep(connection, SUBJECT, 60))
    await until(lambda: error_of(wrong) < 20)
    keeping.cancel()
    await asyncio.wait([keeping])


async def test_a_cancellation_that_a_measurement_loses_ends_it_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of asyncio.wait_for on Python 3.11, where the answer comes at the same moment."""
    asked = asyncio.Event()

    class Broker:
        async def request(self, *_: object, **__: object) -> SimpleNamespace:
            assert not asked.is_set()  # it is not asked again
            asked.set()
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            return SimpleNamespace(data=b"{}")

    monkeypatch.setattr(clock, "_EVERY", 0)
    keeping = asyncio.create_task(BrokerClock().keep(cast("Client", Broker()), SUBJECT, 60))
    await asked.wait()
    keeping.cancel()
    await asyncio.wait([keeping])
    assert keeping.cancelled()


async def test_a_worker_whose_clock_is_ahead_expires_nothing_early(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiokeyless.worker.nats.broker.BrokerClock", lambda: off_by(150))
    async with ApprovalWorker(client, broker.url):
        await submit_approval(connection, "C0FFEE", operation_id="txn-1", expires_in=120)
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        async with asyncio.timeout(60), aclosing(outcomes(connection, "test")) as events:
            assert (await anext(events)).outcome is Outcome.APPROVED


@pytest.mark.parametrize("step", STEPS)
async def test_a_worker_whose_wall_clock_steps_ends_each_request_at_its_deadline(
    client: KeylessClient,
    broker: NatsServer,
    connection: Client,
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    *,
    step: timedelta,
) -> None:
    wall = Steps()
    monkeypatch.setattr("aiokeyless.worker.nats.broker.BrokerClock", lambda: BrokerClock(wall))
    async with (
        ApprovalWorker(client, broker.url, schedule=wait_fixed(0.1)),
        asyncio.timeout(60),
        aclosing(outcomes(connection, "test")) as events,
    ):
        await submit_approval(connection, "C0FFEE", operation_id="long", expires_in=1800)
        await submit_approval(connection, "C0FFEE", operation_id="short", expires_in=2)
        await until(lambda: len(sandbox.operations) == 2)
        wall.by = step
        ended = await anext(events)
        assert (ended.operation_id, ended.outcome, ended.answered) == ("short", Outcome.EXPIRED, True)
        sandbox.approve("long")
        ended = await anext(events)
        assert (ended.operation_id, ended.outcome) == ("long", Outcome.APPROVED)
