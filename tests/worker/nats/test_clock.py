"""A worker whose machine's clock is wrong keeps the deadlines of the broker's clock."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from waiting import until

from aiokeyless.worker import ApprovalWorker, Outcome, submit_approval
from aiokeyless.worker.clock import BrokerClock

from ..reading import read  # noqa: TID252

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats_server import NatsServer

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.platform


async def test_a_worker_whose_clock_is_ahead_expires_nothing_early(
    client: KeylessClient, broker: NatsServer, connection: Client, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    ahead = BrokerClock(lambda: datetime.now(UTC) + timedelta(seconds=150))
    monkeypatch.setattr("aiokeyless.worker.nats.broker.BrokerClock", lambda: ahead)
    async with ApprovalWorker(client, broker.url):
        await submit_approval(connection, "C0FFEE", operation_id="txn-1", expires_in=120)
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        [event] = await read(connection)
    assert event.outcome is Outcome.APPROVED
