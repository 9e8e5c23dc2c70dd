"""How many polls the circuit allows, on a made-up clock: closed, open, half open, and any mixture of these."""

from __future__ import annotations

import itertools
import math
import statistics

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiokeyless._rules import circuit as circuit_module
from aiokeyless._rules.backoff import MAX_PAUSE
from aiokeyless._rules.circuit import FAILURES_UNTIL_OPEN, Circuit, CircuitState, Transition, Transitions
from aiokeyless.errors import RateLimitError, TransportError
from aiokeyless.events import CircuitChanged
from benchmarks.approval_times import seeded_random

LIMIT = 64
MAX_BACKOFF = 5.0
OPERATIONS = itertools.count()  # of which each polls once


@pytest.fixture
def full_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the chance out of the backoff: always the full window, 0.5 s, 1 s, 2 s, 4 s, 5 s."""

    def full(failures: int) -> float:
        return min(0.5 * 2.0 ** (failures - 1), MAX_BACKOFF)

    monkeypatch.setattr(circuit_module, "error_delay", full)


def fail(circuit: Circuit, now: float, times: int = 1, *, pause: float = 0.0) -> None:
    """Let polls of different operations fail, one after another; with a pause, of a limit that is the tenant's."""
    for _ in range(times):
        circuit.record_failure(now, next(OPERATIONS), started_at=now, is_probe=True)
        if pause:
            circuit.record_pause(now, pause)


def refuse(
    circuit: Circuit, now: float, *, pause: float | None = 10.0, is_probe: bool = True, is_limited: bool = False
) -> bool:
    """Let one operation get a 429, and return whether the limit is the tenant's."""
    error = RateLimitError(status=429, method="GET", path="/", retry_after=pause)
    circuit.record_failure(now, "refused", started_at=now, is_probe=is_probe, is_refusal=True)
    return circuit.record_refusal(now, error, is_probe=is_probe, is_limited=is_limited)


def open_at(now: float, limit: int = LIMIT) -> Circuit:
    circuit = Circuit(limit)
    fail(circuit, now, FAILURES_UNTIL_OPEN)
    assert circuit.is_probed
    return circuit


def one_round(circuit: Circuit, now: float) -> None:
    """Answer as many polls as the circuit allows well."""
    for _ in range(circuit.room(now)):
        circuit.record_success(now, started_at=now)


# -- closed


def test_a_new_circuit_is_closed_and_allows_all_polls() -> None:
    circuit = Circuit(LIMIT)
    assert (circuit.room(0.0), circuit.is_closed, circuit.is_probed) == (LIMIT, True, False)
    assert circuit.retry_at() == -math.inf
    assert circuit.since == -math.inf


def test_four_failures_in_a_row_take_little_room() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 1.0, 4)
    assert (circuit.is_closed, circuit.is_probed) == (True, False)
    assert circuit.room(1.0) == 60


def test_a_good_answer_between_them_makes_failures_not_in_a_row() -> None:
    circuit = Circuit(LIMIT)
    for now in range(10):
        fail(circuit, float(now), 4)
        circuit.record_success(float(now), started_at=float(now))
    assert circuit.is_closed


def test_one_operation_that_fails_all_the_time_does_not_open_the_circuit() -> None:
    circuit = Circuit(LIMIT)
    for now in range(100):
        circuit.record_failure(float(now), "bad", started_at=float(now), is_probe=True)
    assert circuit.is_closed
    assert circuit.room(100.0) >= 4


def test_polls_that_fail_after_the_service_answered_others_do_not_open_the_circuit() -> None:
    circuit = Circuit(LIMIT)
    circuit.record_success(5.0, started_at=4.9)
    for operation in range(20):  # they hung
        circuit.record_failure(10.0, operation, started_at=0.0, is_probe=True)
    assert circuit.is_closed


