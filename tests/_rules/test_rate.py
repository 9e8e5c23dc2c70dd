"""How many polls may start in a second, on a made-up clock."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from aiokeyless._rules.rate import PollRate
from aiokeyless.errors import RateLimitError

if TYPE_CHECKING:
    from collections.abc import Callable


def start_polls(rate: PollRate, start: float, until: float, *, demand: float = math.inf) -> list[float]:
    """Start polls as soon as they may, as many a second as are due."""
    times: list[float] = []
    now = start
    while True:
        now = max(rate.ready_at(now), now)
        if now >= until:
            return times
        rate.record_poll(now)
        times.append(now)
        assert len(times) < 100_000, "polls without end"
        now += 1 / demand


def refuse(
    rate: PollRate,
    now: float,
    *,
    started_at: float | None = None,
    times: int = 14,
    pause: float | None = None,
    is_final: bool = False,
    was_good: bool = True,
) -> None:
    """Let so many polls be refused; without a number, as many as show that the limit is the tenant's."""
    error = RateLimitError(status=429, method="GET", path="/", retry_after=pause)
    for _ in range(times):
        started = now if started_at is None else started_at
        rate.record_refusal(now, error, started_at=started, is_final=is_final, was_good=was_good)


class TestTokenBucket:
    def test_without_a_limit_polls_start_at_once(self) -> None:
        rate = PollRate(None)
        assert rate.per_second(0.0) == math.inf
        for _ in range(10_000):
            assert rate.ready_at(5.0) <= 5.0
            rate.record_poll(5.0)

    def test_after_a_quiet_time_a_seconds_polls_start_at_once_and_the_others_by_the_rate(self) -> None:
        times = start_polls(PollRate(10.0), 100.0, 105.0)
        assert times[:10] == [100.0] * 10
        assert times[10:] == pytest.approx([100 + n / 10 for n in range(1, 50)])

    @pytest.mark.parametrize("limit", [0.1, 0.5, 3.0])
    def test_a_small_rate_lets_a_whole_poll_through(self, limit: float) -> None:
        times = start_polls(PollRate(limit), 0.0, 100.0)
        assert len(times) == pytest.approx(100 * limit + max(1, limit), abs=1)

    def test_polls_that_do_not_wait_are_owed_up_to_a_seconds(self) -> None:
        rate = PollRate(10.0)
        for _ in range(1000):
            rate.record_poll(0.0)
        assert rate.ready_at(0.0) == pytest.approx(1.1)
        assert rate.ready_at(1.2) <= 1.2

    @pytest.mark.parametrize("limit", [0.5, 0.1])
    def test_of_a_small_rate_one_poll_is_owed_at_most(self, limit: float) -> None:
        rate = PollRate(limit)
        for _ in range(10):
            rate.record_poll(0.0)
        assert rate.ready_at(0.0) == pytest.approx(2 / limit)

    def test_a_clock_that_stands_still_adds_nothing(self) -> None:
        rate = PollRate(1.0)
        rate.record_poll(5.0)
        assert rate.ready_at(5.0) == rate.ready_at(5.0) == pytest.approx(6.0)

    def test_there_is_room_for_the_polls_that_may_start_at_once(self) -> None:
        rate = PollRate(10.0)
        assert PollRate(None).room(0.0) is None
        assert rate.room(0.0) == 10
        for left in (9, 8, 7):
            rate.record_poll(0.0)
            assert rate.room(0.0) == left
        assert rate.room(0.1) == 8
        assert rate.room(0.19) == 8
        for _ in range(20):
            rate.record_poll(0.2)
        assert rate.room(0.2) == 0

    def test_room_is_not_lost_to_rounding(self) -> None:
        rate = PollRate(10.0)
        for _ in range(10):
            rate.record_poll(0.0)
        assert rate.room(0.3) == 3  # 0.3 * 10 may be a little less


