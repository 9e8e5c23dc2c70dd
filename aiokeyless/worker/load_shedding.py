"""Load shedding: delays are stretched while more polls are due than the workers can make.

The broker delivers again before it delivers anew. Where the polls that are due take all the room, a new request would
not be delivered at all: its user would not be asked until others have given up. Each delivery carries the number of
requests that were never delivered, and that is all that workers need to make room together.
"""

from __future__ import annotations

from typing import Final

_MAX_FACTOR: Final = 16.0
#: What the factor grows by with each poll that was made before a new request, and shrinks by with each that was not.
_STEP: Final = 1.01
_NEGLIGIBLE: Final = 1.1  # as much as the schedule's own jitter


class LoadShedding:
    """How much one worker stretches the delays of its schedule.

    Attributes:
        factor: What they are multiplied by, 1 to 16.
    """

    def __init__(self) -> None:
        self.factor: float = 1.0

    @property
    def is_noticeable(self) -> bool:
        """Whether polls are so far from where the schedule put them that it must not learn from their times."""
        return self.factor > _NEGLIGIBLE

    def on_delivery(self, *, redelivered: bool, backlog: int) -> None:
        """Adapt to a delivery.

        Args:
            redelivered: Whether it was delivered before. New ones say nothing: a burst of them is no lack of room.
            backlog: How many requests were never delivered.
        """
        if redelivered:
            self.factor = min(self.factor * _STEP, _MAX_FACTOR) if backlog else max(self.factor / _STEP, 1.0)