def test_five_in_a_row_are_no_news_where_several_fail_between_two_good_answers() -> None:
    circuit = Circuit(LIMIT)
    for now in range(100):
        fail(circuit, float(now), 3)
        circuit.record_success(float(now), started_at=float(now))
    fail(circuit, 100.0, 35)
    assert not circuit.is_probed
    fail(circuit, 100.0, 6)
    assert circuit.is_probed


def test_a_service_that_is_well_again_for_a_while_counts_as_well() -> None:
    circuit = Circuit(LIMIT)
    for now in range(100):
        fail(circuit, float(now), 3)
        circuit.record_success(float(now), started_at=float(now))
    for now in range(100, 200):
        circuit.record_success(float(now), started_at=float(now))
    fail(circuit, 200.0, 6)
    assert circuit.is_probed


def test_an_operation_that_usually_fails_between_good_answers_raises_the_number_that_opens() -> None:
    circuit = Circuit(LIMIT)
    for now in range(100):
        fail(circuit, float(now))
        circuit.record_success(float(now), started_at=float(now))
    fail(circuit, 100.0, FAILURES_UNTIL_OPEN + 10)
    assert circuit.is_closed
    fail(circuit, 100.0, 2)
    assert circuit.is_probed


@pytest.mark.parametrize(("failing", "room"), [(0.3, (50, 64)), (0.5, (40, 64)), (0.7, (12, 45)), (0.9, (2, 20))])
def test_the_more_fail_the_fewer_are_in_flight_and_some_always_are(failing: float, room: tuple[int, int]) -> None:
    circuit = Circuit(LIMIT)
    source = seeded_random(1)
    seen = []
    circuit.record_success(1.0, started_at=0.0)
    for number in range(4000):
        if source.random() < failing:
            circuit.record_failure(2.0, number, started_at=0.0, is_probe=True)
        else:
            circuit.record_success(2.0, started_at=0.0)
        seen.append(circuit.limit)
    assert room[0] <= statistics.mean(seen[1000:]) <= room[1]
    assert min(seen) >= 4
    assert circuit.is_closed


# -- closed


@pytest.mark.usefixtures("full_backoff")
def test_five_failures_in_a_row_allow_one_probe_and_only_after_the_backoff() -> None:
    circuit = open_at(100.0)
    assert (circuit.state, circuit.limit) == (CircuitState.OPEN, 1)
    assert circuit.retry_at() == 100.5
    assert circuit.room(100.49) == 0
    assert circuit.room(100.5) == 1
    assert circuit.room(1e9) == 1


@pytest.mark.usefixtures("full_backoff")
def test_unanswered_final_polls_open_the_circuit_too() -> None:
    circuit = Circuit(LIMIT)
    for _ in range(5):
        circuit.record_failure(100.0, next(OPERATIONS), started_at=98.0, is_probe=False)
    assert circuit.is_probed
    assert circuit.retry_at() == 100.5


@pytest.mark.usefixtures("full_backoff")
def test_probes_come_within_a_second_for_half_a_minute_and_then_on_the_backoff() -> None:
    circuit = open_at(1000.0)
    assert gaps_of_probes(circuit, 1000.0, 34) == [0.5, *[1.0] * 30, 5.0, 5.0, 5.0]


@pytest.mark.usefixtures("full_backoff")
def test_flapping_does_not_begin_the_half_minute_anew() -> None:
    circuit = open_at(1000.0)
    circuit.record_success(1029.0, started_at=1028.9)
    assert circuit.state is CircuitState.HALF_OPEN
    while not circuit.is_probed:
        fail(circuit, 1029.0)
    assert gaps_of_probes(circuit, 1029.0, 5) == [0.5, 1.0, 2.0, 4.0, 5.0]
    for now in range(1050, 1200):
        circuit.record_success(float(now), started_at=now - 0.1)
    assert circuit.is_closed
    fail(circuit, 1200.0, 5)
    assert gaps_of_probes(circuit, 1200.0, 5) == [0.5, 1.0, 1.0, 1.0, 1.0]


