from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from waiting import PATIENCE

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker.broker import UnavailableError

from .brokers import FILE, LEASE, NATS, POSTGRES, submit

if TYPE_CHECKING:
    from aiokeyless.worker.broker import Broker

    from .brokers import Storage


@pytest.mark.parametrize("storage", [FILE, NATS, POSTGRES], indirect=True)
async def test_a_broker_is_opened_once_and_closed_as_often_as_one_likes(storage: Storage) -> None:
    broker: Any = storage.broker()
    with pytest.raises(ConfigurationError, match="async with"):
        await broker.inspect()
    async with broker:
        with pytest.raises(ConfigurationError, match="open already"):
            await broker.open()
    await broker.aclose()
    async with broker:
        await broker.prepare(lease=LEASE, service="")
        await submit(broker, "a")


async def test_what_waits_when_the_broker_is_closed_ends_with_an_error(broker: Broker) -> None:
    waiting = [asyncio.create_task(call) for call in (broker.next_outcome("shop"), broker.take(1, 60.0))]
    await asyncio.sleep(0.3)
    await broker.aclose()
    for task in waiting:
        with pytest.raises((ConfigurationError, UnavailableError)):
            await asyncio.wait_for(task, PATIENCE)
