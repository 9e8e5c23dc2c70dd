"""How many polls a service gets at once: as many as it answers soon, and without a limit if that is not the cause."""

from __future__ import annotations

import math
from operator import itemgetter
from typing import TYPE_CHECKING

import pytest

from aiokeyless._rules.window import Window
from benchmarks.approval_times import seeded_random

if TYPE_CHECKING:
    from collections.abc import Callable


class Service:
    """A service, and polls that are sent to it as fast as a window allows, and at most so many a second.

    Args:
        answers_at: When a poll that starts at a time is answered.
        per_second: Polls that are due.
    """

    def __init__(self, answers_at: Callable[[float], float], per_second: float) -> None:
        self.window = Window()
        self.limits: list[float] = []
        self._now = self._due_at = 0.0
        self._answers_at = answers_at
        self._per_second = per_second
        self._in_flight: list[tuple[float, float]] = []  # when each started, and when it is answered

    def run(self, until: float) -> None:
        """Let the time pass."""
        while self._now < until:
            window, started = self.window, [start for start, _ in self._in_flight]
            opens_at = self._now if window.limit == math.inf else window.opens_at(self._now, started)
            starts_at = max(opens_at, self._due_at)
            first = min(self._in_flight, key=itemgetter(1), default=(0.0, math.inf))
            self._now = now = min(starts_at, first[1])
            if starts_at <= first[1]:
                self._in_flight.append((now, self._answers_at(now)))
                self._due_at = now + 1 / self._per_second
                continue
            if window.record_success(now, started_at=first[0]):
                window.adapt(now, started)
            self.limits.append(window.limit)
            self._in_flight.remove(first)


def queue(capacity: float, seconds: float = 0.0) -> Callable[[float], float]:
    """Return a service that answers so many requests a second, one after another."""
    free_at = 0.0

    def answers_at(now: float) -> float:
        nonlocal free_at
        free_at = max(free_at, now) + 1 / capacity
        return free_at + seconds

    return answers_at


@pytest.mark.parametrize(("capacity", "times"), [(5.0, 4.0), (20.0, 4.0), (100.0, 4.0), (20.0, 8.0)])
def test_a_service_with_more_to_do_than_it_can_has_a_short_queue(capacity: float, times: float) -> None:
    service = Service(queue(capacity), times * capacity)
    service.run(300.0)
    seconds = [limit / capacity for limit in service.limits[-800:]]
    assert max(seconds) <= 2.0
    assert min(service.limits[-800:]) >= 2.0


@pytest.mark.parametrize("seconds", [0.05, 2.0, 9.0])
def test_a_service_that_is_far_away_has_no_limit(seconds: float) -> None:
    service = Service(lambda now: now + seconds, 50.0)
    service.run(60.0)
    assert set(service.limits) == {math.inf}


@pytest.mark.parametrize("seconds", [2.0, 5.0, 9.0])
def test_a_service_whose_answers_begin_to_take_longer_at_any_load_has_no_limit(seconds: float) -> None:
    service = Service(lambda now: now + (seconds if 30.0 <= now < 90.0 else 0.05), 50.0)
    service.run(120.0)
    assert set(service.limits) == {math.inf}


@pytest.mark.parametrize("seconds", [1.0, 3.0, 6.0])
def test_a_service_that_becomes_slower_and_slower_at_any_load_gets_nearly_all_polls(seconds: float) -> None:
    service = Service(lambda now: now + 0.05 + seconds * min(1.0, max(0.0, (now - 30.0) / 10.0)), 20.0)
    service.run(120.0)
    assert len(service.limits) > 0.85 * 20.0 * (120.0 - seconds)
    assert service.limits[-1] == math.inf


@pytest.mark.parametrize("seed", range(5))
def test_answers_that_take_any_time_are_no_queue(seed: int) -> None:
    source = seeded_random(seed)
    service = Service(lambda now: now + (source.uniform(1.0, 3.0) if now >= 30.0 else 0.05), 20.0)
    service.run(200.0)
    assert service.limits.count(math.inf) > 0.9 * len(service.limits)


def test_a_slow_shard_is_no_queue() -> None:
    source = seeded_random(1)
    service = Service(lambda now: now + (5.0 if source.random() < 1 / 3 else 0.05), 50.0)
    service.run(200.0)
    assert set(service.limits) == {math.inf}


def test_once_the_service_is_quick_again_the_limit_rises_until_it_is_gone() -> None:
    saturated = queue(20.0)
    service = Service(lambda now: saturated(now) if now < 60.0 else now + 0.05, 50.0)
    service.run(60.0)
    assert service.limits[-1] < 10.0
    service.run(120.0)
    assert service.limits[-1] == math.inf


def test_if_the_fewest_polls_in_flight_make_the_answers_no_quicker_there_is_no_limit() -> None:
    saturated = queue(20.0)
    service = Service(lambda now: saturated(now) if now < 30.0 else now + 3.0, 50.0)
    service.run(30.0)
    assert service.limits[-1] < math.inf
    service.run(120.0)
    assert service.limits[-1] == math.inf


def test_nor_is_there_one_if_they_take_any_time_at_the_least_that_may_be_in_flight() -> None:
    source, saturated = seeded_random(1), queue(20.0)
    service = Service(lambda now: saturated(now) if now < 30.0 else now + source.uniform(2.0, 9.0), 50.0)
    service.run(400.0)
    assert service.limits[-1] == math.inf


