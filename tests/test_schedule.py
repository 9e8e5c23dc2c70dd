"""When to poll next: what the schedule promises about single delays, and what it costs over many waits.

The figures at the end are computed, not sampled, wherever that can be: a learned schedule with no jitter polls at
fixed times, so its expected cost follows from the distribution, and so does the least cost that any schedule could
have. Only the learning itself is sampled, from fixed seeds. Approval times and optimum are those of the benchmarks.
"""

from __future__ import annotations

import doctest
import math
import pickle
import random
import statistics
import sys
from datetime import timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from aiokeyless import schedule as schedule_room
from aiokeyless.errors import ConfigurationError
from aiokeyless.schedule import attempt_at, next_delay, record_observation, wait_adaptive
from benchmarks.approval_times import QUICK, SLOW, TWO_GROUPS, TYPICAL, ApprovalTimes, seeded_random
from benchmarks.optimum import least_cost
from benchmarks.polling import TIMEOUT, cost, lateness_quantile, poll_times, simulate_waits

if TYPE_CHECKING:
    from collections.abc import Iterable

Observation = tuple[float, float | None]  # after, until

NOT_NUMBERS = [None, "1", True, 1j, Decimal(1), timedelta(seconds=1), [1.0]]
HUGE = 10**400  # beyond any float
NOT_FINITE = [math.nan, math.inf, -math.inf, pytest.param(HUGE, id="huge"), pytest.param(10**5000, id="digits")]

seconds = st.one_of(
    st.floats(0, 1e9), st.floats(0, 200), st.sampled_from([0.0, 5e-324, 0.5, 1.0, 120.0, 4096.0, 1e308])
)
observations = st.lists(
    st.one_of(
        st.tuples(seconds, st.none()),
        st.tuples(seconds, seconds).map(lambda pair: (min(pair), max(pair))),
        seconds.map(lambda moment: (moment, moment)),
    ),
    max_size=60,
)


def state_at(elapsed: float | None) -> tenacity.RetryCallState:
    """Make tenacity's state of a call that was last answered ``elapsed`` seconds after its start."""
    state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
    state.start_time = 0.0
    state.outcome_timestamp = elapsed
    return state


def delay_at(schedule: tenacity.wait.wait_base, elapsed: float) -> float:
    return schedule(state_at(elapsed))


def delays(schedule: wait_adaptive) -> list[float]:
    return [delay_at(schedule, elapsed) for elapsed in (0.0, 3.0, 17.0, 119.0)]


def schedule_after(observed: Iterable[Observation], **options: float) -> wait_adaptive:
    schedule = wait_adaptive(**options)
    for after, until in observed:
        schedule.observe(after, until)
    return schedule


# --- one delay


@given(observed=observations, elapsed=seconds, jitter=st.floats(0, 1))
def test_no_observations_move_a_delay_out_of_bounds(observed: list[Observation], elapsed: float, jitter: float) -> None:
    schedule = schedule_after(observed, min_interval=0.5, max_interval=30.0, jitter=jitter)
    assert 0.5 <= delay_at(schedule, elapsed) <= 30.0


