"""The journal of requests: how long they took, and how much of them is kept."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from waiting import spin_until

from aiokeyless.sandbox.journal import Journal

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


def test_journal_keeps_a_bounded_amount_of_text() -> None:
    journal = Journal(most_text=10_000)
    for number in range(100):
        journal.add("GET", f"/{number}" + "p" * 1000, number, most_records=1000)
        assert sum(len(record.path) for record in journal.requests) <= 10_000
    assert journal.requests[-1].path.startswith("/99")


def test_journal_that_was_cleared_has_room_again() -> None:
    journal = Journal(most_text=1000)
    journal.add("GET", "p" * 900, 0, most_records=10)
    journal.requests.clear()
    for number in range(3):
        journal.add("GET", "p" * 200, number, most_records=10)
    assert [record.at for record in journal.requests] == [0, 1, 2]


def test_journal_keeps_the_latest_request_whatever_its_length() -> None:
    journal = Journal(most_text=10)
    journal.add("GET", "/first", 0, most_records=10)
    record = journal.add("M" * 100, "/" + "p" * 1000, 1, most_records=10)
    assert journal.requests == [record]
    assert record.method == "M" * 40 + "… (60 more characters)"
