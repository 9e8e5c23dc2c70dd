"""Cuts a story that breaks a promise down to what is needed for that, one actor, leg and fault after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

from .checker import check
from .loop import compare
from .story import Story, run

if TYPE_CHECKING:
    from collections.abc import Callable

    from .actors import Leg
    from .evidence import Violation

T = TypeVar("T")


def breaks(story: Story, promise: str | None = None) -> list[Violation]:
    """Run a story, and return the promises that it breaks: all of them, or one."""
    history = run(story)
    broken = [*check(history, story.faults), *compare(story, history, run)]
    return [violation for violation in broken if promise in (None, violation.promise)]


def minimize(story: Story, promise: str) -> Story:
    """Return a part of a story that still breaks a promise, and does not where anything more is left out."""

    def still(shorter: Story) -> bool:
        return bool(breaks(shorter, promise))

    size = 0
    while size != (size := len(story.tell())):
        story = _with_fewer_actors_and_faults(story, still)
        for index in range(len(story.actors)):
            story = _with_fewer_legs(story, index, still)
        for index, process in enumerate(story.processes):
            calm = replace(process, closes=(), jumps=(), clock_error=0.0)
            simpler = replace(story, processes=_replaced(story.processes, index, calm))
            story = simpler if calm != process and still(simpler) else story
    return story


def _with_fewer_actors_and_faults(story: Story, still: Callable[[Story], bool]) -> Story:
    actors = fewest(story.actors, lambda some: still(replace(story, actors=some)))
    few = replace(story, actors=actors)
    return replace(few, faults=fewest(few.faults, lambda some: still(replace(few, faults=some))))


def _with_fewer_legs(story: Story, index: int, still: Callable[[Story], bool]) -> Story:
    def only(legs: tuple[Leg, ...]) -> Story:
        return replace(story, actors=_replaced(story.actors, index, replace(story.actors[index], legs=legs)))

    return only(fewest(story.actors[index].legs, lambda some: still(only(some))))


def fewest(parts: tuple[T, ...], still: Callable[[tuple[T, ...]], bool]) -> tuple[T, ...]:
    """Leave out halves, then quarters, and at last single parts, for as long as it still happens."""
    size = len(parts)
    while size >= 1:
        start = 0
        while start < len(parts):
            fewer = parts[:start] + parts[start + size :]
            if still(fewer):
                parts = fewer
            else:
                start += size
        size //= 2
    return parts


def _replaced(parts: tuple[T, ...], index: int, part: T) -> tuple[T, ...]:
    return (*parts[:index], part, *parts[index + 1 :])
