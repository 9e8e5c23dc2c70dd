from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from nats_server import jetstream, prepare

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls that fail are repeated soon, and connections that are lost are made again soon."""
    monkeypatch.setattr("aiokeyless.worker.nats.broker.error_delay", lambda _failures: 0.01)
    monkeypatch.setattr("aiokeyless.worker.nats.connection.error_delay", lambda _failures: 0.05)


@pytest.fixture
async def stream(connection: Client) -> JetStreamContext:
    """The streams, as a worker makes them."""
    stream = jetstream(connection)
    await prepare(stream, ack_wait=30)
    return stream
