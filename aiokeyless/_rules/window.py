"""The polls that a saturated service gets at once: as many as it answers soon. Pure.

A service that answers so many requests in a second, and no more, queues the rest. Then more polls in flight bring no
more answers, only later ones, until each is cut off before its answer comes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Good answers that are compared at a time. A slow one among them, as of a slow shard, is no sign.
_ROUND: Final = 8
#: Answers are late if the quickest of a round takes so many times as long as the quickest ever, and so much more.
_TIMES_QUICKEST: Final = 2.0
_SECONDS_MORE: Final = 0.3
#: A queue grows if answers come in so many times the time in which their polls were sent.
_GROWS: Final = 1.2
#: What is left of the polls in flight if answers are late.
_LEFT: Final = 0.7
_LEAST: Final = 2.0
#: Polls that may be in flight after the first good answer of an outage: the service may still be starting.
_AFTER_OUTAGE: Final = 16.0
#: A fall helps, the first one aside, if the quickest answer then takes less than so many times as long as before.
_HELPS: Final = 0.9
#: A limit of so many times the polls in flight is not needed.
_UNUSED: Final = 4.0
#: A poll in flight for so many times a round trip, and for a second, hangs.
_ROUND_TRIPS: Final = 3.0
_SECONDS: Final = 1.0


class Window:
    """How many polls may be in flight, by how long good answers take. It starts without a limit."""

    def __init__(self) -> None:
        self.limit: float = math.inf
        """Polls that may be in flight, without those that hang."""
        self._quickest = math.inf  # seconds of an answer
        self._answers: list[tuple[float, float]] = []  # of this round: when the poll started, and when the answer came
        self._since = -math.inf  # when the limit fell last
        self._fell_at = math.inf  # seconds of the quickest answer then, if it was a second fall in a row or a later one
        self._fell_with = 0.0  # the limit before that fall
        self._hangs_after = _SECONDS
        self.begins_anew: bool = False
        """Whether few polls are in flight after silence, and each good answer lets one more be."""
        self._last = math.inf  # seconds of the last good answer

    def opens_at(self, now: float, started: Sequence[float]) -> float:
        """Return when one more poll may start, if none of those in flight ends before. They `started` in this order."""
        limit = int(self.limit)
        return now if self._count_recent(now, started) < limit else started[-limit] + self._hangs_after

    def record_success(self, now: float, *, started_at: float) -> bool:
        """Record a good answer. Return whether the limit must be adapted."""
        self._last = now - started_at
        if started_at < self._since:  # it shows nothing about the present limit
            return False
        answers = self._answers
        answers.append((started_at, now))
        if self.begins_anew:
            return True
        if len(answers) < _ROUND:
            return False
        self._quickest = min(self._quickest, quickest := min([at - start for start, at in answers]))
        if self.limit == math.inf and not self._is_late(quickest):  # nearly always
            answers.clear()
            return False
        return True

    def adapt(self, now: float, started: Sequence[float]) -> None:
        """Adapt the limit."""
        answers, self._answers = self._answers, []
        if self.begins_anew:
            start, at = answers[-1]
            self._hangs_after = max(_SECONDS, _ROUND_TRIPS * (at - start))
            self.begins_anew = not self._is_late(at - start)
            self.limit += self.begins_anew
            if self.limit > _UNUSED * self._count_recent(now, started):
                self.limit, self.begins_anew = math.inf, False
            return
        seconds = [at - start for start, at in answers]
        quickest = min(seconds)
        self._hangs_after = max(_SECONDS, _ROUND_TRIPS * max(seconds))
        starts = [start for start, _ in answers]
        grows = answers[-1][1] - answers[0][1] > _GROWS * (max(starts) - min(starts))
        grows &= max(starts[: _ROUND // 2]) <= min(starts[_ROUND // 2 :])  # a queue keeps the order
        if not self._is_late(quickest):
            self._fell_at = math.inf
            self.limit += _ROUND / self.limit
            if self.limit > _UNUSED * self._count_recent(now, started):
                self.limit = math.inf
        elif self.limit == math.inf:
            if grows:  # else all answers take longer, by whatever cause
                self._fall(now, started)
        elif self.limit > _LEAST and (quickest < _HELPS * self._fell_at or self.limit > _HELPS * self._fell_with):
            self._fell_at, self._fell_with = quickest, self.limit
            self._fall(now, started)
        else:  # fewer polls are no help: this is how long the service takes
            self._quickest, self._fell_at, self.limit = quickest, math.inf, math.inf

    def record_silence(self, now: float, *, started_at: float, answered_at: float) -> None:
        """Record a poll that got no answer. If no other was answered well since it started, begin anew with few polls.

        Perhaps the service's queue is so long that all of its answers come too late. If the last ones were slow, the
        service gets fewer polls the longer it is silent.
        """
        if answered_at < started_at and started_at >= self._since:
            if self.begins_anew and self._last > _SECONDS:
                self._hangs_after *= 2.0
            self.begin_anew(now, _LEAST)

    def begin_anew(self, now: float, limit: float = _AFTER_OUTAGE) -> None:
        """Let so many polls be in flight, and one more with each good answer that is not late."""
        self.limit, self._since, self.begins_anew, self._answers = limit, now, True, []

    def _is_late(self, seconds: float) -> bool:
        return seconds > _TIMES_QUICKEST * self._quickest + _SECONDS_MORE

    def _fall(self, now: float, started: Sequence[float]) -> None:
        in_flight = min(self.limit, self._count_recent(now, started))  # more than the limit, if it fell just now
        self.limit, self._since = max(_LEAST, _LEFT * in_flight), now

    def _count_recent(self, now: float, started: Sequence[float]) -> int:
        return sum(at > now - self._hangs_after for at in started)
