"""The machine in tables of calls: what it is told, what it starts, and what waits end with."""

from __future__ import annotations

import gc
import math
from typing import TYPE_CHECKING, Any

import pytest
from rich.pretty import pretty_repr
from tenacity import wait_exponential, wait_fixed
from tenacity.wait import wait_base

from aiokeyless import (
    ApprovalTicket,
    AuthenticationError,
    ConfigurationError,
    DecodeError,
    DefaultTimeout,
    KeylessError,
    wait_adaptive,
)
from aiokeyless._listeners import Listeners
from aiokeyless._rules.final import Unanswered
from aiokeyless._waits import machine as machine_module
from aiokeyless._waits.machine import BATCH
from aiokeyless._waits.state import Poll, PolledOperation, WaitPhase
from aiokeyless.events import Event, PollEnded, ServiceChanged, WaitEnded, WaitOutcome, WaitStarted

from .calls import TIMEOUT, USER, Calls, Updates, cached, error, names, no_answer, no_key, operation, replaced_key

if TYPE_CHECKING:
    from collections.abc import Sequence

#: So many operations that are refused at once show that the limit is the tenant's.
MANY = 14
UNREADABLE = DecodeError("cannot be decoded", status=200, method="GET", path="/v2/operations/op")
TICKET = ApprovalTicket.for_operation("op", user_id=USER, expires_in=20.0)


