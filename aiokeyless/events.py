"""What listeners are told: an event for each exchange, wait and poll, each change of the circuit, and what workers do.

An event is a frozen struct. It never holds a key, a payload or a user; an operation id only where it names a wait.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

import msgspec

from .models import Model

__all__ = [
    "CircuitChanged",
    "DeliveryEnded",
    "Event",
    "Inspection",
    "Listener",
    "OutcomePublished",
    "PollEnded",
    "PollResult",
    "RequestEnded",
    "WaitEnded",
    "WaitOutcome",
    "WaitStarted",
    "WorkerInspected",
]


class RequestEnded(Model, frozen=True, kw_only=True):
    """One HTTP exchange with the service has ended, for a single call or for a poll.

    Attributes:
        method: HTTP method.
        route: The path as the API documents it, such as ``/v2/operations/{operationId}``: it names no operation.
        server: Host of the service.
        port: Its port.
        status: Status of the answer; None if there was none.
        error: Name of the exception's type if the exchange failed, such as ``"TransportError"`` or
            ``"NotFoundError"``; ``"CancelledError"`` if it was cut off because its answer was no longer needed; else
            None.
        seconds: Seconds that it took.
        attempt: 1 for the first attempt of a single call, then 2, ...; always 1 for a poll.
        request_id: The service's id of the exchange, for its support; None if the answer has none.
    """

    method: str
    route: str
    server: str
    port: int
    status: int | None
    error: str | None
    seconds: float
    attempt: int
    request_id: str | None


class WaitStarted(Model, frozen=True, kw_only=True):
    """A wait has started; the listener runs in the context of its caller.

    Attributes:
        wait: Number of the wait, unique in the process.
        operation_id: What is waited for.
        timeout: Seconds until its final poll; 0 for a ticket that has expired, None for no end. The holds of one target
            are one wait.
        traceparent: Where the ticket was created, if that was traced (W3C Trace Context); else None.
    """

    wait: int
    operation_id: str
    timeout: float | None
    traceparent: str | None


class WaitOutcome(StrEnum):
    """How a wait ended."""

    APPROVED = "approved"
    """By the approval."""
    TIMED_OUT = "timed_out"
    """`ApprovalTimeoutError`: the final poll said pending."""
    UNKNOWN = "unknown"
    """`ApprovalUnknownError`: the final poll got no answer."""
    REJECTED = "rejected"
    """`OperationMismatchError` or `InconsistentOperationError`: an answer contradicts itself or the ticket."""
    FAILED = "failed"
    """Another error, such as `NotFoundError`."""
    CANCELLED = "cancelled"
    """The caller was cancelled, or left an iterator."""
    CLOSED = "closed"
    """`ClientClosedError`: the client was closed."""
    HELD = "held"
    """Nobody held it again within 10 s of its last hold."""


class WaitEnded(Model, frozen=True, kw_only=True):
    """A wait has ended.

    Attributes:
        wait: Number of the wait.
        operation_id: What was waited for.
        outcome: How it ended.
        error: Name of the type of what was raised; None where nothing was, and for a cancellation.
        seconds: Seconds that it took.
        polls: Polls on its behalf.
        age: Seconds since the operation was created; None for a bare id, of which that is not known.
    """

    wait: int
    operation_id: str
    outcome: WaitOutcome
    error: str | None
    seconds: float
    polls: int
    age: float | None


class PollResult(StrEnum):
    """What one poll brought."""

    APPROVED = "approved"
    """An approval; whether it is the one that is waited for is a wait's outcome."""
    PENDING = "pending"
    """The operation is pending."""
    INVALID = "invalid"
    """An answer of neither kind."""
    MISSING = "missing"
    """404: there is no such operation, as before the create of a worker's request or before the phone's own."""
    FAILED = "failed"
    """Another error; a wait goes on if it is transient."""
    CUT_OFF = "cut_off"
    """It was cut off, since no wait needed it any more."""


class PollEnded(Model, frozen=True, kw_only=True):
    """A poll has ended; one poll serves all waits for its operation.

    Attributes:
        waits: Numbers of the waits for which it was sent; none of a worker, whose waits are the broker's.
        operation_id: What was polled.
        result: What it brought.
        error: Name of the error's type if `result` is ``failed``; else None.
        is_final: Whether it was the final poll of waits whose deadline had passed.
        seconds: Seconds that it took.
        lag: Seconds after it was due at which it started; 0 for a final poll; None of a worker, which does not know
            when it was due.
    """

    waits: tuple[int, ...]
    operation_id: str
    result: PollResult
    error: str | None
    is_final: bool
    seconds: float
    lag: float | None