@pytest.mark.usefixtures("full_backoff")
def test_probes_that_are_refused_follow_the_backoff_from_the_beginning() -> None:
    circuit = open_at(1000.0)
    assert gaps_of_probes(circuit, 1000.0, 6, is_refusal=True) == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def gaps_of_probes(circuit: Circuit, now: float, times: int, *, is_refusal: bool = False) -> list[float]:
    """Let so many probes fail at once, and return the pauses before them."""
    gaps = []
    for _ in range(times):
        gaps.append(circuit.retry_at() - now)
        now = circuit.retry_at()
        circuit.record_failure(now, next(OPERATIONS), started_at=now, is_probe=True, is_refusal=is_refusal)
    return gaps


@pytest.mark.usefixtures("full_backoff")
def test_a_second_opening_restarts_the_backoff() -> None:
    circuit = open_at(0.0)
    for _ in range(5):
        fail(circuit, circuit.retry_at())
    now = circuit.retry_at()
    for _ in range(50):
        circuit.record_success(now, started_at=now)
    fail(circuit, now, 5)
    assert circuit.retry_at() - now == 0.5


@pytest.mark.usefixtures("full_backoff")
def test_the_delay_counts_from_the_probes_failure_not_from_its_start() -> None:
    circuit = open_at(0.0)
    circuit.record_failure(10.5, next(OPERATIONS), started_at=0.5, is_probe=True)
    assert circuit.retry_at() == 11.5


@pytest.mark.usefixtures("full_backoff")
def test_stragglers_that_fail_do_not_advance_the_backoff() -> None:
    circuit = open_at(100.0)
    for now in (100.0, 100.1, 100.4, 107.0):
        circuit.record_failure(now, next(OPERATIONS), started_at=99.9, is_probe=True)
        assert circuit.retry_at() == 100.5
    fail(circuit, 108.0)
    assert circuit.retry_at() == 109.0  # the second probe's window, not the sixth's


@pytest.mark.usefixtures("full_backoff")
def test_a_poll_that_starts_in_the_moment_of_the_opening_is_a_probe() -> None:
    circuit = open_at(10.0)
    circuit.record_failure(12.0, "probe", started_at=10.0, is_probe=True)
    assert circuit.retry_at() == 13.0


@pytest.mark.usefixtures("full_backoff")
def test_after_a_probe_that_was_cut_off_the_next_one_keeps_the_same_distance() -> None:
    circuit = open_at(100.0)
    fail(circuit, 101.0)
    assert circuit.retry_at() == 102.0
    for start, end in ((102.0, 102.1), (103.0, 109.0)):
        circuit.record_cut(started_at=start, is_probe=True)
        assert circuit.retry_at() == start + 1.0, "the second step"
        assert circuit.room(max(end, start + 1.0)) == 1
    circuit.record_success(110.0, started_at=109.5)
    assert circuit.retry_at() == -math.inf


def test_of_what_is_cut_off_only_a_probe_puts_off_the_next_one() -> None:
    circuit = Circuit(LIMIT)
    circuit.record_cut(started_at=99.0, is_probe=True)
    assert circuit.room(99.0) == LIMIT
    circuit = open_at(100.0)
    before = circuit.retry_at()
    circuit.record_cut(started_at=before, is_probe=False)
    circuit.record_cut(started_at=99.9, is_probe=True)  # from before the opening
    assert circuit.retry_at() == before


@pytest.mark.usefixtures("full_backoff")
def test_final_polls_do_not_pace_the_probes() -> None:
    circuit = open_at(100.0)
    for now in (100.1, 100.2, 100.3):
        circuit.record_failure(now, next(OPERATIONS), started_at=now, is_probe=False)
        assert circuit.retry_at() == 100.5


def test_a_good_answer_makes_an_open_circuit_half_open() -> None:
    circuit = open_at(100.0)
    circuit.record_success(130.0, started_at=130.0)
    assert (circuit.is_probed, circuit.state) == (False, CircuitState.HALF_OPEN)
    assert circuit.room(130.0) == 2  # the probe was the round of one