@pytest.fixture(autouse=True)
def _backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backoff without its chance: half a second for each failure in a row."""
    monkeypatch.setattr(machine_module, "error_delay", lambda failures: 0.5 * failures)


def test_neither_a_poll_nor_its_operation_shows_its_waits_in_an_error_report() -> None:
    machine = Calls()
    for _ in range(100):
        machine.wait("txn-1", at=0.0)
    poll = machine.one(0.0)
    for shown in (poll, poll.polled):
        assert len(repr(shown)) < 100
        assert len(pretty_repr(shown)) < 100


class TestPolls:
    def test_a_wait_is_polled_at_once_and_then_by_its_schedule(self) -> None:
        machine = Calls(schedule=wait_fixed(2))
        machine.wait(at=1.0)
        assert machine.wake_at() == 1.0
        poll = machine.one(1.0)
        assert machine.started(1.0) == []
        machine.answer(poll, 1.5)
        assert machine.started(3.4) == []
        assert machine.wake_at() == 3.5
        assert names(machine.started(3.5)) == ["op"]

    @pytest.mark.parametrize(("is_fresh", "first", "second"), [(False, 5.0, 6.0), (True, 6.0, 8.0)])
    def test_the_schedule_sets_a_fresh_tickets_first_poll(self, is_fresh: bool, first: float, second: float) -> None:
        machine = Calls(schedule=wait_exponential())
        machine.wait(at=5.0, ticket=TICKET, age=0.5, is_fresh=is_fresh)
        assert machine.started(first - 0.1) == []
        machine.answer(machine.one(first), first)
        assert machine.wakes(first) == second

    def test_a_poll_that_would_start_at_the_deadline_is_the_final_one(self) -> None:
        machine = Calls(schedule=wait_fixed(2))
        wait = machine.wait(ticket=TICKET, timeout=2.0, is_fresh=True)
        poll = machine.one(2.0)
        assert poll.final
        assert wait.final_poll is poll

    def test_the_clock_of_the_schedule_starts_at_the_earliest_creation_that_a_wait_knows_of(self) -> None:
        asked: list[float | None] = []

        class Asked(wait_base):
            def __call__(self, retry_state: Any) -> float:
                asked.append(retry_state.seconds_since_start)
                return 1.0

        machine = Calls(schedule=Asked())
        machine.wait(at=10.0)
        machine.wait(at=10.0, ticket=TICKET, age=4.0)
        machine.wait(at=10.0)
        machine.answer(machine.one(10.0), 11.0)
        assert asked == [5.0]

    def test_the_soonest_delay_of_all_schedules_counts(self) -> None:
        machine = Calls()
        for seconds in (5, 2, 9):
            machine.wait(schedule=wait_fixed(seconds))
        machine.answer(machine.one(0.0), 0.0)
        assert machine.wakes(0.0) == 2.0

    def test_of_those_due_at_the_same_time_the_first_to_come_is_first(self) -> None:
        machine = Calls(1)
        for name in "cab":
            machine.wait(name)
        order = []
        for _ in range(3):
            poll = machine.one(0.0)
            order.append(poll.polled.operation_id)
            machine.answer(poll, 0.0)
        assert order == ["c", "a", "b"]

    def test_a_poll_that_becomes_due_during_another_one_waits_for_its_end(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        machine.wait()
        poll = machine.one(0.0)
        machine.wait(at=0.5)  # it wants one at once
        assert machine.started(0.5) == []
        machine.answer(poll, 3.0)
        assert names(machine.started(3.0)) == ["op"]

    @pytest.mark.parametrize(
        "answer",
        ["pending", error(500), error(404), operation(state="denied")],
        ids=["pending", "transient", "missing", "rejected"],
    )
    def test_no_other_answer_than_an_approval_counts_for_a_wait_that_came_after_its_poll(self, answer: Any) -> None:
        machine = Calls()
        machine.wait()
        poll = machine.one(0.0)
        updates = Updates()
        late = machine.wait(at=0.5, updates=updates)
        machine.answer(poll, 1.0, answer)
        assert (late.outcome, late.polls, late.attempt, late.error, updates) == ("", 0, 1, None, [])

    def test_an_approval_counts_for_a_wait_that_came_after_its_poll_too(self) -> None:
        machine = Calls()
        wait = machine.wait()
        poll = machine.one(0.0)
        late = machine.wait(at=0.5)
        machine.answer(poll, 1.0, "approved")
        assert (wait.outcome, late.outcome, late.polls) == ("approved", "approved", 1)

    def test_a_schedule_that_raises_ends_its_own_waits(self) -> None:
        class Broken(wait_base):
            def __call__(self, retry_state: object) -> float:
                raise RuntimeError

        machine = Calls()
        alone = machine.wait("alone", schedule=Broken())
        broken, good = machine.wait(schedule=Broken()), machine.wait()
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0)
        assert (alone.outcome, broken.outcome, good.outcome) == ("ConfigurationError", "ConfigurationError", "")
        assert machine.wakes(0.0) == 1.0

    def test_the_attempt_counts_pending_answers(self) -> None:
        machine = Calls(schedule=wait_exponential())
        wait = machine.wait()
        for at, answer in ((0.0, "pending"), (1.0, error(500)), (1.5, error(500)), (2.5, "pending"), (4.5, "pending")):
            machine.answer(machine.one(at), at, answer)
            assert machine.wakes(at) > at
        assert wait.attempt == 4


class TestSlots:
    def test_a_poll_takes_a_slot_until_it_ends_or_for_a_second(self) -> None:
        machine = Calls(2)
        for name in ("slow", "quick", "third"):
            machine.wait(name)
        slow, quick = machine.started(0.0)
        assert machine.statistics(0.4).lag == 0.4
        machine.answer(quick, 0.5)
        third = machine.one(0.5)
        machine.wait("fourth", at=0.6)
        assert machine.wakes(0.6) == 1.0
        assert names(machine.started(1.0)) == ["fourth"]
        assert machine.statistics(1.0).in_flight == 3
        machine.wait("fifth", at=1.0)
        assert machine.wakes(1.2) == 1.5
        machine.answer(slow, 1.3)  # it has no slot any more
        assert machine.started(1.3) == []
        machine.answer(third, 1.4)
        assert names(machine.started(1.4)) == ["fifth"]

    @pytest.mark.parametrize(("answered", "most"), [(math.inf, 8), (1.1, 8), (1.0, 24)])
    def test_beside_good_answers_more_polls_may_hang(self, answered: float, most: int) -> None:
        machine = Calls(4)
        for number in range(40):
            machine.wait(f"hanging-{number}")
        in_flight = 0
        for at in range(10):
            machine._budget.answered_at = at - answered
            in_flight += len(machine.started(float(at)))
            if machine.take_cut():
                break
        assert in_flight == most

    def test_a_saturated_service_gets_as_many_polls_at_once_as_it_answers_soon(self) -> None:
        machine = Calls(64, schedule=wait_fixed(1))
        for number in range(200):
            machine.wait(f"op-{number}")
        queue: list[Poll] = []
        for answered in range(3000):  # twenty a second
            at = answered / 20
            queue += machine.started(at)
            assert not machine.take_cut()
            poll = queue.pop(0)
            assert not poll.is_over  # nothing is sent in vain
            machine.answer(poll, at)
        assert 2 <= len(queue) <= 20  # a second's worth
        machine.wait("final", at=150.0, timeout=0.1)
        assert names(machine.started(150.1))[0] == "final"  # these do not wait for it

    def test_at_the_most_the_oldest_slow_poll_gives_way_and_counts_as_failed(self) -> None:
        machine = Calls(1)
        for number in range(4):
            machine.wait(f"op-{number}", at=number)
        first, *_ = [machine.one(float(at)) for at in range(2)]
        assert machine.wakes(2.5) == 1.0 + TIMEOUT
        assert list(machine.take_cut()) == [first]
        assert machine.started(2.6) == []  # one at a time
        assert list(machine.take_cut()) == []
        machine.answer(first, 2.7, None)
        assert names(machine.started(2.7)) == ["op-2"]
        assert machine.statistics(2.7).transient_failures == 1
        assert first.polled.failures == 1

    def test_what_is_not_due_cuts_nothing(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        machine.wait("answered")
        machine.answer(machine.one(0.0), 0.0)
        for number in range(2):
            machine.wait(f"op-{number}", at=5.0 + number)
            machine.one(5.0 + number)
        assert machine.wakes(8.0) == 5.0 + TIMEOUT
        assert not machine.take_cut()

    def test_no_more_polls_are_in_flight_than_there_are_connections(self) -> None:
        machine = Calls(8, connections=2, schedule=wait_fixed(60))
        for number in range(3):
            machine.wait(f"op-{number}")
        machine.wait("final", timeout=0.2)
        first, second = machine.started(0.0)
        assert machine.wakes(0.2) == 1.0  # there is none for the final poll, either
        assert machine.started(1.0) == []
        assert list(machine.take_cut()) == [first]
        machine.answer(first, 1.1, None)
        assert [poll.final for poll in machine.started(1.1)] == [True]
        assert list(machine.take_cut()) == [second]

    def test_a_final_poll_goes_before_what_is_due_longer_and_takes_no_slot(self) -> None:
        machine = Calls(1, schedule=wait_fixed(50))
        machine.wait("final", timeout=1.0)
        machine.answer(machine.one(0.0), 0.0)
        machine.wait("ordinary", at=0.5)
        machine.wait("other", at=0.5)
        assert [(poll.polled.operation_id, poll.final) for poll in machine.started(1.0)] == [
            ("final", True),
            ("ordinary", False),
        ]

    def test_final_polls_are_four_times_as_many_as_there_are_slots(self) -> None:
        machine = Calls(2, schedule=wait_fixed(50))
        for number in range(10):
            machine.wait(f"final-{number}", timeout=0.5)
            machine.run(0.0, lambda *_: "pending")
        first, *others = machine.started(0.5)
        assert [poll.final for poll in (first, *others)] == [True] * 8
        machine.answer(first, 0.6)
        assert len(machine.started(0.6)) == 1

    def test_once_the_last_wait_before_its_deadline_leaves_only_final_polls_start(self) -> None:
        machine = Calls(schedule=wait_fixed(2))
        late, other = machine.wait(timeout=1.0), machine.wait()
        machine.answer(machine.one(0.0), 0.0)
        assert machine.one(1.0).final
        machine.give_up(other, 1.5)
        assert machine.started(2.0) == []
        assert late.outcome == ""

    def test_a_final_poll_that_no_wait_needs_any_more_is_left_out(self) -> None:
        machine = Calls(1)
        machine.wait("busy")
        busy = machine.one(0.0)
        late, other = machine.wait("late", timeout=1.0), machine.wait("other", timeout=1.1)
        machine.expire(1.0)
        machine.expire(1.1)
        late.is_cancelled = True
        assert machine.statistics(3.0).lag == 0.0
        machine.answer(busy, 1.5)
        assert names(machine.started(1.5)) == ["other"]
        machine.leave(late, 1.5)
        assert other.outcome == ""

    def test_if_no_wait_needs_its_final_poll_any_more_none_starts(self) -> None:
        machine = Calls(connections=1, schedule=wait_fixed(60))
        machine.wait("busy")
        busy = machine.one(0.0)
        late = machine.wait("late", timeout=0.5)
        machine.expire(0.5)
        late.is_cancelled = True
        machine.answer(busy, 0.8)
        assert machine.started(0.8) == []
        assert machine.wake_at() == 2.5

    def test_of_very_many_final_polls_that_no_wait_needs_some_are_passed_over_at_a_time(self) -> None:
        machine = Calls(1)
        machine.wait("busy")
        busy = machine.one(0.0)
        gone = [machine.wait(f"gone-{number}", timeout=1.0) for number in range(1_000)]
        needed = machine.wait("needed", at=1e-7, timeout=1.0)
        for _ in range(8):  # turns of the loop
            machine.expire(1.0)
        for wait in gone:
            wait.is_cancelled = True
        machine.answer(busy, 1.0)
        for _ in range(2):
            assert machine.started(1.0) == []
            assert machine.wake_at() == 1.0
        assert names(machine.started(1.0)) == ["needed"]
        assert needed.final_poll is not None

    def test_no_poll_starts_for_callers_that_are_gone(self) -> None:
        machine = Calls()
        gone = [machine.wait(f"gone-{number}") for number in range(1_000)]
        machine.wait("here", at=1e-7)
        for wait in gone:
            wait.is_cancelled = True
        for _ in range(2):
            assert machine.started(0.0) == []
            assert machine.wake_at() == 0.0
        assert names(machine.started(0.0)) == ["here"]
        assert machine.wake_at() == TIMEOUT

    @pytest.mark.parametrize(("answer", "first"), [(error(500), 30), (error(403), 30), (error(429), 10)], ids=str)
    def test_an_operation_that_always_fails_is_polled_less_after_half_a_minute(
        self, answer: KeylessError, first: int
    ) -> None:
        machine = Calls()
        machine.wait(timeout=200.0)
        polls = [at for at, _ in machine.run(100.0, lambda _, at: answer if at else "pending")]
        assert len([at for at in polls if 1.0 < at <= 31.0]) == first
        assert 4 <= len([at for at in polls if at > 31.0]) <= 9

    def test_beside_good_answers_an_operation_that_always_fails_is_polled_as_often_as_by_a_loop(self) -> None:
        machine = Calls(schedule=wait_fixed(0.5))
        machine.wait("well")
        machine.wait("bad")
        polls = machine.run(100.0, lambda name, at: error(503) if name == "bad" and at > 1.0 else "pending")
        times = [at for at, name in polls if name == "bad"]
        assert times[:38] == [0.0, 0.5, 1.0, 1.5, *range(2, 33), 33.5, 35.0, 36.5]
        assert times[-1] - times[-2] == 1.5
        assert len(polls) - len(times) == 201

    def test_while_failing_ones_hold_over_a_quarter_of_the_slots_good_ones_go_first(self) -> None:
        machine = Calls(4)
        for number in range(3):
            machine.wait(f"bad-{number}")
        machine.wait("good")
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0, "pending" if poll.polled.operation_id == "good" else error(500))
        machine.wait("new", at=0.9)
        assert [name[:3] for name in names(machine.started(0.95))] == ["bad", "bad", "new", "bad"]
        assert machine.started(1.4) == []
        machine.answer(next(iter(machine._dispatcher.in_flight)), 1.5, error(500))
        assert names(machine.started(1.5)) == ["good"]

    def test_after_silence_those_that_failed_go_last(self) -> None:
        machine = Calls()
        for name in ("hangs", "hangs too"):
            machine.wait(name)
        for poll in machine.started(0.0):
            machine.answer(poll, TIMEOUT, machine.no_answer(poll, TIMEOUT))
        machine.wait("new", at=TIMEOUT + 0.9)
        assert names(machine.started(TIMEOUT + 1.0))[0] == "new"

    def test_a_503_holds_its_operation_until_another_poll_is_answered_well(self) -> None:
        machine = Calls(schedule=wait_fixed(3))
        for name, at in (("held", 0.0), ("well", 1.0)):
            machine.wait(name, at=at)
            machine.answer(machine.one(at), at)
        machine.answer(machine.one(3.0), 3.0, error(503, retry_after=60))
        assert machine.wakes(3.6) == 4.0  # its own backoff is over
        machine.answer(machine.one(4.0), 4.0)
        assert names(machine.started(4.0)) == ["held"]

    def test_without_a_good_answer_a_503_holds_for_the_longest_delay(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("aiokeyless._rules.backoff.error_delay", lambda _failures: 4.0)
        machine = Calls()
        machine.wait()
        machine.answer(machine.one(0.0), 0.0, error(503, retry_after=60))
        assert machine.wakes(0.0) == 4.0

    @pytest.mark.parametrize(("answer", "due"), [("pending", 11.0), (error(500), 9.0)])
    def test_the_next_answer_to_a_held_operation_sets_its_due(self, answer: str | KeylessError, due: float) -> None:
        machine = Calls(schedule=wait_fixed(3))
        machine.wait("held")
        machine.answer(machine.one(0.0), 0.0, error(503, retry_after=60))
        poll = machine.one(5.0)
        well = machine.wait("well", at=5.0)
        machine.answer(machine.one(5.0), 6.0)
        machine.answer(poll, 8.0, answer)
        machine.give_up(well, 8.0)
        assert machine.wakes(8.0) == due

    def test_while_polls_fail_one_in_one_and_a_half_seconds_uses_a_new_connection(self) -> None:
        machine, renewals = Calls(), []
        machine.wait()
        for at in (0.0, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5):
            poll = machine.one(at)
            if poll.is_renewal:
                renewals.append(at)
            machine.answer(poll, at, "pending" if at == 4.5 else error(500))
        assert renewals == [0.5, 2.5, 4.5]

    def test_a_held_operation_whose_waits_are_gone_is_not_polled(self) -> None:
        machine = Calls(schedule=wait_fixed(3))
        held = machine.wait("held")
        machine.wait("well", at=0.0)
        held_poll, well = machine.started(0.0)
        machine.answer(held_poll, 0.0, error(503, retry_after=60))
        machine.give_up(held, 0.1)
        machine.answer(well, 0.2)
        assert machine.run(2.0, lambda *_: "pending", since=0.2) == []

    def test_nothing_is_kept_of_a_held_operation_whose_waits_are_gone(self) -> None:
        machine = Calls()
        held = machine.wait("held and gone")
        machine.answer(machine.one(0.0), 0.0, error(503, retry_after=60))
        machine.give_up(held, 0.1)
        del held
        gc.collect()
        kept = [each for each in gc.get_objects() if isinstance(each, PolledOperation)]
        assert "held and gone" not in {polled.operation_id for polled in kept}

    def test_a_wait_for_an_operation_whose_caller_was_cancelled_is_polled_at_once(self) -> None:
        machine = Calls()
        cancelled = machine.wait()
        cancelled.is_cancelled = True
        assert machine.started(0.0) == []
        machine.wait(at=0.0)
        machine.leave(cancelled, 0.0)
        assert names(machine.started(0.0)) == ["op"]

    def test_a_poll_is_overdue_after_the_request_timeout_and_backs_off(self) -> None:
        machine = Calls()
        machine.wait("first")
        first = machine.one(0.0)
        machine.wait("second", at=3.0)
        second = machine.one(3.0)
        machine.expire(TIMEOUT - 0.1)
        assert list(machine.take_cut()) == []
        machine.expire(TIMEOUT)
        assert list(machine.take_cut()) == [first]
        assert list(machine.take_cut()) == []
        assert machine.wake_at() == 3.0 + TIMEOUT
        machine.answer(first, TIMEOUT, None)
        assert machine.statistics(TIMEOUT).transient_failures == 1
        assert machine.wake_at() <= TIMEOUT
        assert machine.started(TIMEOUT) == []
        assert machine.wake_at() == TIMEOUT + 0.5
        assert not second.is_over

    def test_a_poll_that_brought_nothing_is_repeated_at_once(self) -> None:
        machine = Calls()
        wait = machine.wait()
        poll = machine.one(1.0)
        machine.answer(poll, 2.0, None)
        machine.answer(poll, 2.0, None)
        assert names(machine.started(2.0)) == ["op"]
        assert wait.outcome == ""

    def test_a_final_poll_that_brought_nothing_is_made_again(self) -> None:
        machine = Calls()
        wait = machine.wait(timeout=1.0)
        machine.answer(machine.one(0.0), 0.5)
        poll = machine.one(1.0)
        machine.answer(poll, 1.2, None)
        again = machine.one(1.2)
        assert again.final
        machine.answer(again, 1.3, "approved")
        assert wait.outcome == "approved"


class TestRate:
    def test_below_the_rate_nothing_changes(self) -> None:
        for rate in (None, 2.0):
            machine = Calls(rate=rate)
            machine.wait("a")
            machine.wait("b", schedule=wait_fixed(2.5))
            times = [at for at, _ in machine.run(10.0, lambda *_: "pending")]
            assert times == [0, 0, 1, 2, 2.5, 3, 4, 5, 5, 6, 7, 7.5, 8, 9, 10, 10]

    def test_no_operation_starves_above_the_rate(self) -> None:
        machine = Calls(rate=50.0, schedule=wait_fixed(0.1))
        for number in range(50):
            machine.wait(f"op-{number}")
        machine.wait("slow", schedule=wait_fixed(10))
        polls = machine.run(60.0, lambda *_: "pending")
        assert [name for _, name in polls].count("slow") >= 5
        assert len(polls) == pytest.approx(50 + 50 * 60, abs=2)

    def test_the_lag_is_the_time_by_which_polls_are_late(self) -> None:
        machine = Calls(rate=1.0, schedule=wait_fixed(100))
        for number in range(5):
            machine.wait(f"op-{number}")
        assert machine.statistics(0.0).lag == 0.0
        machine.run(2.0, lambda *_: "pending")
        assert machine.statistics(3.0).lag == 3.0
        machine.run(4.0, lambda *_: "pending", since=3.0)
        assert machine.statistics(5.0).lag == 0.0

    def test_a_final_poll_does_not_wait_for_the_rate_and_is_counted(self) -> None:
        machine = Calls(rate=1.0, schedule=wait_fixed(100))
        for number in range(3):
            machine.wait(f"final-{number}", timeout=0.0)
        machine.expire(120.0)
        assert len(machine.started(120.0)) == 3
        machine.wait("ordinary", at=120.0)
        assert machine.started(120.0) == []
        assert machine.wake_at() == pytest.approx(122.0)  # a second's polls are owed, and no more
        assert machine.started(121.9) == []
        assert names(machine.started(122.0)) == ["ordinary"]

    def test_refusals_of_many_operations_halve_the_rate_and_their_pause_holds_all(self) -> None:
        machine = Calls(rate=100.0)
        refused(machine, retry_after=30.0)
        assert machine.statistics(1.0).rate_limit == MANY / 2
        assert machine.wakes(1.0) == 31.0
        assert Calls().statistics(0.0).rate_limit is None

    def test_one_operation_that_is_refused_waits_as_long_as_it_was_asked_to_and_holds_up_no_other(self) -> None:
        machine = Calls(rate=100.0, schedule=wait_fixed(1))
        machine.wait("refused")
        machine.wait("well")
        polls = machine.run(60.0, lambda name, _: error(429, retry_after=30) if name == "refused" else "pending")
        assert [at for at, name in polls if name == "refused"] == [0.0, 30.0, 60.0]
        assert len(polls) == 3 + 61
        assert (machine.statistics(60.0).is_failing, machine.statistics(60.0).rate_limit) == (False, 100.0)

    def test_operations_that_are_refused_all_the_time_are_no_sign_of_the_tenants_limit(self) -> None:
        machine = Calls(rate=100.0)
        for number in range(100):
            machine.wait(f"refused-{number}")
        for name in ("well", *"abcde"):
            machine.wait(name)
        good_at_first = {"well": 60.0} | dict.fromkeys("abcde", 0.0)
        polls = machine.run(60.0, lambda name, at: "pending" if at <= good_at_first.get(name, -1.0) else error(429))
        assert machine.statistics(60.0).rate_limit == 100.0
        assert len([name for _, name in polls if name == "well"]) > 55

    def test_final_polls_that_queue_while_a_pause_holds_go_one_at_a_time(self) -> None:
        machine = Calls()
        machine._rate.paused_until = 3.0
        ends = [machine.wait(f"final-{number}", timeout=0.1) for number in range(3)]
        first = machine.one(0.1)
        assert machine.wakes(0.2) == 2.1
        machine.answer(first, 0.3)
        assert len(machine.started(0.3)) == 1
        assert [wait.outcome for wait in ends] == ["ApprovalTimeoutError", "", ""]

    @pytest.mark.parametrize("is_final", [False, True])
    def test_only_ordinary_polls_extend_a_pause(self, *, is_final: bool) -> None:
        machine = Calls(rate=100.0)
        machine.wait("last", timeout=2.0 if is_final else None)
        refused(machine, retry_after=5.0, beside="last")
        assert machine.wakes(1.1) == (2.0 if is_final else 6.0)
        at = 2.0 if is_final else 6.0
        last = machine.started(at)[0]
        assert last.final is is_final
        machine.answer(last, at, error(429, retry_after=30))
        assert machine._rate.paused_until == (6.0 if is_final else 36.0)


def refused(machine: Calls, *, retry_after: float, beside: str = "") -> None:
    """Let so many operations be answered well at 0 s and refused at 1 s as show that the limit is the tenant's."""
    for number in range(MANY):
        machine.wait(f"op-{number}")
    for at in (0.0, 1.0):
        for poll in machine.started(at):
            is_well = at == 0.0 or poll.polled.operation_id == beside
            machine.answer(poll, at, "pending" if is_well else error(429, retry_after=retry_after))


