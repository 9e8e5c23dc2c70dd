"""Waits that are later than a loop, or lose what it gets, are seen; the known exceptions are not."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest

from .actors import Actor, Leg, Process
from .faults import Failure, Moved, Outage, RateLimit
from .loop import compare
from .people import Person
from .story import Story, run

if TYPE_CHECKING:
    from .history import History

LEGS = (Leg(0.0, 0, every=1.0),)
STORY = Story(
    seed=1,
    processes=(Process(has_no_key=((40.0, 41.0),)),),
    actors=tuple(Actor(10.0, f"storm{n}", 0, person=Person(12.0 + n), legs=LEGS, is_compared=True) for n in range(12)),
    faults=(
        Outage(25.0, 30.0, Failure("page", 403, page=b'{"message": "Forbidden"}'), methods="GET"),
        Outage(31.0, 33.0, Failure("html"), methods="GET"),
        Outage(34.0, 35.0, Failure("hangs"), share=0.1, methods="GET"),
    ),
)


@pytest.fixture(scope="module")
def told() -> History:
    return run(STORY)


def _broken(history: History, *faults: Outage | Moved | RateLimit) -> list[str]:
    story = Story(STORY.seed, STORY.processes, STORY.actors, (*STORY.faults, *faults))
    return [violation.text for violation in compare(story, history, lambda _: history)]


@pytest.mark.parametrize(
    ("late", "fault"),
    [
        (0.0, None),
        (3.0, RateLimit(500.0, 501.0, 40, None)),
    ],
)
def test_waits_may_be_about_as_late_as_loops_and_later_in_weather_that_is_known_for_it(
    told: History, late: float, fault: RateLimit | None
) -> None:
    history = copy.deepcopy(told)
    for wait in history.waits:
        wait.ended_at += late
    assert _broken(history, *([fault] if fault else [])) == []
    assert bool(_broken(history)) == (late > 0.0)
    for wait in history.waits:
        wait.ended_at += 20.0
    assert "by a loop" in _broken(history, *([fault] if fault else []))[0]


@pytest.mark.parametrize(
    ("faults", "is_seen"),
    [
        ((), True),
        ((Outage(500.0, 501.0, Failure("status", 429, 30.0)),), False),
        ((RateLimit(500.0, 501.0, 40, 30.0),), False),
        ((RateLimit(500.0, 501.0, 3, None),), False),
        ((Moved(500.0, 501.0, None),), False),
    ],
)
def test_approvals_that_only_loops_get_are_lost(
    told: History, faults: tuple[Outage | RateLimit | Moved, ...], is_seen: bool
) -> None:
    history = copy.deepcopy(told)
    for wait in history.waits:
        wait.outcome = "ApprovalUnknownError"
    assert bool(_broken(history, *faults)) == is_seen


def test_what_only_waits_get_is_no_fault_of_theirs() -> None:
    silent = Outage(20.0, 500.0, Failure("lost"), methods="GET")
    story = Story(1, STORY.processes, STORY.actors, (silent,))
    history = run(story)
    for wait in history.waits:
        wait.outcome = "approved"
    assert list(compare(story, history, run)) == []
