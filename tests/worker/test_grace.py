"""For how long a final poll is repeated: only seconds count in which the worker could have asked."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aiokeyless.worker.grace import Grace

from .reading import a_message

START = datetime(2026, 11, 27, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def due(deadline: float, stored: float = 0.0) -> Any:
    """Return what the grace reads of a delivery."""
    return SimpleNamespace(ticket=SimpleNamespace(expires_at=at(deadline)), message=a_message(stored_at=at(stored)))


def living(*turns: tuple[int, int], seconds: float = 30.0) -> Grace:
    """Return the grace of a worker that started at 0, and whose intake had a turn each second of these times."""
    grace = Grace(seconds, now=at(0))
    for first, last in turns:
        for turn in range(first, last + 1):
            grace.record_turn(at(turn))
    return grace


@pytest.mark.parametrize(
    ("turns", "deadline", "now", "left"),
    [
        ([(0, 100)], 90, 100, 20),
        ([(0, 100)], 60, 100, -10),
        ([(0, 100)], 130, 100, 60),
        ([(0, 60), (63, 100)], 60, 100, -10),  # a turn that took 3 s
        ([(0, 60), (64, 100)], 60, 100, -6),
        ([(0, 60), (90, 100)], 50, 100, 10),
        ([(0, 60), (90, 100)], 80, 100, 20),  # only what comes after the deadline
        ([(0, 60), (90, 100)], 50, 70, 20),  # only what comes before the poll
        ([(0, 60)], 60, 63, 27),
        ([(0, 60)], 50, 100, 20),  # it has not ended
        ([(0, 10), (70, 80), (140, 150), (210, 220)], 10, 220, -30),  # 150 s in all
        ([(0, 10), (200, 210), (220, 230)], 10, 230, 0),  # or one that is longer
    ],
)
def test_absences_after_the_deadline_do_not_count(
    turns: list[tuple[int, int]], deadline: float, now: float, left: float
) -> None:
    assert living(*turns).left(due(deadline), at(now)) == left


def test_it_begins_neither_before_the_worker_nor_before_the_request_was_stored() -> None:
    grace = living((0, 100))
    assert grace.left(due(-500, stored=-600), at(10)) == 20
    assert grace.left(due(-500, stored=90), at(100)) == 20
    assert grace.overdue(at(29.999)) is None
    assert grace.overdue(at(30)) == 30


@pytest.mark.parametrize(("now", "overdue"), [(159.999, 150), (160, 30), (160.5, 30)])
def test_it_is_told_at_once_at_the_end_of_an_absence(now: float, overdue: float) -> None:
    """A search that goes back by so little each time would take a minute."""
    assert living((0, 10), (130, 160)).overdue(at(now)) == pytest.approx(overdue)


@pytest.mark.parametrize(
    ("pauses", "left"),
    [
        ([(50, 20)], 0),
        ([(60, 30)], 10),
        ([(60, 31)], -20),  # longer than the grace
        ([(95, 20)], -15),  # only what comes before the poll
        ([(50, 20), (75, 10)], -10),  # only the last one
        ([(50, 20), (75, 100)], -20),
    ],
)
def test_the_last_pause_does_not_count_unless_it_is_longer_than_the_grace(
    pauses: list[tuple[float, float]], left: float
) -> None:
    grace = living((0, 100))
    for begins, seconds in pauses:
        grace.record_pause(at(begins), seconds)
    assert grace.left(due(50), at(100)) == left


@pytest.mark.parametrize(
    ("turns", "pause", "left"),
    [
        ([(0, 60), (90, 100)], (55, 30), 15),  # 35 s in all
        ([(0, 60), (90, 100)], (65, 20), 10),
        ([(0, 60), (65, 70), (80, 100)], (62, 12), 0),
        ([(0, 60)], (70, 30), 20),
    ],
)
def test_a_pause_in_an_absence_does_not_count_twice(
    turns: list[tuple[int, int]], pause: tuple[float, float], left: float
) -> None:
    grace = living(*turns)
    grace.record_pause(at(pause[0]), pause[1])
    assert grace.left(due(50), at(100)) == left


def test_a_clock_that_is_set_back_begins_no_second_grace() -> None:
    grace = Grace(30.0, now=at(3600))
    for second in range(101):
        grace.record_turn(at(second))
    assert grace.left(due(60), at(91)) == -1
    assert grace.overdue(at(91)) == 30


@given(
    turns=st.lists(st.floats(0.1, 200.0), max_size=80),
    pause=st.floats(0.0, 40.0),
    seconds=st.sampled_from((0.0, 5.0, 30.0, 300.0)),
)
def test_what_the_broker_tells_from_the_others_is_what_is_past_its_grace(
    turns: list[float], pause: float, seconds: float
) -> None:
    grace, now = Grace(seconds, now=at(-100)), 0.0
    for number, turn in enumerate(turns):
        now += turn
        grace.record_turn(at(now))
        if number == len(turns) // 2:
            grace.record_pause(at(now), pause)
    overdue = grace.overdue(at(now))
    if overdue is None:
        assert grace.left(due(-100, stored=-100), at(now)) > 0
    else:
        assert grace.left(due(now - overdue, stored=-100), at(now)) <= 2e-6
        assert overdue == 0.0 or grace.left(due(now - overdue + 0.0011, stored=-100), at(now)) > 0