@pytest.mark.usefixtures("full_backoff")
def test_a_good_answer_to_anything_ends_the_wait_for_the_next_probe() -> None:
    circuit = open_at(0.0)
    fail(circuit, 0.5)
    assert circuit.retry_at() == 1.5
    circuit.record_success(0.6, started_at=0.55)
    assert circuit.room(0.6) == 2


# -- half open


@pytest.mark.parametrize(
    ("limit", "rounds"),
    [(64, [2, 4, 8, 16, 32, 64, 64]), (100, [2, 4, 8, 16, 32, 64, 100, 100]), (3, [2, 3, 3]), (2, [2, 2]), (1, [1, 1])],
)
def test_the_limit_doubles_with_every_round_of_good_answers_up_to_max_in_flight(limit: int, rounds: list[int]) -> None:
    circuit = open_at(0.0, limit)
    circuit.record_success(100.0, started_at=100.0)
    seen = []
    for _ in rounds:
        seen.append(circuit.room(100.0))
        one_round(circuit, 100.0)
    assert seen == rounds
    assert circuit.is_closed


def test_each_good_answer_makes_room_for_one_more() -> None:
    circuit = open_at(0.0)
    circuit.record_success(100.0, started_at=100.0)
    for allowed in range(2, LIMIT):
        assert (circuit.room(100.0), circuit.state) == (allowed, CircuitState.HALF_OPEN)
        circuit.record_success(100.0, started_at=100.0)
    assert (circuit.room(100.0), circuit.state) == (LIMIT, CircuitState.CLOSED)


def test_where_few_wait_it_is_closed_after_half_a_minute_of_good_answers() -> None:
    circuit = open_at(100.0)
    circuit.record_success(110.0, started_at=110.0)
    for now in range(111, 140):
        circuit.record_success(now, started_at=now)
        assert circuit.state is CircuitState.HALF_OPEN
    circuit.record_success(140.0, started_at=140.0)
    assert circuit.is_closed
    assert circuit.limit == 32, "it goes on rising, as the service has not borne more yet"
    circuit.record_success(141.0, started_at=141.0)
    assert circuit.limit == 33


def test_where_one_of_three_fails_it_is_not_closed_by_time() -> None:
    circuit = open_at(100.0)
    circuit.record_success(110.0, started_at=110.0)
    for now in range(111, 171, 3):
        fail(circuit, now)
        circuit.record_success(now + 1, started_at=now + 1)
        circuit.record_success(now + 2, started_at=now + 2)
    assert circuit.state is CircuitState.HALF_OPEN


def test_a_single_failure_while_half_open_does_not_stop_the_ramp_up() -> None:
    circuit = open_at(0.0)
    circuit.record_success(100.0, started_at=100.0)
    fail(circuit, 100.0)
    assert circuit.room(100.0) == 2
    one_round(circuit, 100.0)
    assert circuit.room(100.0) == 4


def test_failures_while_half_open_open_it_again() -> None:
    circuit = open_at(0.0)
    circuit.record_success(100.0, started_at=100.0)
    one_round(circuit, 100.0)
    fail(circuit, 101.0, 9)
    assert circuit.is_probed
    circuit.record_success(150.0, started_at=150.0)
    assert circuit.room(150.0) == 2


def test_good_answers_to_polls_from_before_the_opening_do_not_ramp_up() -> None:
    circuit = open_at(100.0)
    for _ in range(200):
        circuit.record_success(101.0, started_at=99.0)
        assert circuit.room(101.0) <= 2
    one_round(circuit, 101.0)
    assert circuit.room(101.0) == 4


