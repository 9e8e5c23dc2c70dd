"""Each promise of a broker is tested once, against every broker. A broker joins by one line in `BROKERS`."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from .brokers import BROKERS, LEASE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage


@pytest.fixture(params=BROKERS)
async def storage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncGenerator[Storage]:
    async with request.param(tmp_path) as storage:
        yield storage


@pytest.fixture
async def opened(storage: Storage) -> AsyncGenerator[Opened]:
    """Opens a broker as one more process would, and closes it at the end."""
    async with AsyncExitStack() as stack:

        async def opened(lease: float = LEASE) -> Broker:
            broker = await stack.enter_async_context(storage.broker())
            await broker.prepare(lease=lease, service="https://keyless.test")
            return broker

        yield opened


@pytest.fixture
async def broker(opened: Opened) -> Broker:
    return await opened()