class TestRefusals:
    def test_a_refusal_halves_the_rate_at_which_polls_started(self) -> None:
        rate = PollRate(1000.0)
        start_polls(rate, 0.0, 20.0, demand=100)
        refuse(rate, 20.0, started_at=19.95)
        assert rate.per_second(20.0) == pytest.approx(50, rel=0.02)

    def test_a_refusal_without_a_limit_sets_one(self) -> None:
        rate = PollRate(None)
        start_polls(rate, 0.0, 20.0, demand=100)
        refuse(rate, 20.0, started_at=19.95)
        assert len(start_polls(rate, 21.0, 22.0)) < 150
        assert rate.per_second(20.0 + 121.0) == math.inf

    def test_further_refusals_of_the_same_polls_do_not_halve_it_again(self) -> None:
        rate = PollRate(100.0)
        start_polls(rate, 0.0, 10.0)
        for _ in range(50):
            refuse(rate, 10.0, started_at=9.9)
            refuse(rate, 10.5, started_at=10.4)
        assert rate.per_second(10.0) == pytest.approx(50, rel=0.02)

    def test_a_second_after_the_rate_was_halved_a_refusal_halves_it_again(self) -> None:
        rate = PollRate(100.0)
        start_polls(rate, 0.0, 10.0)
        refuse(rate, 10.0, started_at=9.9)
        start_polls(rate, 10.0, 11.0)
        before = rate.per_second(11.0)
        refuse(rate, 11.0, started_at=11.0)
        assert rate.per_second(11.0) < 0.75 * before

    def test_a_single_poll_that_is_refused_counts_once(self) -> None:
        rate = PollRate(None)
        rate.record_poll(0.0)
        refuse(rate, 0.0, started_at=0.0)
        assert rate.per_second(0.0) == pytest.approx(0.5)

    @pytest.mark.parametrize(
        ("polls", "refused"),
        [({0.0: 5, 1.5: 1}, 5), ({0.0: 5, 2.0: 1}, 1), ({0.0: 5, 10.0: 1}, 1), ({0.0: 1, 1.0: 1}, 1)],
        ids=str,
    )
    def test_the_refused_rate_is_that_of_the_last_two_seconds(self, polls: dict[float, int], refused: int) -> None:
        rate = PollRate(None)
        for now, count in polls.items():
            for _ in range(count):
                rate.record_poll(now)
        refuse(rate, now, started_at=now)
        assert rate.per_second(now) == refused / 2

    def test_polls_at_an_earlier_time_count_once_each(self) -> None:
        rate = PollRate(1000.0)
        for now in (10.0, 9.5, 9.0):
            rate.record_poll(now)
        refuse(rate, 9.0, started_at=9.0)
        assert rate.per_second(9.0) == pytest.approx(1.5)

    def test_after_a_refusal_one_poll_starts_at_once(self) -> None:
        rate = PollRate(1000.0)
        start_polls(rate, 0.0, 10.0, demand=100)
        refuse(rate, 10.0, started_at=9.95)
        assert rate.room(25.0) == 1

    def test_once_the_rate_is_back_at_the_limit_a_seconds_polls_start_at_once_again(self) -> None:
        rate = PollRate(10.0)
        start_polls(rate, 0.0, 10.0)
        refuse(rate, 10.0, started_at=9.9)
        assert rate.per_second(30.0) == 10.0
        assert rate.room(30.0) == 10

    def test_a_refusal_counts_for_two_minutes(self) -> None:
        rate = PollRate(None)
        rate.record_poll(0.0)
        refuse(rate, 0.0, started_at=0.0)
        assert rate.per_second(120.0) < math.inf
        assert rate.per_second(120.1) == math.inf

    def test_it_climbs_back_within_about_a_minute(self) -> None:
        rate = PollRate(1000.0)
        start_polls(rate, 0.0, 10.0, demand=50)
        refuse(rate, 10.0, started_at=9.9)
        rates = [rate.per_second(10.0 + second) for second in range(90)]
        assert rates == sorted(rates)
        assert rates[8] > 0.9 * 50
        assert rates[20] == pytest.approx(50, rel=0.02)
        assert rates[30] < 1.1 * 50
        assert rates[70] == rates[89] == 1000.0

    def test_it_is_never_less_than_half_a_poll_a_second(self) -> None:
        rate = PollRate(1000.0)
        for second in range(0, 200, 2):
            refuse(rate, float(second), started_at=float(second))
        assert rate.per_second(200.0) >= 0.5

    @pytest.mark.parametrize("service", ["a bucket of 50", "a bucket of 5", "50 in each second"])
    @pytest.mark.parametrize("demand", [75.0, 200.0, 2000.0])
    def test_a_service_with_a_limit_of_50_gets_45_to_50_polls_after_a_minute(self, service: str, demand: float) -> None:
        allows = limited_service(service)
        rate = PollRate(1000.0)
        answers: list[tuple[float, bool]] = []
        good_after_a_minute: list[float] = []
        now = 0.0
        while now < 300.0:
            now = max(rate.ready_at(now), now)
            rate.record_poll(now)
            answers.append((now, allows(now)))
            while answers and answers[0][0] <= now - 0.05:  # an answer takes 50 ms
                started_at, good = answers.pop(0)
                if not good:
                    refuse(rate, now, started_at=started_at, times=1)
                    continue
                rate.record_answer()
                if started_at >= 60.0:
                    good_after_a_minute.append(started_at)
            now += 1 / demand
        assert 45 <= len(good_after_a_minute) / 240 <= 50.5


