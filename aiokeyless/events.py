"""The events that listeners get: of each exchange, create, wait and poll, of failures, and of workers.

An event is a frozen struct. It never holds a key or a payload. Only `OperationCreated` names a user.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias

import msgspec

from .models import Model

__all__ = [
    "ClientEvent",
    "DeliveryEnded",
    "Event",
    "Inspection",
    "Listener",
    "OperationCreated",
    "OutcomePublished",
    "PollEnded",
    "PollResult",
    "RequestEnded",
    "ServiceChanged",
    "WaitEnded",
    "WaitOutcome",
    "WaitStarted",
    "WorkerInspected",
]


class ClientEvent(Model, frozen=True, kw_only=True):
    """What each event has.

    Attributes:
        client: The `name` of the client, for a worker of the worker's client; None if it has no name.
    """

    client: str | None = None


class RequestEnded(ClientEvent, frozen=True, kw_only=True):
    """One HTTP exchange with the service has ended, for a single call or for a poll.

    Attributes:
        method: HTTP method.
        route: The path as the API documents it, such as ``/v2/operations/{operationId}``: it names no operation.
        server: Host of the service.
        port: Its port.
        status: Status of the answer; None if there was none.
        error: Name of the exception's type if the exchange failed, such as ``"TransportError"`` or
            ``"NotFoundError"``. ``"CancelledError"`` if its answer was no longer needed. None if it succeeded.
        seconds: Its duration, in seconds.
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


class OperationCreated(ClientEvent, frozen=True, kw_only=True):
    """A call or a worker has created an operation, or has found it after a lost answer: it can be told to the phone.

    Attributes:
        operation_id: The operation.
        user_id: The user who is to approve it, in upper-case hex.
    """

    operation_id: str
    user_id: str


class WaitStarted(ClientEvent, frozen=True, kw_only=True):
    """A wait has started; the listener runs in the context of its caller.

    Attributes:
        wait: Number of the wait, unique in the process.
        operation_id: The operation that is waited for.
        timeout: Seconds until its final poll; 0 for a ticket that has expired, None for no end. The holds of one target
            are one wait.
        traceparent: The trace in which the ticket was created (W3C Trace Context); None if it was not traced.
    """

    wait: int
    operation_id: str
    timeout: float | None
    traceparent: str | None


class WaitOutcome(StrEnum):
    """How a wait ended."""

    APPROVED = "approved"
    """The user approved it."""
    TIMED_OUT = "timed_out"
    """`ApprovalTimeoutError`: the final poll said pending."""
    UNKNOWN = "unknown"
    """`ApprovalUnknownError`: the final poll got no answer, or could not be sent."""
    REJECTED = "rejected"
    """`OperationMismatchError` or `InconsistentOperationError`: an answer contradicts itself or the ticket."""
    FAILED = "failed"
    """Another error, such as `NotFoundError`."""
    CANCELLED = "cancelled"
    """The caller was cancelled, or left an iterator."""
    CLOSED = "closed"
    """`ClientClosedError`: the client was closed."""
    HELD = "held"
    """No other hold came within 10 s of the last one."""


class WaitEnded(ClientEvent, frozen=True, kw_only=True):
    """A wait has ended.

    Attributes:
        wait: Number of the wait.
        operation_id: The operation that was waited for.
        outcome: How it ended.
        error: Name of the exception's type; None if nothing was raised, or if it was cancelled.
        seconds: Its duration, in seconds.
        polls: Polls on its behalf.
        age: Seconds since the operation was created; None for a bare id, whose creation time is unknown.
    """

    wait: int
    operation_id: str
    outcome: WaitOutcome
    error: str | None
    seconds: float
    polls: int
    age: float | None


class PollResult(StrEnum):
    """The result of one poll."""

    APPROVED = "approved"
    """An approval. The wait decides whether it is the one that it waits for."""
    PENDING = "pending"
    """The operation is pending."""
    INVALID = "invalid"
    """An answer of neither kind."""
    MISSING = "missing"
    """404: there is no such operation yet, such as before a worker or the phone has created it."""
    FAILED = "failed"
    """Another error; a wait goes on if it is transient."""
    CUT_OFF = "cut_off"
    """It was cut off: no wait needed it any more, or its task was cancelled from outside."""


class PollEnded(ClientEvent, frozen=True, kw_only=True):
    """A poll has ended; one poll serves all waits for its operation.

    Attributes:
        waits: Numbers of the waits for which it was sent; empty for a worker, whose waits are at the broker.
        operation_id: The operation that was polled.
        result: Its result.
        error: Name of the error's type if `result` is ``failed``; else None.
        is_final: Whether it was the final poll of waits whose deadline had passed.
        seconds: Its duration, in seconds.
        lag: Seconds by which it started late; 0 for a final poll; None for a worker, which does not know when it was
            due.
    """

    waits: tuple[int, ...]
    operation_id: str
    result: PollResult
    error: str | None
    is_final: bool
    seconds: float
    lag: float | None


