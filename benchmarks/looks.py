"""The looks of a wait under a schedule: when they come, what they cost on average, what they teach.

A wait is counted as the library does it. It begins with the operation, as for a ticket just made, so the schedule sets
the first look too; the last look is at the timeout and is a request like any other. No socket is opened: an answer
takes no time. Times are seconds since the operation was created.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Iterator, Sequence

    from tenacity.wait import wait_base

    from aiokeyless import wait_adaptive

    from .people import People

TIMEOUT: Final = 120.0


class Toll(NamedTuple):
    """What a wait costs on average. Late is only what was approved before the timeout."""

    polls: float
    lateness: float  # seconds a wait: those that end without an approval count as 0

    def cost(self, poll_cost: float) -> float:
        """Return both as one figure, in seconds."""
        return poll_cost * self.polls + self.lateness


def looks(schedule: wait_base) -> Iterator[float]:
    """Yield when a wait looks that nobody approves."""
    moment, attempt = 0.0, 0
    while moment < TIMEOUT:
        attempt += 1
        moment = min(moment + next_delay(schedule, attempt_number=attempt, since_start=moment), TIMEOUT)
        yield moment


def toll(moments: Iterable[float], people: People) -> Toll:
    """Return what these looks cost, averaged over all people: computed from their distribution, not drawn."""
    polls, lateness, share = 0.0, -people.mean_time_by(TIMEOUT), 0.0
    for moment in moments:
        polls += 1.0 - share
        share, before = people.approved_by(moment), share
        lateness += moment * (share - before)
    return Toll(polls, lateness)


def latest(waits: Sequence[Sequence[float]], people: People, quantile: float) -> float:
    """Return the seconds within which this share of the approvals is noticed, over all people and these waits alike."""
    gaps = [
        (last, people.approved_by(last) if last else 0.0, look)
        for wait in waits
        for last, look in zip([0.0, *wait], wait, strict=False)
    ]
    later = (1.0 - quantile) * people.approved_by(TIMEOUT) * len(waits)
    low, high = 0.0, TIMEOUT
    while high - low > 0.001:
        limit = (low + high) / 2
        if sum(people.approved_by(look - limit) - share for last, share, look in gaps if look - limit > last) > later:
            low = limit
        else:
            high = limit
    return high


def live(schedule: wait_adaptive, people: People, waits: int, source: random.Random) -> None:
    """Let the schedule pace waits and learn from them what a poller can know: between which looks, or not at all."""
    for _ in range(waits):
        approved = people.draw(source)
        last = 0.0
        for look in looks(schedule):
            if approved <= look:
                schedule.observe(last, look)
                break
            last = look
        else:
            schedule.observe(last, None)
