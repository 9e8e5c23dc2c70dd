"""Bad requests do not hold up good ones, as `Broker.take` promises. The benchmark `fairness` measures more."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from benchmarks.suite.fairness import WEATHERS, Weather, measure

from .brokers import those

if TYPE_CHECKING:
    from .brokers import Storage

pytestmark = pytest.mark.slow


def weathers(*names: str) -> pytest.MarkDecorator:
    found = [weather for weather in WEATHERS if weather.name in names]
    return pytest.mark.parametrize("weather", found, ids=names)


async def check(storage: Storage, weather: Weather, *, before: int, after: int) -> None:
    async with storage.broker() as broker:
        lateness = await measure(broker, weather, before=before, after=after, quiet=6.0)
    if storage.moves_clock:
        assert len(lateness.asked) == len(lateness.approved) == before + after
    assert weather.goal is not None
    for late, goal in zip(lateness.p95(), weather.goal, strict=True):
        assert late < goal + (0.0 if storage.moves_clock else 30.0)  # of a busy machine


@weathers("500, at once", "500 to their create", "hang", "503 with Retry-After")
@those(which=lambda storage: storage.moves_clock)
async def test_good_requests_are_asked_and_approved_in_time_among_many_bad_ones(
    storage: Storage, weather: Weather
) -> None:
    random.seed(5)  # the backoff is random
    await check(storage, weather, before=30, after=40)


@weathers("500, at once")
@those(which=lambda storage: not storage.moves_clock)
async def test_they_are_so_on_the_real_clock(storage: Storage, weather: Weather) -> None:
    await check(storage, weather, before=20, after=40)
