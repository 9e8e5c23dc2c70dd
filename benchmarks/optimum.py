"""The lowest cost of any schedule that knows the approval times and the timeout, by dynamic programming."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from .polling import TIMEOUT, cost

if TYPE_CHECKING:
    from .approval_times import ApprovalTimes

#: The times at which a poll may be sent, closer together at the start; more of them lower the least cost by less than
#: 0.02% at a poll cost of 0.3, and by 0.1% at 0.02.
_POINTS: Final = 500
_GRID: Final = tuple(TIMEOUT * (k / _POINTS) ** 2 for k in range(_POINTS + 1))


@cache
def best_poll_times(approvals: ApprovalTimes, poll_cost: float) -> tuple[float, ...]:
    """Return the poll times of the schedule with the least cost.

    ``ahead[k]`` is the least cost that follows a pending answer at ``_GRID[k]``, times the probability of that answer;
    ``follower[k]`` is the poll that comes next in that case.
    """
    share = [0.0, *(approvals.approved_by(time) for time in _GRID[1:])]
    ahead = [0.0] * (_POINTS + 1)
    follower = [_POINTS] * _POINTS
    for k in reversed(range(_POINTS)):
        best, follower[k] = min((_GRID[n] * (share[n] - share[k]) + ahead[n], n) for n in range(k + 1, _POINTS + 1))
        ahead[k] = poll_cost * (1.0 - share[k]) + best
    times, k = [], 0
    while k < _POINTS:
        k = follower[k]
        times.append(_GRID[k])
    return tuple(times)


@cache
def least_cost(approvals: ApprovalTimes, poll_cost: float) -> float:
    """Return the expected cost of that schedule."""
    return cost(best_poll_times(approvals, poll_cost), approvals).total(poll_cost)
