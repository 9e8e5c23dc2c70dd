"""Requests that always fail do not hold up the others: the promise of `Broker.take`, at each broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.fairness import measure

from .conformance.brokers import MEMORY, Nats, Postgres

if TYPE_CHECKING:
    from pathlib import Path

    from .conformance.brokers import Storage


async def check(storage: Storage, *, bad: int, rate: float, seconds: float) -> None:
    async with storage, storage.broker() as broker:
        lateness = await measure(broker, bad=bad, rate=rate, seconds=seconds)
    assert lateness.missing == 0
    assert lateness.asked_p95() < 2
    assert lateness.approved_p95() < 3


@pytest.mark.parametrize("storage_of", [MEMORY])
@pytest.mark.parametrize(("rate", "seconds"), [(1, 30), (2, 20), (10, 10)])
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    storage_of: type[Storage], tmp_path: Path, rate: float, seconds: float
) -> None:
    await check(storage_of(tmp_path), bad=200, rate=rate, seconds=seconds)


@pytest.mark.parametrize(
    ("storage_of", "bad", "rate", "seconds"),
    [
        pytest.param(Nats, 200, 2, 15, marks=pytest.mark.slow),
        pytest.param(Postgres, 1000, 2, 15, marks=pytest.mark.slow),
        *(
            pytest.param(Postgres, bad, rate, 60, marks=pytest.mark.benchmarks)
            for bad in (200, 1000)
            for rate in (1, 2, 10)
        ),
    ],
)
async def test_they_are_so_on_the_real_clock(
    storage_of: type[Storage], tmp_path: Path, *, bad: int, rate: float, seconds: float
) -> None:
    await check(storage_of(tmp_path), bad=bad, rate=rate, seconds=seconds)
