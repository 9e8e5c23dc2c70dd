"""The interface of a broker, for workers and for the applications on both sides of them.

A broker stores a request until it is decided, and delivers it again each time it is put off. It keeps one outcome of
each request, and delivers that to each reader until the reader has handled it. Each broker is a folder of this package.
`tests/worker/conformance` tests these promises.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from enum import Enum, IntEnum, auto
from types import TracebackType
from typing import Final, NamedTuple, Self, TypeVar

import msgspec

from aiokeyless.errors import BrokerError
from aiokeyless.events import Inspection
from aiokeyless.models import Private

from .messages import REQUEST_VERSION, ApprovalEvent, ApprovalRequest, Message

T = TypeVar("T")

#: Most seconds for which an unhandled outcome is put off.
LONGEST_PAUSE: Final = 300.0
#: Unread outcomes of each reader that an inspection looks at. A dead reader must not make it slow.
MOST_UNREAD: Final = 10_000


def outcome_pause(deliveries: int) -> float:
    """Return the seconds for which an unhandled outcome is put off after so many deliveries: 1, 2, 4, ..."""
    return float(min(2.0 ** (deliveries - 1), LONGEST_PAUSE))


class UnavailableError(Exception):
    """The broker did not confirm that it did what it was asked, and may do it later.

    It never leaves the worker's package: an application gets a `BrokerError`. If the broker will never do it, because
    it is misconfigured or the worker may not use it, it raises a `BrokerError` itself, and the worker ends.
    """


class RefusedError(UnavailableError):
    """The broker refused, because a disk or a stream is full, for example; or it did not answer in time."""


class NewRequest(Private, msgspec.Struct, frozen=True):
    """A request to store."""

    request: ApprovalRequest  # already checked
    body: bytes  # the request as JSON: what `Message.body` will be
    digest: str  # of all its content but `created_at`: two requests with equal digests are the same request
    traceparent: str | None  # its position in a trace (W3C Trace Context), which travels beside the request


class UnreadOutcome(NamedTuple):
    """An outcome that a reader has not handled."""

    reader: str
    operation_id: str
    age: float  # seconds since it was stored
    failures: int  # deliveries in vain


class OutcomeDelivery(ABC):
    """An outcome that a reader has not handled, delivered to one of the reader's processes.

    On an application's connection it is in a transaction, which `mark_handled` commits and `put_off` rolls back.
    """

    __slots__ = ("data", "place")

    data: bytes  # the event, as JSON
    place: str  # at the broker, for the log

    @abstractmethod
    async def mark_handled(self) -> None:
        """Do not deliver it to this reader again.

        Raises:
            UnavailableError: It may be delivered again.
            BrokerError: As above.
        """

    @abstractmethod
    async def put_off(self, delay: float | None = None) -> None:
        """Deliver it again later.

        Args:
            delay: Seconds until then. Default: 1 s, 2 s, ... and at most 5 minutes, longer each time.

        Raises:
            UnavailableError: It is delivered again at some other time.
        """


class ApplicationSide(ABC):
    """The applications' side of a broker: they submit requests, and read outcomes.

    An application may have only this side, on a connection of its own, and submit in its own transactions.

    Attributes:
        largest_request: Most bytes of one request.
    """

    largest_request: int

    @abstractmethod
    async def submit(self, new: NewRequest) -> bool:
        """Store a request, unless the same is stored already. The broker itself retries.

        Returns:
            Whether the same request was stored already.

        Raises:
            ConflictError: A different request has this operation id, which the message names. If the broker cannot
                tell, it stores the request, and the worker decides it as a conflict.
            InvalidRequestError: The broker cannot store such a request.
            UnavailableError: The broker did not confirm that it stored the request, which can be submitted again.
            BrokerError: Requests cannot be stored, and that does not change by itself.
        """

    @abstractmethod
    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        """Wait for an outcome that this reader has not handled.

        A new reader gets all stored outcomes. If an outcome is neither handled nor put off, because its process was
        killed, the broker delivers it again, after half a minute at the latest. Due outcomes come in such an order that
        one that kills its process does not hold up the others.

        Args:
            reader: Name of the reading application; its processes share the outcomes.

        Raises:
            UnavailableError: The broker is away.
            BrokerError: Outcomes cannot be read, and that does not change by itself.
        """


class ExchangeResult(IntEnum):
    """How a delivery's exchange with Keyless ended. The functions of PostgreSQL have these numbers, too."""

    ANSWERED = 0
    """Keyless answered a poll well, which resets the request's failures."""
    FAILED = 1
    """It failed transiently, which adds one failure to the request."""
    NONE = 2
    """There was none: the worker gives the delivery back, and it does not count."""
    CREATED = 3
    """The operation was created, or is there already. That resets the failures too, but no poll was answered."""


class Claim(Enum):
    """Which request an operation id belongs to."""

    NEW = auto()
    """This request's, by this claim."""
    HELD = auto()
    """This request's already, by an earlier delivery."""
    ANOTHERS = auto()
    """A different request's, or nobody's any more: an outcome of this request is stored already."""