class CircuitChanged(Model, frozen=True, kw_only=True):
    """The circuit, which all waits of a client or of a worker share, has changed its state.

    Attributes:
        state: The new state: ``"closed"``, ``"half_open"`` or ``"open"``; see ``ClientStatistics.circuit``.
        previous: The state before.
        cause: Name of the type of the failure that changed it; None if that was a good answer; ``"ClientClosedError"``
            where the client was closed, or the worker ended, while its circuit was not.
        waiting: Waits under way; of a worker, deliveries in flight.
        seconds: Seconds for which the previous state lasted.
    """

    state: str
    previous: str
    cause: str | None
    waiting: int
    seconds: float


class DeliveryEnded(Model, frozen=True, kw_only=True):
    """A worker has processed a delivery of a request: one poll, mostly, after which the request is delivered again.

    Attributes:
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: Where requests are stored; it names the fleet.
        number: Number of the delivery of its request, from 1.
        error: Name of the type of what kept it from being settled: ``"BrokerError"``, or what is wrong with the worker,
            such as ``"AuthenticationError"``. The request is delivered again. Else None.
        seconds: Seconds that it took.
    """

    system: str
    destination: str
    number: int
    error: str | None
    seconds: float


class OutcomePublished(Model, frozen=True, kw_only=True):
    """A worker has decided a request, and the broker has stored the event: told once, by one worker of the fleet.

    Attributes:
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: Where requests are stored; it names the fleet.
        operation_id: What was waited for; None where the request was too broken to have one.
        outcome: How the wait ended, in the words for a client's waits: ``expired`` is `WaitOutcome.TIMED_OUT` where
            the final poll was answered, else `WaitOutcome.UNKNOWN`; a failure is `WaitOutcome.REJECTED` where an
            answer contradicted itself or the request, else `WaitOutcome.FAILED`.
        reason: Why it failed, see `aiokeyless.worker.FailureReason`; else None.
        deliveries: How often the request was delivered: about the number of polls.
        age: Seconds from when the approval was asked for until it was decided.
        traceparent: Where the request was submitted, if that was traced (W3C Trace Context); else None.
    """

    system: str
    destination: str
    operation_id: str | None
    outcome: WaitOutcome
    reason: str | None
    deliveries: int
    age: float
    traceparent: str | None


class Inspection(msgspec.Struct, frozen=True, kw_only=True):
    """What a broker tells of all its workers together, at one moment.

    Attributes:
        waiting: Requests that are not decided.
        backlog: Those of them that were never delivered.
        oldest_age: Seconds since the oldest of them was stored; 0 if there is none.
        clock_ahead: Seconds by which the broker's clock is ahead of this machine's.
        problems: Why requests or outcomes cannot be stored or delivered, in one line each.
    """

    waiting: int = 0
    backlog: int = 0
    oldest_age: float = 0.0
    clock_ahead: float = 0.0
    problems: tuple[str, ...] = ()


class WorkerInspected(Model, frozen=True, kw_only=True):
    """How a worker and its fleet fare: told every 5 seconds, when the broker was asked, and once more at the end.

    The figures are those of `aiokeyless.worker.WorkerStatistics`.

    Attributes:
        worker: Number of the worker, unique in the process.
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: Where requests are stored; it names the fleet.
        has_ended: Whether the worker has ended: it tells no more.
        is_ready: Whether it takes requests.
        in_flight: Its deliveries in flight.
        fleet: What the broker tells of all its workers.
        lateness: Seconds that requests waited for their first delivery, to this worker: the most between the last two
            inspections.
        duplicates: Outcomes that the broker had already, since the worker started.
        unsettled: Deliveries of which the broker took no word, since the worker started.
    """

    worker: int
    system: str
    destination: str
    has_ended: bool
    is_ready: bool
    in_flight: int
    fleet: Inspection
    lateness: float
    duplicates: int
    unsettled: int


Event: TypeAlias = (
    RequestEnded
    | WaitStarted
    | WaitEnded
    | PollEnded
    | CircuitChanged
    | DeliveryEnded
    | OutcomePublished
    | WorkerInspected
)
"""The events that a listener is told of. Kinds may be added, so ignore those that you do not know."""

Listener: TypeAlias = Callable[[Event], object]
"""A plain function that takes an event."""