def test_each_fall_leaves_seven_tenths_of_the_polls_in_flight() -> None:
    window = Window()
    for number in range(8):  # of eight, the quickest is in time
        assert not window.record_success(float(number), started_at=number / 2 - 0.05)
    for number in range(8):
        assert window.record_success(10.0 + number, started_at=9.0 + number / 2) is (number == 7)
    window.adapt(17.0, [0.0] + [16.5] * 10)  # the first one hangs, for over three round trips
    assert window.limit == 7.0
    assert not window.record_success(18.0, started_at=16.9)  # it started before the limit fell
    assert window.opens_at(18.0, [17.0] * 6) == 18.0
    assert window.opens_at(18.0, [16.0, *[17.0] * 6]) == 16.0 + 3 * 4.5


def test_a_second_fall_is_from_the_limit_though_more_polls_than_that_are_still_in_flight() -> None:
    window = Window()
    for number in range(8):
        assert not window.record_success(number + 0.05, started_at=float(number))
    for begins, limit in ((10.0, 28.0), (20.0, 19.6)):
        for number in range(8):  # 40 polls are in flight: those before the first fall have not ended
            window.record_success(begins + 5.0 + number / 5, started_at=begins + number / 50)
        window.adapt(begins + 6.4, [begins + 6.0] * 40)
        assert window.limit == pytest.approx(limit)


QUICK = [(float(number), number + 0.05) for number in range(10, 18)]  # when each poll started, and when its answer came
PACED = [float(number) for number in range(20, 28)]


@pytest.mark.parametrize(
    ("starts", "pace", "expected"),
    [(PACED, 1.19, math.inf), (PACED, 1.21, 7.0), ([20.0, 21.0, 24.0, 22.0, 23.0, 25.0, 26.0, 27.0], 1.5, math.inf)],
)
def test_late_answers_are_a_queue_if_they_come_in_order_and_over_a_fifth_slower_than_their_polls(
    starts: list[float], pace: float, expected: float
) -> None:
    window = Window()
    answers = [*QUICK, *((start, 30.0 + pace * number) for number, start in enumerate(starts))]
    for started_at, now in answers:
        if window.record_success(now, started_at=started_at):
            window.adapt(now, [now] * 10)
    assert window.limit == expected


class TestBeginningAnew:
    """After an outage, or silence, few polls are in flight at first: the service may still be starting."""

    def test_after_an_outage_sixteen_and_one_more_with_each_good_answer(self) -> None:
        window = Window()
        window.begin_anew(100.0)
        assert window.opens_at(101.0, [100.5] * 15) == 101.0
        assert window.opens_at(101.0, [100.5] * 16) == 101.5
        for limit in (17.0, 18.0, 19.0):
            assert window.record_success(101.0, started_at=100.5)
            window.adapt(101.0, [100.5] * 16)
            assert window.limit == limit
        assert not window.record_success(101.0, started_at=99.9), "it started before"

    def test_there_is_no_limit_again_once_it_is_not_needed(self) -> None:
        window = Window()
        window.begin_anew(100.0)
        for limit in (17.0, math.inf):
            assert window.record_success(101.0, started_at=100.5)
            window.adapt(101.0, [100.5] * (5 if limit < math.inf else 4))
            assert window.limit == limit
        assert not window.record_success(101.0, started_at=100.5)

    def test_an_answer_that_is_late_ends_the_rise(self) -> None:
        window = Window()
        for start, at in QUICK:
            window.record_success(at, started_at=start)
        window.begin_anew(100.0)
        assert window.record_success(102.0, started_at=101.0)
        window.adapt(102.0, [101.5] * 16)
        assert window.limit == 16.0
        assert window.opens_at(102.0, [100.5] * 16) == 100.5 + 3 * 1.0
        assert not window.record_success(102.0, started_at=101.0), "a round has eight answers again"

    @pytest.mark.parametrize(
        ("started_at", "answered_at", "limit"), [(100.0, 99.0, 2.0), (100.0, 100.0, math.inf), (100.0, 101.0, math.inf)]
    )
    def test_a_poll_without_an_answer_leaves_two_at_a_time_unless_another_was_answered(
        self, started_at: float, answered_at: float, limit: float
    ) -> None:
        window = Window()
        window.record_silence(110.0, started_at=started_at, answered_at=answered_at)
        assert window.limit == limit

    @pytest.mark.parametrize(
        ("seconds", "expected"), [(None, [1.0, 2.0, 4.0, 8.0]), (1.1, [1.0, 2.0, 4.0, 8.0]), (1.0, [1.0] * 4)]
    )
    def test_the_longer_a_slow_service_is_silent_the_fewer_polls_are_sent(
        self, seconds: float | None, expected: list[float]
    ) -> None:
        window = Window()
        gaps = []
        if seconds is not None:
            window.record_success(90.0, started_at=90.0 - seconds)
        for now in (110.0, 120.0, 130.0, 140.0):
            window.record_silence(now, started_at=now - 10.0, answered_at=0.0)
            window.record_silence(now, started_at=now - 10.1, answered_at=0.0)  # it began before the last one
            gaps.append(window.opens_at(now, [now, now]) - now)
        assert gaps == expected
        assert window.record_success(141.0, started_at=140.5)
        window.adapt(141.0, [140.5, 140.5])
        assert (window.limit, window.opens_at(141.0, [140.5] * 3)) == (3.0, 140.5 + 3 * 0.5)
