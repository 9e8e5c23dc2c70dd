"""How many polls may start while the service fails, and when it counts as failing, on a made-up clock."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from aiokeyless._rules.budget import Budget, ServiceWatch
from aiokeyless._rules.final import RESOLUTION
from aiokeyless.errors import ClientClosedError, TransportError
from aiokeyless.events import ServiceChanged

ERROR = TransportError("m", method="GET", path="/")


def budget_of(waits: int, *, polls: int = 0, now: float = 100.0) -> Budget:
    """Return the budget of so many waits, after so many polls at once."""
    budget = Budget()
    budget.waits = waits
    for _ in range(polls):
        budget.record_poll(now)
    return budget


# -- tokens


@pytest.mark.parametrize(
    ("waits", "tokens"), [(0, 32), (1, 32), (10, 32), (11, 33), (100, 300), (170, 510), (171, 512), (100_000, 512)]
)
def test_there_are_three_tokens_for_each_wait_32_at_least_and_512_at_most(waits: int, tokens: int) -> None:
    budget = budget_of(waits)
    assert budget.room(0.0) == budget.capacity == tokens
    assert budget.ready_at(0.0) == 0.0


def test_each_poll_takes_one_and_without_one_none_starts() -> None:
    budget = Budget()
    for left in range(31, -1, -1):
        assert budget.ready_at(100.0) == 100.0
        budget.record_poll(100.0)
        assert budget.room(100.0) == left
    assert budget.ready_at(100.0) == pytest.approx(100.2)


@pytest.mark.parametrize("failing_for", [None, 0.0, 29.0])
def test_five_a_second_come_by_themselves(failing_for: float | None) -> None:
    budget = budget_of(0, polls=32)
    if failing_for is not None:
        budget.record_failure(100.0, started_at=100.0 - failing_for)
    assert [budget.room(100.0 + seconds) for seconds in (0.19, 0.21, 0.41, 0.99)] == [0, 1, 2, 4]


def test_one_a_second_comes_once_nothing_was_answered_well_for_half_a_minute() -> None:
    budget = budget_of(0, polls=32, now=100.0)
    budget.record_failure(100.0, started_at=70.0)
    assert budget.ready_at(100.0) == pytest.approx(101.0)
    assert [budget.room(100.0 + seconds) for seconds in (0.9, 1.1, 2.1, 31.9, 33.0, 1e9)] == [0, 1, 2, 31, 32, 32]


@pytest.mark.parametrize(("waits", "polls", "room"), [(0, 32, 32), (100, 300, 41), (100, 41, 300), (100, 42, 299)])
def test_a_good_answer_returns_its_token_and_adds_forty(waits: int, polls: int, room: int) -> None:
    budget = budget_of(waits, polls=polls)
    budget.record_success(100.0)
    assert (budget.room(100.0), budget.answered_at) == (room, 100.0)


def test_an_answer_that_says_nothing_returns_its_own_and_a_failure_none() -> None:
    budget = budget_of(0, polls=3)
    budget.record_failure(100.0, started_at=100.0)
    assert budget.room(100.0) == 29
    for room in (30, 31, 32, 32):
        budget.record_other()
        assert budget.room(100.0) == room


def test_a_poll_that_starts_without_a_token_leaves_no_debt() -> None:
    budget = budget_of(0, polls=40)
    assert budget.ready_at(100.0) == pytest.approx(100.2)
    assert budget.room(101.1) == 5


def test_waits_that_come_bring_their_tokens_and_those_that_go_leave_no_debt() -> None:
    budget = budget_of(10, polls=32)
    budget.waits = 100
    assert budget.room(100.0) == 268
    budget = budget_of(100, polls=300)
    budget.waits = 1
    assert [budget.room(100.0), budget.room(101.1)] == [0, 5]


@pytest.mark.parametrize(("waits", "enough", "short"), [(0, 16, 17), (10, 16, 17), (100, 150, 151), (1000, 256, 257)])
def test_it_is_short_if_less_than_half_is_left(waits: int, enough: int, short: int) -> None:
    assert not budget_of(waits, polls=enough).is_short(100.0)
    assert budget_of(waits, polls=short).is_short(100.0)


@pytest.mark.parametrize(
    ("waits", "seconds", "least", "most"), [(1, 60, 205, 215), (30, 60, 263, 275), (1000, 180, 800, 815)]
)
def test_an_outage_costs_the_tokens_then_five_a_second_then_one(
    waits: int, seconds: int, least: int, most: int
) -> None:
    budget, now, polls = budget_of(waits), 100.0, 0
    while now < 100.0 + seconds:
        budget.record_poll(now)
        budget.record_failure(now, started_at=now)
        polls += 1
        now = budget.ready_at(now)
    assert least <= polls <= most


def test_nothing_is_held_back_while_one_answer_of_41_is_good() -> None:
    budget = Budget()
    for number in range(41 * 100):
        assert budget.ready_at(0.0) == 0.0
        budget.record_poll(0.0)
        if number % 32 == 31:
            budget.record_success(0.0)
        else:
            budget.record_failure(0.0, started_at=0.0)


# -- failing


@pytest.mark.parametrize(("now", "is_failing"), [(109.9, False), (110.0, True), (130.0, True)])
def test_it_fails_after_ten_seconds_of_nothing_but_failures(now: float, *, is_failing: bool) -> None:
    budget = Budget()
    budget.record_failure(101.0, started_at=100.0)
    assert (budget.is_failing, budget.failing_since) == (False, 100.0)
    budget.record_failure(now, started_at=now)
    assert budget.is_failing is is_failing


def test_a_poll_that_began_before_a_good_answer_came_failed_since_then() -> None:
    budget = Budget()
    budget.record_success(105.0)
    budget.record_failure(110.0, started_at=100.0)
    assert (budget.is_failing, budget.failing_since) == (False, 105.0)


def test_it_fails_without_a_token_and_one_good_answer_ends_that() -> None:
    budget = budget_of(0, polls=31)
    budget.record_failure(100.0, started_at=100.0)
    assert not budget.is_failing
    budget.record_poll(100.0)
    budget.record_failure(100.0, started_at=100.0)
    assert budget.is_failing
    budget.record_success(100.1)
    assert (budget.is_failing, budget.failing_since) == (False, math.inf)


@pytest.mark.parametrize(("pause", "since"), [(30.0, 100.0), (30.1, 130.1), (3600.0, 3700.0)])
def test_a_failure_long_after_another_begins_anew(pause: float, since: float) -> None:
    budget = Budget()
    budget.record_failure(100.0, started_at=100.0)
    budget.record_failure(100.0 + pause, started_at=100.0 + pause)
    assert (budget.failing_since, budget.is_failing) == (since, since == 100.0)


# -- connections


def test_new_connections_are_tried_only_in_doubt_and_once_in_one_and_a_half_seconds() -> None:
    budget = Budget()
    assert not budget.take_renewal(100.0)
    budget.record_success(100.0)
    budget.record_failure(100.5, started_at=100.0)
    taken = [quarter / 4 for quarter in range(32) if budget.take_renewal(100.0 + quarter / 4)]
    assert taken == [1.25, 2.75, 4.25, 5.75, 7.25]
    budget.record_success(106.0)
    assert not budget.take_renewal(110.0)


# -- what is noticed


def test_its_beginning_and_its_end_are_noticed_once() -> None:
    budget, watch = budget_of(7), ServiceWatch()
    budget.record_failure(100.0, started_at=99.0)
    assert watch.notice(budget, ERROR, 100.0) == (None, None)
    budget.record_failure(110.0, started_at=110.0)
    begun = ServiceChanged(is_failing=True, error="TransportError", seconds=11.0, waiting=7)
    assert [watch.notice(budget, ERROR, 110.0) for _ in range(2)] == [(begun, begun), (None, None)]
    assert watch.is_failing
    budget.record_success(120.0)
    ended = ServiceChanged(is_failing=False, error=None, seconds=21.0, waiting=7)
    assert [watch.notice(budget, None, 120.0) for _ in range(2)] == [(ended, ended), (None, None)]
    assert watch.end(budget, ClientClosedError(), 121.0) is None


def test_a_service_that_comes_and_goes_is_logged_once_a_minute() -> None:
    budget, watch = Budget(), ServiceWatch()
    logged = []
    for now in (100.0, 130.0, 145.0, 160.0, 200.0, 220.0):
        budget.record_failure(now, started_at=now - 10.0)
        begun = watch.notice(budget, ERROR, now)
        budget.record_success(now + 1.0)
        ended = watch.notice(budget, None, now + 1.0)
        assert begun[0] is not None
        assert ended[0] is not None
        logged.append(ended[1] is not None)
    assert logged == [True, False, False, True, False, True]


def test_one_that_goes_within_the_minute_and_stays_away_is_logged_then() -> None:
    budget, watch = Budget(), ServiceWatch()
    noticed = []
    for now in (100.0, 101.0, 120.0, 159.0, 160.0, 161.0, 300.0):
        if now == 101.0:
            budget.record_success(now)
        else:
            budget.record_failure(now, started_at=now - 10.0)
        noticed.append(tuple(change is not None for change in watch.notice(budget, ERROR, now)))
    news, logged = (True, True), (False, True)
    assert noticed == [news, news, (True, False), (False, False), logged, (False, False), (False, False)]


def test_whoever_counts_failing_services_hears_of_the_end_of_the_client() -> None:
    budget, watch = budget_of(1), ServiceWatch()
    budget.record_failure(110.0, started_at=100.0)
    watch.notice(budget, ERROR, 110.0)
    ended = ServiceChanged(is_failing=False, error="ClientClosedError", seconds=15.0, waiting=1)
    assert watch.end(budget, ClientClosedError(), 115.0) == ended
    assert watch.end(budget, ClientClosedError(), 116.0) is None


# -- whatever happens


class BudgetMachine(RuleBasedStateMachine):
    """A client whose waits come and go, and a service that answers in any order and however late."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.budget = Budget()
        self.in_flight: list[float] = []  # when each started

    @rule(seconds=st.sampled_from([0.001, 0.2, 1.0, 10.0, 31.0, 3600.0]))
    def let_time_pass(self, seconds: float) -> None:
        self.now += seconds

    @rule(waits=st.sampled_from([0, 1, 20, 100, 10_000]))
    def let_waits_come_and_go(self, waits: int) -> None:
        self.budget.waits = waits

    @rule(is_final=st.booleans(), times=st.integers(1, 600))
    def poll(self, times: int, *, is_final: bool) -> None:
        for _ in range(times):
            if is_final or self.budget.ready_at(self.now) <= self.now:
                self.budget.record_poll(self.now)
                self.in_flight.append(self.now)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), kind=st.sampled_from(["good", "failed", "other", "cut off"]), times=st.integers(1, 40))
    def answer(self, data: st.DataObject, kind: str, times: int) -> None:
        for _ in range(min(times, len(self.in_flight))):
            started_at = self.in_flight.pop(data.draw(st.integers(0, len(self.in_flight) - 1)))
            if kind == "good":
                self.budget.record_success(self.now)
                assert self.budget.room(self.now) >= 32
                assert not self.budget.is_failing
            elif kind == "failed":
                self.budget.record_failure(self.now, started_at=started_at)
            elif kind == "other":
                self.budget.record_other()

    @invariant()
    def there_is_never_more_than_all_is_well(self) -> None:
        assert self.budget.room(self.now) <= self.budget.capacity

    @invariant()
    def a_poll_may_start_within_a_second(self) -> None:
        ready_at = self.budget.ready_at(self.now)
        assert self.now <= ready_at <= self.now + 1.0
        assert (self.budget.room(self.now) >= 1) is (ready_at <= self.now + RESOLUTION)


BudgetMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_whatever_happens_the_budget_is_bounded_and_a_poll_may_start_within_a_second = BudgetMachine.TestCase
