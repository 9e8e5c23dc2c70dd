"""A client's real poller against a service that is simulated, on a virtual clock: minutes take seconds to run.

Nothing is sent. A service is a function that says for each poll how long it takes and how it ends, so that it can be
well, down, half down, or bad for some operations only.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import looptime

from aiokeyless._http.transport import Transport
from aiokeyless._listeners import Listeners
from aiokeyless._waits.poller import Poller
from aiokeyless.errors import RateLimitError, StatusError
from aiokeyless.models import Operation

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from tenacity.wait import wait_base

    from aiokeyless._waits.poller import FutureWait
    from aiokeyless.events import Listener

_LATENCY: Final = 0.05  # seconds of a good answer

#: Seconds that an answer takes (infinite: none comes), and the failure that it is; None: a good one.
Answer = tuple[float, StatusError | None]
#: A service: its answer to a poll, by the operation id and the time.
Service = Callable[[str, float], Answer]

GOOD: Final[Answer] = (_LATENCY, None)
HANGING: Final[Answer] = (math.inf, None)


def failing(status: int = 500, *, seconds: float = _LATENCY, retry_after: float | None = None) -> Answer:
    """Return an answer that is a failure."""
    kind = RateLimitError if status == 429 else StatusError  # as protocol.read
    return seconds, kind(status=status, method="GET", path="/v2/operations/x", retry_after=retry_after)


def operation(operation_id: str, *, is_approved: bool, user_id: str = "AB", payload: str | None = None) -> Operation:
    """Return a good answer."""
    return Operation(
        id=1,
        timestamp="2026-01-01T00:00:00",
        node_id="",
        user_id=user_id,
        operation_id=operation_id,
        operation_payload=payload,
        result=is_approved,
        state="approved" if is_approved else "pending",
    )


class SimulatedTransport(Transport):
    """A transport that asks a function instead of a network."""

    def __init__(self, service: Service) -> None:  # there is no session: nothing of the real one is called
        self.request_timeout = 10.0
        self.max_connections = math.inf
        self.service = service
        self.sent: list[float] = []  # when each poll was
        self.approved_at: dict[str, float] = {}

    async def poll(self, operation_id: str, is_renewal: bool = False) -> Operation:  # noqa: ARG002
        """Answer as the service says."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        seconds, error = self.service(operation_id, now)
        self.sent.append(now)
        await (loop.create_future() if seconds == math.inf else asyncio.sleep(seconds))
        if error is not None:
            raise error.with_traceback(None)
        return operation(operation_id, is_approved=now >= self.approved_at.get(operation_id, math.inf))


class Simulation:
    """A poller, its service, and what became of the waits.

    Args:
        service: How each poll ends.
        schedule: When to poll.
        seed: Of all that is random, the library's backoff and jitter included.
        max_in_flight: Polls in flight at once.
        listeners: Whom to tell of waits, polls and the service.
    """

    transport: SimulatedTransport
    poller: Poller

    def __init__(
        self,
        service: Service,
        schedule: wait_base,
        *,
        seed: int = 1,
        max_in_flight: int = 256,
        listeners: tuple[Listener, ...] = (),
    ) -> None:
        random.seed(seed)
        self._listeners = Listeners(listeners) if listeners else None
        self._service = service
        self._schedule = schedule
        self._max_in_flight = max_in_flight
        self._loop = looptime.new_event_loop(noop_cycles=1)
        self.lateness: dict[str, float] = {}
        """Seconds from the approval of an operation to the end of its wait."""

    def run(self, scenario: Coroutine[Any, Any, None]) -> None:
        """Run a scenario to its end, and close the client."""

        async def main() -> None:
            self.transport = SimulatedTransport(self._service)
            self.poller = Poller(
                self.transport,
                schedule=self._schedule,
                max_in_flight=self._max_in_flight,
                max_polls_per_second=1000.0,  # as by default
                listeners=self._listeners,
            )
            await scenario
            await self.poller.aclose()

        try:
            self._loop.run_until_complete(main())
        finally:
            self._loop.close()

    @property
    def now(self) -> float:
        """The virtual time, in seconds from the start."""
        return self._loop.time()

    async def sleep_until(self, when: float) -> None:
        """Let time pass."""
        await asyncio.sleep(max(0.0, when - self.now))

    def start(self, operation_id: str, *, approved_in: float = math.inf, timeout: float = math.inf) -> FutureWait:
        """Start a wait for an operation that is approved in so many seconds."""
        at = self.now + approved_in
        self.transport.approved_at[operation_id] = at
        wait = self.poller.start(operation_id, ticket=None, timeout=timeout, schedule=None, may_be_missing=False)

        def ended(_: object) -> None:
            if isinstance(wait.result(), Operation):
                self.lateness[operation_id] = self.now - at

        wait.add_done_callback(ended)
        return wait