def spend(machine: Calls, at: float) -> None:
    """Spend all tokens: the next poll may start 0.2 s later."""
    while machine._budget.room(at):
        machine._budget.record_poll(at)
        machine._budget.record_failure(at, started_at=at)
    assert machine.statistics(at).is_failing


class TestBudget:
    def test_without_a_token_only_final_polls_start_one_at_a_time(self) -> None:
        machine = Calls(schedule=wait_fixed(100))
        for number in range(3):
            machine.wait(f"final-{number}", timeout=0.01, is_fresh=True)
            machine.wait(f"ordinary-{number}")
        spend(machine, 0.0)
        first = machine.one(0.01)
        assert first.final
        assert machine.started(0.1) == []
        machine.answer(first, 0.1, error(500))
        assert [poll.final for poll in machine.started(0.1)] == [True]

    def test_a_final_poll_that_is_in_flight_for_two_seconds_holds_up_no_other(self) -> None:
        machine = Calls(schedule=wait_fixed(100))
        for number in range(2):
            machine.wait(f"final-{number}", timeout=1.0 + number, is_fresh=True)
        machine.wait("final-0")
        for at in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0):
            spend(machine, at)
            machine.started(at)
        assert len(machine._dispatcher.final_in_flight) == 1
        for at in (1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6, 2.8):
            spend(machine, at)
            assert machine.started(at) == []
        spend(machine, 3.0)
        assert names(machine.started(3.0)) == ["final-1"]

    def test_final_polls_of_operations_that_were_answered_well_go_first(self) -> None:
        machine = Calls(schedule=wait_fixed(100))
        for name in ("bad", "well"):
            machine.wait(name, timeout=5.0)
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0, "pending" if poll.polled.operation_id == "well" else error(429, retry_after=60))
        spend(machine, 5.0)
        assert names(machine.started(5.0)) == ["well"]

    def test_good_ones_are_polled_before_failing_ones_and_these_last_that_never_were(self) -> None:
        machine = Calls()
        machine.wait("bad")
        for at in (0.0, 0.5):
            machine.answer(machine.one(at), at, error(500))
        answers: dict[str, Any] = {"failing": error(500), "well": "pending", "failed": "pending"}
        for name in answers:
            machine.wait(name, at=1.0, schedule=wait_fixed(0.1 if name == "failed" else 0.2))
        for poll in machine.started(1.0):
            machine.answer(poll, 1.0, answers[poll.polled.operation_id])
        machine.answer(machine.one(1.1), 1.1, error(500))
        machine.wait("new", at=1.2)
        machine.wait("gone", at=1.2).is_cancelled = True
        assert order_after(machine, 2.0) == ["new", "well", "failed", "bad", "failing"]

    def test_every_second_poll_is_for_one_that_was_never_tried(self) -> None:
        machine = Calls(schedule=wait_fixed(0.1))
        for name in ("good", "well"):
            machine.wait(name)
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0)
        for number, name in enumerate(("new", "newer", "newest")):
            machine.wait(name, at=0.01 * number)
        assert order_after(machine, 1.0) == ["good", "new", "well", "newer", "newest"]

    def test_a_poll_that_was_cut_off_keeps_its_token(self) -> None:
        machine = Calls()
        wait = machine.wait("leaving")
        spend(machine, 0.0)
        poll = machine.one(0.2)
        machine.give_up(wait, 0.3)
        assert list(machine.take_cut()) == [poll]
        machine.answer(poll, 0.3, None)
        machine.wait("next", at=0.3)
        assert machine.wakes(0.3) == pytest.approx(0.4)

    @pytest.mark.parametrize(("waits", "seconds", "most"), [(10, 30.0, 182), (100, 60.0, 480), (1000, 60.0, 692)])
    def test_an_outage_costs_the_tokens_and_few_polls_a_second_however_many_wait(
        self, waits: int, seconds: float, most: int
    ) -> None:
        machine = Calls(256)
        for number in range(waits):
            machine.wait(f"op-{number}")
        polls = machine.run(seconds, lambda *_: error(500))
        assert 0.9 * most <= len(polls) <= most
        assert machine.statistics(seconds).is_failing

    def test_after_an_outage_all_are_polled_within_two_seconds(self) -> None:
        machine = Calls()
        for number in range(100):
            machine.wait(f"op-{number}")
        polls = machine.run(22.0, lambda _, at: error(500) if at < 20.0 else "pending")
        assert len({name for at, name in polls if at >= 20.0}) == 100
        assert not machine.statistics(22.0).is_failing

    def test_after_an_outage_sixteen_polls_are_in_flight_at_first(self) -> None:
        machine = Calls()
        for number in range(100):
            machine.wait(f"op-{number}")
        machine.run(20.0, lambda *_: error(500))
        machine.answer(machine.started(20.5)[0], 20.6)
        machine.started(20.6)
        assert machine.statistics(20.6).in_flight == 16

    def test_a_service_that_is_silent_gets_two_polls_at_a_time(self) -> None:
        machine = Calls()
        for number in range(40):
            machine.wait(f"op-{number}")
        machine.started(0.0)
        machine.expire(TIMEOUT)
        for poll in machine.take_cut():
            machine.answer(poll, TIMEOUT, None)
        assert len(machine.started(TIMEOUT + 0.5)) == 2

    def test_an_update_says_when_the_pause_ends_if_that_is_later_than_the_backoff(self) -> None:
        machine, updates = Calls(), Updates()
        machine.wait(updates=updates)
        poll = machine.one(0.0)
        machine._rate.paused_until = 30.0
        machine.answer(poll, 1.0, error(500))
        assert updates[-1].next_poll_in == 29.0

    def test_one_operation_that_always_fails_costs_the_others_nothing(self) -> None:
        counts = []
        for names_ in (("a", "b"), ("a", "b", "bad")):
            machine = Calls(4)
            for name in names_:
                machine.wait(name)
            polls = machine.run(300.0, lambda name, _: error(500) if name == "bad" else "pending")
            counts.append([at for at, name in polls if name != "bad"])
            assert not machine.statistics(300.0).is_failing
        assert counts[0] == counts[1]

    def test_listeners_are_told_when_the_service_begins_to_fail_and_when_it_answers(self) -> None:
        events: list[Event] = []
        machine = Calls(listeners=Listeners((events.append,)))
        machine.wait(may_be_missing=True)
        machine.run(20.0, lambda _, at: error(500) if at < 15.0 else error(404))  # good, and no error
        changes = [(e.is_failing, e.error, e.waiting) for e in events if isinstance(e, ServiceChanged)]
        assert changes == [(True, "ServerError", 1), (False, None, 1)]


