"""Bad requests do not hold up good ones: the promise of `Broker.take`, at each broker."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from benchmarks.suite.fairness import WEATHERS, Lateness, Weather, measure

from .conformance.brokers import FILE, MEMORY, NATS, POSTGRES

if TYPE_CHECKING:
    from pathlib import Path

    from .conformance.brokers import Storage

#: Weathers that take a second or two of computing; the others take more.
QUICK = {"500, at once", "500 to their create"}


def weathers(*names: str) -> pytest.MarkDecorator:
    found = [weather for weather in WEATHERS if weather.goal is not None and (not names or weather.name in names)]
    slow = {weather: () if weather.name in QUICK else pytest.mark.slow for weather in found}
    return pytest.mark.parametrize("weather", [pytest.param(each, id=each.name, marks=slow[each]) for each in found])


async def check(storage: Storage, weather: Weather, *, before: int, after: int, quiet: float) -> Lateness:
    async with storage, storage.broker() as broker:
        lateness = await measure(broker, weather, before=before, after=after, quiet=quiet)
    assert weather.goal is not None
    asked, approved = lateness.p95()
    assert asked < weather.goal[0] + storage.slack
    assert approved < weather.goal[1] + storage.slack
    return lateness


@weathers()
@pytest.mark.parametrize("storage_of", [MEMORY])
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    storage_of: type[Storage], tmp_path: Path, weather: Weather
) -> None:
    random.seed(5)  # the backoff of the probes is random
    lateness = await check(storage_of(tmp_path), weather, before=30, after=70, quiet=6.0)
    assert len(lateness.asked) == len(lateness.approved) == 100


# The benchmark `fairness` does it in full.
@pytest.mark.slow
@weathers("500, at once", "hang")
@pytest.mark.parametrize("storage_of", [FILE, NATS, POSTGRES])
async def test_they_are_so_on_the_real_clock(storage_of: type[Storage], tmp_path: Path, weather: Weather) -> None:
    await check(storage_of(tmp_path), weather, before=20, after=40, quiet=6.0)