@given(
    observed=observations,
    elapsed=seconds,
    poll_cost=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_no_poll_cost_sets_a_delay_out_of_bounds(observed: list[Observation], elapsed: float, poll_cost: float) -> None:
    schedule = schedule_after(observed, poll_cost=poll_cost, max_interval=1e300, jitter=0)
    assert 0.25 <= delay_at(schedule, elapsed) <= 1e300


@given(observed=observations, elapsed=seconds, cheap=st.floats(0.01, 10), factor=st.floats(1, 100))
def test_the_dearer_a_request_the_longer_the_delay(
    observed: list[Observation], elapsed: float, cheap: float, factor: float
) -> None:
    options = {"min_interval": 1e-9, "max_interval": 1e9, "jitter": 0.0}
    often = delay_at(schedule_after(observed, poll_cost=cheap, **options), elapsed)
    seldom = delay_at(schedule_after(observed, poll_cost=cheap * factor, **options), elapsed)
    assert seldom >= often * (1 - 1e-6)


@pytest.mark.parametrize("elapsed", [None, 0.0, -3.0, math.nan])
def test_a_state_without_a_usable_time_counts_as_the_beginning(elapsed: float | None) -> None:
    schedule = wait_adaptive(jitter=0)
    assert schedule(state_at(elapsed)) == delay_at(schedule, 0.0)


def test_the_first_delay_is_long_but_does_not_sleep_through_the_first_approvals() -> None:
    schedule = wait_adaptive(max_interval=60, jitter=0)
    assert 1.0 < delay_at(schedule, 0.0) < 5.0
    assert delay_at(schedule, 0.9) < delay_at(schedule, 0.0)


def test_the_longer_there_was_no_approval_the_longer_the_delay() -> None:
    schedule = wait_adaptive(max_interval=60, jitter=0)
    delays = [delay_at(schedule, elapsed) for elapsed in (2.0, 5.0, 10.0, 20.0, 40.0)]
    assert delays == sorted(delays)


@pytest.mark.parametrize("elapsed", [300.0, 4095.9, 4096.0, 1e6, 1e308, math.inf])
def test_where_no_approval_is_expected_any_more_the_delay_is_the_longest(elapsed: float) -> None:
    assert delay_at(wait_adaptive(max_interval=45, jitter=0), elapsed) == 45.0


def test_a_constant_hazard_gets_the_spacing_of_keller() -> None:
    rate = 0.1
    schedule = wait_adaptive(poll_cost=0.3, jitter=0)
    source = seeded_random(1)
    for _ in range(3000):
        approved = source.expovariate(rate)
        schedule.observe(approved, approved)
    for elapsed in (4.0, 8.0, 12.0):
        assert delay_at(schedule, elapsed) == pytest.approx(math.sqrt(2 * 0.3 / rate), rel=0.15)


def test_jitter_varies_the_delay_to_both_sides_equally() -> None:
    random.seed(1)
    exact = delay_at(wait_adaptive(jitter=0), 8.0)
    schedule = wait_adaptive(jitter=0.1)
    delays = [delay_at(schedule, 8.0) for _ in range(2000)]
    assert exact * 0.9 <= min(delays) < exact * 0.91
    assert exact * 1.09 < max(delays) <= exact * 1.1
    assert statistics.mean(delays) == pytest.approx(exact, rel=0.01)


def test_jitter_spreads_the_longest_delays_too() -> None:
    random.seed(1)
    schedule = wait_adaptive(max_interval=20, jitter=0.1)
    delays = {delay_at(schedule, 1000.0) for _ in range(100)}
    assert len(delays) == 100
    assert min(delays) >= 18.0
    assert max(delays) <= 20.0


# --- previous_poll


@given(observed=observations, poll_cost=st.floats(0.01, 10))
def test_the_previous_poll_of_a_poll_is_the_one_that_set_it(observed: list[Observation], poll_cost: float) -> None:
    schedule = schedule_after(observed, poll_cost=poll_cost, jitter=0)
    before = 0.0
    for _ in range(30):
        moment = before + delay_at(schedule, before)
        # Where the next poll hardly depends on this one, many moments are as good: what counts is that they lead there.
        found = schedule.previous_poll(moment)
        assert found + delay_at(schedule, found) == pytest.approx(moment, rel=1e-5)
        assert found <= before + 1e-9
        before = moment


def test_the_previous_poll_is_exact_to_a_hundredth_of_a_second_in_hours() -> None:
    schedule = wait_adaptive(jitter=0)
    before = 0.0
    while before < 7200:
        moment = before + delay_at(schedule, before)
        assert schedule.previous_poll(moment) == pytest.approx(before, abs=0.01)
        before = moment


@given(observed=observations, share=st.floats(0, 1))
def test_before_the_first_poll_there_was_none(observed: list[Observation], share: float) -> None:
    schedule = schedule_after(observed, jitter=0)
    assert schedule.previous_poll(share * delay_at(schedule, 0.0)) == 0.0


@given(observed=observations, one=seconds, other=seconds)
def test_the_later_a_poll_the_later_the_previous_one(observed: list[Observation], one: float, other: float) -> None:
    schedule = schedule_after(observed, jitter=0)
    earlier, later = sorted((one, other))
    assert schedule.previous_poll(earlier) <= schedule.previous_poll(later) + later * 2e-6


@given(observed=observations, moment=st.floats(0, sys.float_info.max))
def test_the_previous_poll_of_however_huge_a_moment_can_be_observed(observed: list[Observation], moment: float) -> None:
    schedule = schedule_after(observed, jitter=0)
    before = schedule.previous_poll(moment)
    assert 0.0 <= before <= moment
    schedule.observe(before, moment)


def test_jitter_does_not_move_the_previous_poll() -> None:
    assert {wait_adaptive(jitter=jitter).previous_poll(60.0) for jitter in (0.0, 0.1, 1.0)} == {
        wait_adaptive(jitter=0).previous_poll(60.0)
    }


# --- learning


def test_a_schedule_that_fails_to_learn_is_logged_and_raises_nothing(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(wait_adaptive):
        def observe(self, after: float, until: float | None) -> None:
            raise RuntimeError("not today")

    record_observation(Failing(), 4.0, None)
    assert "failed to learn" in caplog.text
    assert "not today" in caplog.text


def test_a_wait_that_timed_out_shows_that_users_may_never_approve() -> None:
    before = wait_adaptive(max_interval=60, jitter=0)
    schedule = schedule_after([(120.0, None)] * 5, max_interval=60, jitter=0)
    for elapsed in (0.0, 5.0, 20.0, 80.0):
        assert delay_at(schedule, elapsed) > delay_at(before, elapsed)


def test_a_wait_that_was_given_up_early_says_nothing_about_later() -> None:
    schedule = schedule_after([(4.0, 5.0), (30.0, 33.0)], jitter=0)
    later = delay_at(schedule, 20.0)
    for _ in range(20):
        schedule.observe(2.0, None)
    assert delay_at(schedule, 20.0) == pytest.approx(later, rel=0.05)
    assert delay_at(schedule, 0.0) > delay_at(schedule_after([(4.0, 5.0), (30.0, 33.0)], jitter=0), 0.0)


def test_an_approval_between_two_distant_polls_is_assumed_where_others_approved() -> None:
    known = [(8.0, 8.2)] * 40
    schedule = schedule_after([*known, *[(3.0, 40.0)] * 40], max_interval=60, jitter=0)
    ignorant = schedule_after([(3.0, 40.0)] * 40, max_interval=60, jitter=0)
    assert delay_at(schedule, 25.0) > delay_at(ignorant, 25.0)


def test_approvals_later_than_anybody_expected_are_learned() -> None:
    schedule = schedule_after([(600.0, 610.0)] * 40, max_interval=60, jitter=0)
    assert delay_at(schedule, 590.0) < 15.0
    assert delay_at(wait_adaptive(max_interval=60, jitter=0), 590.0) == 60.0


def test_approvals_past_the_end_of_the_histogram_say_only_that_it_was_late() -> None:
    late = schedule_after([(5000.0, 6000.0)] * 5, jitter=0)
    never = schedule_after([(5000.0, None)] * 5, jitter=0)
    assert delays(late) == delays(never)


@given(observed=observations)
def test_after_any_observations_there_are_never_more_approvals_than_waits(observed: list[Observation]) -> None:
    still_pending = [1.0 / inverse for inverse in schedule_after(observed)._observed.curve().inverse]
    assert 1.0 >= max(still_pending) >= min(still_pending) > 0.0
    assert still_pending == sorted(still_pending, reverse=True)


def test_an_observation_counts_half_after_five_hundred_more() -> None:
    observed = schedule_after([(4096.0, None), *[(4.0, 5.0)] * 500])._observed
    assert observed.pending[-1] == pytest.approx(0.5)


@pytest.mark.parametrize("observed", [[(4.0, 5.0)], [(5.0, None)] * 500, [(120.0, None)] * 500])
def test_an_observation_of_no_time_says_nothing(observed: list[Observation]) -> None:
    schedule = schedule_after(observed, jitter=0)
    before = delays(schedule)
    for _ in range(5):
        schedule.observe(0.0, None)
        assert delays(schedule) == before


@pytest.mark.parametrize("timeout", [10.0, 30.0, 120.0])
@pytest.mark.parametrize("learned", [30, 300, 1000])
def test_after_an_outage_of_push_messages_fifty_approvals_bring_promptness_back(learned: int, timeout: float) -> None:
    schedule = learn(TYPICAL, 0.02, learned, seed=1)
    before = learned_lateness(schedule, TYPICAL)
    for _ in range(1500):
        schedule.observe(timeout, None)
    assert learned_lateness(schedule, TYPICAL) <= before * 2.0
    source = seeded_random(2)
    for _ in range(50):
        while (approved := TYPICAL.draw(source)) > 120:
            pass
        schedule.observe(max(0.0, approved - 0.5), approved)
    assert learned_lateness(schedule, TYPICAL) <= before * 1.4


def test_ten_thousand_observations_at_once_are_learned_as_one_by_one() -> None:
    at_once = schedule_after([(4.0, 5.0)] * 12_000, jitter=0)
    one_by_one = wait_adaptive(jitter=0)
    for _ in range(12_000):
        one_by_one.observe(4.0, 5.0)
        delay_at(one_by_one, 4.0)  # reduces the weights at once
    assert delay_at(at_once, 4.0) == pytest.approx(delay_at(one_by_one, 4.0))


def test_a_pickled_schedule_gives_the_same_delays() -> None:
    schedule = schedule_after([(4.0, 5.0)] * 9, jitter=0)
    assert delays(pickle.loads(pickle.dumps(schedule))) == delays(schedule)  # noqa: S301 - our own bytes


# --- arguments


@pytest.mark.parametrize("option", ["poll_cost", "min_interval", "max_interval", "jitter"])
@pytest.mark.parametrize("value", [*NOT_NUMBERS, *NOT_FINITE, -1, -0.001])
def test_a_wrong_option_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"{option} must be a .*, not "):
        wait_adaptive(**{option: value})


@pytest.mark.parametrize(
    "options",
    [{"poll_cost": 0}, {"min_interval": 0}, {"max_interval": 0.2}, {"min_interval": 30}, {"jitter": 1.01}],
)
def test_an_option_out_of_its_range_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigurationError, match="must be a"):
        wait_adaptive(**options)


