"""The dispatcher alone: no loop, no clock, no network."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
from tenacity import wait_fixed
from yarl import URL

from aiokeyless._poller.dispatch import Dispatcher
from aiokeyless._poller.state import PolledOperation, Wait
from aiokeyless._rules.circuit import FAILURES_UNTIL_OPEN, Circuit
from aiokeyless._rules.rate import PollRate

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable, Iterator

TIMEOUT = 10.0


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that never runs: waits are futures, and futures need one."""
    import asyncio

    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture
def operation(loop: asyncio.AbstractEventLoop) -> Callable[..., PolledOperation]:
    made = 0

    def make(*, deadline: float = 120.0, deadline_passed: bool = False) -> PolledOperation:
        nonlocal made
        made += 1
        polled = PolledOperation(made, f"op-{made}", URL("http://localhost"), 0.0)
        wait = Wait(
            polled,
            loop,
            started_at=0.0,
            origin=0.0,
            deadline=deadline,
            schedule=wait_fixed(1),
            ticket=None,
            may_be_missing=False,
            updates=None,
        )
        polled.add(wait)
        if deadline_passed:
            wait.deadline_passed = True
            polled.before_deadline -= 1
        return polled

    return make


def dispatcher(limit: int = 2, *, rate: float | None = None) -> tuple[Dispatcher, Circuit]:
    circuit = Circuit(limit)
    return Dispatcher(circuit, PollRate(rate), max_in_flight=limit, request_timeout=TIMEOUT), circuit


def opened(circuit: Circuit, now: float) -> None:
    for operation in range(FAILURES_UNTIL_OPEN):
        circuit.record_failure(now, operation, started_at=now, is_probe=True)


