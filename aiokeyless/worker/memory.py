"""A broker in memory, for tests: workers and applications of one event loop share it, and it ends with them.

It keeps what the engine promises, its clock is the event loop's (which a test may move), and it stores nothing: a wait
that must survive its process needs a real broker.
"""

from __future__ import annotations

import asyncio
import itertools
import math
from bisect import insort
from collections import Counter
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from .engine import EXPIRES, Broker, Claim, Claims, Engine, Inspection, Learned, Message, OutcomeMessage, Taken, Terms

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aiokeyless.errors import BrokerError

    from .engine import Sealed

_LONGEST_WAIT: Final = 24 * 3600.0  # seconds
_LARGEST_MESSAGE: Final = 1 << 20  # bytes, as with NATS
_FLEET_NAME: Final = "keyless"
_RESOLUTION: Final = 1e-6  # seconds by which a timer may fire too early: what it is for is due


class MemoryBroker(Broker):
    """A broker in memory: give it to `ApprovalWorker`, `submit_approval` and `approval_outcomes`.

    Made and used in one event loop. A request that a worker did not settle is delivered again when that worker has
    ended, and an event that a reader did not handle when that reader reads again.

    Example:
        >>> broker = MemoryBroker()
        >>> async with ApprovalWorker(client, broker):
        ...     await submit_approval(broker, "C0FFEE")
        ...     async with aclosing(approval_outcomes(broker, "test")) as events:
        ...         event = await anext(events)
    """

    def __init__(self) -> None:
        self.fleet_name = _FLEET_NAME
        self._store = _Store()

    def now(self) -> datetime:
        """Return the time: that of its making, and what has passed since on the loop's clock."""
        return self._store.now()

    @property
    def waiting(self) -> int:
        """How many requests are not decided."""
        return self._store.waiting()

    @property
    def largest_message(self) -> int:
        """See `Broker`."""
        return _LARGEST_MESSAGE

    async def submit(self, request: bytes, name: str, traceparent: str | None = None) -> bool:
        """See `Broker`."""
        return self._store.submit(request, name, traceparent)

    def outcomes(self, reader: str) -> AsyncGenerator[OutcomeMessage]:
        """See `Broker`."""
        return self._store.outcomes(reader)

    def engine(self) -> MemoryEngine:
        """Make the worker's side of it, for one worker."""
        return MemoryEngine(self._store)


class _Store:
    """What is stored: requests, outcomes, claims, and when requests are due."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._began_at = datetime.now(UTC)
        self._began = self._loop.time()
        self._sequence = itertools.count(1)
        self._requests: dict[str, _Request] = {}  # those that were submitted, decided ones included, by their names
        self._due: list[_Due] = []  # those that no worker has, in the order of delivery
        self._timer: asyncio.TimerHandle | None = None
        self._engines: list[MemoryEngine] = []
        self.holders: dict[str, _Holder] = {}
        """The name of the request that holds each operation id."""
        self.learned: dict[str, Learned] = {}
        """What each bucket keeps."""
        self._events: dict[str, Sealed] = {}  # by their names
        self._readers: dict[str, _Reader] = {}
        self._news = asyncio.Event()

    def now(self) -> datetime:
        """See `MemoryBroker`."""
        return self._began_at + timedelta(seconds=self._loop.time() - self._began)

    def waiting(self) -> int:
        """See `MemoryBroker`."""
        return sum(not request.is_decided for request in self._requests.values())

    def backlog(self) -> int:
        """Return how many requests were never delivered."""
        return sum(not due.request.deliveries for due in self._due)

    def inspect(self) -> Inspection:
        """See `Engine`."""
        waiting = [request.stored_at for request in self._requests.values() if not request.is_decided]
        oldest_age = (self.now() - min(waiting, default=self.now())).total_seconds()
        return Inspection(waiting=len(waiting), backlog=self.backlog(), oldest_age=oldest_age)

    def submit(self, request: bytes, name: str, traceparent: str | None) -> bool:
        """See `Broker`."""
        if name in self._requests:
            return True
        stored = _Request(request, name, self.now(), next(self._sequence), traceparent)
        self._requests[name] = stored
        self.put_off(stored, 0.0)
        return False

    async def outcomes(self, reader: str) -> AsyncGenerator[OutcomeMessage]:
        """See `Broker`."""
        place = self._readers.setdefault(reader, _Reader())
        delays = place.delays
        while True:
            self._news.clear()
            now = self._loop.time() + _RESOLUTION
            events = enumerate(self._events.values())
            found = next(((number, event) for number, event in events if delays.get(number, now) <= now), None)
            if found is None:
                later = min((at for at in delays.values() if at < math.inf), default=None)
                with suppress(TimeoutError):
                    async with asyncio.timeout_at(later):
                        await self._news.wait()
                continue
            message = _MemoryOutcome(found[1], found[0], place)
            try:
                yield message
            finally:
                if not message.is_settled:
                    del delays[message.sequence]
                    self._news.set()

    def attach(self, engine: MemoryEngine) -> None:
        """Deliver to a worker from now on."""
        self._engines.append(engine)

    def detach(self, engine: MemoryEngine) -> None:
        """Deliver nothing to a worker any more."""
        if engine in self._engines:
            self._engines.remove(engine)

    def put_off(self, request: _Request, delay: float) -> None:
        """Deliver a request after so many seconds."""
        insort(self._due, _Due(self._loop.time() + delay, not request.deliveries, request.sequence, request))
        self.deliver()

    def decide(self, request: _Request, event: Sealed) -> bool:
        """Store an outcome, and the request as decided."""
        request.is_decided = True
        if event.name in self._events:
            return False
        self._events[event.name] = event
        self._news.set()
        return True

    def deliver(self) -> None:
        """Deliver what is due to the workers that asked, and come back when more is due."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time() + _RESOLUTION
        while self._due and self._due[0].at <= now and (engine := self._free_engine()) is not None:
            request = self._due.pop(0).request
            request.deliveries += 1
            engine.take(request, self.backlog())
        if self._due and self._due[0].at > now:
            self._timer = self._loop.call_at(self._due[0].at, self.deliver)

    def _free_engine(self) -> MemoryEngine | None:
        return max((engine for engine in self._engines if engine.expected()), key=MemoryEngine.expected, default=None)


