"""Requests that always fail do not hold up the others, on the real clock."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokeyless.worker.postgres import PostgresBroker
from worker.fairness import measure

if TYPE_CHECKING:
    from postgres_server import PostgresServer


@pytest.mark.parametrize(
    ("bad", "rate", "seconds"),
    [
        pytest.param(1000, 2, 15, marks=pytest.mark.slow),
        *(pytest.param(bad, rate, 60, marks=pytest.mark.benchmarks) for bad in (200, 1000) for rate in (1, 2, 10)),
    ],
)
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    server: PostgresServer, database: str, bad: int, rate: float, seconds: float
) -> None:
    async with PostgresBroker(server.url(database)) as broker:
        lateness = await measure(broker, bad=bad, rate=rate, seconds=seconds)
    assert lateness.missing == 0
    assert lateness.asked_p95() < 2
    assert lateness.approved_p95() < 3
