"""The polls of a wait under a schedule: when they are sent, what they cost on average, what the schedule learns.

A wait is counted as the library counts it. It starts when the operation is created, as for a new ticket, so the
schedule sets the first poll too; the last poll is at the timeout and is a request like any other. No socket is opened:
an answer takes no time. Times are seconds since the operation was created.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator, Sequence

    from tenacity.wait import wait_base

    from aiokeyless import wait_adaptive

    from .approval_times import ApprovalTimes

TIMEOUT: Final = 120.0


class Cost(NamedTuple):
    """The average cost of a wait. Only approvals before the timeout can be late."""

    polls: float
    lateness: float  # seconds per wait: a wait that ends without an approval counts as 0

    def total(self, poll_cost: float) -> float:
        """Return both as one figure, in seconds."""
        return poll_cost * self.polls + self.lateness


def poll_times(schedule: wait_base) -> Iterator[float]:
    """Yield the times of the polls of a wait that is never approved."""
    time, attempt = 0.0, 0
    while time < TIMEOUT:
        attempt += 1
        time = min(time + next_delay(schedule, attempt_number=attempt, since_start=time), TIMEOUT)
        yield time


def cost(times: Iterable[float], approvals: ApprovalTimes) -> Cost:
    """Return the expected cost of polls at these times: computed from the distribution, not sampled."""
    polls, lateness, share = 0.0, -approvals.mean_time_by(TIMEOUT), 0.0
    for time in times:
        polls += 1.0 - share
        share, before = approvals.approved_by(time), share
        lateness += time * (share - before)
    return Cost(polls, lateness)


def lateness_quantile(waits: Sequence[Sequence[float]], approvals: ApprovalTimes, quantile: float) -> float:
    """Return the seconds within which this share of the approvals is noticed, averaged over the given waits.

    Args:
        waits: The poll times of each wait.
        approvals: When users approve.
        quantile: The share of the approvals, 0 to 1.
    """
    gaps = [
        (last, approvals.approved_by(last) if last else 0.0, poll)
        for wait in waits
        for last, poll in zip([0.0, *wait], wait, strict=False)
    ]
    later = (1.0 - quantile) * approvals.approved_by(TIMEOUT) * len(waits)
    low, high = 0.0, TIMEOUT
    while high - low > 0.001:
        limit = (low + high) / 2
        if (
            sum(approvals.approved_by(poll - limit) - share for last, share, poll in gaps if poll - limit > last)
            > later
        ):
            low = limit
        else:
            high = limit
    return high


def simulate_waits(schedule: wait_adaptive, approvals: ApprovalTimes, waits: int, source: random.Random) -> None:
    """Run waits on the schedule, and let it learn what a poller can observe: between which polls, or never."""
    for _ in range(waits):
        approved = approvals.draw(source)
        last = 0.0
        for poll in poll_times(schedule):
            if approved <= poll:
                schedule.observe(last, poll)
                break
            last = poll
        else:
            schedule.observe(last, None)
