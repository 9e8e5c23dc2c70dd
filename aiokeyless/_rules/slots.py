"""How many polls may be in flight, in slots that slow polls give back. Pure."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, Generic, TypeVar

from .circuit import CircuitState
from .final import RESOLUTION

if TYPE_CHECKING:
    from collections.abc import Hashable

    from .circuit import Circuit

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
    """Return how many final polls may be in flight while the circuit is closed."""
    return max(slots, min(4 * slots, 256))


class Slots(Generic[T]):
    """The polls of a client, or the deliveries of a worker, that hold a slot: each for its first second.

    Times are of one clock, in seconds.
    """

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit
        self._held: dict[T, tuple[float, Hashable, bool]] = {}  # since when, see `take`; the oldest first
        self._failed: set[T] = set()
        self.of_retries: int = 0
        """Slots that are held by operations whose last poll failed."""

    def __len__(self) -> int:
        """Return how many slots are held; `release_slow` first releases those of slow polls."""
        return len(self._held)

    def take(self, holder: T, now: float, *, is_retry: bool, operation: Hashable = None) -> None:
        """Give a slot to what starts now; `is_retry` says that the operation's last poll failed.

        If it is slow, the operation fails, which is the holder by default.
        """
        self._held[holder] = now, holder if operation is None else operation, is_retry
        self.of_retries += is_retry

    def release(self, holder: T) -> None:
        """Forget what has ended."""
        self._failed.discard(holder)
        self._free(holder)

    def release_slow(self, now: float) -> None:
        """Release the slots of slow polls, and of those from before the circuit opened.

        A slow probe counts as failed, once, from its start. It is not cut off, since its answer may still be good.
        """
        circuit = self._circuit
        while self._held:
            holder, (since, operation, _) = next(iter(self._held.items()))
            is_from_before = not (circuit.is_calm or circuit.takes_room(since))
            if since + SLOW > now + RESOLUTION and not is_from_before:
                return
            self._free(holder)
            if circuit.state is CircuitState.OPEN and not is_from_before and not self.has_failed(holder):
                self.count_as_failed(holder)
                circuit.record_failure(since, operation, started_at=since, is_probe=True)

    def slow_at(self) -> float:
        """Return when the oldest holder gives its slot back at the latest; infinity if there is none."""
        return next(iter(self._held.values()))[0] + SLOW if self._held else math.inf

    def has_failed(self, holder: T) -> bool:
        """Return whether it counted as a failure already."""
        return holder in self._failed

    def count_as_failed(self, holder: T) -> None:
        """Let `has_failed` be true of it until its release."""
        self._failed.add(holder)

    @property
    def are_held_by_failing(self) -> bool:
        """Whether failing operations hold over a quarter of the slots, so that the order of probes applies."""
        return 4 * self.of_retries > self._circuit.limit

    def _free(self, holder: T) -> None:
        if (slot := self._held.pop(holder, None)) is not None:
            self.of_retries -= slot[2]
