"""The final poll: which one it is, until when it may start, and why it got no answer. Pure.

Rule 3 of docs/rules.md. Each engine keeps its deadlines by a clock of its own, so the functions take seconds only.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

#: Seconds past the deadline for the final poll of a wait in memory, and for repeating it if it fails.
FINAL_POLL_TIMEOUT: Final = 2.0
#: The last seconds of that time in which none starts: it would hardly be answered.
_TOO_LATE: Final = 0.5
#: If a deadline is handled so many seconds late, the event loop stood still, and that time begins only then.
STOOD_STILL: Final = 0.5
#: Seconds to which the clocks in use round, or better. A timer that fires so little before its time is not early.
RESOLUTION: Final = 1e-6


def is_final(left: float) -> bool:
    """Return whether a poll that starts so many seconds before the deadline is the final one."""
    return left <= RESOLUTION


def may_start(left: float) -> bool:
    """Return whether a final poll of a wait in memory may start so many seconds before its deadline (negative: after).

    That also holds for its repetition. An error at the wrong moment must not cost an approval that came in time.
    """
    return left + FINAL_POLL_TIMEOUT >= _TOO_LATE - RESOLUTION


class Unanswered(Enum):
    """Why a wait in memory ends with an unknown outcome. The value is a clause for the error's message."""

    NO_ANSWER = "its final poll was not answered"
    FAILED = "its final poll failed"
    NO_SLOT = "no final poll could be sent, since all slots for them were taken"
    FAILING = "no final poll could be sent, since the service fails, and they go one at a time"
    PAUSE = "no final poll could be sent, since the service asked for a pause, and they go one at a time"