def order_after(machine: Calls, at: float) -> list[str]:
    """Spend all tokens, and return the order in which polls start then; none is answered."""
    spend(machine, at)
    order: list[str] = []
    while at < 4.0:
        order += names(machine.started(at))
        at = machine.wake_at()
    return order


class TestDeadlines:
    def test_a_driver_that_sends_the_next_poll_wakes_for_a_final_poll_that_is_to_be_repeated(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        machine.wait("final", timeout=5.0)
        machine.answer(machine.one(0.0), 0.0)
        final = machine.one(5.0)
        assert machine.wakes(5.0) == 7.0
        machine.wait("next", at=5.1)
        machine.answer(final, 5.1, error(500))
        assert machine.next_poll(5.1) is not None
        assert machine.wake_at() == 5.6
        assert not machine.is_settled(6.0)

    def test_a_driver_has_nothing_else_to_do_while_all_slots_are_taken(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        for name in ("one", "other", "third"):
            machine.wait(name)
        machine.answer(machine.one(0.0), 0.0)
        assert machine.next_poll(0.0) is not None
        assert machine.is_settled(1.0)
        assert not machine.is_settled(1.1)
        machine.give_up(machine.wait("third"), 0.0)
        assert machine.is_settled(1.0)
        machine.wait("final", timeout=0.5)
        machine.expire(0.5)
        assert not machine.is_settled(1.0)

    def test_a_driver_asks_again_if_another_poll_may_start(self) -> None:
        machine = Calls(2)
        for name in ("one", "other"):
            machine.wait(name)
        assert machine.next_poll(0.0) is not None
        assert not machine.is_settled(1.0)

    def test_a_driver_has_to_cut_off_what_no_wait_needs(self) -> None:
        machine = Calls()
        wait = machine.wait()
        machine.one(0.0)
        assert machine.is_settled(TIMEOUT)
        machine.give_up(wait, 1.0)
        assert not machine.is_settled(TIMEOUT)

    def test_the_final_poll_says_pending(self) -> None:
        machine = Calls(schedule=wait_fixed(4))
        wait = machine.wait(timeout=5.0)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(4.0), 4.0)
        assert machine.wakes(4.0) == 5.0
        assert wait.phase is WaitPhase.POLLING
        poll = machine.one(5.0)
        assert (wait.phase, poll.final) == (WaitPhase.FINAL, True)
        machine.answer(poll, 5.5)
        assert (wait.phase, wait.outcome, wait.polls) == (WaitPhase.ENDED, "ApprovalTimeoutError", 3)
        result: Any = wait.result()
        assert result.last_operation == operation()
        assert result.elapsed == 5.5
        assert machine.is_idle
        assert machine.wakes(5.5) == math.inf

    def test_a_poll_that_hangs_into_the_deadline_is_cut_off(self) -> None:
        machine = Calls()
        machine.wait(timeout=5.0)
        hanging = machine.one(0.0)
        final = machine.one(5.0)
        assert final.final
        assert list(machine.take_cut()) == [hanging]

    def test_a_poll_that_another_wait_needs_is_not(self) -> None:
        machine = Calls()
        for timeout in (5.0, 60.0):
            machine.wait(timeout=timeout)
        hanging = machine.one(0.0)
        final = machine.one(5.0)
        assert list(machine.take_cut()) == []
        machine.answer(final, 5.5)  # the other one goes on
        machine.answer(hanging, 6.0)
        assert machine.statistics(6.0).waiting == 1

    @pytest.mark.parametrize(
        ("answers", "outcome", "at"),
        [
            ([error(500), "approved"], "approved", 5.5),
            ([error(500), "pending"], "ApprovalTimeoutError", 5.5),
            ([error(500), error(503), error(500), error(500)], "ApprovalUnknownError", 6.5),
            ([error(503, retry_after=60), "approved"], "approved", 5.5),
            ([error(429, retry_after=1.5), "approved"], "approved", 6.5),
            ([error(429, retry_after=1.51)], "ApprovalUnknownError", 5.0),
            (4 * [error(404)], "ApprovalUnknownError", 6.5),
        ],
        ids=["approved", "pending", "unknown", "asked for", "refused", "too late", "404"],
    )
    def test_a_failed_final_poll_is_repeated_for_two_seconds(self, answers: list[Any], outcome: str, at: float) -> None:
        machine = Calls(schedule=wait_fixed(60))
        updates = Updates()
        wait = machine.wait(timeout=5.0, updates=updates)
        machine.answer(machine.one(0.0), 0.0)
        before, now = 0.0, 5.0
        for answer in answers:
            assert machine.wakes(before) == now
            machine.answer(machine.one(now), now, answer)
            due = updates[-1].next_poll_in
            before, now = now, now + (due or 0.0)
        assert (wait.outcome, before) == (outcome, at)
        assert updates.closed

    def test_a_final_poll_that_hangs_ends_the_wait_after_two_seconds_and_counts_once(self) -> None:
        machine = Calls()
        waits = [machine.wait(timeout=5.0) for _ in range(3)]
        machine.answer(machine.one(0.0), 0.0, error(404))
        for wait in waits:
            assert wait.outcome == "NotFoundError"
        waits = [machine.wait(timeout=5.0) for _ in range(3)]
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, error(500))
        machine.one(1.5)
        final = machine.one(5.0)
        assert machine.wake_at() == 7.0
        machine.expire(7.0)
        assert {wait.outcome for wait in waits} == {"ApprovalUnknownError"}
        result: Any = waits[0].result()
        assert (result.last_operation, str(result.last_error)) == (
            None,
            "GET /v2/operations/op got no answer within 2 s",
        )
        assert machine.statistics(7.0).transient_failures == 2
        assert machine.statistics(7.0).timeouts == 3
        assert final in machine.take_cut()

    def test_a_wait_whose_final_poll_cannot_start_ends_unknown(self) -> None:
        machine = Calls(connections=1)
        machine.wait("busy")
        machine.one(0.0)
        wait = machine.wait(timeout=1.0)
        assert machine.started(1.0) == []
        assert machine.statistics(2.0).lag == 1.0
        machine.expire(3.0)
        assert wait.outcome == "ApprovalUnknownError"
        result: Any = wait.result()
        assert result.last_error is None
        assert machine.statistics(3.0).transient_failures == 0

    @pytest.mark.parametrize(("starts_at", "failures"), [(2.001, 0), (2.0, 1)])
    def test_a_final_poll_that_hung_for_a_second_counts_as_a_failure(self, starts_at: float, failures: int) -> None:
        machine = Calls(connections=1)
        machine.wait("busy")
        busy = machine.one(0.0)
        wait = machine.wait(timeout=1.0)
        assert machine.started(1.0) == []
        machine.answer(busy, starts_at)
        assert machine.one(starts_at).final
        machine.expire(3.0)
        assert wait.outcome == "ApprovalUnknownError"
        assert machine.statistics(3.0).transient_failures == failures

    @pytest.mark.parametrize("why", [Unanswered.NO_SLOT, Unanswered.FAILING, Unanswered.PAUSE])
    def test_a_wait_whose_final_poll_could_not_be_sent_says_why(self, why: Unanswered) -> None:
        machine = Calls(5, schedule=wait_fixed(60))
        waits = [machine.wait(f"op-{number}", timeout=1.0, is_fresh=True) for number in range(21)]
        if why is Unanswered.FAILING:
            spend(machine, 1.0)
        elif why is Unanswered.PAUSE:
            machine._rate.paused_until = 60.0
        assert len(machine.started(1.0)) == (20 if why is Unanswered.NO_SLOT else 1)
        sent = [wait for wait in waits if wait.final_poll is not None]
        machine.expire(3.0)
        for wait in waits:  # if the service is at fault, with what another wait's poll has met
            reason = Unanswered.NO_ANSWER if wait in sent else why
            path = f"GET /v2/operations/{wait.polled.operation_id} " if wait in sent else ""
            cause = ";" if reason is Unanswered.NO_SLOT else f" (last failure: {path}got no answer"
            assert f"and {reason.value}{cause}" in str(wait.result())
            assert wait in sent or wait.error is None

    def test_a_wait_whose_final_poll_failed_says_so_even_if_the_repetition_could_not_be_sent(self) -> None:
        machine = Calls(connections=1, schedule=wait_fixed(60))
        wait = machine.wait(timeout=1.0, is_fresh=True)
        machine.answer(machine.one(1.0), 1.0, failure := error(500))
        machine.wait("busy", at=1.0)
        machine.one(1.0)
        assert machine.started(1.5) == []
        machine.expire(3.0)
        assert f"and its final poll failed (last failure: {failure});" in str(wait.result())

    @pytest.mark.parametrize(("at", "starts"), [(2.5, True), (2.51, False)])
    def test_a_final_poll_does_not_start_in_its_last_half_second(self, at: float, *, starts: bool) -> None:
        machine = Calls(connections=1, schedule=wait_fixed(60))
        machine.wait("busy")
        busy = machine.one(0.0)
        wait = machine.wait(timeout=1.0)
        machine.expire(1.0)
        machine.answer(busy, at)
        assert bool(machine.started(at)) is starts
        machine.expire(3.0)
        assert wait.outcome == "ApprovalUnknownError"

    @pytest.mark.parametrize(("stood_still", "ends_at"), [(0.5, 7.0), (0.51, 7.51), (3.0, 10.0), (3600.0, 3607.0)])
    def test_if_the_loop_stood_still_across_the_deadline_the_final_poll_gets_its_time_then(
        self, stood_still: float, ends_at: float
    ) -> None:
        machine = Calls(schedule=wait_fixed(60))
        waits = [machine.wait(timeout=5.0) for _ in range(2)]
        machine.answer(machine.one(0.0), 0.0)
        final = machine.one(5.0 + stood_still)
        assert final.final
        assert machine.wakes(5.0 + stood_still) == ends_at
        machine.answer(final, ends_at - 0.1, "approved")
        assert [wait.outcome for wait in waits] == ["approved"] * 2

    def test_if_it_stood_still_while_a_final_poll_was_in_flight_the_answer_still_counts(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        wait = machine.wait(timeout=5.0, is_fresh=True)
        final = machine.one(5.0)
        assert machine.started(9.0) == []  # the answer is there, but not read yet
        machine.answer(final, 9.0, "approved")
        assert wait.outcome == "approved"

    @pytest.mark.parametrize("woke_at", [3.0, 4.8])
    def test_if_it_stood_still_before_the_deadline_that_moves_no_end(self, woke_at: float) -> None:
        machine = Calls(schedule=wait_fixed(60))
        machine.wait(timeout=1.0)
        late = machine.wait(timeout=5.0)
        machine.answer(machine.one(0.0), 0.0)
        for now in (woke_at, 5.0, 6.9):
            machine.started(now)
        assert late.outcome == ""
        machine.started(7.0)
        assert late.outcome == "ApprovalUnknownError"

    def test_a_short_halt_at_the_end_of_a_final_poll_does_not_move_that_end(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        wait = machine.wait(timeout=5.0, is_fresh=True)
        for now in (5.0, 6.5, 7.6):
            machine.started(now)
        assert wait.outcome == "ApprovalUnknownError"

    def test_a_wait_whose_ticket_expires_now_has_expired(self) -> None:
        machine = Calls()
        assert machine.wait(timeout=0.0, patience=7.0).deadline == 7.0

    def test_the_later_deadlines_are_handled_the_more_of_them_at_once(self) -> None:
        machine = Calls()
        waits = [machine.wait(str(number), timeout=5.0, is_fresh=True) for number in range(1000)]
        handled = []
        for late in (0.1, 1.25):
            machine.expire(5.0 + late)
            assert machine.wake_at() <= 5.0
            handled.append(sum(wait.phase is WaitPhase.FINAL for wait in waits))
        assert handled == [BATCH, BATCH + int(2.5 * BATCH)]

    def test_a_machine_that_is_busy_with_many_deadlines_did_not_stand_still(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        waits = [machine.wait(f"op-{number}", timeout=5.0, is_fresh=True) for number in range(1000)]
        for now in (*(5.0 + turn / 10 for turn in range(20)), *(7.0 + turn / 100 for turn in range(9))):
            machine.started(now)
        assert {wait.outcome for wait in waits} == {"ApprovalUnknownError"}

    def test_no_final_poll_starts_for_a_wait_that_left_even_if_another_one_goes_on(self) -> None:
        machine = Calls(connections=1, schedule=wait_fixed(60))
        machine.wait("busy")
        busy = machine.one(0.0)
        leaving = machine.wait(timeout=1.0, at=0.0)
        machine.wait(at=0.0)
        assert machine.started(1.0) == []
        machine.give_up(leaving, 1.2)
        machine.answer(busy, 1.3)
        assert [poll.final for poll in machine.started(1.3)] == [False]

    def test_final_polls_take_no_room_of_ordinary_ones(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        machine.wait("final", timeout=1.0)
        machine.answer(machine.one(0.0), 0.0)
        machine.wait("hanging", at=0.1)
        machine.one(0.1)
        assert machine.one(1.0).final
        machine.wait("next", at=1.5)
        assert names(machine.started(1.5)) == ["next"]

    def test_a_poll_that_has_ended_is_not_cut_off(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        wait = machine.wait(timeout=5.0)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(5.0), 5.0)
        assert wait.outcome == "ApprovalTimeoutError"
        assert not machine.take_cut()

    def test_no_final_poll_gives_way(self) -> None:
        machine = Calls(connections=2, schedule=wait_fixed(60))
        machine.wait("final", timeout=1.0)
        machine.answer(machine.one(0.0), 0.0)
        assert machine.one(1.0).final
        machine.wait("other", at=1.0)
        other = machine.one(1.0)
        machine.wait("third", at=2.5)
        assert machine.started(2.5) == []
        assert list(machine.take_cut()) == [other]

    def test_deadlines_that_pass_before_a_final_poll_can_start_share_it(self) -> None:
        machine = Calls(connections=1)
        machine.wait("busy")
        busy = machine.one(0.0)
        waits = [machine.wait(timeout=timeout) for timeout in (1.0, 1.5, 1.8)]
        for at in (1.0, 1.5):
            assert machine.started(at) == []
        machine.answer(busy, 1.8)
        poll = machine.one(1.8)
        machine.answer(poll, 2.0)
        assert {wait.outcome for wait in waits} == {"ApprovalTimeoutError"}

    def test_an_ordinary_poll_in_between_is_the_repeat_of_a_final_one(self) -> None:
        machine = Calls()
        goes_on = machine.wait(schedule=wait_fixed(5.01))
        wait = machine.wait(timeout=5.0, schedule=wait_fixed(60))
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(5.0), 5.0, error(500))
        poll = machine.one(5.01)
        assert not poll.final
        machine.answer(poll, 5.02)
        assert (wait.outcome, goes_on.outcome) == ("ApprovalTimeoutError", "")

    def test_a_final_poll_does_for_an_ordinary_one_that_is_due(self) -> None:
        machine = Calls(schedule=wait_fixed(5))
        machine.wait()
        machine.wait(timeout=5.0)
        machine.answer(machine.one(0.0), 0.0)
        poll = machine.one(5.0)
        assert poll.final
        machine.answer(poll, 5.5)
        assert machine.wake_at() == 5.5
        assert machine.started(5.5) == []
        assert machine.wake_at() == 10.5

    def test_a_final_poll_that_fails_beside_one_in_flight_sets_nothing(self) -> None:
        machine = Calls(schedule=wait_fixed(1))
        machine.wait()
        ending = machine.wait(timeout=5.0)
        hanging = machine.one(0.0)
        machine.answer(machine.one(5.0), 5.0, error(500))
        machine.give_up(ending, 5.0)
        machine.answer(hanging, 8.0, error(500))
        assert machine.started(8.9) == []
        assert names(machine.started(9.0)) == ["op"]

    def test_the_last_wait_that_needs_a_final_poll_takes_it_along(self) -> None:
        machine = Calls()
        first, second = machine.wait(timeout=5.0), machine.wait(timeout=5.5)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, error(500))
        hanging = machine.one(1.5)
        final = machine.one(5.0)
        assert list(machine.take_cut()) == []
        machine.expire(5.5)
        assert list(machine.take_cut()) == [hanging]
        machine.give_up(first, 6.0)
        assert list(machine.take_cut()) == [final]
        assert machine.one(6.0) is second.final_poll

    @pytest.mark.parametrize("answer", ["pending", "approved"])
    def test_an_expired_ticket_has_one_poll_without_a_deadline(self, answer: str) -> None:
        machine = Calls()
        wait = machine.wait(ticket=TICKET, age=30.0, timeout=DefaultTimeout.FROM_TARGET)
        assert machine.wake_at() == 0.0
        poll = machine.one(0.0)
        assert not poll.final
        assert machine.wake_at() == TIMEOUT
        machine.answer(poll, 9.0, answer)
        assert wait.outcome == ("approved" if answer == "approved" else "ApprovalTimeoutError")

    def test_the_poll_of_an_expired_ticket_is_repeated_for_two_seconds_from_its_first_failure(self) -> None:
        machine = Calls()
        wait = machine.wait(ticket=TICKET, age=20.0, timeout=DefaultTimeout.FROM_TARGET)
        polls = machine.run(60.0, lambda *_: error(500))
        assert [at for at, _ in polls] == [0.0, 0.5, 1.0, 1.5]
        assert wait.outcome == "ApprovalUnknownError"

    def test_failures_of_polls_that_other_callers_want_give_an_expired_ticket_no_more_time(self) -> None:
        machine = Calls()
        wait = machine.wait(ticket=TICKET, age=20.0, timeout=DefaultTimeout.FROM_TARGET)
        for at in (0.0, 0.4, 0.8, 1.2):  # each before the first one would be repeated
            machine.answer(machine.one(at), at, error(500))
            machine.wait(at=at + 0.4)
        assert wait.outcome == "ApprovalUnknownError"

    @pytest.mark.parametrize(("options", "at"), [({}, 120.0), ({"patience": 3.0}, 3.0)])
    def test_an_expired_ticket_whose_poll_cannot_start_gets_another(self, options: dict[str, Any], at: float) -> None:
        machine = Calls(connections=1)
        machine.wait("busy")
        busy = machine.one(0.0)
        wait = machine.wait(ticket=TICKET, age=20.0, timeout=DefaultTimeout.FROM_TARGET, **options)
        machine.started(at)
        machine.take_cut()
        machine.answer(busy, at, None)
        assert machine.one(at).final
        assert wait.outcome == ""

    @pytest.mark.parametrize(("age", "deadline"), [(0.0, 20.0), (15.0, 5.0)])
    def test_a_ticket_has_what_is_left_of_its_lifetime(self, age: float, deadline: float) -> None:
        machine = Calls()
        assert machine.wait(ticket=TICKET, age=age, timeout=DefaultTimeout.FROM_TARGET).deadline == deadline

    def test_a_bare_id_without_a_timeout_has_no_end(self) -> None:
        assert Calls().wait(timeout=None).deadline == math.inf


class TestResults:
    @pytest.mark.parametrize(
        ("answer", "outcome"),
        [
            (operation(approved=True), "approved"),
            (operation("other", approved=True), "OperationMismatchError"),
            (operation(user_id="FF"), "OperationMismatchError"),
            (operation(state="denied"), "InconsistentOperationError"),
            (error(404), "NotFoundError"),
            (error(401), "AuthenticationError"),
            (error(500), ""),
            (operation(), ""),
        ],
    )
    @pytest.mark.parametrize("count", [1, 2, 2 * BATCH + 1])
    def test_the_first_answer_that_decides_ends_each_wait(self, answer: Any, outcome: str, count: int) -> None:
        machine = Calls()
        waits = [machine.wait(ticket=TICKET, age=6.0) for _ in range(count)]
        machine.answer(machine.one(0.0), 0.5, answer)
        assert {wait.outcome for wait in waits} == {outcome}
        if outcome and outcome != "approved":
            assert len({id(wait.result()) for wait in waits}) == count

    @pytest.mark.parametrize(
        ("options", "outcome"),
        [
            ({}, "NotFoundError"),
            ({"may_be_missing": True}, ""),
            ({"ticket": TICKET, "age": 4.9}, ""),
            ({"ticket": TICKET, "age": 5.0}, "NotFoundError"),
        ],
    )
    def test_a_404_counts_as_pending_before_and_soon_after_a_create(
        self, options: dict[str, Any], outcome: str
    ) -> None:
        machine = Calls()
        wait = machine.wait(**options)
        machine.answer(machine.one(0.0), 0.5, error(404))
        assert wait.outcome == outcome
        assert (machine.wake_at() == 0.5) if outcome else (machine.started(0.5) == [] and machine.wake_at() == 1.5)

    def test_a_404_is_a_failure_once_the_operation_was_seen(self) -> None:
        machine = Calls()
        wait, other = machine.wait(), machine.wait(may_be_missing=True)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, error(404))
        assert (wait.outcome, other.outcome) == ("", "")
        assert machine.statistics(1.0).transient_failures == 1
        assert machine.started(1.4) == []
        machine.answer(machine.one(1.5), 1.5, error(404))
        assert machine.statistics(1.5).transient_failures == 2

    def test_odd_answers_are_failures_of_the_service(self) -> None:
        machine = Calls()
        machine.wait()
        machine.run(30.0, lambda _, at: error(403) if at else "pending")
        assert machine.statistics(30.0).is_failing

    def test_a_first_poll_that_is_refused_says_nothing_about_the_service(self) -> None:
        machine = Calls(schedule=wait_fixed(100))
        spend(machine, 0.0)
        wait = machine.wait("new")
        machine.answer(machine.one(0.2), 0.2, error(403))
        assert (wait.outcome, machine.statistics(0.2).is_failing) == ("ServerError", True)
        machine.wait("next", at=0.2)
        assert names(machine.started(0.2)) == ["next"]  # its token was returned

    def test_an_answer_from_a_cache_is_neither_good_nor_bad(self) -> None:
        machine = Calls(schedule=wait_fixed(100))
        wait, endless = machine.wait(timeout=200.0), machine.wait(timeout=None)
        machine.answer(machine.one(0.0), 0.0)
        spent = machine._budget.room(100.0)
        polls = machine.run(250.0, lambda *_: cached(), since=100.0)
        assert (wait.outcome, endless.outcome) == ("ApprovalUnknownError", "")
        assert "(last failure: a cache said so)" in str(wait.result())
        assert (machine._budget.room(250.0), machine.statistics(250.0).is_failing) == (spent, False)
        assert machine.statistics(250.0).transient_failures == len(polls) > 20
        machine.answer(machine.started(260.0)[0], 260.0, "approved")
        assert endless.outcome == "approved"

    def test_a_minute_of_odd_answers_ends_a_wait_without_a_deadline(self) -> None:
        machine = Calls()
        endless, other = machine.wait(), machine.wait(timeout=300.0)
        odd = error(403)
        polls = machine.run(400.0, lambda _, at: odd if at > 100.0 else error(500) if at else "pending")
        first = next(at for at, _ in polls if at > 100.0)
        ended = next(at for at, _ in polls if at >= first + 60.0)
        assert (endless.outcome, other.outcome) == ("ServerError", "ApprovalUnknownError")
        assert endless.polls == len([at for at, _ in polls if at <= ended])

    @pytest.mark.parametrize("count", [1, 60, 1000])
    def test_a_minute_of_nothing_but_refusals_of_the_key_ends_all_waits(self, count: int) -> None:
        machine = Calls()
        waits = [machine.wait(f"op-{number}", timeout=300.0) for number in range(count)]
        updates = Updates()
        waits.append(machine.wait("op-0", timeout=None, updates=updates))
        polls = machine.run(74.0, lambda _, at: error(401) if at >= 1.0 else "pending")
        for number, wait in enumerate(waits):
            ended = wait.result()
            assert isinstance(ended, AuthenticationError)
            assert ended.path == f"/v2/operations/op-{number % count}"
            assert ended.path in str(ended)
        assert updates.closed
        assert machine.is_idle
        assert 61.0 <= polls[-1][0] <= 66.0

    @pytest.mark.parametrize(
        ("others", "outcome"),
        [
            (error(503), ""),
            (error(429), ""),
            (error(403), ""),
            (UNREADABLE, ""),
            (replaced_key(), ""),
            (no_key(), "AuthenticationError"),
            (no_answer(), "AuthenticationError"),
        ],
        ids=["503", "429", "403", "unreadable", "replaced key", "no key", "no answer"],
    )
    def test_each_other_answer_begins_that_minute_anew(self, others: Any, outcome: str) -> None:
        machine = Calls()
        waits = [machine.wait(f"op-{number}", timeout=300.0) for number in range(60)]
        machine.run(120.0, lambda _, at: (others if at % 40.0 < 4.0 else error(401)) if at >= 1.0 else "pending")
        assert {wait.outcome for wait in waits} == {outcome}

    def test_refusals_of_the_key_among_good_answers_end_no_wait(self) -> None:
        machine = Calls()
        waits = [machine.wait(f"op-{number}", timeout=300.0) for number in range(3)]
        machine.run(200.0, lambda name, at: error(401) if at and name != "op-0" else "pending")
        assert {wait.outcome for wait in waits} == {""}

    def test_a_minute_without_an_answer_after_one_refusal_of_the_key_ends_no_wait(self) -> None:
        machine = Calls()
        wait = machine.wait(timeout=300.0)
        machine.run(200.0, lambda _, at: no_answer() if at > 2.0 else error(401) if at else "pending")
        assert wait.outcome == ""

    def test_a_refusal_of_the_key_from_before_a_time_without_waits_does_not_count(self) -> None:
        machine = Calls()
        machine.wait("old")
        machine.answer(machine.one(0.0), 0.0, error(401))
        wait, other = machine.wait("op", at=100.0, timeout=60.0), machine.wait("other", at=100.0, timeout=60.0)
        for poll in machine.started(100.0)[:1]:
            machine.answer(poll, 100.0, error(401))
        assert (wait.outcome, other.outcome) == ("AuthenticationError", "")

    def test_very_many_waits_end_over_several_turns_once_the_key_is_revoked(self) -> None:
        machine = Calls()
        waits = [machine.wait(f"op-{number}") for number in range(2 * BATCH + 3)]
        machine.run(60.9, lambda _, at: error(401) if at >= 1.0 else "pending")
        poll, *others = machine.started(70.0)
        more = machine.finish_poll(poll, error(401), 70.0)
        assert more is not None
        ended = [wait for wait in waits if wait.outcome]
        assert len(ended) == BATCH
        machine.give_up(next(wait for wait in waits if not wait.outcome), 70.0)
        machine.answer(next(poll for poll in others if not poll.is_over), 70.0, "approved")
        assert machine.apply_more(more, 70.1)
        assert not machine.apply_more(more, 70.2)
        outcomes = sorted(wait.outcome for wait in waits)
        assert outcomes == ["", *["AuthenticationError"] * (2 * BATCH + 1), "approved"]
        assert machine.is_idle

    def test_a_404_that_counted_as_pending_is_no_sight_of_the_operation(self) -> None:
        machine = Calls()
        patient = machine.wait(may_be_missing=True)
        machine.answer(machine.one(0.0), 0.0, error(404))
        wait = machine.wait(at=0.5)
        machine.answer(machine.one(0.5), 0.5, error(404))
        assert (wait.outcome, patient.outcome) == ("NotFoundError", "")

    def test_the_backoff_counts_failures_in_a_row_and_the_pause_that_is_asked_for(self) -> None:
        machine = Calls()
        machine.wait()
        for at, answer in (
            (0.0, error(500)),
            (0.5, error(500)),
            (1.5, "pending"),
            (2.5, error(429, retry_after=7.0)),
            (9.5, error(500)),
            (10.5, "pending"),
        ):
            assert machine.started(at - 0.01) == []
            machine.answer(machine.one(at), at, answer)

    def test_updates_say_what_a_poll_brought_and_when_the_next_one_is_due(self) -> None:
        machine = Calls(schedule=wait_fixed(3))
        updates = Updates()
        machine.wait(timeout=5.0, updates=updates)
        failure = error(500)
        for at, answer in ((0.0, "pending"), (3.0, failure), (3.5, "pending"), (5.0, "pending")):
            machine.answer(machine.one(at), at, answer)
        assert [(u.operation, u.error, u.polls, u.elapsed, u.next_poll_in) for u in updates] == [
            (operation(), None, 1, 0.0, 3.0),
            (None, failure, 2, 3.0, 0.5),
            (operation(), None, 3, 3.5, 1.5),
            (operation(), None, 4, 5.0, None),
        ]
        assert updates.closed

    def test_waits_that_are_told_and_waits_that_are_not_share_a_poll(self) -> None:
        machine = Calls()
        updates = Updates()
        wait, told = machine.wait(), machine.wait(updates=updates)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, "approved")
        assert (wait.outcome, told.outcome) == ("approved", "approved")
        assert [update.next_poll_in for update in updates] == [1.0, None]
        assert updates[-1].operation == operation(approved=True)

    def test_very_many_waits_take_several_turns_and_one_that_leaves_meanwhile_keeps_its_end(self) -> None:
        machine = Calls()
        waits = [machine.wait() for _ in range(2 * BATCH + 1)]
        more = machine.finish_poll(machine.one(0.0), operation(approved=True), 0.0)
        assert more is not None
        assert [wait.outcome for wait in waits].count("approved") == BATCH
        machine.give_up(waits[-1], 0.0)
        assert machine.apply_more(more, 0.1)
        assert not machine.apply_more(more, 0.2)
        assert {wait.outcome for wait in waits[:-1]} == {"approved"}
        assert machine.is_idle
        assert machine.statistics(0.2).in_flight == 0

    def test_a_bug_ends_the_waits_of_its_poll_and_no_others(self) -> None:
        machine = Calls()
        wait, other = machine.wait(), machine.wait("other")
        poll, _ = machine.started(0.0)
        machine.fail_poll(poll, ZeroDivisionError(), 0.5)
        machine.fail_poll(poll, ZeroDivisionError(), 0.5)
        assert machine.wake_at() == 0.5
        assert (wait.outcome, other.outcome) == ("ZeroDivisionError", "")
        assert machine.statistics(0.5).in_flight == 1