class _Request:
    """A request that was submitted."""

    __slots__ = ("data", "deliveries", "is_decided", "message_id", "sequence", "stored_at", "traceparent")

    def __init__(
        self, data: bytes, message_id: str, stored_at: datetime, sequence: int, traceparent: str | None
    ) -> None:
        self.data: bytes = data
        self.message_id: str = message_id
        self.stored_at: datetime = stored_at
        self.sequence: int = sequence
        self.traceparent: str | None = traceparent
        self.deliveries: int = 0
        self.is_decided: bool = False


class _Reader:
    """What an application has had of the outcomes."""

    def __init__(self) -> None:
        self.delays: dict[int, float] = {}  # when it may have an event again, by its sequence
        self.deliveries: Counter[int] = Counter()  # of each event


class _Due(NamedTuple):
    """When a request is to be delivered; compared up to the sequence, which is unique."""

    at: float
    is_new: bool
    sequence: int
    request: _Request


class _Holder(NamedTuple):
    """The request that holds an operation id, and how often it was taken."""

    request: str
    token: int


class MemoryClaims(Claims):
    """The claims on operation ids.

    Args:
        holders: The name of the request that holds each operation id.
    """

    def __init__(self, holders: dict[str, _Holder]) -> None:
        self._holders = holders

    async def take(self, operation_id: str, request: str) -> Taken:
        """See `Claims`."""
        holder = self._holders.get(operation_id)
        if holder is not None and holder.request != request:
            return Taken(Claim.ANOTHERS, holder.token)
        taken = self._holders[operation_id] = _Holder(request, holder.token + 1 if holder else 1)
        return Taken(Claim.HELD if holder else Claim.NEW, taken.token)

    async def is_held(self, operation_id: str, request: str) -> bool:
        """See `Claims`."""
        holder = self._holders.get(operation_id)
        return holder is not None and holder.request == request

    async def release(self, operation_id: str, request: str, token: int) -> bool:
        """See `Claims`."""
        if self._holders.get(operation_id) != (request, token):
            return False
        del self._holders[operation_id]
        return True


