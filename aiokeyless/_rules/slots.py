"""How many polls may be in flight, in slots that slow polls give back. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, TypeVar

from .final import RESOLUTION

if TYPE_CHECKING:
    from collections.abc import Hashable

T = TypeVar("T", bound="Hashable")

#: Seconds after which a poll in flight gives its slot back.
SLOW: Final = 1.0


def most_in_flight(slots: int, now: float, *, answered_at: float) -> int:
    """Return how many ordinary polls may be in flight, slow ones included.

    There are fewer while the service answers none well: the last good answer came at `answered_at`. Many systems give a
    process 1024 descriptors, so large numbers of slots have fewer beside them.
    """
    if now - answered_at <= SLOW:
        return max(2 * slots, min(6 * slots, 512))
    return max(3 * slots // 2, min(2 * slots, 384))


def most_final_in_flight(slots: int) -> int:
    """Return how many final polls may be in flight unless the budget is spent."""
    return max(slots, min(4 * slots, 256))


class Slots(dict[T, tuple[float, bool]]):
    """The polls of a client, or the deliveries of a worker, that hold a slot: each for its first second.

    Each has the time since when, in seconds of one clock, and whether the operation's last poll failed; the oldest is
    first. `release_slow` releases those of slow polls.
    """

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit: int = limit
        """How many slots there are."""
        self._of_retries = 0

    def take(self, holder: T, now: float, *, is_retry: bool) -> None:
        """Give a slot to what starts now; `is_retry` says that the operation's last poll failed."""
        self[holder] = now, is_retry
        self._of_retries += is_retry

    def release(self, holder: T) -> None:
        """Release the slot of what has ended."""
        if (slot := self.pop(holder, None)) is not None:
            self._of_retries -= slot[1]

    def release_slow(self, now: float) -> None:
        """Release the slots of slow polls."""
        while self and self.slow_at() <= now + RESOLUTION:
            self.release(next(iter(self)))

    def slow_at(self) -> float:
        """Return when the oldest holder gives its slot back at the latest; infinity if there is none."""
        return next(iter(self.values()))[0] + SLOW if self else math.inf

    @property
    def are_held_by_failing(self) -> bool:
        """Whether operations whose last poll failed hold over a quarter of the slots."""
        return 4 * self._of_retries > self.limit
