"""Each promise of a broker is tested once, against every storage whose facts allow it; `promises.md` lists them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import wraps
from typing import TYPE_CHECKING

import pytest
from waiting import PATIENCE

from .brokers import LEASE, those

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage


def pytest_itemcollected(item: pytest.Function) -> None:
    """Let no case wait for ever for what a storage does not give. A moved clock passes an hour at once."""
    case, within = item.obj, 3600.0 if item.get_closest_marker("looptime") else PATIENCE

    @wraps(case)
    async def limited(**fixtures: object) -> None:
        await asyncio.wait_for(case(**fixtures), within)

    item.obj = limited if asyncio.iscoroutinefunction(case) else case


@pytest.fixture(params=those().args[1])
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
