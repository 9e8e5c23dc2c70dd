"""Each promise of a broker is tested once, against every storage whose facts allow it; `promises.md` lists them."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from functools import wraps
from typing import TYPE_CHECKING, Final

import pytest
from waiting import PATIENCE

from .brokers import HEAD_START, LEASE, those

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage

#: Seconds of pauses that no promise names, which are longer in production, and so in the second tier: between two looks
#: of a broker for what other processes did, until a pull ends, for which a broker that is closed waits, and until a
#: worker takes a request of a later version. PostgreSQL's for the last is in the database.
PAUSES: Final = {
    "sqlite.broker._CHECKS_EVERY": 0.02,
    "sqlite.store._HEAD_START": HEAD_START,
    "postgres.broker._TAKES_EVERY": 0.02,
    "postgres.broker._WELCOMES_EVERY": 0.05,
    "postgres.adapters.driver.READS_EVERY": 0.02,
    "nats.intake.EXPIRES": 0.05,
}


def pytest_itemcollected(item: pytest.Function) -> None:
    """Let no case wait for ever for what a storage does not give. A moved clock passes an hour at once."""
    case, within = item.obj, 3600.0 if item.get_closest_marker("looptime") else PATIENCE

    @wraps(case)
    async def limited(**fixtures: object) -> None:
        await asyncio.wait_for(case(**fixtures), within)

    item.obj = limited if asyncio.iscoroutinefunction(case) else case


@pytest.fixture(autouse=True)
def _pauses_are_short(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, _short_pulls: None) -> None:
    if request.node.get_closest_marker("slow") is None:
        for name, seconds in PAUSES.items():
            monkeypatch.setattr(f"aiokeyless.worker.{name}", seconds)


@pytest.fixture
def takes_begin_at_once(monkeypatch: pytest.MonkeyPatch, _pauses_are_short: None) -> None:
    """Takes that do not gather what becomes due."""
    for module in ("sqlite", "postgres"):
        monkeypatch.setattr(f"aiokeyless.worker.{module}.broker._TAKES_EVERY", 0.0)


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