class TestLeaving:
    def test_the_last_one_takes_the_polls_along(self) -> None:
        machine = Calls()
        first, second = machine.wait(), machine.wait()
        poll = machine.one(0.0)
        machine.give_up(first, 0.5)
        assert list(machine.take_cut()) == []
        machine.give_up(second, 0.5)
        machine.give_up(second, 0.5)
        assert list(machine.take_cut()) == [poll]
        machine.answer(poll, 0.6, None)
        assert machine.is_idle
        assert machine.started(99.0) == []

    def test_a_final_poll_of_the_last_one_is_cut_off_and_others_are_not(self) -> None:
        machine = Calls()
        wait, other = machine.wait(timeout=5.0), machine.wait("other", timeout=5.0)
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0, error(500))
        finals = [poll for poll in machine.started(5.0) if poll.final]
        machine.give_up(wait, 5.5)
        assert [poll.polled.operation_id for poll in machine.take_cut()] == ["op"]
        assert [poll.is_over for poll in finals] == [True, False]
        assert other.outcome == ""

    def test_a_stopped_wait_ends_with_none(self) -> None:
        machine = Calls()
        wait = machine.wait()
        machine.end(wait, None, 1.0)
        machine.end(wait, ZeroDivisionError(), 1.0)
        assert wait.result() is None
        assert machine.is_idle

    def test_all_waits_can_be_ended_while_they_are_listed(self) -> None:
        machine = Calls()
        gone, *waits = [machine.wait(name) for name in ("a", "b", "b")]
        gone.is_cancelled = True
        for wait in machine.waits():
            machine.end(wait, ZeroDivisionError(), 1.0)
        assert {wait.outcome for wait in waits} == {"ZeroDivisionError"}
        machine.leave(gone, 1.0)
        assert machine.is_idle

    @pytest.mark.parametrize("order", [range(5), range(4, -1, -1), [2, 0, 4, 1, 3]], ids=["first", "last", "any"])
    def test_an_operation_lets_go_of_waits_that_have_ended(self, order: Sequence[int]) -> None:
        machine = Calls()
        waits = [machine.wait() for _ in order]
        polled = waits[0].polled
        for ended, k in enumerate(order, 1):
            machine.give_up(waits[k], 0.0)
            assert (polled.live, polled.before_deadline) == (5 - ended, 5 - ended)
            assert polled.active_waits() == [wait for wait in waits if not wait.done()]
            assert len(polled.waits) <= 2 * polled.live

    def test_waits_and_operations_and_polls_hold_nothing_else(self) -> None:
        machine = Calls()
        wait = machine.wait()
        for thing in (wait, wait.polled, machine.one(0.0)):
            assert not hasattr(thing, "__dict__")