def test_polls_of_better_days_take_no_room_until_it_is_closed_again() -> None:
    circuit = Circuit(2)
    assert circuit.takes_room(99.0)
    fail(circuit, 100.0, FAILURES_UNTIL_OPEN)
    assert not circuit.takes_room(99.0)
    assert circuit.takes_room(100.0)
    circuit.record_success(101.0, started_at=101.0)
    assert circuit.is_closed
    assert circuit.takes_room(99.0)


def test_good_answers_when_all_is_well_widen_nothing() -> None:
    circuit = Circuit(4)
    for now in range(100):
        circuit.record_success(float(now), started_at=float(now))
    assert circuit.room(100.0) == 4


# -- Retry-After


@pytest.mark.parametrize(
    ("pause", "until"),
    [(0.001, 100.001), (5.0, 105.0), (120.0, 220.0), (121.0, 220.0), (1e15, 220.0), (math.inf, 220.0)],
)
def test_a_retry_after_counts_for_two_minutes_at_most(pause: float, until: float) -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, pause=pause)
    assert circuit.retry_at() == until
    assert not circuit.is_probed
    before = math.nextafter(until, 0.0)
    assert (circuit.room(100.0), circuit.room(before), circuit.room(until)) == (0, 0, 1)


def test_of_two_retry_afters_the_one_that_ends_later_counts() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, pause=30.0)
    fail(circuit, 101.0, pause=5.0)
    assert circuit.retry_at() == 130.0
    fail(circuit, 102.0, pause=40.0)
    assert circuit.retry_at() == 142.0


def test_after_a_retry_after_it_ramps_up_from_one() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, pause=10.0)
    seen = []
    for _ in range(8):
        seen.append(circuit.room(110.0))
        one_round(circuit, 110.0)
    assert seen == [1, 2, 4, 8, 16, 32, 64, 64]
    assert circuit.is_closed


def test_with_one_poll_in_flight_at_most_it_is_closed_after_a_retry_after() -> None:
    circuit = Circuit(1)
    fail(circuit, 100.0, pause=10.0)
    assert not circuit.is_closed
    one_round(circuit, 110.0)
    assert circuit.is_closed


def test_good_answers_during_a_retry_after_do_not_end_it() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, pause=10.0)
    circuit.record_success(101.0, started_at=99.0)
    assert (circuit.room(109.9), circuit.state) == (0, CircuitState.OPEN)


def test_final_polls_answered_well_during_a_retry_after_do_not_ramp_up_for_the_time_after_it() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, pause=100.0)
    for second in range(100):
        circuit.record_success(100.0 + second, started_at=100.0 + second)
    assert circuit.room(200.0) == 1


def test_a_retry_after_while_half_open_starts_again_from_one() -> None:
    circuit = open_at(0.0)
    circuit.record_success(100.0, started_at=100.0)
    for _ in range(3):
        one_round(circuit, 100.0)
    assert circuit.room(100.0) == 16
    fail(circuit, 101.0, pause=2.0)
    assert (circuit.room(102.9), circuit.room(103.0)) == (0, 1)


# -- refusals


@pytest.mark.parametrize(
    ("refused", "among", "is_tenants"),
    [(13, 40, False), (14, 40, True), (14, 14, True), (13, 13, False), (26, 80, False)],
)
def test_a_limit_is_the_tenants_if_a_third_of_forty_is_refused(refused: int, among: int, *, is_tenants: bool) -> None:
    circuit = Circuit(LIMIT)
    said = False
    for number in range(among):  # spread evenly
        if (number + 1) * refused // among > number * refused // among:
            said = refuse(circuit, 100.0)
        else:
            circuit.record_success(100.0, started_at=99.9)
    assert said is is_tenants
    assert (circuit.state is CircuitState.OPEN) is is_tenants


