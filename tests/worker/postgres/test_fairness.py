"""Requests that always fail do not hold up the others, on the real clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokeyless.worker.postgres import PostgresBroker
from worker.fairness import measure

if TYPE_CHECKING:
    from postgres_server import PostgresServer


# Each night alone: it takes a minute of the real clock, and asks of the machine to keep up. What is tried first while
# Keyless fails is a promise of the conformance suite.
@pytest.mark.benchmarks
@pytest.mark.parametrize("bad", [200, 1000])
@pytest.mark.parametrize("rate", [1, 2, 10])
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    server: PostgresServer, database: str, bad: int, rate: float
) -> None:
    async with PostgresBroker(server.url(database)) as broker:
        lateness = await measure(broker, bad=bad, rate=rate, seconds=60)
    assert lateness.missing == 0
    assert lateness.asked_p95() < 2
    assert lateness.approved_p95() < 3