class Learner(wait_adaptive):
    """Polls every two seconds, and keeps what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[float, float | None]] = []

    def __call__(self, retry_state: object) -> float:
        return 2.0

    def observe(self, after: float, until: float | None) -> None:
        self.observed.append((after, until))


class TestLearning:
    @pytest.mark.parametrize(
        ("ticket", "age", "observed"),
        [(TICKET, 0.5, [(2.5, 5.5)]), (TICKET, 1.0, []), (None, 0.0, [])],
        ids=["began with it", "resumed", "bare id"],
    )
    def test_only_waits_that_began_with_their_operation_teach(
        self, ticket: ApprovalTicket | None, age: float, observed: list[Any]
    ) -> None:
        schedule = Learner()
        machine = Calls(schedule=schedule)
        machine.wait(ticket=ticket, age=age)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(2.0), 3.0)
        machine.answer(machine.one(5.0), 5.0, "approved")
        assert schedule.observed == observed

    def test_each_schedule_learns_once(self) -> None:
        schedule, other = Learner(), Learner()
        machine = Calls(schedule=schedule)
        for each in (None, other, schedule, other, wait_fixed(1)):
            machine.wait(ticket=TICKET, schedule=each)
        machine.answer(machine.one(0.0), 0.0, "approved")
        assert schedule.observed == other.observed == [(0.0, 0.0)]

    def test_a_schedule_that_does_not_learn_is_told_nothing(self, caplog: pytest.LogCaptureFixture) -> None:
        machine = Calls(schedule=wait_fixed(1))
        machine.wait(ticket=TICKET)
        machine.answer(machine.one(0.0), 0.0, "approved")
        assert caplog.records == []

    def test_a_schedule_of_a_waits_own_learns_alone(self) -> None:
        schedule, own = Learner(), Learner()
        machine = Calls(schedule=schedule)
        machine.wait(ticket=TICKET, schedule=own)
        machine.answer(machine.one(0.0), 0.0, "approved")
        assert (schedule.observed, own.observed) == ([], [(0.0, 0.0)])

    def test_an_operation_that_was_not_approved_teaches_until_when_it_was_pending(self) -> None:
        schedule = Learner()
        machine = Calls(schedule=schedule)
        wait = machine.wait(ticket=TICKET)
        machine.give_up(machine.wait("unseen", ticket=TICKET), 0.0)
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(2.0), 3.0)
        machine.give_up(wait, 4.0)
        assert schedule.observed == [(2.0, None)]


class TestRecords:
    """What errors, events and counts say, to the second and to the poll."""

    @staticmethod
    def watched(slots: int = 64, **options: Any) -> tuple[Calls, list[Event]]:
        events: list[Event] = []
        return Calls(slots, listeners=Listeners((events.append,)), **options), events

    def test_a_timeout_tells_of_its_wait(self) -> None:
        machine, events = self.watched(schedule=wait_fixed(60))
        wait = machine.wait(at=3.0, ticket=TICKET, age=1.0, timeout=5.0)
        machine.answer(machine.one(3.0), 3.0)
        machine.answer(machine.one(8.0), 8.5)
        result: Any = wait.result()
        assert (result.operation_id, result.polls, result.elapsed, result.ticket) == ("op", 2, 5.5, TICKET)
        assert (result.last_operation, result.last_error) == (operation(), None)
        (ended,) = (event for event in events if isinstance(event, WaitEnded))
        assert (ended.seconds, ended.age) == (5.5, 6.5)

    def test_a_timeout_of_an_operation_that_never_came_tells_of_the_404(self) -> None:
        machine, _ = self.watched()
        missing = error(404)
        wait = machine.wait(at=3.0, timeout=5.0, may_be_missing=True)
        for at in (3.0, 4.0, 5.0, 6.0, 7.0, 8.0):
            machine.answer(machine.one(at), at, missing)
        result: Any = wait.result()
        assert (type(result).__name__, result.last_operation) == ("ApprovalTimeoutError", None)
        assert result.last_error is missing

    @pytest.mark.parametrize("ends", ["hangs", "fails", "refuses"])
    def test_an_unknown_outcome_tells_of_the_failure_and_never_of_an_operation(self, ends: str) -> None:
        machine, events = self.watched(schedule=wait_fixed(60))
        updates = Updates()
        wait = machine.wait(at=3.0, timeout=5.0, updates=updates)
        machine.answer(machine.one(3.0), 3.0)
        poll = machine.one(8.0)
        failure = error(429, retry_after=5.0) if ends == "refuses" else error(503)
        if ends == "hangs":
            machine.expire(10.0)
        else:
            machine.answer(poll, 8.5, failure)
            while not wait.outcome:
                machine.answer(machine.one(machine.wakes(8.5)), 10.0, failure)
        result: Any = wait.result()
        assert (type(result).__name__, result.last_operation, result.ticket) == ("ApprovalUnknownError", None, None)
        assert result.last_error is failure if ends != "hangs" else "within 2 s" in str(result.last_error)
        assert ends == "hangs" or [update.error for update in updates[1:]] == [failure] * (len(updates) - 1)
        (ended,) = (event for event in events if isinstance(event, WaitEnded))
        assert ended.seconds == {"hangs": 7.0, "fails": 7.0, "refuses": 5.5}[ends]

    def test_outcomes_are_counted(self) -> None:
        machine, _ = self.watched()
        for number in range(3):
            machine.wait(f"approved-{number}")
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0, "approved")
        for number in range(2):
            machine.wait(f"late-{number}", at=1.0, timeout=1.0, schedule=wait_fixed(60))
        for poll in (*machine.started(1.0), *machine.started(2.0)):
            machine.answer(poll, 2.0)
        for poll in machine.started(2.0):
            machine.answer(poll, 2.0)
        counted = machine.statistics(2.0)
        assert (counted.approvals, counted.timeouts, counted.polls, counted.waiting) == (3, 2, 7, 0)

    def test_what_a_schedule_that_raises_ends_is_told_in_time(self) -> None:
        class Broken(wait_base):
            def __call__(self, retry_state: object) -> float:
                raise RuntimeError

        machine, events = self.watched(schedule=Broken())
        waits = [machine.wait(at=1.0), machine.wait(at=1.0)]
        machine.answer(machine.one(1.0), 2.5)
        assert [event.seconds for event in events if isinstance(event, WaitEnded)] == [1.5, 1.5]
        assert waits[0].result() is not waits[1].result()

    def test_what_a_bug_ends_is_told_in_time_and_nothing_cuts_its_poll_off(self) -> None:
        machine, events = self.watched()
        machine.wait(at=1.0)
        poll = machine.one(1.0)
        machine.fail_poll(poll, ZeroDivisionError(), 2.5)
        assert [event.seconds for event in events if isinstance(event, WaitEnded)] == [1.5]
        assert not machine.take_cut()
        assert machine.started(2.5) == []

    def test_a_poll_that_brought_nothing_is_not_cut_off(self) -> None:
        machine, _ = self.watched()
        wait = machine.wait()
        poll = machine.one(0.0)
        machine.answer(poll, 1.0, None)
        machine.give_up(wait, 1.0)
        assert not machine.take_cut()

    def test_a_poll_that_was_cut_off_is_no_failure(self) -> None:
        machine, events = self.watched()
        wait = machine.wait()
        poll = machine.one(0.0)
        machine.give_up(wait, 0.5)
        machine.answer(poll, 0.5, None)
        assert machine.statistics(0.5).transient_failures == 0
        assert [e.result.value for e in events if isinstance(e, PollEnded)] == ["cut_off"]

    def test_final_polls_that_get_no_answer_are_failures_of_the_service(self) -> None:
        machine, events = self.watched(schedule=wait_fixed(60))
        for number, timeout in enumerate((5.0, 16.0)):
            machine.wait(f"op-{number}", timeout=timeout)
        for poll in machine.started(0.0):
            machine.answer(poll, 0.0)
        for at in (5.0, 7.0, 16.0, 18.0):
            machine.started(at)
        (change,) = (event for event in events if isinstance(event, ServiceChanged))
        assert (change.is_failing, change.error, change.seconds) == (True, "RequestTimeoutError", 13.0)

    @pytest.mark.parametrize(
        ("answer", "outcome", "error_type"),
        [
            (operation(approved=True), WaitOutcome.APPROVED, None),
            (operation(state="denied"), WaitOutcome.REJECTED, "InconsistentOperationError"),
            (error(404), WaitOutcome.FAILED, "NotFoundError"),
        ],
        ids=["approved", "rejected", "failed"],
    )
    def test_the_end_of_a_wait_is_told_in_time(self, answer: Any, outcome: WaitOutcome, error_type: str | None) -> None:
        machine, events = self.watched()
        wait = machine.wait(at=3.0, ticket=TICKET, age=6.0)
        machine.answer(machine.one(3.0), 4.5, answer)
        (ended,) = (event for event in events if isinstance(event, WaitEnded))
        assert (ended.outcome, ended.error, ended.seconds) == (outcome, error_type, 1.5)
        result: Any = wait.result()
        assert result is answer or result.last_operation is answer

    def test_each_poll_is_told_with_what_it_brought(self) -> None:
        machine, events = self.watched()
        machine.wait()
        for at, answer in ((0.0, error(500)), (0.5, "pending"), (1.5, "approved")):
            machine.answer(machine.one(at), at, answer)
        told = [(event.result.value, event.error) for event in events if isinstance(event, PollEnded)]
        assert told == [("failed", "ServerError"), ("pending", None), ("approved", None)]

    def test_a_poll_that_hangs_is_told_by_its_operation(self) -> None:
        machine, _ = self.watched()
        updates = Updates()
        machine.wait(at=3.0, updates=updates)
        poll = machine.one(3.0)
        machine.expire(13.0)
        machine.answer(poll, 13.0, None)
        assert str(updates[0].error) == "GET /v2/operations/op got no answer within 10 s"
        assert updates[0].elapsed == 10.0

    def test_a_poll_tells_by_how_much_it_is_late(self, caplog: pytest.LogCaptureFixture) -> None:
        machine, _ = self.watched(1, schedule=wait_fixed(60))
        machine.wait("busy")
        machine.wait("late", at=1.0)
        busy = machine.one(1.0)
        assert busy.lag == 1.0
        machine.answer(busy, 4.0)
        late = machine.one(4.0)
        assert late.lag == 3.0
        machine.answer(late, 4.0)
        for number in range(10):
            machine.wait(f"later-{number}", at=4.0)
            machine.answer(machine.one(6.0 + number), 6.0 + number)
        (line,) = (record.getMessage() for record in caplog.records)
        assert line.startswith("polls have been late for over 5 s, now by 3.0 s, with 4 waits")

    def test_a_bug_at_the_end_of_a_wait_ends_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(*_: object) -> None:
            raise ZeroDivisionError

        machine, events = self.watched(1)
        machine.wait("busy")
        machine.one(0.0)
        broken_wait, other = machine.wait(at=1.0, timeout=1.0), machine.wait("other", at=1.0, timeout=3.0)
        machine.expire(2.0)
        monkeypatch.setattr(machine_module, "unknown_error", broken)
        machine.expire(4.0)
        assert (broken_wait.outcome, other.phase) == ("ZeroDivisionError", WaitPhase.FINAL)
        assert [event.seconds for event in events if isinstance(event, WaitEnded)] == [3.0]

    @pytest.mark.parametrize("waits", [1, 2])
    def test_a_bug_of_a_schedule_or_a_rule_ends_its_waits(self, monkeypatch: pytest.MonkeyPatch, waits: int) -> None:
        def broken(*_: object, **__: object) -> None:
            raise ConfigurationError("no number", argument="schedule")

        machine, events = self.watched()
        for _ in range(waits):
            machine.wait()
        poll = machine.one(0.0)
        monkeypatch.setattr(machine_module, "next_delay" if waits == 1 else "poll_verdict", broken)
        machine.answer(poll, 3.0)
        ends = [(event.seconds, event.error) for event in events if isinstance(event, WaitEnded)]
        assert ends == waits * [(3.0, "ConfigurationError")]


class TestSharing:
    def test_waits_that_share_polls_count_their_own_attempts(self) -> None:
        machine = Calls(schedule=wait_exponential())
        first = machine.wait()
        machine.answer(machine.one(0.0), 0.0)
        second = machine.wait(at=0.5)
        for at in (0.5, 1.5, 3.5):
            machine.answer(machine.one(at), at)
        assert (first.attempt, second.attempt) == (4, 4)

    def test_a_caller_who_joins_takes_no_attempt_from_another_wait(self) -> None:
        machine = Calls()
        wait = machine.wait()
        poll = machine.one(0.0)
        machine.give_up(machine.wait(at=0.2), 0.4)  # during a poll
        machine.answer(poll, 0.5)
        machine.answer(machine.one(0.5), 0.5)
        machine.give_up(machine.wait(at=0.7, is_fresh=True, schedule=wait_fixed(60)), 0.9)  # between two
        machine.answer(machine.one(1.5), 1.5)
        assert wait.attempt == 4

    def test_a_wait_counts_no_attempt_before_its_own_schedule_would_poll(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        often, seldom = machine.wait(schedule=wait_fixed(1)), machine.wait(schedule=wait_fixed(10))
        for at in range(5):
            machine.answer(machine.one(float(at)), float(at))
        assert (often.attempt, seldom.attempt) == (6, 2)
        machine.give_up(machine.wait(at=4.5), 4.5)
        machine.answer(machine.one(5.0), 5.0)
        assert (often.attempt, seldom.attempt) == (7, 2)

    def test_a_caller_who_comes_and_goes_changes_no_schedule(self) -> None:
        machine = Calls(schedule=wait_exponential(max=64))
        stays = machine.wait()
        for now in range(0, 100, 5):
            machine.run(now + 4.0, lambda *_: "pending", since=now)
            passer_by = machine.wait(at=now + 4.0)
            machine.run(now + 5.0, lambda *_: "pending", since=now + 4.0)
            machine.give_up(passer_by, now + 5.0)
        assert stays.attempt <= 8  # 1, 2, 4, 8, 16, 32 s of a hundred

    def test_waits_that_share_polls_poll_as_one(self) -> None:
        counts = []
        for waits in (1, 5, 20):
            machine = Calls(schedule=wait_adaptive(jitter=0.0))
            for _ in range(waits):
                machine.wait()
            counts.append(len(machine.run(120.0, lambda *_: "pending")))
        assert len(set(counts)) == 1

    def test_a_failure_counts_once_however_many_batches_of_waits_there_are(self) -> None:
        machine = Calls()
        for _ in range(3 * BATCH):
            machine.wait()
        machine.answer(machine.one(0.0), 0.0, error(404))
        waits = [machine.wait() for _ in range(3 * BATCH)]
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, error(404))
        assert machine.statistics(1.0).transient_failures == 1
        assert waits[0].polled.failures == 1
        assert machine.wakes(1.0) == 1.5

    def test_operations_share_the_list_of_what_learns_from_them(self) -> None:
        machine = Calls(schedule=Learner())
        first, second = machine.wait("a", ticket=TICKET), machine.wait("b", ticket=TICKET)
        assert first.polled.learners is second.polled.learners
        machine.wait("b", ticket=TICKET)
        assert first.polled.learners is second.polled.learners

    def test_a_single_wait_asks_its_schedule_by_its_age_and_its_attempt(self) -> None:
        asked: list[tuple[float | None, int]] = []

        class Asked(wait_base):
            def __call__(self, retry_state: Any) -> float:
                asked.append((retry_state.seconds_since_start, retry_state.attempt_number))
                return 1.0

        machine = Calls(schedule=Asked())
        machine.wait(at=10.0, ticket=TICKET, age=0.5, is_fresh=True)
        machine.answer(machine.one(11.0), 11.5)
        machine.answer(machine.one(12.5), 12.5)
        assert asked == [(0.5, 1), (2.0, 2), (3.0, 3)]

    def test_a_404_is_a_failure_once_a_single_wait_has_seen_the_operation(self) -> None:
        machine = Calls()
        wait = machine.wait()
        machine.answer(machine.one(0.0), 0.0)
        machine.answer(machine.one(1.0), 1.0, error(404))
        assert wait.outcome == ""
        assert machine.wakes(1.0) == 1.5

    def test_the_only_wait_of_an_operation_gets_the_very_error_of_its_poll(self) -> None:
        machine = Calls()
        wait, failure = machine.wait(), error(404)
        machine.answer(machine.one(0.0), 0.0, failure)
        assert wait.result() is failure

    def test_of_two_queues_the_one_that_is_due_longer_goes_first(self) -> None:
        machine = Calls(1, schedule=wait_fixed(60))
        machine.wait("bad")
        machine.answer(machine.one(0.0), 0.0, error(500))  # due again at 0.5
        for name, at in (("before", 0.4), ("after", 0.6)):
            machine.wait(name, at=at)
        order = []
        for _ in range(3):
            poll = machine.one(0.7)
            order.append(poll.polled.operation_id)
            machine.answer(poll, 0.7)
        assert order == ["before", "bad", "after"]

    def test_a_final_poll_that_goes_on_for_others_holds_up_another_for_two_seconds_at_most(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        machine._rate.paused_until = 100.0
        machine.wait("a", timeout=5.0)
        machine.wait("a")
        final = machine.one(5.0)
        machine.wait("b", at=5.0, timeout=1.0)
        assert machine.wakes(6.0) == 7.0
        assert names(machine.started(7.0)) == ["b"]
        assert not final.is_over

    def test_a_final_poll_that_is_cut_off_holds_up_no_other(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        machine._rate.paused_until = 100.0
        leaving = machine.wait("a", timeout=5.0)
        final = machine.one(5.0)
        machine.wait("b", at=5.0, timeout=0.2)
        assert machine.started(5.2) == []
        machine.give_up(leaving, 5.5)
        assert list(machine.take_cut()) == [final]
        assert names(machine.started(5.5)) == ["b"]

    def test_a_poll_serves_those_that_are_left(self) -> None:
        machine = Calls(schedule=wait_fixed(60))
        waits = [machine.wait(timeout=5.0 + number) for number in range(4)]
        poll = machine.one(0.0)
        for number in range(3):
            machine.expire(5.0 + number)
            assert poll.serves_any()
            assert not poll.serves(waits[number])
        machine.expire(8.0)
        assert not poll.serves_any()
        assert list(machine.take_cut()) == [poll]


def test_events_tell_of_waits_and_polls() -> None:
    events: list[Event] = []
    machine = Calls(listeners=Listeners((events.append,)), schedule=wait_fixed(5))
    wait = machine.wait(timeout=6.0)
    stopped = machine.wait("held")
    for poll in machine.started(0.5):
        machine.answer(poll, 1.0)
    machine.end(stopped, None, 2.0)
    machine.answer(machine.one(6.0), 6.0)
    started = [e for e in events if isinstance(e, WaitStarted)]
    assert [(e.wait, e.timeout) for e in started] == [(wait.number, 6.0), (wait.number + 1, None)]
    polls = [e for e in events if isinstance(e, PollEnded)]
    assert [(e.operation_id, e.waits, e.is_final, e.seconds, e.lag) for e in polls] == [
        ("op", (wait.number,), False, 0.5, 0.5),
        ("held", (wait.number + 1,), False, 0.5, 0.5),
        ("op", (wait.number,), True, 0.0, 0.0),
    ]
    ended = [e for e in events if isinstance(e, WaitEnded)]
    assert [(e.outcome, e.seconds, e.polls, e.age) for e in ended] == [
        (WaitOutcome.HELD, 2.0, 1, None),
        (WaitOutcome.TIMED_OUT, 6.0, 2, None),
    ]
