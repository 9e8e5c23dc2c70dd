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
#: The most ordinary polls in flight, in multiples of the slots: while the service also answers well, and while it does
#: not.
_MOST_BESIDE_GOOD: Final = 6
_MOST: Final = 2


def most_in_flight(slots: int, now: float, *, answered_at: float) -> int:
    """Return how many ordinary polls may be in flight, slow ones included.

    Args:
        slots: How many slots there are.
        now: The time.
        answered_at: When the last good answer came.
    """
    return (_MOST_BESIDE_GOOD if now - answered_at <= SLOW else _MOST) * slots


def are_held_by_failing(failing: int, limit: int) -> bool:
    """Return whether failing operations hold over a quarter of the slots, so that the order of probes applies."""
    return 4 * failing > limit


class Slots(Generic[T]):
    """The deliveries of one worker that hold a slot: each for its first second. Times are of one clock, in seconds."""

    __slots__ = ("_circuit", "_failing", "_held", "_slow_probes")

    def __init__(self, circuit: Circuit) -> None:
        self._circuit = circuit
        self._held: dict[T, tuple[float, bool]] = {}  # since when, and whether its last poll failed; the oldest first
        self._failing = 0
        self._slow_probes: set[T] = set()

    def take(self, holder: T, now: float, *, is_retry: bool) -> None:
        """Give a slot to what starts now. `is_retry` tells whether its last poll failed."""
        self._held[holder] = now, is_retry
        self._failing += is_retry

    def release(self, holder: T) -> None:
        """Forget what has ended."""
        self._slow_probes.discard(holder)
        self._free(holder)

    def held(self, now: float) -> int:
        """Return how many slots are held, without slow ones and those from before the circuit opened.

        A slow probe counts as failed, once, from its start. Its answer may still be good.
        """
        circuit = self._circuit
        while self._held:
            holder = next(iter(self._held))
            started_at = self._held[holder][0]
            is_from_before = not circuit.takes_room(started_at)
            if started_at + SLOW > now + RESOLUTION and not is_from_before:
                break
            self._free(holder)
            if circuit.state is CircuitState.OPEN and not is_from_before:
                self._slow_probes.add(holder)
                circuit.record_failure(started_at, holder, started_at=started_at, is_probe=True)
        return len(self._held)

    def slow_at(self) -> float:
        """Return when the oldest holder gives its slot back at the latest; infinity if there is none."""
        return self._held[next(iter(self._held))][0] + SLOW if self._held else math.inf

    def has_failed(self, holder: T) -> bool:
        """Return whether it counted as a failed probe already."""
        return holder in self._slow_probes

    @property
    def are_held_by_failing(self) -> bool:
        """Whether failing ones hold over a quarter of the slots."""
        return are_held_by_failing(self._failing, self._circuit.limit)

    def _free(self, holder: T) -> None:
        if (held := self._held.pop(holder, None)) is not None:
            self._failing -= held[1]
