"""What a worker, and the applications on both sides of it, need of a broker; nothing here knows any one broker.

`aiokeyless.worker.nats` implements it on NATS JetStream, `aiokeyless.worker.memory` in memory, for tests. A broker
stores a request until it is decided, delivers it as often as it is put off, keeps one outcome of each name, and
remembers which request an operation id belongs to.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from datetime import datetime

    from aiokeyless.errors import BrokerError

    from .messages import Outcome

#: Seconds for which one pull waits for deliveries. It is asked again then, whatever became of it; and a worker that is
#: to end waits for that, since a pull cannot be taken back.
EXPIRES: Final = 1.0


class EngineError(Exception):
    """The broker did not do what it was asked, as far as is known: a delivery that was not settled comes again.

    It never leaves the worker.
    """


class RefusedError(EngineError):
    """The broker answered that it does not do it: a stream is full, say, or sealed."""


class NoPlaceError(EngineError):
    """The broker has no place for it, and waiting for one was in vain."""


class Claim(Enum):
    """Whose an operation id is."""

    NEW = auto()
    """Ours, since just now."""
    HELD = auto()
    """Ours already, by an earlier delivery of this request or of the same one."""
    ANOTHERS = auto()
    """A different request's."""


class Taken(NamedTuple):
    """The answer to a request for an operation id.

    Attributes:
        claim: Whose the id is.
        token: Stands for the claim as it is now; it changes when another delivery of the same request takes the id.
    """

    claim: Claim
    token: int


class Terms(NamedTuple):
    """What the broker allows.

    Attributes:
        longest_wait: Seconds that a request may be waited for.
        largest_message: Bytes of one message.
    """

    longest_wait: float
    largest_message: int


class Inspection(NamedTuple):
    """What the broker tells of the fleet at one moment.

    Attributes:
        waiting: Requests that are not decided.
        backlog: Those of them that were never delivered.
        oldest_age: Seconds since the oldest of them was stored; 0 where there is none.
        clock_ahead: Seconds by which the broker's clock is ahead of this machine's.
        problems: Why requests or outcomes cannot be stored or delivered, in one line each.
    """

    waiting: int = 0
    backlog: int = 0
    oldest_age: float = 0.0
    clock_ahead: float = 0.0
    problems: tuple[str, ...] = ()


class Learned(NamedTuple):
    """What the schedules of a fleet have learned, as the broker keeps it.

    Attributes:
        state: As `wait_adaptive.to_json` returns it; None where nothing was written.
        revision: Stands for this state; it changes when another one is written.
    """

    state: bytes | None
    revision: int


class Sealed(NamedTuple):
    """An event, ready to be published.

    Attributes:
        outcome: Its kind.
        data: The event as JSON.
        name: Of two events with the same name, the broker keeps the first.
        signature: See `EventKeys`; None where the worker has no event key.
        traceparent: The position in the trace of who submitted the request (W3C Trace Context); or None.
        is_genuine: Tells of an event and its signature whether a worker wrote it about the same request; None likewise.
    """

    outcome: Outcome
    data: bytes
    name: str
    signature: str | None = None
    traceparent: str | None = None
    is_genuine: Callable[[bytes, str | None], bool] | None = None


class Message(ABC):
    """One delivery of a request to a worker.

    Attributes:
        data: What was published.
        message_id: The name that its publisher gave it, if any.
        stored_at: When the broker stored it, by its clock.
        number: Number of this delivery, from 1.
        backlog: How many requests were never delivered.
        name: A name of the message that is unique for good.
        traceparent: The header of that name, as it was sent; None where there is none.
    """

    __slots__ = ("backlog", "data", "message_id", "name", "number", "stored_at", "traceparent")

    data: bytes
    message_id: str | None
    stored_at: datetime
    number: int
    backlog: int
    name: str
    traceparent: str | None

    @abstractmethod
    async def put_off(self, delay: float) -> None:
        """Have it delivered again after so many seconds.

        Raises:
            EngineError: It may be delivered sooner or later than that.
        """

    @abstractmethod
    async def decide(self, event: Sealed) -> bool:
        """Store the event, and only when that is done, remove the request.

        Where anybody else may have stored an event under its name, one that is not genuine does not keep it out.

        Returns:
            Whether the event is stored by this call; False where there was one of this name already.

        Raises:
            EngineError: The event or the removal may not be stored; the request may be delivered again. It is a
                `RefusedError` where the broker said that it does not store the event.
        """


class Claims(ABC):
    """Which request an operation id belongs to, as the broker stores it.

    That an operation of the right content exists does not say who asked for it: an earlier request may have, and its
    approval must not count a second time. The number of a delivery does not say it either: a broker that is killed
    forgets deliveries of the last moment, and a request may be published twice. So a request takes its operation id
    before it creates the operation, and only where nothing was there; and only what holds the id believes an approval.
    All methods raise `EngineError` where the broker does not answer.
    """

    @abstractmethod
    async def take(self, operation_id: str, request: str) -> Taken:
        """Take an operation id for a request, by its name, unless the id is taken."""

    @abstractmethod
    async def is_held(self, operation_id: str, request: str) -> bool:
        """Return whether the id belongs to this request."""

    @abstractmethod
    async def release(self, operation_id: str, request: str, token: int) -> bool:
        """Give an id back that was taken, unless another delivery of the request took it as well in the meantime.

        Args:
            operation_id: The id.
            request: Name of the request that took it.
            token: What `take` returned with it.

        Returns:
            Whether nobody holds it any more.
        """


