"""What workers, and the applications on both sides of them, need of a broker; nothing here knows any one broker.

A broker stores a request until it is decided, delivers it as often as it is put off, keeps one outcome of each request,
and hands that to each reader until the reader has handled it. Each broker is a folder of this package, which says by
itself which URLs and which connections it is for. `tests/worker/conformance` has the promises as tests.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from datetime import datetime  # noqa: TC003  # msgspec reads the annotations
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec

from aiokeyless.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType, TracebackType

    from aiokeyless.events import Inspection

    from .messages import ApprovalEvent, ApprovalRequest

_SCHEME: Final = re.compile(r"([a-z][a-z0-9+.-]*):", re.IGNORECASE)
#: Seconds for which an outcome that was not handled is put off: doubled each time, from the first to the last.
FIRST_PAUSE: Final = 1.0
LONGEST_PAUSE: Final = 300.0


class UnavailableError(Exception):
    """The broker did not do what it was asked, as far as is known, and may do it later.

    It never leaves the worker's package: an application gets a `BrokerError`. A broker that will never do it, because
    it is misconfigured or the worker may not use it, raises a `BrokerError` itself, and the worker ends.
    """


class RefusedError(UnavailableError):
    """The broker answered that it does not do it: a disk is full, say, or a stream."""


class NewRequest(NamedTuple):
    """A request to store.

    Attributes:
        request: The request, which was checked.
        body: The request as JSON: what `Message.body` will be.
        digest: Of all its content but `created_at`: two requests with equal digests are the same request.
        traceparent: Where in a trace it was submitted (W3C Trace Context), which travels beside the request; or None.
    """

    request: ApprovalRequest
    body: bytes
    digest: str
    traceparent: str | None


class OutcomeDelivery(ABC):
    """An outcome that a reader has not handled, in the hands of one process of the reader.

    On an application's connection it is in a transaction, which `handled` commits and `put_off` rolls back.

    Attributes:
        data: The event, as JSON.
        place: Where the broker keeps it, for the log.
    """

    __slots__ = ("data", "place")

    data: bytes
    place: str

    @abstractmethod
    async def handled(self) -> None:
        """Do not deliver it to this reader again.

        Raises:
            BrokerError: It may be delivered again.
        """

    @abstractmethod
    async def put_off(self, delay: float | None = None) -> None:
        """Deliver it again later.

        Args:
            delay: After so many seconds. Default: after 1 s, 2 s, ... and at most 5 minutes, longer each time.

        Raises:
            UnavailableError: It is delivered again at some other time.
        """


class ApplicationSide(ABC):
    """What applications do with a broker: they submit requests, and read outcomes.

    An application may have no more of a broker than this: a connection of its own, in whose transactions it submits.

    Attributes:
        largest_request: Bytes of one request, at most.
    """

    largest_request: int

    @abstractmethod
    async def submit(self, new: NewRequest) -> bool:
        """Store a request, unless the same is stored already. Repeats are the broker's own business.

        Returns:
            Whether the same request was stored already.

        Raises:
            InvalidRequestError: A different request has this operation id. A broker that cannot tell stores it; the
                worker then decides it as a conflict.
            BrokerError: It was not stored, as far as is known; the same can be submitted again.
        """

    @abstractmethod
    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        """Wait for an outcome that this reader has not handled.

        A reader that is new to the broker gets all outcomes that are stored. One that is neither handled nor put off,
        because its process was killed, is delivered again, after half a minute at the latest. Those that are due come
        in an order in which one that kills its process holds up no other.

        Args:
            reader: Name of the reading application; its processes share the outcomes.

        Raises:
            UnavailableError: The broker is away.
            BrokerError: Outcomes cannot be read, and that does not change by itself.
        """


class Terms(NamedTuple):
    """What a broker allows.

    Attributes:
        longest_wait: Seconds that a request may be waited for, final polls included.
        largest_request: Bytes of one request.
    """

    longest_wait: float
    largest_request: int


class Message(msgspec.Struct, kw_only=True, eq=False):
    """One delivery of a request to a worker. A broker may extend it by what it needs to know the request again.

    Attributes:
        id: The request's number at the broker.
        body: The request as JSON.
        stored_at: When the broker stored it, by its clock.
        number: Number of this delivery, from 1.
        failures: Exchanges for this request that failed in a row, as far as the broker knows.
        traceparent: As it was submitted; None where there is none.
    """

    id: int
    body: bytes
    stored_at: datetime
    number: int
    failures: int = 0
    traceparent: str | None = None


class Exchange(Enum):
    """What became of the exchange with Keyless that a delivery was for."""

    ANSWERED = auto()
    """Keyless answered well: the request has no failures any more."""
    FAILED = auto()
    """It failed transiently: the request has one failure more."""
    NONE = auto()
    """There was none: the delivery is handed back, and does not count."""


class Claim(Enum):
    """Whose an operation id is."""

    NEW = auto()
    """This request's, since just now."""
    HELD = auto()
    """This request's already, by an earlier delivery."""
    ANOTHERS = auto()
    """A different request's."""


class Claimed(NamedTuple):
    """The answer to a claim on an operation id.

    Attributes:
        claim: Whose the id is.
        token: Stands for the claim as it is now; it changes when another delivery of the request claims the id.
    """

    claim: Claim
    token: int


