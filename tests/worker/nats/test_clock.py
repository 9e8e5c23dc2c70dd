"""A worker whose machine's clock is wrong keeps the deadlines of the broker's clock."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalWorker, Outcome, submit_approval
from aiokeyless.worker.clock import BrokerClock

from ..reading import outcomes  # noqa: TID252

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats_server import NatsServer

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.platform


def off_by(seconds: float) -> BrokerClock:
    return BrokerClock(lambda: datetime.now(UTC) + timedelta(seconds=seconds))


class Steps:
    """A wall clock that somebody sets while a worker runs."""

    def __init__(self) -> None:
        self.by = timedelta()

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.by


STEPS = [pytest.param(timedelta(hours=1), id="ahead"), pytest.param(timedelta(hours=-1), id="back")]


async def test_a_worker_whose_clock_is_ahead_expires_nothing_early(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiokeyless.worker.nats.broker.BrokerClock", lambda: off_by(150))
    async with ApprovalWorker(client, broker.url):
        await submit_approval(connection, "C0FFEE", operation_id="txn-1", expires_in=120)
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        async with asyncio.timeout(PATIENCE), aclosing(outcomes(connection, "test")) as events:
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
        asyncio.timeout(PATIENCE),
        aclosing(outcomes(connection, "test")) as events,
    ):
        await submit_approval(connection, "C0FFEE", operation_id="long", expires_in=1800)
        await submit_approval(connection, "C0FFEE", operation_id="short", expires_in=2)
        await until(lambda: "long" in sandbox.operations)  # on a busy machine the other one may be over by then
        wall.by = step
        ended = await anext(events)
        assert (ended.operation_id, ended.outcome) == ("short", Outcome.EXPIRED)
        sandbox.approve("long")
        ended = await anext(events)
        assert (ended.operation_id, ended.outcome) == ("long", Outcome.APPROVED)