class Engine(ABC):
    """The worker's side of a broker: one worker's connection to it. Its methods are called in the order given here.

    Attributes:
        claims: Which request an operation id belongs to.
        fleet_name: Name of the worker's fleet.
        system: Kind of the broker, for listeners, by OpenTelemetry's conventions.
        destination: Where requests are published, likewise.
    """

    claims: Claims
    fleet_name: str
    system: str
    destination: str

    @abstractmethod
    async def connect(self, *, on_reconnect: Callable[[], None], on_loss: Callable[[BrokerError], None]) -> None:
        """Connect to the broker.

        Args:
            on_reconnect: Called when the connection was lost and is there again; nothing is expected any more then.
            on_loss: Called where it will not come back, or is good for nothing.

        Raises:
            BrokerError: It cannot be reached, or does not let this user in.
        """

    @abstractmethod
    async def prepare(self, *, ack_wait: float) -> Terms:
        """Make or check what the broker stores requests, outcomes and claims in.

        Args:
            ack_wait: Seconds after which a delivery that was not settled comes again.

        Raises:
            BrokerError: Something is not as it must be, and cannot be made so.
        """

    @abstractmethod
    async def open(self, *, deliver: Callable[[Message], None], ended: Callable[[str | None], None]) -> None:
        """Get ready to be delivered to.

        Args:
            deliver: Takes a delivery; it must not block.
            ended: Told that a pull has ended, so that there may be reason to ask again; and why, where the broker did
                not keep it for as long as it was asked to.
        """

    @property
    @abstractmethod
    def is_connected(self) -> bool:
        """Whether the broker is there, as far as is known."""

    @abstractmethod
    def now(self) -> datetime:
        """Return the time by the broker's clock, as far as it is known: that by which requests are stored."""

    @abstractmethod
    def expected(self) -> int:
        """Return how many deliveries were asked for and have not come."""

    @abstractmethod
    async def ask(self, batch: int) -> None:
        """Ask for so many deliveries more.

        Raises:
            EngineError: Nothing was asked for.
        """

    @abstractmethod
    async def inspect(self) -> Inspection:
        """Ask the broker how the fleet fares, by few and cheap requests.

        Raises:
            EngineError: It does not answer.
        """

    @abstractmethod
    async def read_learned(self, bucket: str) -> Learned:
        """Return what the fleet has learned, from a bucket.

        Raises:
            EngineError: There is no such bucket, or the broker does not answer.
        """

    @abstractmethod
    async def write_learned(self, bucket: str, state: bytes, revision: int) -> bool:
        """Write what the fleet has learned, unless another worker has done so since it was read.

        Args:
            bucket: The bucket.
            state: The state.
            revision: That of the state that was read.

        Returns:
            Whether it was written.

        Raises:
            EngineError: As far as is known, it was not.
        """

    @abstractmethod
    async def restore(self) -> None:
        """After refused pulls: make again what can be made again.

        Raises:
            BrokerError: What is missing cannot be made again: the requests in it are gone.
        """

    @abstractmethod
    async def close(self) -> None:
        """Wait for the pulls to end, which takes `EXPIRES` at most; what arrives meanwhile is still handed on.

        Raises:
            EngineError: The broker was lost meanwhile; it delivers again what was on its way.
        """

    @abstractmethod
    async def disconnect(self) -> None:
        """End the connection, whatever became of the broker."""


class OutcomeMessage(ABC):
    """One delivery of an event to an application.

    Attributes:
        data: What was published.
        kind: The kind of outcome under which it was published.
        sequence: Its number among the outcomes.
        number: Number of this delivery to this application, from 1.
        signature: See `EventKeys`; None where it has none.
    """

    __slots__ = ("data", "kind", "number", "sequence", "signature")

    data: bytes
    kind: str
    sequence: int
    number: int
    signature: str | None

    @abstractmethod
    async def done(self) -> None:
        """It was handled: do not deliver it again to this application."""

    @abstractmethod
    async def discard(self) -> None:
        """It can never be handled by this application."""

    @abstractmethod
    async def put_off(self, delay: float) -> None:
        """Have it delivered again after so many seconds."""


class Broker(ABC):
    """The application's side of a broker: requests go in, outcomes come out.

    Attributes:
        fleet_name: Name of the fleet.
    """

    fleet_name: str

    @property
    @abstractmethod
    def largest_message(self) -> int:
        """Bytes of one message."""

    @abstractmethod
    async def submit(self, request: bytes, name: str, traceparent: str | None = None) -> bool:
        """Store a request, unless one of this name is stored.

        Args:
            request: The request as JSON.
            name: Its name.
            traceparent: The submitter's position in its trace (W3C Trace Context), which travels beside the request.

        Returns:
            Whether there was one already.

        Raises:
            EngineError: It was not stored, as far as is known; the same can be submitted again. It is a `NoPlaceError`
                where that is no use until a worker has started.
        """

    @abstractmethod
    def outcomes(self, reader: str) -> AsyncGenerator[OutcomeMessage]:
        """Iterate over the outcomes that this reader has not handled, without end.

        Raises:
            BrokerError: There is no place for outcomes, or it cannot be read.
        """
