"""The tokens of one client, as an observer counts them by rule 4 of docs/rules.md."""

from __future__ import annotations

import math
from bisect import bisect_right
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from .evidence import Evidence
    from .history import Exchange

#: Tokens for each wait; of all, at least and at most; of a good answer, with the one that its poll took.
PER_WAIT: Final = 3
LEAST: Final = 32
MOST: Final = 512
GAIN: Final = 41
#: Tokens of a second, and once there have been only failures for so many seconds.
PER_SECOND: Final = 5.0
LATER: Final = 1.0
LONG: Final = 30.0

_Event = Literal["begins", "ends", "sent", "good", "other", "failed"]
#: What is certain to come last of what comes at once, if there may be fewer tokens; else the other way round.
_ORDER: Final[dict[_Event, int]] = {"failed": 0, "ends": 0, "sent": 1, "other": 2, "good": 2, "begins": 2}


class Tokens:
    """How many tokens a client has at most (generous), or at least.

    An answer that is not certain to be a failure is a good one, or a failure.
    """

    def __init__(self, evidence: Evidence, *, is_generous: bool) -> None:
        self._is_generous = is_generous
        self._spent = self._counted_at = self._sent_at = 0.0
        self._waits = 0
        self._since = math.inf  # when failures began
        self._failed_at = self._answered_at = -math.inf
        self._times: list[float] = []
        self._left: list[tuple[float, int]] = []
        self.taken: list[tuple[Exchange, float]] = []
        """The polls, and how many tokens there were before each."""
        for at, event, poll in self._events(evidence):
            self._count(at, event, poll)
            self._times.append(at)
            self._left.append((self._spent, self._capacity))

    def at(self, at: float) -> float:
        """Return how many there are before a time."""
        spent, capacity = self._left[last] if (last := bisect_right(self._times, at) - 1) >= 0 else (0.0, LEAST)
        return capacity - spent

    @property
    def _capacity(self) -> int:
        return min(max(PER_WAIT * self._waits, LEAST), MOST)

    def _events(self, evidence: Evidence) -> list[tuple[float, _Event, Exchange | None]]:
        kinds: dict[str, _Event] = {"said": "good", "missing": "good", "failed": "failed", "error": "other"}
        kinds["unsure"] = "good" if self._is_generous else "failed"
        events: list[tuple[float, _Event, Exchange | None]] = []
        for wait in evidence.waits:
            events += [(wait.started_at, "begins", None), (wait.ended_at, "ends", None)]
        for poll in evidence.polls:
            events.append((poll.sent_at, "sent", poll))
            if (kind := evidence.read(poll).kind) != "cut":
                is_old = poll.was_stored and kind == "failed"
                events.append((poll.ended_at, "other" if is_old else kinds[kind], poll))
        sign = -1 if self._is_generous else 1
        return sorted(events, key=lambda event: (event[0], sign * _ORDER[event[1]]))

    def _count(self, at: float, event: _Event, poll: Exchange | None) -> None:
        is_slow = not self._is_generous or self._counted_at - self._since >= LONG
        # Without a token, nothing is owed for a poll, but what starts with a good answer is paid from its tokens.
        is_owed = not self._is_generous and (event != "sent" or at == self._sent_at)
        spent = self._spent if is_owed else min(self._spent, self._capacity)
        self._spent = max(0.0, spent - (at - self._counted_at) * (LATER if is_slow else PER_SECOND))
        self._counted_at = at
        match event:
            case "begins":
                self._waits += 1
            case "ends":
                self._waits -= 1
                if self._is_generous:  # perhaps the tokens since the last poll were not counted before
                    gained = (at - self._sent_at) * (LATER if is_slow else PER_SECOND)
                    self._spent = max(0.0, min(self._spent, self._capacity - gained))
            case "good" | "other":
                self._spent = max(0.0, self._spent - (GAIN if event == "good" else 1))
                if event == "good":
                    self._answered_at, self._since = at, math.inf
            case "sent":
                assert poll is not None
                self.taken.append((poll, self._capacity - self._spent))
                self._spent += 1.0
                self._sent_at = at
            case "failed":
                assert poll is not None
                if self._since == math.inf or at - self._failed_at > LONG:  # they begin anew
                    if is_slow and self._is_generous:
                        self._spent = max(0.0, self._spent - (PER_SECOND - LATER) * (at - poll.sent_at))
                    self._since = max(poll.sent_at, self._answered_at)
                self._failed_at = at