@pytest.mark.parametrize(("before", "last"), [(0, 3), (1, 6), (2, 9)])
def test_a_sudden_onset_of_refusals_is_the_tenants_limit_again_while_polls_respect_one(before: int, last: int) -> None:
    circuit = Circuit(LIMIT)
    for _ in range(before):
        refuse(circuit, 100.0)
    for number in range(40 - before):
        if number % 4:
            circuit.record_success(100.0, started_at=99.9)
        else:  # it is not calm, which forgets refusals
            circuit.record_failure(100.0, "failing", started_at=99.9, is_probe=True)
    assert not any(refuse(circuit, 100.0, is_limited=True) for _ in range(last - 1))
    assert not refuse(circuit, 100.0, is_limited=False)
    assert refuse(circuit, 100.0, is_limited=True)


def test_refusals_between_good_answers_add_up_whatever_polls_were_in_flight() -> None:
    circuit = Circuit(LIMIT)
    said = []
    for _ in range(14):  # a refused poll started before the last good answer: its operation counts for no failure
        circuit.record_success(100.0, started_at=99.9)
        circuit.record_success(100.0, started_at=99.9)
        circuit.record_failure(100.1, "refused", started_at=99.9, is_probe=True, is_refusal=True)
        error = RateLimitError(status=429, method="GET", path="/", retry_after=None)
        said.append(circuit.record_refusal(100.1, error, is_probe=True, is_limited=False))
    assert said == [False] * 13 + [True]


def test_refusals_are_forgotten_after_eighty_polls() -> None:
    circuit = Circuit(LIMIT)
    refuse_thirteen(circuit, 100.0)
    answers = 0
    while not circuit.is_calm:
        circuit.record_success(101.0, started_at=100.9)
        answers += 1
    assert answers == 80
    assert not refuse(circuit, 102.0)


def test_a_limit_without_a_pause_opens_nothing() -> None:
    circuit = Circuit(LIMIT)
    refuse_thirteen(circuit, 100.0)
    assert refuse(circuit, 100.0, pause=None)
    assert circuit.is_closed


def test_the_pause_of_a_limit_that_is_the_tenants_holds_all_polls() -> None:
    circuit = Circuit(LIMIT)
    refuse_thirteen(circuit, 100.0)
    assert circuit.room(100.0) > 0
    refuse(circuit, 101.0, pause=10.0)
    assert (circuit.retry_at(), circuit.is_probed) == (111.0, False)


def test_a_pause_that_a_final_poll_is_asked_for_extends_none_and_begins_one() -> None:
    circuit = Circuit(LIMIT)
    refuse_thirteen(circuit, 100.0)
    refuse(circuit, 100.0)
    refuse(circuit, 105.0, is_probe=False)
    assert circuit.retry_at() == 110.0
    refuse(circuit, 110.0, is_probe=False)
    assert circuit.retry_at() == 120.0
    refuse(circuit, 115.0)
    assert circuit.retry_at() == 125.0


def refuse_thirteen(circuit: Circuit, now: float) -> None:
    """Let as many polls be refused as are no limit yet."""
    assert not any(refuse(circuit, now, pause=60.0) for _ in range(13))


# -- both at once


@pytest.mark.usefixtures("full_backoff")
def test_five_failures_with_a_retry_after_open_the_circuit_until_the_later_of_the_two_ends() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, 5, pause=10.0)
    assert circuit.is_probed
    assert (circuit.room(109.9), circuit.room(110.0), circuit.retry_at()) == (0, 1, 110.0)
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, 5, pause=0.1)
    assert (circuit.room(100.4), circuit.room(100.5)) == (0, 1)


@pytest.mark.usefixtures("full_backoff")
@pytest.mark.parametrize("pause", [0.001, 0.25])
def test_a_short_retry_after_with_every_failure_does_not_let_probes_run_faster_than_the_backoff(pause: float) -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 0.0, 5, pause=pause)
    now = 0.0
    gaps = []
    for _ in range(8):
        gaps.append(circuit.retry_at() - now)
        sent_at = circuit.retry_at()
        now = sent_at + 0.25  # an answer takes its time, and the probe was sent before the pause that it brings
        circuit.record_failure(now, "probe", started_at=sent_at, is_probe=True)
        circuit.record_pause(now, pause)
    assert gaps == [0.5, *[1.0] * 7]