@pytest.mark.parametrize("value", [*NOT_NUMBERS, *NOT_FINITE, -1e-9])
def test_a_wrong_last_pending_poll_is_refused_and_changes_nothing(value: Any) -> None:
    schedule = wait_adaptive(jitter=0)
    with pytest.raises(ConfigurationError, match="after must be a finite number of seconds, at least 0, not "):
        schedule.observe(value, 5.0)
    assert delays(schedule) == delays(wait_adaptive(jitter=0))


@pytest.mark.parametrize("value", [*NOT_NUMBERS[1:], *NOT_FINITE, -1.0, 2.999])
def test_a_wrong_approving_poll_is_refused_and_changes_nothing(value: Any) -> None:
    schedule = wait_adaptive(jitter=0)
    with pytest.raises(
        ConfigurationError, match="until must be a finite number of seconds, at least after, or None, not "
    ):
        schedule.observe(3.0, value)
    assert delays(schedule) == delays(wait_adaptive(jitter=0))


def test_the_repr_shows_the_options() -> None:
    assert repr(wait_adaptive(poll_cost=1, jitter=0)) == (
        "wait_adaptive(poll_cost=1.0, min_interval=0.25, max_interval=20.0, jitter=0.0)"
    )


def test_the_example_in_the_documentation_runs() -> None:
    results = doctest.testmod(schedule_room)
    assert results.attempted > 0
    assert results.failed == 0


