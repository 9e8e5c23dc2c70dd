"""The journal of requests: how long they took, until they were answered or ended."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from waiting import spin_until

from .phone_page import get

if TYPE_CHECKING:
    import aiohttp

    from aiokeyless.sandbox import Sandbox


@pytest.mark.looptime
async def test_the_journal_records_how_long_an_answer_took(sandbox: Sandbox, http: aiohttp.ClientSession) -> None:
    sandbox.latency = 0.2
    asking = asyncio.create_task(get(http))
    await spin_until(lambda: sandbox.requests)
    assert sandbox.requests[0].duration == 0
    await asking
    assert sandbox.requests[0].duration == pytest.approx(0.2)


@pytest.mark.looptime
async def test_the_journal_records_how_long_a_client_waited_that_left(
    sandbox: Sandbox, http: aiohttp.ClientSession
) -> None:
    sandbox.latency = 3600
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1):
            await get(http)
    await spin_until(lambda: sandbox.requests[0].duration)
    assert sandbox.requests[0].status is None
    assert sandbox.requests[0].duration == pytest.approx(1)