@pytest.mark.usefixtures("full_backoff")
def test_a_retry_after_of_a_straggler_leaves_the_probe_under_way_a_probe() -> None:
    circuit = open_at(100.0)
    circuit.record_failure(101.0, "old", started_at=99.0, is_probe=True)
    circuit.record_pause(101.0, 1.0)
    assert circuit.since == 100.0  # so the probe sent at 100.5 stays the only one
    circuit.record_failure(102.0, next(OPERATIONS), started_at=100.5, is_probe=True)
    assert circuit.retry_at() == 103.0


def test_the_end_of_a_retry_after_does_not_close_an_open_circuit() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, 5, pause=10.0)
    assert circuit.is_probed
    assert circuit.room(1e9) == 1


def test_a_good_answer_does_not_end_a_retry_after_and_the_ramp_up_then_starts_from_one() -> None:
    circuit = Circuit(LIMIT)
    fail(circuit, 100.0, 5, pause=60.0)
    circuit.record_success(130.0, started_at=130.0)
    assert not circuit.is_probed
    assert (circuit.room(159.9), circuit.room(160.0)) == (0, 1)
    one_round(circuit, 160.0)
    assert circuit.room(160.0) == 2


# -- whatever happens


# -- its transitions


def test_an_outage_lasts_from_the_first_opening_until_it_is_closed() -> None:
    closed, half_open, opened = CircuitState.CLOSED, CircuitState.HALF_OPEN, CircuitState.OPEN
    transitions = Transitions(10.0)
    changes = [
        transitions.notice(state, now)
        for now, state in ((12.0, opened), (15.0, half_open), (16.0, opened), (20.0, half_open), (21.5, closed))
    ]
    assert changes == [
        Transition(closed, opened, 2.0, is_outage=True, outage=None),
        Transition(opened, half_open, 3.0, is_outage=False, outage=None),
        Transition(half_open, opened, 1.0, is_outage=False, outage=None),
        Transition(opened, half_open, 4.0, is_outage=False, outage=None),
        Transition(half_open, closed, 1.5, is_outage=False, outage=9.5),
    ]
    assert transitions.state is closed
    assert transitions.notice(half_open, 30.0) == Transition(closed, half_open, 8.5, is_outage=False, outage=None)
    assert transitions.notice(closed, 31.0) == Transition(half_open, closed, 1.0, is_outage=False, outage=None)


@pytest.mark.parametrize(
    ("error", "cause"), [(TransportError, "TransportError"), (None, None)], ids=["failure", "good"]
)
def test_listeners_are_told_both_states_why_and_how_long_it_took(
    error: type[TransportError] | None, cause: str | None
) -> None:
    told = Transition(CircuitState.CLOSED, CircuitState.OPEN, 2.0, is_outage=True, outage=None).event(error, 7)
    assert told == CircuitChanged(state="open", previous="closed", cause=cause, waiting=7, seconds=2.0)


