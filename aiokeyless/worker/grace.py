"""For how long past its deadline a request's final poll is repeated if it got no answer. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from datetime import timedelta
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from datetime import datetime

    from .messages import Delivery

_NONE: Final = timedelta()
_STEP: Final = timedelta(milliseconds=1)
#: The longest time between two turns of the intake that is no absence.
_TURN: Final = timedelta(seconds=3)
#: Of all absences together, what does not count. A broker that flaps must not delay an outcome forever.
_ABSENT: Final = timedelta(seconds=150)


class Grace:
    """Counts the seconds after a deadline in which the worker could have asked. Times are by the broker's clock.

    After a freeze, or after the broker was away, Keyless may be back a moment later than the worker. docs/rules.md says
    what does not count.
    """

    def __init__(self, seconds: float, *, now: datetime) -> None:
        self.seconds = seconds
        self._grace = timedelta(seconds=seconds)
        self._started_at = self._turn_at = now
        self._absences: deque[tuple[datetime, datetime]] = deque(maxlen=_ABSENT // _TURN)
        self._pause = (now, now)

    def record_turn(self, now: datetime) -> None:
        """Record a turn of the intake that the broker answered, or that needed none of its answers."""
        self._started_at = min(self._started_at, now)  # the clock of a machine may be set back
        if now - self._turn_at > _TURN:
            self._absences.append((self._turn_at, now))
        self._turn_at = now

    def record_pause(self, now: datetime, seconds: float) -> None:
        """Record that Keyless asked for a pause of all polls."""
        self._pause = (now, now + timedelta(seconds=seconds if seconds <= self.seconds else 0.0))

    def left(self, delivery: Delivery, at: datetime) -> float:
        """Return the seconds until a request is past its deadline and the grace; negative if it is."""
        since = max(delivery.ticket.expires_at, delivery.message.stored_at, self._started_at)
        return (self._grace + self._skipped(since, at) - (at - since)).total_seconds()

    def overdue(self, at: datetime) -> float | None:
        """Return how many seconds ago a deadline was that is past the grace now; None if there can be none yet."""
        steps = range((at - self._started_at) // _STEP + 1)
        ago = bisect_left(steps, self._grace, key=lambda step: step * _STEP - self._skipped(at - step * _STEP, at))
        return (ago * _STEP).total_seconds() if ago < len(steps) else None

    def _skipped(self, since: datetime, at: datetime) -> timedelta:
        """Return for how long of a time the worker could not ask."""
        absences = [*self._absences]
        if at - self._turn_at > _TURN:  # one that has not ended
            absences.append((self._turn_at, at))
        times = [_overlap(absence, since, at) for absence in absences]
        begins, ends = max(self._pause[0], since), min(self._pause[1], at)
        paused = sum((-_overlap(absence, begins, ends) for absence in absences), max(_NONE, ends - begins))
        return max(min(sum(times, _NONE), _ABSENT), *times, _NONE) + paused


def _overlap(interval: tuple[datetime, datetime], since: datetime, until: datetime) -> timedelta:
    return max(_NONE, min(interval[1], until) - max(interval[0], since))
