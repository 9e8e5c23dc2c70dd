"""A worker's reports on itself and its fleet: statistics, problems, events for listeners, and log lines."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sized
from typing import Final

import msgspec

from aiokeyless._listeners import Listeners
from aiokeyless._rules.approval import describe_apart
from aiokeyless._rules.budget import Budget, ServiceWatch
from aiokeyless._rules.outcome import poll_result
from aiokeyless.errors import BrokerError, ClientClosedError, KeylessError
from aiokeyless.events import (
    DeliveryEnded,
    Inspection,
    OperationCreated,
    OutcomePublished,
    PollEnded,
    WaitOutcome,
    WorkerInspected,
)
from aiokeyless.models import Operation

from .broker import Broker, RefusedError, UnavailableError
from .logs import RateLimitedLog, log, name_client
from .messages import ApprovalEvent, ApprovalRequest, FailureReason, Message, Outcome, RequestHead

_EVERY: Final = 5.0  # seconds between two inspections
#: Seconds for which requests may wait while this worker receives none.
_STALLED_FOR: Final = 30.0
#: Seconds for which a refusal counts: longer than the lease, after which the broker repeats the delivery.
_REFUSED_FOR: Final = 60.0
_SLOW: Final = "its answers take too long"
_COUNTS: Final = ("deliveries", "polls", "created", *Outcome, "duplicates", "transient_failures", "unsettled")
#: Numbers of the workers of this process.
_WORKERS: Final = itertools.count(1)
#: Failures that the poller reports as a rejected answer.
_REJECTED: Final = frozenset({FailureReason.MISMATCH, FailureReason.INCONSISTENT})


class WorkerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's state, and its counts since it was made.

    Attributes:
        in_flight: Deliveries in flight.
        deliveries: Deliveries taken.
        polls: Polls sent.
        created: Operations created.
        approved: Outcomes of this kind that this worker stored, without those that the broker had already.
        expired: As above.
        failed: As above.
        duplicates: Outcomes that the broker had already, from a delivery that was not settled in time.
        transient_failures: Exchanges with Keyless that failed transiently.
        unsettled: Deliveries whose result the broker did not take; it delivers these requests again.
        fleet: The broker's answers at the last inspection; there is one every 5 s.
        lateness: The longest wait for a first delivery to this worker, in seconds, between the last two inspections.
        is_failing: Whether Keyless fails, as far as this worker knows: nothing but failures for 10 s, or so many that
            few polls may start.
        is_ready: Whether there are no problems.
        problems: Why the worker is not ready, in one line each. It is about to end, or Keyless refuses the key. The
            broker is away, stores no outcomes, delivers no requests, or its housekeeping has failed for a minute. Or
            Keyless fails while requests wait.
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
    is_failing: bool = False
    is_ready: bool = False
    problems: tuple[str, ...] = ()
    is_draining: bool = False


class WorkerReporter:
    """Counts for one worker, inspects its fleet every few seconds, and knows what keeps it from being ready.

    If the broker will not come back, it calls `on_loss`.
    """

    def __init__(
        self,
        broker: Broker,
        budget: Budget,
        deliveries: Sized,
        *,
        listeners: Listeners,
        on_loss: Callable[[BrokerError], None],
    ) -> None:
        self._broker = broker
        self._budget = budget
        self._deliveries = deliveries
        self._listeners = listeners
        self._on_loss = on_loss
        self._worker = next(_WORKERS)
        self._now = asyncio.get_running_loop().time
        self._service = ServiceWatch()
        self._counts: dict[str, int] = dict.fromkeys(_COUNTS, 0)
        self._fleet = Inspection()
        self._silence: str | None = None  # why the last inspection failed; None if it did not
        self._unsettled = RateLimitedLog(logging.WARNING, "delivery.unsettled")  # of each request, if a disk is full
        self._newer = RateLimitedLog(logging.ERROR, "request.newer")
        self._not_ready = RateLimitedLog(logging.WARNING, "worker.not_ready")
        self._refusal: str | None = None  # why the broker did not store the last event or claim
        self._refused_until = -math.inf
        self._delivered = 0  # deliveries since the last inspection
        self._stalled_since: float | None = None  # since when requests wait and this worker receives none
        self._longest_wait = 0.0  # for a first delivery, since the last inspection
        self._lateness = 0.0  # the same, between the last two inspections
        self.is_draining: bool = False
        self.key_refusal: KeylessError | None = None  # why Keyless seems to refuse the key
        self.last_failure: str = _SLOW  # of an exchange, if none was answered well since
        self.who: dict[str, str] = name_client(listeners.client)
        """Begins the facts of the log lines of the whole worker."""
        self.take_failure: str | None = None  # of the last take: a full disk fails takes alone, and no inspection

    def statistics(self) -> WorkerStatistics:
        """Return the worker at this moment."""
        problems = tuple(self._problems())
        return WorkerStatistics(
            in_flight=len(self._deliveries),
            fleet=self._fleet,
            lateness=round(self._lateness, 3),
            is_failing=self._budget.is_failing,
            is_ready=not problems,
            problems=problems,
            is_draining=self.is_draining,
            **self._counts,
        )

    def _problems(self) -> Iterator[str]:
        """Return why requests are not stored, delivered and decided as they should be, in one line each."""
        if self.is_draining:
            yield "the worker is about to end"
            return
        now, backlog = self._now(), self._fleet.backlog
        if silence := self._silence or self.take_failure:
            yield f"the broker does not answer: {silence}"
        yield from self._fleet.problems
        if now < self._refused_until:
            yield f"the broker does not store outcomes or claims: {self._refusal}"
        if self._stalled_since is not None and (waited := now - self._stalled_since) >= _STALLED_FOR:
            yield f"{backlog} requests wait, and none was delivered to this worker for {waited:.0f} s"
        if backlog and self._budget.is_failing:
            yield f"Keyless fails, and {backlog} new requests wait"
        if self.key_refusal is not None:
            yield f"Keyless refuses the key: {self.key_refusal}"

    # -- the fleet

    async def watch(self) -> None:
        """Inspect the fleet again and again, until it is cancelled."""
        while True:
            await self._inspect()
            self._publish_inspection()
            await asyncio.sleep(_EVERY)

    async def _inspect(self) -> None:
        try:
            self._fleet = await self._broker.inspect()
        except UnavailableError as error:
            self._silence = str(error)
            return
        except BrokerError as error:
            self._on_loss(error)
            return
        except Exception as error:  # noqa: BLE001  # a bug: /readyz must not keep its last figures as if all were well
            log(logging.ERROR, "inspection.failed", self.who, exc_info=True)
            self._silence = f"{type(error).__name__}; see the log"
            return
        self._silence = None
        self._budget.waits = self._fleet.waiting
        self._lateness, self._longest_wait = self._longest_wait, 0.0
        if not self._fleet.backlog or self._delivered or self._budget.is_failing:
            self._stalled_since = None
        elif self._stalled_since is None:
            self._stalled_since = self._now()
        self._delivered = 0

    def _publish_inspection(self, *, has_ended: bool = False) -> None:
        statistics = self.statistics()
        if not (statistics.is_ready or self.is_draining):
            self._not_ready.log({**self.who, "problems": statistics.problems})
        self._listeners.tell(
            WorkerInspected(
                worker=self._worker,
                system=self._broker.system,
                destination=self._broker.destination,
                has_ended=has_ended,
                is_ready=statistics.is_ready,
                is_failing=statistics.is_failing,
                in_flight=statistics.in_flight,
                fleet=statistics.fleet,
                lateness=statistics.lateness,
                duplicates=statistics.duplicates,
                unsettled=statistics.unsettled,
            )
        )

    def report_end(self) -> None:
        """Report the end to listeners, which may count workers and failing services."""
        self._publish_inspection(has_ended=True)
        if (change := self._service.end(self._budget, ClientClosedError(), self._now())) is not None:
            self._listeners.tell(change)

    # -- exchanges

    def count(self, what: str) -> None:
        """Increment the count that `WorkerStatistics` has under this name."""
        self._counts[what] += 1

    def report_poll(
        self, operation_id: str, answer: Operation | KeylessError, *, is_final: bool, started_at: float
    ) -> None:
        """Report a poll."""
        result, error = poll_result(answer)
        self._listeners.tell(
            PollEnded(
                waits=(),
                operation_id=operation_id,
                result=result,
                error=error,
                is_final=is_final,
                seconds=self._now() - started_at,
                lag=None,
            )
        )

    def report_creation(self, request: ApprovalRequest) -> None:
        """Report that the operation of a request is there."""
        created = OperationCreated(operation_id=request.operation_id, user_id=request.user_id.upper())
        self._listeners.tell(created)

    def report_exchange(self, failure: KeylessError | None) -> None:
        """Report, after an exchange that was answered well or failed, that the service fails or answers again."""
        self.last_failure = _SLOW if failure is None else describe_apart(failure)
        news, logged = self._service.notice(self._budget, failure, self._now())
        if logged is not None and logged.is_failing:
            log(logging.WARNING, "keyless.failing", {**self.who, "error": str(failure), "waiting": logged.waiting})
        elif logged is not None:
            log(logging.INFO, "keyless.answering", {**self.who, "seconds": round(logged.seconds, 3)})
        if news is not None:
            self._listeners.tell(news)

    # -- deliveries

    def report_delivery(self, message: Message) -> None:
        """Count a delivery."""
        self.count("deliveries")
        self._delivered += 1
        if message.number == 1:
            waited = (self._broker.now() - message.stored_at).total_seconds()
            self._longest_wait = max(self._longest_wait, waited)

    def report_newer(self, head: RequestHead) -> None:
        """Report a request of a later version, which is given back. It shows that the broker delivers."""
        self._delivered += 1
        self._newer.log({"operation_id": head.operation_id, "version": head.version})

    def report_settlement(self, number: int, failure: Exception | None, *, started_at: float) -> None:
        """Report that a delivery was settled, or what kept it from being settled."""
        if isinstance(failure, UnavailableError):
            self.count("unsettled")
            self._unsettled.log({"error": str(failure)})
            if isinstance(failure, RefusedError):
                self._refusal, self._refused_until = str(failure), self._now() + _REFUSED_FOR
            failure = BrokerError(str(failure), may_pass=True)  # `UnavailableError` is internal
        self._listeners.tell(
            DeliveryEnded(
                system=self._broker.system,
                destination=self._broker.destination,
                number=number,
                error=None if failure is None else type(failure).__name__,
                seconds=self._now() - started_at,
            )
        )

    def report_outcome(self, event: ApprovalEvent, *, is_new: bool) -> None:
        """Report an outcome, which is new unless the broker had one already."""
        self._refused_until = -math.inf
        if not is_new:
            self.count("duplicates")
            return
        self.count(event.outcome)
        _log_outcome(event)
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


def _log_outcome(event: ApprovalEvent) -> None:
    facts = {
        "operation_id": event.operation_id,
        "deliveries": event.deliveries,
        "seconds": round((event.decided_at - event.requested_at).total_seconds(), 3),
        "answered": event.answered,
        "asked": event.asked,
        "reason": event.reason,
        "detail": event.detail,
    }
    is_known = event.outcome is Outcome.APPROVED or event.answered
    level = logging.INFO if is_known else logging.WARNING
    log(level, f"approval.{event.outcome}", {name: fact for name, fact in facts.items() if fact is not None})


def _outcome(event: ApprovalEvent) -> WaitOutcome:
    """Return how a wait of the poller would have ended."""
    if event.outcome is Outcome.APPROVED:
        return WaitOutcome.APPROVED
    if event.outcome is Outcome.EXPIRED:
        return WaitOutcome.TIMED_OUT if event.answered else WaitOutcome.UNKNOWN
    return WaitOutcome.REJECTED if event.reason in _REJECTED else WaitOutcome.FAILED