class Broker(ApplicationSide):
    """A broker, for workers and for applications.

    It is an async context manager. Each call is for one item. A broker that is faster in batches gathers the calls of
    one turn of the event loop itself, for example with ``batches.Batches``.

    The methods for workers raise `UnavailableError` if the broker is away and may come back. They raise `BrokerError`
    if it will not come back, or if this worker may not use it.

    Attributes:
        system: Kind of the broker, for listeners, by OpenTelemetry's conventions.
        destination: The place of its requests, by the same conventions.
        forgets_claims: Whether an operation id can be claimed anew after about a day.
        request_version: The newest version of requests that its workers know.
    """

    system: str
    destination: str
    forgets_claims: bool
    request_version: int = REQUEST_VERSION

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def open(self) -> None:
        """Connect.

        Raises:
            BrokerError: The broker cannot be reached, does not let this user in, or is not fit.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Disconnect, even if the broker is away. Unsettled deliveries come again. Idempotent."""

    # -- for workers

    @abstractmethod
    async def prepare(self, *, lease: float, service: str) -> float:
        """Make or check what workers need. Each worker calls it once, before the methods below.

        Args:
            lease: Seconds after which an unsettled delivery comes again.
            service: Base URL of the service that the worker asks. The broker records that of the first worker, and
                refuses workers of others. Empty: none is recorded or refused.

        Returns:
            The longest wait for a request that it allows, in seconds, final polls included.

        Raises:
            BrokerError: Something is not as it must be, and cannot be made so.
        """

    @abstractmethod
    def now(self) -> datetime:
        """Return the time by the broker's clock, as last measured. The same clock stamps stored requests."""

    @abstractmethod
    async def take(self, up_to: int, within: float, *, untried: int | None = None) -> Sequence[Message]:
        """Take requests that are due; wait for some if there are none.

        Several workers may call it at once, even on one broker object. If a call is cancelled, the requests that it has
        taken come again. Requests come in the order in which they are due, or in that of `aiokeyless._rules.order`.

        Those of a later version than `request_version` come beside the others and hold up none: workers give them back.

        Args:
            up_to: How many of the others at most; at least 1.
            within: Seconds after which it returns at the latest, even without a request.
            untried: None unless requests fail. Then so many that were never tried come first, and the others by fewest
                failures. Among equals, those that a poll answered well come first. Those that were tried and no more
                follow, and then those never tried; of both, the newest first.
        """

    @abstractmethod
    async def take_overdue(self, up_to: int, grace: float) -> Sequence[Message]:
        """Take due requests whose time was over `grace` seconds ago, without waiting for any.

        These seconds are the worker's grace, and those since then that do not count for it. A worker calls it
        while Keyless is away, because it can decide these requests without Keyless. A broker that cannot tell them from
        others may return others as well, which the worker puts off.
        """

    @abstractmethod
    async def put_off(self, message: Message, delay: float, result: ExchangeResult) -> None:
        """Deliver a request again after `delay` seconds, unless it has been delivered again already.

        A broker may cut the delay to 200 s. Then a clock that was set back delays no request for longer.
        """

    @abstractmethod
    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        """Store an outcome and remove the request: in one step, or else the outcome first.

        Args:
            message: Any delivery of the request, the last or an earlier one. Of two decisions the first one is kept.
            event: The outcome.

        Returns:
            Whether this call stored the outcome; False if the request had one already.

        Raises:
            RefusedError: The broker does not store the outcome.
        """

    # An operation does not say which request asked for it. An earlier request of the same content may have, and its
    # approval must not count twice. So a request claims its operation id before it creates the operation, and only if
    # there was none. If the phone starts the operation, the request claims the id before its first poll. An approval
    # counts only for a request that holds its id.

    @abstractmethod
    async def claim(self, message: Message) -> Claim:
        """Claim an operation id for a request, unless another request holds it. The claim is durable on return.

        A broker of SQL refuses a request that another worker has decided. NATS does not know of that.
        """

    @abstractmethod
    async def has_claim(self, message: Message) -> bool:
        """Return whether the request holds its operation id at this moment."""

    @abstractmethod
    async def unclaim(self, message: Message) -> bool:
        """Release an id, unless another delivery of the request has claimed it since. Return whether it is free now."""

    @abstractmethod
    async def inspect(self) -> Inspection:
        """Return the state of the whole fleet, by few and cheap calls to the broker."""

    async def list_unread(self, up_to: int) -> Sequence[UnreadOutcome]:  # noqa: ARG002  # for brokers that can tell
        """Return the oldest of the outcomes that `inspect` counts; none if the broker cannot tell them apart."""
        return ()


@contextmanager
def public_errors(what: str = "") -> Iterator[None]:
    """Raise an `UnavailableError` as a `BrokerError` that may pass, which begins with these words."""
    try:
        yield
    except UnavailableError as error:
        raise BrokerError(f"{what}{error}", may_pass=True) from None


async def without_frames(connecting: Awaitable[T]) -> T:
    """Raise an error, or a cancellation, without the driver's frames, which hold the password."""
    try:
        return await connecting
    except BaseException as error:  # noqa: BLE001  # see above
        error.__context__ = None
        raise error.with_traceback(None) from None