class ServiceChanged(ClientEvent, frozen=True, kw_only=True):
    """The service has begun to fail, for a client or a worker, or it answers again.

    It fails if there was nothing but failures for 10 s, or if so many polls failed that few may start.

    Attributes:
        is_failing: Whether it fails.
        error: Name of the last failure's type; None if the service answers again. ``"ClientClosedError"`` if the client
            was closed, or the worker ended, while it failed.
        seconds: Seconds since the first of the failures.
        waiting: Waits under way; for a worker, requests.
    """

    is_failing: bool
    error: str | None
    seconds: float
    waiting: int


class DeliveryEnded(ClientEvent, frozen=True, kw_only=True):
    """A worker has processed a delivery of a request: usually one poll, after which the request is delivered again.

    Attributes:
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: The place of the requests at the broker; it names the fleet.
        number: Number of the delivery of its request, from 1.
        error: Name of the exception's type if it could not be settled: ``"BrokerError"``, or an error of the worker's
            setup such as ``"AuthenticationError"``. The request is then delivered again. Else None.
        seconds: Its duration, in seconds.
    """

    system: str
    destination: str
    number: int
    error: str | None
    seconds: float


class OutcomePublished(ClientEvent, frozen=True, kw_only=True):
    """A worker has decided a request, and the broker has stored the event. One worker of the fleet reports it, once.

    Attributes:
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: The place of the requests at the broker; it names the fleet.
        operation_id: The operation that was waited for; None if the request has no readable id.
        outcome: How the wait ended, by the same names as a client's waits. ``expired`` is `WaitOutcome.TIMED_OUT` if
            the final poll was answered, else `WaitOutcome.UNKNOWN`. ``failed`` is `WaitOutcome.REJECTED` if an answer
            contradicted itself or the request, else `WaitOutcome.FAILED`.
        reason: Why it failed, see `aiokeyless.worker.FailureReason`; else None.
        deliveries: How often the request was delivered: about the number of polls.
        age: Seconds from the request until the decision.
        traceparent: The trace in which the request was submitted (W3C Trace Context); None if it was not traced.
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
    """The broker's figures for all its workers together, at one moment.

    Attributes:
        waiting: Requests that are not decided.
        backlog: Undecided requests that were never delivered.
        oldest_age: Seconds since the oldest of them was stored; 0 if there is none.
        unread: Outcomes that each reader has not handled, by its name; 10 000 at most.
        oldest_unread_age: Seconds since the oldest of these was stored, by the reader's name; 0 if there is none.
        clock_ahead: Seconds by which the broker's clock is ahead of this machine's.
        problems: Why requests or outcomes cannot be stored or delivered, or what of the housekeeping fails, in one line
            each.
    """

    waiting: int = 0
    backlog: int = 0
    oldest_age: float = 0.0
    unread: dict[str, int] = {}
    oldest_unread_age: dict[str, float] = {}
    clock_ahead: float = 0.0
    problems: tuple[str, ...] = ()


class WorkerInspected(ClientEvent, frozen=True, kw_only=True):
    """The figures of a worker and its fleet, every 5 seconds and once more at the end.

    The figures are those of `aiokeyless.worker.WorkerStatistics`.

    Attributes:
        worker: Number of the worker, unique in the process.
        system: Kind of the broker, such as ``"postgresql"`` or ``"nats"``.
        destination: The place of the requests at the broker; it names the fleet.
        has_ended: Whether the worker has ended; this is then its last event.
        is_ready: Whether it has no problems.
        is_failing: Whether Keyless fails for it, see `ServiceChanged`.
        in_flight: Its deliveries in flight.
        fleet: The figures of the whole fleet.
        lateness: The longest time, in seconds, that a request waited for its first delivery to this worker since the
            last such event.
        duplicates: Outcomes that the broker had already, since the worker started.
        unsettled: Deliveries that the broker did not let the worker settle, since the worker started.
    """

    worker: int
    system: str
    destination: str
    has_ended: bool
    is_ready: bool
    is_failing: bool
    in_flight: int
    fleet: Inspection
    lateness: float
    duplicates: int
    unsettled: int


Event: TypeAlias = (
    RequestEnded
    | OperationCreated
    | WaitStarted
    | WaitEnded
    | PollEnded
    | ServiceChanged
    | DeliveryEnded
    | OutcomePublished
    | WorkerInspected
)
"""The events that a listener gets. Later releases may add kinds, so ignore unknown ones."""

Listener: TypeAlias = Callable[[Event], object]
"""A plain function that takes an event."""
