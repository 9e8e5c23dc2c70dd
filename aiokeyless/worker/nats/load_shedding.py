"""Load shedding: delays are stretched while more polls are due than the workers can make.

The broker repeats deliveries before it delivers new requests. If the due polls took all the room, no new request would
be delivered, and its user would not be asked until others have given up. Each delivery carries the number of requests
that were never delivered. That number is enough for workers to make room together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_MAX_FACTOR: Final = 16.0
#: Seconds in which the factor doubles while new requests wait: a burst passes before it matters.
_DOUBLES_IN: Final = 5.0
_HALVES_IN: Final = 2.5  # seconds, while none waits
_SEEN_FOR: Final = 1.0  # seconds for which one delivery shows that new requests wait


class LoadShedding:
    """How much one worker stretches the delays of its schedule."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._factor = 1.0
        self._at = now()  # the time to which the factor belongs
        self._behind_until = self._at

    @property
    def factor(self) -> float:
        """What delays are multiplied by, 1 to 16."""
        self._advance()
        return self._factor

    def on_delivery(self, *, redelivered: bool, backlog: int) -> None:
        """Adapt to a delivery, while so many requests were never delivered."""
        self._advance()
        if not backlog:
            self._behind_until = self._at
        elif redelivered:  # a new one does not show a lack of room, even while others wait: they may be a burst
            self._behind_until = self._at + _SEEN_FOR

    def _advance(self) -> None:
        now = self._now()
        behind = max(0.0, min(now, self._behind_until) - self._at)
        grown = min(self._factor * 2.0 ** (behind / _DOUBLES_IN), _MAX_FACTOR)
        self._factor = max(grown * 2.0 ** -((now - self._at - behind) / _HALVES_IN), 1.0)
        self._at = now
