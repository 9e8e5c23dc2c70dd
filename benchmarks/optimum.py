"""The best that any schedule could do that knew the people and the timeout, by dynamic programming."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from .looks import TIMEOUT, toll

if TYPE_CHECKING:
    from .people import People

#: Looks may come at these moments, closer at the beginning; more of them change the least cost by less than 0.0002 of
#: it.
_POINTS: Final = 500
_GRID: Final = tuple(TIMEOUT * (k / _POINTS) ** 2 for k in range(_POINTS + 1))


@cache
def best_looks(people: People, poll_cost: float) -> tuple[float, ...]:
    """Return when the schedule looks that costs the least.

    ``ahead[k]`` is the least cost to come after a look at ``_GRID[k]`` that found nothing, times the share for whom
    that happens; ``follower[k]`` is the look that comes next then.
    """
    share = [0.0, *(people.approved_by(moment) for moment in _GRID[1:])]
    ahead = [0.0] * (_POINTS + 1)
    follower = [_POINTS] * _POINTS
    for k in reversed(range(_POINTS)):
        best, follower[k] = min((_GRID[n] * (share[n] - share[k]) + ahead[n], n) for n in range(k + 1, _POINTS + 1))
        ahead[k] = poll_cost * (1.0 - share[k]) + best
    moments, k = [], 0
    while k < _POINTS:
        k = follower[k]
        moments.append(_GRID[k])
    return tuple(moments)


@cache
def least_cost(people: People, poll_cost: float) -> float:
    """Return the expected cost of that schedule."""
    return toll(best_looks(people, poll_cost), people).cost(poll_cost)
