"""Requests that always fail do not hold up the others."""

from __future__ import annotations

import pytest

from aiokeyless.worker.sqlite import SqliteBroker

from .fairness import measure


@pytest.mark.looptime
@pytest.mark.parametrize("rate", [1, 2, 10])
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(rate: float) -> None:
    async with SqliteBroker(":memory:") as broker:
        lateness = await measure(broker, bad=200, rate=rate, seconds=60)
    assert lateness.missing == 0
    assert lateness.asked_p95() < 2
    assert lateness.approved_p95() < 3
