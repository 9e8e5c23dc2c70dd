"""What a worker tells of itself: events for the listeners of its client, and two log lines for an outage of Keyless."""

from __future__ import annotations

import asyncio
import itertools
import logging
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless._rules.circuit import CircuitState, Transitions
from aiokeyless._rules.outcome import poll_result
from aiokeyless.errors import BrokerError, ClientClosedError, KeylessError
from aiokeyless.events import (
    DeliveryEnded,
    Inspection,
    OutcomePublished,
    PollEnded,
    PollResult,
    WaitOutcome,
    WorkerInspected,
)

from .broker import UnavailableError
from .logs import log
from .messages import FailureReason, Outcome

if TYPE_CHECKING:
    from collections.abc import Sized

    from aiokeyless._listeners import Listeners
    from aiokeyless._rules.circuit import Transition
    from aiokeyless.models import Operation

    from .broker import Broker
    from .messages import ApprovalEvent

#: Numbers of the workers of this process.
_WORKERS: Final = itertools.count(1)
#: Failures of which the poller says that the answer was rejected.
_REJECTED: Final = frozenset({FailureReason.MISMATCH, FailureReason.INCONSISTENT})


class WorkerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker is doing, and its counts since it was made.

    Attributes:
        in_flight: Deliveries in flight.
        deliveries: Deliveries taken.
        polls: Polls sent.
        created: Operations created.
        approved: Outcomes of this kind stored; those that the broker had already are not counted.
        expired: Likewise.
        failed: Likewise.
        duplicates: Outcomes that the broker had already, from a delivery that was not settled in time.
        transient_failures: Exchanges with Keyless that failed transiently.
        unsettled: Deliveries of which the broker took no word: it delivers these requests again.
        fleet: What the broker told at the last inspection; there is one every 5 s.
        lateness: Seconds that requests waited for their first delivery, to this worker: the most between the last two
            inspections.
        circuit: How Keyless fares, as far as this worker can tell: ``closed`` (well), ``half_open`` (ramping up) or
            ``open`` (probes only, or none until its ``Retry-After``).
        is_ready: Whether it takes requests: there are no problems.
        problems: Why it is not ready, in one line each: it is about to end, the broker is away or refuses outcomes, the
            key is refused, requests are not delivered, the circuit is open and new requests wait.
        is_draining: Whether the worker is about to end.
    """

    in_flight: int = 0
    deliveries: int = 0
    polls: int = 0
    created: int = 0
    approved: int = 0
    expired: int = 0
    failed: int = 0
    duplicates: int = 0
    transient_failures: int = 0
    unsettled: int = 0
    fleet: Inspection = Inspection()
    lateness: float = 0.0
    circuit: str = CircuitState.CLOSED.value
    is_ready: bool = False
    problems: tuple[str, ...] = ()
    is_draining: bool = False


class Reporter:
    """Reports for one worker.

    Args:
        listeners: Whom to tell of events; None for nobody.
        broker: The broker.
        deliveries: Those in flight.
    """

    def __init__(self, listeners: Listeners | None, broker: Broker, deliveries: Sized) -> None:
        self._listeners = listeners
        self._broker = broker
        self._deliveries = deliveries
        self._worker = next(_WORKERS)
        self._now = asyncio.get_running_loop().time
        self._transitions = Transitions(self._now())

    def poll_ended(
        self, operation_id: str, answer: Operation | KeylessError, *, is_final: bool, started_at: float
    ) -> None:
        """Report a poll."""
        if self._listeners is not None:
            result = poll_result(answer)
            self._listeners.tell(
                PollEnded(
                    waits=(),
                    operation_id=operation_id,
                    result=result,
                    error=type(answer).__name__ if result is PollResult.FAILED else None,
                    is_final=is_final,
                    seconds=self._now() - started_at,
                    lag=None,
                )
            )

    def delivery_ended(self, number: int, failure: Exception | None, *, started_at: float) -> None:
        """Report a delivery.

        Args:
            number: Its number.
            failure: What kept it from being settled; None if it was.
            started_at: When it started.
        """
        if self._listeners is not None:
            kind = BrokerError if isinstance(failure, UnavailableError) else type(failure)  # that one is internal
            self._listeners.tell(
                DeliveryEnded(
                    system=self._broker.system,
                    destination=self._broker.destination,
                    number=number,
                    error=None if failure is None else kind.__name__,
                    seconds=self._now() - started_at,
                )
            )

    def outcome_published(self, event: ApprovalEvent) -> None:
        """Report an event that this worker has stored."""
        if self._listeners is not None:
            self._listeners.tell(
                OutcomePublished(
                    system=self._broker.system,
                    destination=self._broker.destination,
                    operation_id=event.operation_id,
                    outcome=_outcome(event),
                    reason=event.reason,
                    deliveries=event.deliveries,
                    age=(event.decided_at - event.requested_at).total_seconds(),
                    traceparent=event.traceparent,
                )
            )

    def circuit_is(self, state: CircuitState, cause: KeylessError | None) -> None:
        """Report the circuit's state after an exchange, if it has changed.

        Args:
            state: The state.
            cause: The failure of the exchange; None if it was answered.
        """
        if state is self._transitions.state:
            return
        change = self._transitions.notice(state, self._now())
        if change.is_outage:
            log(logging.WARNING, "keyless.circuit_opened", {"error": str(cause), "in_flight": len(self._deliveries)})
        elif change.outage is not None:
            log(logging.INFO, "keyless.circuit_closed", {"seconds": round(change.outage, 3)})
        self._tell_circuit(change, None if cause is None else type(cause))

    def inspected(self, statistics: WorkerStatistics, *, has_ended: bool = False) -> None:
        """Report how the worker and its fleet fare."""
        if self._listeners is not None:
            self._listeners.tell(
                WorkerInspected(
                    worker=self._worker,
                    system=self._broker.system,
                    destination=self._broker.destination,
                    has_ended=has_ended,
                    is_ready=statistics.is_ready,
                    in_flight=statistics.in_flight,
                    fleet=statistics.fleet,
                    lateness=statistics.lateness,
                    duplicates=statistics.duplicates,
                    unsettled=statistics.unsettled,
                )
            )

    def closed(self, statistics: WorkerStatistics) -> None:
        """Report the end: to listeners, who may count workers, and circuits that are not closed."""
        self.inspected(statistics, has_ended=True)
        if self._transitions.state is not CircuitState.CLOSED:
            self._tell_circuit(self._transitions.notice(CircuitState.CLOSED, self._now()), ClientClosedError)

    def _tell_circuit(self, change: Transition, cause: type[KeylessError] | None) -> None:
        if self._listeners is not None:
            self._listeners.tell(change.event(cause, waiting=len(self._deliveries)))


def _outcome(event: ApprovalEvent) -> WaitOutcome:
    """Return how a wait of the poller would have ended."""
    if event.outcome is Outcome.APPROVED:
        return WaitOutcome.APPROVED
    if event.outcome is Outcome.EXPIRED:
        return WaitOutcome.TIMED_OUT if event.answered else WaitOutcome.UNKNOWN
    return WaitOutcome.REJECTED if event.reason in _REJECTED else WaitOutcome.FAILED