def test_nothing_is_polled_before_it_is_due(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    dispatch.schedule(operation(), 5.0)
    assert dispatch.next_poll(4.9) is None
    assert dispatch.next_event(0.0) == 5.0


def test_the_operation_that_is_due_longest_is_polled_first(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    late, later = operation(), operation()
    dispatch.schedule(later, 2.0)
    dispatch.schedule(late, 1.0)
    polls = [dispatch.next_poll(3.0) for _ in range(3)]
    assert [poll and poll.polled for poll in polls] == [late, later, None]


def test_a_sooner_time_replaces_a_later_one_and_never_the_other_way(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation()
    dispatch.schedule(polled, 5.0)
    dispatch.schedule(polled, 3.0)
    dispatch.schedule(polled, 9.0)
    assert dispatch.next_event(0.0) == 3.0
    assert len(dispatch) == 1


def test_no_more_polls_are_in_flight_than_there_are_slots(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher(limit=1)
    first, second = operation(), operation()
    dispatch.schedule(first, 0.0)
    dispatch.schedule(second, 0.0)
    poll = dispatch.next_poll(0.0)
    assert poll is not None
    assert dispatch.next_poll(0.0) is None
    assert dispatch.next_event(0.0) == TIMEOUT  # nothing but the timeout of the one in flight
    assert dispatch.lag(4.0) == 4.0
    dispatch.finish(poll, 4.0)
    following = dispatch.next_poll(4.0)
    assert following is not None
    assert following.polled is second


def test_a_final_poll_goes_before_what_is_due_longer(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    ordinary, final = operation(), operation(deadline_passed=True)
    dispatch.schedule(ordinary, 0.0)
    dispatch.queue_final_poll(final, 1.0)
    dispatch.queue_final_poll(final, 1.0)  # one for all of its waits
    polls = [dispatch.next_poll(1.0), dispatch.next_poll(1.0)]
    assert [(poll.polled, poll.final) for poll in polls if poll is not None] == [(final, True), (ordinary, False)]


def test_a_final_poll_that_no_wait_needs_any_more_is_left_out(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation(deadline_passed=True)
    dispatch.queue_final_poll(polled, 1.0)
    for wait in polled.all_waits():
        wait.cancel()
    assert dispatch.lag(9.0) == 0.0
    assert dispatch.next_poll(1.0) is None
    assert not polled.final_poll_queued


@pytest.mark.parametrize("in_flight", [False, True], ids=["none in flight", "one in flight"])
def test_of_very_many_final_polls_that_no_wait_needs_some_are_passed_over_at_a_time_and_the_next_one_starts(
    operation: Callable[..., PolledOperation], *, in_flight: bool
) -> None:
    dispatch, _ = dispatcher()
    if in_flight:  # its end, perhaps long after, must not be what the next one waits for
        dispatch.queue_final_poll(operation(deadline_passed=True), 1.0)
        assert dispatch.next_poll(1.0) is not None
    gone = [operation(deadline_passed=True) for _ in range(1_000)]
    needed = operation(deadline_passed=True)
    for polled in (*gone, needed):
        dispatch.queue_final_poll(polled, 1.0)
    for polled in gone:
        polled.all_waits()[0].cancel()
    poll = None
    while poll is None:
        assert dispatch.next_event(1.0) == 1.0
        queued = sum(polled.final_poll_queued for polled in gone)
        poll = dispatch.next_poll(1.0)
        assert queued - sum(polled.final_poll_queued for polled in gone) <= 400
    assert poll.polled is needed


def test_queued_final_polls_can_be_forgotten(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    dispatch.queue_final_poll(operation(deadline_passed=True), 1.0)
    assert dispatch.lag(3.0) == 2.0
    dispatch.clear_final_polls()
    assert dispatch.next_poll(1.0) is None
    assert dispatch.next_event(0.0) == math.inf


def test_a_final_poll_does_for_an_ordinary_one_that_is_due(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation(deadline_passed=True)
    dispatch.schedule(polled, 1.0)
    dispatch.queue_final_poll(polled, 1.0)
    assert dispatch.next_poll(1.0) is not None
    assert len(dispatch) == 0


def test_while_the_circuit_is_open_one_probe_and_one_final_poll_go_at_a_time(
    operation: Callable[..., PolledOperation],
) -> None:
    dispatch, circuit = dispatcher(limit=64)
    opened(circuit, 0.0)
    retry_at = circuit.retry_at()
    for _ in range(3):
        dispatch.schedule(operation(), 0.0)
        dispatch.queue_final_poll(operation(deadline_passed=True), 0.0)
    final = dispatch.next_poll(0.0)
    assert final is not None
    assert final.final
    assert dispatch.next_poll(0.0) is None  # no probe before its time, no second final poll
    dispatch.finish(final, retry_at)
    polls = [dispatch.next_poll(retry_at), dispatch.next_poll(retry_at), dispatch.next_poll(retry_at)]
    assert [poll.final for poll in polls if poll is not None] == [True]


def test_polls_from_before_a_failure_take_no_room_while_the_service_recovers(
    operation: Callable[..., PolledOperation],
) -> None:
    dispatch, circuit = dispatcher(limit=8)
    for _ in range(8):
        dispatch.schedule(operation(), 0.0)
    hanging = [dispatch.next_poll(0.0) for _ in range(7)]
    assert None not in hanging
    opened(circuit, 1.0)
    probe = dispatch.next_poll(circuit.retry_at())
    assert probe is not None
    assert not probe.final


def test_a_poll_that_brought_nothing_is_repeated_at_once(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation()
    dispatch.schedule(polled, 1.0)
    poll = dispatch.next_poll(1.0)
    assert poll is not None
    dispatch.finish(poll, 2.0)
    assert dispatch.next_event(0.0) == 2.0


def test_what_is_scheduled_during_a_poll_waits_for_its_end(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation()
    dispatch.schedule(polled, 1.0)
    poll = dispatch.next_poll(1.0)
    assert poll is not None
    dispatch.schedule(polled, 1.5)
    assert dispatch.next_poll(1.5) is None
    dispatch.finish(poll, 2.0)
    assert dispatch.next_event(0.0) == 1.5


def test_nothing_is_scheduled_after_a_poll_whose_waits_have_ended(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher()
    polled = operation()
    dispatch.schedule(polled, 1.0)
    poll = dispatch.next_poll(1.0)
    assert poll is not None
    for wait in polled.all_waits():
        wait.cancel()
        polled.remove(wait)
    dispatch.finish(poll, 2.0)
    assert dispatch.next_event(0.0) == math.inf


def test_a_poll_is_overdue_after_request_timeout_and_those_after_it_are_not(
    operation: Callable[..., PolledOperation],
) -> None:
    dispatch, _ = dispatcher(limit=2)
    dispatch.schedule(operation(), 0.0)
    dispatch.schedule(operation(), 3.0)
    first, second = dispatch.next_poll(0.0), dispatch.next_poll(3.0)
    assert first is not None
    assert second is not None
    assert list(dispatch.overdue(TIMEOUT - 0.1)) == []
    assert list(dispatch.overdue(TIMEOUT)) == [first]
    first.stop(overdue=True)
    assert dispatch.next_event(0.0) == 3.0 + TIMEOUT


def test_a_queued_final_poll_whose_worker_was_cancelled_wakes_the_poller_at_once(
    operation: Callable[..., PolledOperation],
) -> None:
    dispatch, _ = dispatcher()
    dispatch.queue_final_poll(operation(deadline_passed=True), 1.0)
    assert dispatch.next_event(7.0) == 7.0


def run(
    dispatch: Dispatcher, until: float, delays: dict[PolledOperation, float]
) -> list[tuple[float, PolledOperation]]:
    """Run the polls of operations that are each polled again after their delay; an answer takes no time."""
    now, polls = 0.0, []
    while (now := max(now, dispatch.next_event(now))) <= until:
        while (poll := dispatch.next_poll(now)) is not None:
            polls.append((now, poll.polled))
            dispatch.schedule(poll.polled, now + delays[poll.polled])
            dispatch.finish(poll, now)
    return polls


def test_below_the_rate_nothing_changes(operation: Callable[..., PolledOperation]) -> None:
    unlimited, limited = dispatcher()[0], dispatcher(rate=2.0)[0]
    for dispatch in (unlimited, limited):
        delays = {operation(): 1.0, operation(): 2.5}
        for polled in delays:
            dispatch.schedule(polled, 0.0)
        assert [now for now, _ in run(dispatch, 10.0, delays)] == [0, 0, 1, 2, 2.5, 3, 4, 5, 5, 6, 7, 7.5, 8, 9, 10, 10]


def test_no_operation_starves_above_the_rate(operation: Callable[..., PolledOperation]) -> None:
    delays = {operation(): 0.1 for _ in range(50)}
    slow = operation()
    delays[slow] = 10.0
    dispatch, _ = dispatcher(rate=50.0)
    for polled in delays:
        dispatch.schedule(polled, 0.0)
    times = [now for now, polled in run(dispatch, 500.0, delays) if polled is slow]
    assert len(times) >= 4


def test_the_lag_is_the_time_by_which_polls_are_late(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher(rate=1.0)
    waiting = [operation() for _ in range(5)]
    for polled in waiting:
        dispatch.schedule(polled, 0.0)
    assert dispatch.lag(0.0) == 0.0
    run(dispatch, 2.0, dict.fromkeys(waiting, 100.0))
    assert dispatch.lag(3.0) == 3.0
    run(dispatch, 4.0, dict.fromkeys(waiting, 100.0))
    assert dispatch.lag(5.0) == 0.0


def test_a_retry_that_hangs_since_before_the_circuit_opened_keeps_no_probe_from_starting(
    operation: Callable[..., PolledOperation],
) -> None:
    dispatch, circuit = dispatcher(limit=8)
    hanging, other = operation(), operation()
    hanging.failures = other.failures = 1
    dispatch.schedule(hanging, 0.0)
    assert dispatch.next_poll(0.0) is not None
    opened(circuit, 1.0)
    dispatch.schedule(other, 1.0)
    now = circuit.retry_at()
    assert dispatch.next_event(1.0) == now
    probe = dispatch.next_poll(now)
    assert probe is not None
    assert probe.polled is other
    assert dispatch.next_poll(now) is None


def test_final_polls_that_take_the_whole_rate_starve_nobody(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher(rate=5)
    starving = operation()
    dispatch.schedule(starving, 0.0)
    now = 0.0
    for _ in range(100):  # ten deadlines a second
        dispatch.queue_final_poll(operation(deadline_passed=True), now)
        while (poll := dispatch.next_poll(now)) is not None:
            dispatch.finish(poll, now)
            if poll.polled is starving:
                starving.due = math.inf
                dispatch.schedule(starving, now + 1)
        now += 0.1
    assert dispatch.lag(now) < 2


def test_a_final_poll_does_not_wait_for_the_rate_and_is_counted(operation: Callable[..., PolledOperation]) -> None:
    dispatch, _ = dispatcher(limit=9, rate=1.0)
    ordinary, ending = operation(), [operation(deadline=0.0, deadline_passed=True) for _ in range(3)]
    for polled in ending:
        dispatch.queue_final_poll(polled, 0.0)
    dispatch.schedule(ordinary, 0.0)
    started = [dispatch.next_poll(0.0) for _ in range(4)]
    assert [poll and poll.polled for poll in started] == [*ending, None]
    assert dispatch.next_event(0.0) == pytest.approx(2.0)  # a second's polls are owed, and no more
    assert dispatch.next_poll(1.9) is None
    poll = dispatch.next_poll(2.0)
    assert poll is not None
    assert poll.polled is ordinary