class MemoryEngine(Engine):
    """One worker's side of a broker in memory, which is never lost.

    Args:
        store: What the broker stores.
    """

    def __init__(self, store: _Store) -> None:
        self._store = store
        self._loop = asyncio.get_running_loop()
        self._is_connected = False
        self._asked = 0
        self._asked_until = 0.0
        self._unsettled: dict[_Request, None] = {}
        self._deliver: Callable[[Message], None]
        self.claims: Claims = MemoryClaims(store.holders)
        self.fleet_name: str = _FLEET_NAME
        self.system: str = "memory"
        self.destination: str = f"{_FLEET_NAME}.approvals.request"

    async def connect(self, *, on_reconnect: Callable[[], None], on_loss: Callable[[BrokerError], None]) -> None:  # noqa: ARG002
        """See `Engine`."""
        self._is_connected = True

    async def prepare(self, *, ack_wait: float) -> Terms:  # noqa: ARG002
        """See `Engine`."""
        return Terms(_LONGEST_WAIT, _LARGEST_MESSAGE)

    async def open(self, *, deliver: Callable[[Message], None], ended: Callable[[str | None], None]) -> None:  # noqa: ARG002
        """See `Engine`."""
        self._deliver = deliver
        self._store.attach(self)

    @property
    def is_connected(self) -> bool:
        """See `Engine`."""
        return self._is_connected

    def now(self) -> datetime:
        """See `Engine`."""
        return self._store.now()

    def expected(self) -> int:
        """See `Engine`."""
        return self._asked if self._loop.time() < self._asked_until else 0

    async def ask(self, batch: int) -> None:
        """See `Engine`."""
        self._asked = self.expected() + batch
        self._asked_until = self._loop.time() + EXPIRES
        self._store.deliver()

    async def inspect(self) -> Inspection:
        """See `Engine`."""
        return self._store.inspect()

    async def read_learned(self, bucket: str) -> Learned:
        """See `Engine`."""
        return self._store.learned.get(bucket, Learned(None, 0))

    async def write_learned(self, bucket: str, state: bytes, revision: int) -> bool:
        """See `Engine`."""
        if (await self.read_learned(bucket)).revision != revision:
            return False
        self._store.learned[bucket] = Learned(state, revision + 1)
        return True

    async def restore(self) -> None:
        """See `Engine`."""

    async def close(self) -> None:
        """See `Engine`."""
        self._store.detach(self)

    async def disconnect(self) -> None:
        """See `Engine`."""
        self._is_connected = False
        self._store.detach(self)
        while self._unsettled:
            self.settle(request := next(iter(self._unsettled)))
            self._store.put_off(request, 0.0)

    def take(self, request: _Request, backlog: int) -> None:
        """Hand on a delivery."""
        self._asked -= 1
        self._unsettled[request] = None
        self._deliver(_MemoryMessage(self, self._store, request, backlog))

    def settle(self, request: _Request) -> None:
        """Expect no word about a delivery any more."""
        self._unsettled.pop(request, None)


class _MemoryMessage(Message):
    """One delivery of a request."""

    __slots__ = ("_engine", "_request", "_store")

    def __init__(self, engine: MemoryEngine, store: _Store, request: _Request, backlog: int) -> None:
        self._engine = engine
        self._store = store
        self._request = request
        self.data = request.data
        self.message_id = request.message_id
        self.stored_at = request.stored_at
        self.number = request.deliveries
        self.backlog = backlog
        self.name = f"message-{request.sequence}"
        self.traceparent = request.traceparent

    async def put_off(self, delay: float) -> None:
        """See `Message`."""
        self._engine.settle(self._request)
        self._store.put_off(self._request, delay)

    async def decide(self, event: Sealed) -> bool:
        """See `Message`."""
        self._engine.settle(self._request)
        return self._store.decide(self._request, event)


class _MemoryOutcome(OutcomeMessage):
    """One delivery of an event."""

    __slots__ = ("_delays", "is_settled")

    def __init__(self, event: Sealed, sequence: int, place: _Reader) -> None:
        self._delays = place.delays
        self._delays[sequence] = math.inf
        place.deliveries[sequence] += 1
        self.number = place.deliveries[sequence]
        self.data = event.data
        self.kind = event.outcome
        self.sequence = sequence
        self.signature = event.signature
        self.is_settled = False

    async def done(self) -> None:
        """See `OutcomeMessage`."""
        self.is_settled = True

    async def discard(self) -> None:
        """See `OutcomeMessage`."""
        await self.done()

    async def put_off(self, delay: float) -> None:
        """See `OutcomeMessage`."""
        self.is_settled = True
        self._delays[self.sequence] = asyncio.get_running_loop().time() + delay