# --- among tenacity's strategies


def test_it_can_be_added_to_other_strategies() -> None:
    schedule = wait_adaptive(jitter=0)
    exact = delay_at(schedule, 8.0)
    assert delay_at(schedule + tenacity.wait_fixed(2), 8.0) == exact + 2.0
    assert delay_at(tenacity.wait_fixed(2) + schedule, 8.0) == exact + 2.0
    summed = sum([schedule, tenacity.wait_fixed(1)])
    assert isinstance(summed, tenacity.wait.wait_base)
    assert delay_at(summed, 8.0) == exact + 1.0


# --- asking a strategy


class Seen(tenacity.wait.wait_base):
    """Returns, or raises, what it is given, and keeps the state that it was asked with."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.states: list[tenacity.RetryCallState] = []

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        self.states.append(retry_state)
        if isinstance(self.answer, Exception):
            raise self.answer
        answer: float = self.answer
        return answer


@given(attempt_number=st.integers(1, 10**6), since_start=seconds)
def test_a_strategy_sees_the_exact_attempt_and_time_and_no_outcome(attempt_number: int, since_start: float) -> None:
    strategy = Seen(1.0)
    next_delay(strategy, attempt_number=attempt_number, since_start=since_start)
    (state,) = strategy.states
    assert type(state) is tenacity.RetryCallState
    assert state.attempt_number == attempt_number
    assert state.seconds_since_start == since_start
    assert state.outcome is None


@pytest.mark.parametrize(
    ("answer", "delay"),
    [
        *((2, 2.0), (0.5, 0.5)),
        *((answer, 0.02) for answer in (0, -3.0, 0.02, -math.inf)),
        *((answer, 3600.0) for answer in (3600, 3601, math.inf)),
        pytest.param(HUGE, 3600.0, id="huge"),
    ],
)
def test_a_delay_is_clamped_to_what_a_wait_can_use(answer: float, delay: float) -> None:
    assert next_delay(Seen(answer), attempt_number=1, since_start=0.0) == delay
    assert type(next_delay(Seen(answer), attempt_number=1, since_start=0.0)) is float


@pytest.mark.parametrize("answer", [*NOT_NUMBERS, math.nan])
def test_a_strategy_that_returns_no_number_is_a_configuration_error(answer: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"schedule Seen returned .*; it must return a number of seconds"):
        next_delay(Seen(answer), attempt_number=1, since_start=0.0)


def test_a_strategy_that_raises_is_a_configuration_error_with_its_cause() -> None:
    broken = ZeroDivisionError("division by zero")
    with pytest.raises(ConfigurationError, match="schedule Seen raised ZeroDivisionError") as caught:
        next_delay(Seen(broken), attempt_number=1, since_start=0.0)
    assert caught.value.__cause__ is broken


def test_a_strategy_that_needs_an_outcome_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="pass a tenacity wait strategy that needs no outcome"):
        next_delay(tenacity.wait_exception(lambda _: 1.0), attempt_number=1, since_start=0.0)


# --- the number of a poll, for an engine that does not count


@pytest.mark.parametrize(("age", "attempt"), [(0.0, 1), (1.9, 1), (2.0, 2), (5.9, 3), (6.0, 4)])
def test_the_attempt_is_the_number_of_the_poll_that_comes_next(age: float, attempt: int) -> None:
    assert attempt_at(tenacity.wait_fixed(2), age, most=100) == attempt


def test_after_an_outage_an_exponential_schedule_goes_on_where_its_own_polls_would_have_led() -> None:
    doubling = tenacity.wait_exponential(multiplier=1, max=3600)  # polls at 1, 3, 7, 15
    assert attempt_at(doubling, 8.0, most=1000) == 4


def test_the_attempt_is_never_larger_than_the_number_of_deliveries() -> None:
    assert attempt_at(tenacity.wait_fixed(1), 50.0, most=3) == 3


def test_a_wait_of_days_does_not_count_all_of_its_polls() -> None:
    calls = 0

    class Counting(tenacity.wait.wait_base):
        def __call__(self, retry_state: tenacity.RetryCallState) -> float:
            nonlocal calls
            calls += 1
            return 1.0

    assert attempt_at(Counting(), 86_400.0, most=86_400) == 256
    assert calls < 256


def test_an_adaptive_schedule_reads_no_attempt_so_none_is_counted() -> None:
    assert attempt_at(wait_adaptive(), 0.0, most=7) == 7


# --- what it costs

POLL_COSTS = (0.02, 0.3, 1.0)

Schedule = tenacity.wait.wait_base


def expected_cost(schedule: Schedule, approvals: ApprovalTimes, poll_cost: float) -> float:
    """Return ``poll_cost`` * polls + lateness that a schedule without randomness costs on average."""
    return cost(poll_times(schedule), approvals).total(poll_cost)


def ratio(schedule: Schedule, approvals: ApprovalTimes, poll_cost: float) -> float:
    return expected_cost(schedule, approvals, poll_cost) / least_cost(approvals, poll_cost)


def with_options(learned: wait_adaptive, **options: float) -> wait_adaptive:
    """Return a schedule with other options that has learned the same."""
    schedule = wait_adaptive(**options)
    schedule._observed = learned._observed
    return schedule


def learned_ratio(schedule: wait_adaptive, approvals: ApprovalTimes, poll_cost: float) -> float:
    """Return the ratio of what was learned, without the chance of the jitter."""
    return ratio(with_options(schedule, poll_cost=poll_cost, max_interval=60, jitter=0), approvals, poll_cost)


def learned_lateness(schedule: wait_adaptive, approvals: ApprovalTimes) -> float:
    """Return the expected lateness of an approval in seconds, by what was learned and the default options."""
    return cost(poll_times(with_options(schedule, jitter=0)), approvals).lateness / approvals.approved_by(TIMEOUT)


def learn(approvals: ApprovalTimes, poll_cost: float, waits: int, seed: int) -> wait_adaptive:
    random.seed(f"jitter {seed}")  # another seed than the approval times, or both would be correlated
    schedule = wait_adaptive(poll_cost=poll_cost, max_interval=60)
    simulate_waits(schedule, approvals, waits, seeded_random(seed))
    return schedule


def mean_learned_ratio(approvals: ApprovalTimes, poll_cost: float, waits: int) -> float:
    return statistics.mean(
        learned_ratio(learn(approvals, poll_cost, waits, seed), approvals, poll_cost) for seed in range(8)
    )


@pytest.mark.parametrize(
    ("approvals", "waits", "lateness", "p95", "polls"),
    [
        (TYPICAL, 0, 0.62, 1.4, 22.5),
        (TYPICAL, 100, 0.50, 1.15, 21.0),
        (SLOW, 0, 0.85, 1.9, 36.0),
        (SLOW, 100, 0.92, 2.1, 32.0),
        (QUICK, 0, 0.50, 1.1, 16.0),
        (QUICK, 100, 0.25, 0.5, 11.0),
    ],
)
def test_by_default_an_approval_is_noticed_within_about_half_a_second(
    approvals: ApprovalTimes, waits: int, lateness: float, p95: float, polls: float
) -> None:
    exact = [with_options(learn(approvals, 0.02, waits, seed), jitter=0) for seed in range(8 if waits else 1)]
    times = [[*poll_times(schedule)] for schedule in exact]
    costs = [cost(of, approvals) for of in times]
    assert statistics.mean(of.lateness for of in costs) / approvals.approved_by(TIMEOUT) <= lateness
    assert lateness_quantile(times, approvals, 0.95) <= p95
    assert statistics.mean(of.polls for of in costs) <= polls
    assert cost(poll_times(tenacity.wait_fixed(1)), TYPICAL).polls > 33


@pytest.mark.parametrize("poll_cost", POLL_COSTS)
@pytest.mark.parametrize("approvals", [TYPICAL, SLOW, TWO_GROUPS])
def test_untrained_it_costs_at_most_a_fifth_more_than_the_optimum(approvals: ApprovalTimes, poll_cost: float) -> None:
    assert ratio(wait_adaptive(poll_cost=poll_cost, max_interval=60, jitter=0), approvals, poll_cost) <= 1.20


@pytest.mark.parametrize("poll_cost", POLL_COSTS)
@pytest.mark.parametrize("approvals", [TYPICAL, SLOW, TWO_GROUPS])
@pytest.mark.parametrize(("waits", "most"), [(30, 1.07), (100, 1.06)])
def test_after_some_waits_it_costs_at_most_a_few_percent_more_than_the_optimum(
    approvals: ApprovalTimes, poll_cost: float, waits: int, most: float
) -> None:
    assert mean_learned_ratio(approvals, poll_cost, waits) <= most


@pytest.mark.parametrize(("before", "after"), [(TYPICAL, SLOW), (SLOW, TYPICAL), (TYPICAL, TWO_GROUPS)])
def test_new_approval_times_are_followed_within_five_hundred_waits(before: ApprovalTimes, after: ApprovalTimes) -> None:
    for seed in range(2):
        schedule = learn(before, 0.3, 1000, seed)
        assert learned_ratio(schedule, after, 0.3) > 1.15
        simulate_waits(schedule, after, 500, seeded_random(seed))
        assert learned_ratio(schedule, after, 0.3) <= 1.15


@pytest.mark.parametrize(("poll_cost", "more"), [(0.02, 1.15), (0.3, 1.7), (1.0, 1.7)])
def test_the_usual_backoff_and_the_usual_fixed_second_cost_far_more(poll_cost: float, more: float) -> None:
    backoff = tenacity.wait_exponential(multiplier=0.5, exp_base=1.5, max=5)
    adaptive = ratio(wait_adaptive(poll_cost=poll_cost, max_interval=60, jitter=0), TYPICAL, poll_cost)
    assert ratio(backoff, TYPICAL, poll_cost) > adaptive * 1.2
    assert ratio(tenacity.wait_fixed(1), TYPICAL, poll_cost) > adaptive * more
