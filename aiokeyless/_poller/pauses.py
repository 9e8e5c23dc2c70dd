"""What is kept of an operation between two holds of it, so that the second one goes on where the first one stopped.

It is bounded in time and in number: what is forgotten costs one poll at the start of the next hold, and no approval.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.outcome import YOUNG
from aiokeyless.schedule import next_delay

if TYPE_CHECKING:
    from tenacity.wait import wait_base

    from aiokeyless.models import Operation

    from .state import Hold, PolledOperation

KEPT_FOR: Final = 120.0  # seconds: a browser asks again within one or two, a job within a minute
KEPT: Final = 10_000  # operations


class Pause:
    """An operation between two holds.

    Args:
        hold: The hold that ended.
        due: When its schedule or the backoff polls next; None where that is not known yet, as a poll is in flight.
        now: The time.
    """

    __slots__ = ("approval", "attempt", "due", "may_be_missing_until", "polled", "schedule", "seen", "since")

    def __init__(self, hold: Hold, due: float | None, now: float) -> None:
        self.polled: PolledOperation = hold.polled
        self.schedule: wait_base = hold.schedule
        self.attempt: int = hold.attempt
        self.seen: bytes | None = hold.seen
        young_until = -math.inf if hold.ticket is None else hold.origin + YOUNG
        self.may_be_missing_until = math.inf if hold.may_be_missing else young_until  # a 404 counts as pending
        self.due = due
        self.since = now
        self.approval: Operation | None = None  # brought by the poll that was in flight

    def next_poll(self, schedule: wait_base, now: float) -> float:
        """Return when the next hold polls first, by this schedule; infinity where a poll is in flight.

        Raises:
            ConfigurationError: The schedule did not return a number.
        """
        if self.polled.poll is not None:
            return math.inf  # it is still in flight, and its end sets the next one
        if self.due is not None and (schedule is self.schedule or self.polled.failures):
            return max(now, self.due)
        return next_poll(self.polled, schedule, self.attempt - 1, now)


def next_poll(polled: PolledOperation, schedule: wait_base, attempt: int, now: float) -> float:
    """Return when a schedule polls next: counted from the poll in flight, or the last that was answered with pending.

    Where there is neither, that is now; where its other waits back off, the end of that, or infinity where the poll
    that the backoff had set is in flight: its end sets the next one.

    Args:
        polled: The operation.
        schedule: When to poll.
        attempt: The number of that poll, for the schedule.
        now: The time.

    Raises:
        ConfigurationError: The schedule did not return a number.
    """
    if polled.failures and (polled.due < math.inf or polled.poll is not None):
        return polled.due
    last = polled.pending_at if polled.poll is None else polled.poll.started_at
    if last is None:
        return now
    since_start = max(0.0, last - polled.origin)
    return max(now, last + next_delay(schedule, attempt_number=max(attempt, 1), since_start=since_start))


class Pauses:
    """The operations between two holds, those paused longest first."""

    __slots__ = ("_pauses",)

    def __init__(self) -> None:
        self._pauses: dict[str, Pause] = {}

    def __len__(self) -> int:
        return len(self._pauses)

    def add(self, pause: Pause) -> None:
        """Keep a pause, and forget those that are too old or too many."""
        self._pauses[pause.polled.operation_id] = pause
        if len(self._pauses) > KEPT:
            del self._pauses[next(iter(self._pauses))]
        self._forget_old(pause.since)

    def find(self, operation_id: str, now: float) -> Pause | None:
        """Return the pause of an operation, if it is kept."""
        self._forget_old(now)
        return self._pauses.get(operation_id)

    def remove(self, operation_id: str) -> Pause | None:
        """Remove the pause of an operation, and return it if it was kept."""
        return self._pauses.pop(operation_id, None)

    def clear(self) -> None:
        """Forget all of them."""
        self._pauses.clear()

    def _forget_old(self, now: float) -> None:
        while self._pauses and now - self._pauses[oldest := next(iter(self._pauses))].since > KEPT_FOR:
            del self._pauses[oldest]
