"""Waits that share a client with bad operations and bad minutes, in simulated time: nobody is held hostage.

The real poller against a simulated service. `python -m benchmarks weather` has more; here each case is small and has a
seed, so that it always runs the same way.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from typing import TYPE_CHECKING

import pytest
from tenacity import wait_fixed

from aiokeyless import wait_adaptive
from aiokeyless.events import PollEnded, PollResult
from benchmarks.approval_times import seeded_random
from benchmarks.beside_loops import brown_out, compare
from benchmarks.simulation import GOOD, HANGING, Simulation, failing
from benchmarks.suite.weather import beside, outage

if TYPE_CHECKING:
    from benchmarks.simulation import Answer

FAILS = failing()
REFUSED = failing(503, seconds=0.002)
ASKS_FOR_A_PAUSE = failing(503, retry_after=30)
HEALTHY = 60


@pytest.fixture(scope="module")
def alone() -> float:
    """How late approvals are noticed where every operation is well."""
    return statistics.mean(beside(0, GOOD, healthy=HEALTHY))


@pytest.mark.parametrize(
    ("bad", "answer"),
    [(1, FAILS), (20, FAILS), (20, HANGING), (1, ASKS_FOR_A_PAUSE), (5, ASKS_FOR_A_PAUSE)],
    ids=["one fails", "twenty fail", "twenty hang", "one asks for a pause", "five ask for a pause"],
)
def test_operations_that_are_bad_do_not_make_the_others_late(bad: int, answer: Answer, alone: float) -> None:
    late = beside(bad, answer, healthy=HEALTHY)
    assert len(late) == HEALTHY
    assert statistics.mean(late) <= 1.5 * alone


@pytest.mark.parametrize("good_answers", [0, 1], ids=["never answered", "answered once"])
def test_many_that_start_at_once_and_fail_do_not_hold_up_later_ones(good_answers: int) -> None:
    polls: dict[str, int] = {}
    first: dict[str, float] = {}

    def service(name: str, now: float) -> Answer:
        polls[name] = polls.get(name, 0) + 1
        first.setdefault(name, now)
        return GOOD if name.startswith("good") or polls[name] <= good_answers else FAILS

    async def scenario() -> None:
        for number in range(200):
            simulation.start(f"bad-{number}", approved_in=math.inf, timeout=600.0)
        for number in range(100):
            await simulation.sleep_until(6.0 + number / 10)
            simulation.start(f"good-{number}", approved_in=4.0, timeout=120.0)
        await simulation.sleep_until(40.0)

    simulation = Simulation(service, wait_fixed(1.0))
    simulation.run(scenario())
    good = [f"good-{number}" for number in range(100)]
    assert all(name in simulation.lateness for name in good)
    asked = sorted(first[name] - (6.0 + number / 10) for number, name in enumerate(good))
    assert asked[94] < 5.5  # one step of the longest backoff
    assert sorted(simulation.lateness[name] for name in good)[94] < 10.0


@pytest.mark.parametrize("down", [30.0, 120.0])
def test_recovery_is_seen_soon_after_few_requests(down: float) -> None:
    noticed, requests = zip(*(outage(down, REFUSED, seed=seed, waits=50) for seed in range(4)), strict=True)
    assert max(noticed) <= 6
    assert statistics.mean(noticed) <= 4
    # Three for each wait, five a second for half a minute, then one a second.
    assert max(requests) <= 1.03 * (3 * 50 + 5 * 30 + (down - 30.0))


@pytest.mark.parametrize(("share", "least"), [(0.5, 20), (0.7, 10)])
def test_where_answers_fail_at_random_the_others_are_still_polled(share: float, least: float) -> None:
    source = seeded_random(1)

    async def scenario() -> None:
        for k in range(100):
            await simulation.sleep_until(2 * k / 100)
            simulation.start(f"op-{k}")
        await simulation.sleep_until(40)

    simulation = Simulation(lambda _, now: FAILS if now >= 20 and source.random() < share else GOOD, wait_fixed(2))
    simulation.run(scenario())
    assert sum(at >= 20 for at in simulation.transport.sent) / 20 >= least  # of 50 a second


def test_where_half_of_the_answers_fail_waits_are_no_later_than_loops_of_a_second() -> None:
    ours, loop = compare(brown_out(), waits=150, seeds=2)
    assert ours.late <= loop.late
    assert ours.requests <= 1.2 * loop.requests


def test_a_service_with_more_to_do_than_it_can_answers_nearly_all_that_it_gets() -> None:
    free_at, ended = 0.0, Counter[PollResult]()

    def service(_: str, now: float) -> Answer:
        """Answer one request after another, also those that nobody waits for any more."""
        nonlocal free_at
        free_at = max(free_at, now) + 1 / 20
        return free_at - now, None

    def on_event(event: object) -> None:
        if isinstance(event, PollEnded) and simulation.now > 20:
            ended[event.result] += 1

    async def scenario() -> None:
        for k in range(500):
            await simulation.sleep_until(k / 100)
            simulation.start(f"op-{k}")
        await simulation.sleep_until(80)

    simulation = Simulation(service, wait_adaptive(), listeners=(on_event,))
    simulation.run(scenario())
    assert ended[PollResult.PENDING] >= 0.9 * 20 * (80 - 20)
    assert ended[PollResult.FAILED] <= 0.05 * ended.total()


def test_a_service_that_refuses_everything_by_its_rate_limit_gets_no_more_than_one_that_fails() -> None:
    assert outage(60.0, failing(429), waits=100)[1] <= 1.03 * (3 * 100 + 5 * 30 + 30)


def test_final_polls_above_capacity_leave_slots_for_an_ordinary_one() -> None:
    async def scenario() -> None:
        simulation.start("ordinary", approved_in=12, timeout=90)
        for k in range(1500):
            await simulation.sleep_until(10 + k / 50)  # 50 a second, and 40 fit
            simulation.start(f"op-{k}", timeout=0.5)
        await simulation.sleep_until(90)

    simulation = Simulation(lambda *_: GOOD, wait_fixed(2), max_in_flight=2)
    simulation.run(scenario())
    assert simulation.lateness.get("ordinary", math.inf) <= 10
