"""What a worker knows of its fleet from the broker, and what follows for whether it is ready.

The broker is asked every few seconds. Nothing here changes anything: what is not ready goes on working as well as it
can, and somebody is told.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import BrokerError
from aiokeyless.events import Inspection

from .broker import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .broker import Broker, Message, RefusedError

_EVERY: Final = 5.0  # seconds between two inspections
_STALLED_FOR: Final = 30.0  # seconds for which requests may wait while this worker is delivered nothing
#: Seconds for which a refusal counts: longer than the broker takes to deliver again what was refused (its ack wait).
_REFUSED_FOR: Final = 60.0


class Monitor:
    """Inspects the fleet for one worker.

    Args:
        broker: The broker.
        now: The clock, in seconds.
        is_paused: Whether this worker takes no deliveries just now, because Keyless fares badly.
        inspected: Called after each inspection, whatever became of it.
        lost: Called if the broker is gone for good.
    """

    def __init__(
        self,
        broker: Broker,
        now: Callable[[], float],
        *,
        is_paused: Callable[[], bool],
        inspected: Callable[[], None],
        lost: Callable[[BrokerError], None],
    ) -> None:
        self._broker = broker
        self._now = now
        self._is_paused = is_paused
        self._inspected = inspected
        self._lost = lost
        self._silence: str | None = None  # why the broker did not answer last
        self._refusal: str | None = None  # why the broker did not store the last event or claim
        self._refused_until = -math.inf
        self._deliveries = 0  # since the last inspection
        self._stalled_since: float | None = None  # requests have waited since, and none was delivered to this worker
        self._longest_wait = 0.0  # for a first delivery, since the last inspection
        self.last: Inspection = Inspection()
        """What the broker told last."""
        self.lateness: float = 0.0
        """Seconds that a request waited for its first delivery: the most between the last two inspections."""

    async def run(self) -> None:
        """Inspect, again and again, until it is cancelled."""
        while True:
            await self._inspect()
            self._inspected()
            await asyncio.sleep(_EVERY)

    def on_delivery(self, message: Message) -> None:
        """Count a delivery."""
        self._deliveries += 1
        if message.number == 1:
            waited = (self._broker.now() - message.stored_at).total_seconds()
            self._longest_wait = max(self._longest_wait, waited)

    def on_silence(self, error: UnavailableError) -> None:
        """Remember that the broker did not answer, until it answers an inspection."""
        self._silence = str(error)

    def on_refusal(self, error: RefusedError) -> None:
        """Remember that the broker did not store an event, or the claim on an operation id."""
        self._refusal = str(error)
        self._refused_until = self._now() + _REFUSED_FOR

    def on_stored(self) -> None:
        """Forget a refusal: the broker stores events."""
        self._refused_until = -math.inf

    def problems(self) -> Iterator[str]:
        """Return why requests are not stored, delivered and decided as they should be, in one line each."""
        if self._silence is not None:
            yield f"the broker does not answer: {self._silence}"
        yield from self.last.problems
        now = self._now()
        if now < self._refused_until:
            yield f"the broker refuses outcomes or claims: {self._refusal}"
        if self._stalled_since is not None and now - self._stalled_since >= _STALLED_FOR:
            waited = round(now - self._stalled_since)
            yield f"{self.last.backlog} requests wait, and none was delivered to this worker for {waited} s"

    async def _inspect(self) -> None:
        try:
            self.last = await self._broker.inspect()
        except UnavailableError as error:
            self.on_silence(error)
            return
        except BrokerError as error:
            self._lost(error)
            return
        self._silence = None
        self.lateness, self._longest_wait = self._longest_wait, 0.0
        if not self.last.backlog or self._deliveries or self._is_paused():
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = self._now()
        self._deliveries = 0
