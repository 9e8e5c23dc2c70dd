from __future__ import annotations

from typing import TYPE_CHECKING

import nats
import pytest
from nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    server = NatsServer(tmp_path)
    await server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
async def connection(broker: NatsServer) -> AsyncGenerator[Client]:
    async with await nats.connect(broker.url) as connection:
        yield connection


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    """A client as a worker takes it."""
    async with sandbox.client(max_attempts=1) as client:
        yield client
