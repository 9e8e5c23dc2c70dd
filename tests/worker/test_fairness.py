"""Requests that always fail do not hold up the others: the promise of `Broker.take`, at each broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.suite.fairness import measure

from .conformance.brokers import MEMORY, Postgres

if TYPE_CHECKING:
    from pathlib import Path

    from .conformance.brokers import Storage


async def check(storage: Storage, *, bad: int, rate: float, seconds: float) -> None:
    async with storage, storage.broker() as broker:
        lateness = await measure(broker, bad=bad, rate=rate, seconds=seconds)
    assert lateness.missing == 0
    asked, approved = lateness.p95()
    assert asked < 2
    assert approved < 3


@pytest.mark.parametrize("storage_of", [MEMORY])
@pytest.mark.parametrize(("rate", "seconds"), [(1, 30), (2, 20), (10, 10)])
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    storage_of: type[Storage], tmp_path: Path, rate: float, seconds: float
) -> None:
    await check(storage_of(tmp_path), bad=200, rate=rate, seconds=seconds)


# Each night alone: it takes a minute of the real clock, and asks of the machine to keep up. The benchmark `fairness`
# does the same on each broker.
@pytest.mark.benchmarks
@pytest.mark.parametrize("bad", [200, 1000])
@pytest.mark.parametrize("rate", [1, 2, 10])
async def test_they_are_so_on_postgresql_and_the_real_clock(tmp_path: Path, bad: int, rate: float) -> None:
    await check(Postgres(tmp_path), bad=bad, rate=rate, seconds=60)