class CircuitMachine(RuleBasedStateMachine):
    """A client that sends what the circuit allows, and a service that answers in any order and however late."""

    limit: int
    circuit: Circuit

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.flying: list[tuple[float, bool]] = []  # sent at, is it a final poll

    @initialize(limit=st.sampled_from([1, 2, 3, 5, 64]))
    def begin(self, limit: int) -> None:
        self.limit = limit
        self.circuit = Circuit(limit)

    def counted(self) -> int:
        since = -math.inf if self.circuit.is_closed else self.circuit.since
        return sum(sent_at >= since for sent_at, _ in self.flying)

    @rule(seconds=st.sampled_from([0.001, 0.5, 1.0, 10.0, 31.0, 121.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def time_passes_until_there_is_room(self) -> None:
        self.now = max(self.now, self.circuit.retry_at())
        assert self.circuit.room(self.now) >= 1

    @rule()
    def send_what_there_is_room_for(self) -> None:
        while self.counted() < self.circuit.room(self.now):
            self.flying.append((self.now, False))

    @rule()
    def send_a_final_poll(self) -> None:
        self.flying.append((self.now, True))

    @precondition(lambda self: self.flying)
    @rule(data=st.data(), many=st.integers(1, 8))
    def answer_well(self, data: st.DataObject, many: int) -> None:
        for _ in range(min(many, len(self.flying))):
            sent_at, _ = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
            before = self.circuit.limit
            self.circuit.record_success(self.now, started_at=sent_at)
            assert self.circuit.limit <= max(2 * before, 2)
            assert not self.circuit.is_probed

    @precondition(lambda self: self.flying)
    @rule(
        data=st.data(),
        many=st.integers(1, 8),
        pause=st.sampled_from([None, None, 0.0, 0.001, 1.0, 60.0, 1e9]),
        of_all=st.booleans(),
    )
    def fail(self, data: st.DataObject, many: int, pause: float | None, *, of_all: bool) -> None:
        for _ in range(min(many, len(self.flying))):
            sent_at, final = self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1)))
            before, was_open = self.circuit.retry_at(), self.circuit.is_probed
            self.circuit.record_failure(self.now, next(OPERATIONS), started_at=sent_at, is_probe=not final)
            if pause and of_all:
                self.circuit.record_pause(self.now, pause)
            assert self.circuit.limit == 1 or self.circuit.state is not CircuitState.OPEN
            if was_open and (final or sent_at < self.circuit.since) and not pause:
                assert self.circuit.retry_at() == before

    @precondition(lambda self: self.flying)
    @rule()
    def cut_one(self) -> None:
        self.flying.pop()  # neither good nor bad

    @invariant()
    def never_more_room_than_the_limit(self) -> None:
        if hasattr(self, "circuit"):
            assert 1 <= self.circuit.limit <= self.limit
            assert 0 <= self.circuit.room(self.now) <= self.limit

    @invariant()
    def polls_are_allowed_again_in_good_time(self) -> None:
        if hasattr(self, "circuit"):
            assert self.circuit.retry_at() <= self.now + MAX_PAUSE
            assert self.circuit.room(self.now + MAX_PAUSE) >= 1

    @invariant()
    def one_at_a_time_while_open_and_none_during_a_retry_after(self) -> None:
        if hasattr(self, "circuit"):
            if self.circuit.is_probed:
                assert self.circuit.room(self.now + MAX_PAUSE) == 1
            if self.now < self.circuit.retry_at():
                assert self.circuit.room(self.now) == 0
                assert self.circuit.state is CircuitState.OPEN

    @invariant()
    def closed_means_room(self) -> None:
        if hasattr(self, "circuit") and self.circuit.is_closed:
            assert self.circuit.room(self.now) >= min(2, self.limit)

    def teardown(self) -> None:
        """Whatever happened: with good answers from now on, the full limit comes back, in few rounds."""
        if not hasattr(self, "circuit"):
            return
        self.now = max(self.now, self.circuit.retry_at())
        for _ in range(self.limit.bit_length() + 1):
            one_round(self.circuit, self.now)
        assert self.circuit.is_closed
        assert self.circuit.room(self.now) == self.limit


CircuitMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
test_whatever_happens_the_limit_is_bounded_and_comes_back = CircuitMachine.TestCase


def test_it_is_calm_again_once_its_limit_is_full_and_failures_are_forgotten() -> None:
    circuit = Circuit(64)
    assert circuit.is_calm is True
    for number in range(FAILURES_UNTIL_OPEN):
        circuit.record_failure(0.0, number, started_at=0.0, is_probe=True)
    for answers in range(1, 64):
        assert circuit.is_calm is False
        circuit.record_success(2.0 * answers, started_at=2.0 * answers - 1.0)
        assert circuit.is_closed == (answers >= 19)
        assert circuit.limit == 1 + answers
    assert circuit.is_calm is True