class Broker(ApplicationSide):
    """A broker, for workers and for applications.

    It is an async context manager. Its methods are called for one item each; a broker that is faster in batches gathers
    the calls of one turn of the event loop itself, with ``batches.Batches`` for example. All that a worker calls raise
    `UnavailableError` where the broker is away and may come back, and `BrokerError` where it is gone for good, or where
    this worker may not use it.

    Attributes:
        system: Kind of the broker, for listeners, by OpenTelemetry's conventions.
        destination: Where its requests are, likewise.
    """

    system: str
    destination: str

    @property
    def keeps_delays(self) -> bool:
        """Whether deliveries come when they are due; schedules learn nothing from those that do not."""
        return True

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
        """Disconnect, whatever became of the broker. Deliveries that were not settled come again. Idempotent."""

    # -- for workers

    @abstractmethod
    async def prepare(self, *, lease: float, service: str) -> Terms:
        """Make or check what workers need. Each worker calls it once, before all that follows.

        Args:
            lease: Seconds after which a delivery that was not settled comes again.
            service: Base URL of the service that the worker asks. A broker may refuse workers of different services.

        Raises:
            BrokerError: Something is not as it must be, and cannot be made so.
        """

    @abstractmethod
    def now(self) -> datetime:
        """Return the time by the broker's clock, as far as it is known: that by which requests are stored."""

    @abstractmethod
    async def take(self, up_to: int, within: float, *, probing: bool = False) -> Sequence[Message]:
        """Take requests that are due; wait for some if there are none.

        Several workers may ask at once, also of one broker object. A call that is cancelled loses nothing: what it had
        taken comes again. Requests come in the order in which they are due.

        Args:
            up_to: How many at most; at least 1.
            within: Seconds after which it returns at the latest, with nothing if need be.
            probing: Whether Keyless fails. Then the order is: fewest failures; of these, those that were answered well
                before those that were never tried; of these, those due first, but of those never tried the newest. So
                bad requests do not hold good ones up.
        """

    @abstractmethod
    async def take_overdue(self, up_to: int, grace: float) -> Sequence[Message]:
        """Take requests that are due and whose time was over so many seconds ago, without waiting for any.

        A worker asks for them while Keyless is away: they can be decided without it. A broker that cannot tell them
        from others may return others as well, which the worker puts off.
        """

    @abstractmethod
    async def put_off(self, message: Message, delay: float, exchange: Exchange) -> None:
        """Deliver a request again after so many seconds. A later delivery of it than this one is not changed.

        A broker may cut the delay to 200 s, so that a clock that was set back holds up nothing for longer.
        """

    @abstractmethod
    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        """Store an outcome and remove the request: in one step, or else the outcome first.

        Args:
            message: Any delivery of the request, the last or an earlier one. Of two decisions the first one is kept.
            event: The outcome.

        Returns:
            Whether the outcome is stored by this call; False where the request had one already.

        Raises:
            RefusedError: The broker does not store the outcome.
        """

    # An operation of the right content does not say who asked for it: an earlier request may have, and its approval
    # must not count a second time. So a request claims its operation id before it creates the operation, and only
    # where nothing was there. Only a request that holds its id believes an approval.

    @abstractmethod
    async def claim(self, message: Message) -> Claimed:
        """Claim a request's operation id for it, unless it is another's; when this returns, that is stored for good."""

    @abstractmethod
    async def holds(self, message: Message) -> bool:
        """Return whether the request holds its operation id at this moment."""

    @abstractmethod
    async def unclaim(self, message: Message, token: int) -> bool:
        """Give an id back, unless another delivery of the request has claimed it as well in the meantime.

        Args:
            message: A delivery of the request.
            token: What `claim` returned with it.

        Returns:
            Whether nobody holds it any more.
        """

    @abstractmethod
    async def inspect(self) -> Inspection:
        """Return how all workers together fare, by few and cheap requests."""


def broker_for(target: object) -> ApplicationSide:
    """Return the broker of a URL, or the application's side of one for a driver's connection; a broker as it is.

    A folder of this package is a broker if its ``__init__`` has ``SCHEMES``, ``DRIVER`` (the top-level module of the
    driver's types), ``from_url(url)`` and ``from_connection(connection)``. Importing it must not need the driver.

    Raises:
        ConfigurationError: It is for no broker, or a broker's library is not installed.
    """
    if isinstance(target, ApplicationSide):
        return target
    driver = type(target).__module__.partition(".")[0]
    found = _SCHEME.match(target) if isinstance(target, str) else None
    known: list[str] = []
    for package in _brokers():
        known += [f"{scheme}:" for scheme in package.SCHEMES]
        try:
            if isinstance(target, str):
                if found is not None and found[1].lower() in package.SCHEMES:
                    return _made(package.from_url(target))
            elif driver == package.DRIVER:
                return _made(package.from_connection(target))
        except ModuleNotFoundError as error:
            raise ConfigurationError(f"this broker needs {error.name}: {package.HINT}", argument="broker") from None
    shown = f"a URL of the scheme {found[1]!r:.40}" if found else type(target).__name__
    raise ConfigurationError(
        f"broker must be a broker, a URL ({', '.join(known)}) or a driver's connection, not {shown}", argument="broker"
    )


def _brokers() -> Iterator[ModuleType]:
    package = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            yield importlib.import_module(f"{package.__name__}.{module.name}")


def _made(broker: Any) -> ApplicationSide:  # what a package made is not known to a type checker
    assert isinstance(broker, ApplicationSide)  # noqa: S101  # the contract of a broker's package
    return broker