class TestWhoseLimit:
    """A limit is the operation's own, or the tenant's, which all polls must respect."""

    @pytest.mark.parametrize(
        ("refused", "among", "is_tenants"),
        [(13, 40, False), (14, 40, True), (14, 14, True), (13, 13, False), (26, 80, False)],
    )
    def test_it_is_the_tenants_if_a_third_of_forty_polls_is_refused(
        self, refused: int, among: int, *, is_tenants: bool
    ) -> None:
        rate = PollRate(None)
        for number in range(among):  # spread evenly
            if (number + 1) * refused // among > number * refused // among:
                refuse(rate, 100.0, times=1)
            else:
                rate.record_answer()
        assert rate.is_limited(100.0) is is_tenants

    def test_refusals_of_an_operation_whose_poll_before_was_no_good_do_not_count(self) -> None:
        rate = PollRate(None)
        refuse(rate, 100.0, was_good=False, times=100, pause=10.0)
        refuse(rate, 100.0, times=13)
        assert not rate.is_limited(100.0)
        assert rate.paused_until == -math.inf

    @pytest.mark.parametrize(("before", "last"), [(0, 3), (1, 6), (2, 9)])
    def test_a_sudden_onset_is_the_tenants_limit_again_while_polls_respect_one(self, before: int, last: int) -> None:
        rate = PollRate(None)
        for _ in range(20):
            rate.record_poll(100.0)
        refuse(rate, 100.0)
        for _ in range(80):
            rate.record_answer()
        refuse(rate, 105.0, times=before)
        for _ in range(40 - before):
            rate.record_answer()
        refuse(rate, 105.0, times=last - 1, pause=1.0)
        assert rate.paused_until == -math.inf
        refuse(rate, 105.0, times=1, pause=1.0)
        assert rate.paused_until == 106.0

    def test_refusals_are_forgotten_after_eighty_polls(self) -> None:
        rate = PollRate(None)
        refuse(rate, 100.0, times=13)
        for _ in range(40):
            rate.record_answer()
        refuse(rate, 100.0, times=13)
        assert not rate.is_limited(100.0)


class TestPause:
    @pytest.mark.parametrize(("pause", "until"), [(0.001, 100.001), (5.0, 105.0), (121.0, 220.0), (math.inf, 220.0)])
    def test_the_pause_of_the_tenants_limit_holds_all_polls_for_two_minutes_at_most(
        self, pause: float, until: float
    ) -> None:
        rate = PollRate(None)
        refuse(rate, 100.0, times=13, pause=pause)
        assert rate.room(100.0) is None
        refuse(rate, 100.0, times=1, pause=pause)
        assert rate.ready_at(100.0) == rate.paused_until == until
        assert (rate.room(math.nextafter(until, 0.0)), rate.room(until)) == (0, 1)

    def test_a_limit_without_a_pause_holds_none(self) -> None:
        rate = PollRate(None)
        refuse(rate, 100.0, times=14)
        assert rate.paused_until == -math.inf

    def test_of_two_pauses_the_one_that_ends_later_counts(self) -> None:
        rate = PollRate(None)
        for now, pause, until in ((100.0, 30.0, 130.0), (101.0, 5.0, 130.0), (102.0, 40.0, 142.0)):
            refuse(rate, now, pause=pause)
            assert rate.paused_until == until

    def test_the_pause_that_a_final_poll_is_asked_for_prolongs_none_and_begins_one(self) -> None:
        rate = PollRate(None)
        refuse(rate, 100.0, pause=10.0)
        for now, is_final, until in ((105.0, True, 110.0), (110.0, True, 120.0), (115.0, False, 125.0)):
            refuse(rate, now, times=1, pause=10.0, is_final=is_final)
            assert rate.paused_until == until


def limited_service(kind: str) -> Callable[[float], bool]:
    """Return what says whether a service with a limit of 50 a second answers a request at that time."""
    if kind == "50 in each second":
        counts: dict[int, int] = {}

        def in_each_second(now: float) -> bool:
            counts[int(now)] = counts.get(int(now), 0) + 1
            return counts[int(now)] <= 50

        return in_each_second
    capacity = 50.0 if kind == "a bucket of 50" else 5.0
    level, at = capacity, 0.0

    def bucket(now: float) -> bool:
        nonlocal level, at
        level, at = min(capacity, level + 50 * (now - at)), now
        good = level >= 1
        level -= good
        return good

    return bucket
