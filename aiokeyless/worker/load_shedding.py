"""Looks spaced out while there are more of them than workers can make, so that new requests get their turn.

The broker delivers again before it delivers anew. Where the looks that are due take all there is, a new request would
not be delivered at all: its user would not be asked until others have given up. Each delivery tells how many requests
nobody has taken yet, and that is all that workers need to make room together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tenacity.wait import wait_base

if TYPE_CHECKING:
    from tenacity import RetryCallState

_MOST: Final = 16.0
#: By what the spacing grows with each look that was made before a new request, and shrinks with each that was not.
_STEP: Final = 1.01


class LoadShedding(wait_base):
    """A schedule that is stretched while new requests wait for their turn.

    Args:
        schedule: When to look where there is room for all.
    """

    def __init__(self, schedule: wait_base) -> None:
        self._schedule = schedule
        self.factor: float = 1.0

    def __call__(self, retry_state: RetryCallState) -> float:
        """Return what the schedule says, stretched."""
        return self._schedule(retry_state) * self.factor

    def on_delivery(self, *, redelivered: bool, backlog: int) -> None:
        """Adapt to a delivery.

        Args:
            redelivered: Whether it was delivered before. New ones say nothing: a burst of them is no lack of room.
            backlog: How many requests were never delivered yet.
        """
        if redelivered:
            self.factor = min(self.factor * _STEP, _MOST) if backlog else max(self.factor / _STEP, 1.0)
