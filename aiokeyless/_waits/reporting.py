"""Reports events of the poller to listeners, and writes the few log lines that concern all of its waits."""

from __future__ import annotations

import itertools
import logging
import math
from types import NoneType
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.budget import ServiceWatch
from aiokeyless._rules.outcome import poll_result
from aiokeyless.errors import ApprovalError, ApprovalTimeoutError, ApprovalUnknownError, ClientClosedError, KeylessError
from aiokeyless.events import PollEnded, WaitEnded, WaitOutcome, WaitStarted
from aiokeyless.models import Operation

if TYPE_CHECKING:
    from aiokeyless._listeners import Listeners
    from aiokeyless._rules.budget import Budget
    from aiokeyless.events import ServiceChanged

    from .state import Poll, Wait

logger = logging.getLogger("aiokeyless")

#: A poll that starts so many seconds after it was due is late.
_LATE: Final = 1.0
#: Seconds for which all polls must be late before that is logged.
_LATE_FOR: Final = 5.0
#: Seconds between two warnings of the same kind.
_WARN_AGAIN: Final = 60.0
#: Shared by all clients, since a listener may serve several.
_NUMBERS: Final = itertools.count(1)

#: How a wait ended, by the type of its result. The first match counts.
_OUTCOMES: Final[dict[type, WaitOutcome]] = {
    Operation: WaitOutcome.APPROVED,
    NoneType: WaitOutcome.HELD,
    ApprovalUnknownError: WaitOutcome.UNKNOWN,
    ApprovalTimeoutError: WaitOutcome.TIMED_OUT,
    ApprovalError: WaitOutcome.REJECTED,
    ClientClosedError: WaitOutcome.CLOSED,
}


class Reporter:
    """Reports for one poller. Without listeners, no event is built. The log lines begin with the client's name."""

    def __init__(self, listeners: Listeners | None, client: str | None = None) -> None:
        self._listeners = listeners
        self._who = "" if client is None else f"client {client!r}: "
        self._service = ServiceWatch()
        self._late_since: float | None = None  # the first of the late polls; None: the last one was in time
        self._warned_at = self._late_warned_at = -math.inf

    # -- events of waits and polls

    def report_wait_start(self, wait: Wait) -> int:
        """Report a wait that starts, and return its number; 0 if there are no listeners."""
        if self._listeners is None:
            return 0
        number = next(_NUMBERS)
        left = 0.0 if wait.had_expired else wait.deadline - wait.started_at
        self._listeners.tell(
            WaitStarted(
                wait=number,
                operation_id=wait.polled.operation_id,
                timeout=None if math.isinf(left) else left,
                traceparent=None if wait.ticket is None else wait.ticket.traceparent,
            )
        )
        return number

    def report_wait_end(self, wait: Wait, now: float) -> None:
        """Report a wait that has ended or whose caller is gone."""
        if self._listeners is None:
            return
        error = None if wait.cancelled() else wait.result()
        self._listeners.tell(
            WaitEnded(
                wait=wait.number,
                operation_id=wait.polled.operation_id,
                outcome=_outcome(wait),
                error=type(error).__name__ if isinstance(error, Exception) else None,
                seconds=now - wait.started_at,
                polls=wait.polls,
                age=None if wait.ticket is None else now - wait.origin,
            )
        )

    def report_poll(self, poll: Poll, answer: Operation | KeylessError | None, now: float) -> None:
        """Report a poll; `answer` is None if it was cut off because no wait needed it any more."""
        if self._listeners is None:
            return
        waits, (result, error) = poll.waits, poll_result(answer)
        self._listeners.tell(
            PollEnded(
                waits=(waits[0].number,) if len(waits) == 1 else tuple([wait.number for wait in waits]),
                operation_id=poll.polled.operation_id,
                result=result,
                error=error,
                is_final=poll.final,
                seconds=now - poll.started_at,
                lag=poll.lag,
            )
        )

    # -- the service, and late polls

    def notice_service(self, budget: Budget, error: KeylessError | None, now: float) -> None:
        """Report, after an answer, that the service has begun to fail or answers again; a good answer has no error."""
        news, logged = self._service.notice(budget, error, now)
        if logged is not None and logged.is_failing:
            logger.warning(
                "%sKeyless fails (last: %s): %d waits go on, with few polls", self._who, error, logged.waiting
            )
        elif logged is not None:
            logger.info("%sKeyless answers again, %.1f s after the first failure", self._who, logged.seconds)
        self._tell(news)

    def report_unexpected(self, error: KeylessError, now: float) -> None:
        """Log, once a minute, that polls go on after a failure that is not the service's own, or at a limit of rate."""
        if now - self._warned_at >= _WARN_AGAIN:
            self._warned_at = now
            logger.warning("%spolls do not get through, and go on: %s", self._who, error)

    def report_end(self, budget: Budget, now: float) -> None:
        """Report that the client is closed, to listeners that count failing services."""
        self._tell(self._service.end(budget, ClientClosedError(), now))

    def _tell(self, change: ServiceChanged | None) -> None:
        if change is not None and self._listeners is not None:
            self._listeners.tell(change)

    def report_lag(self, lag: float, now: float, *, waiting: int) -> None:
        """Log, once a minute, that polls have been late for a while although the service is well."""
        if lag < _LATE or self._service.is_failing:
            self._late_since = None
            return
        if self._late_since is None:
            self._late_since = now
        if now - self._late_since > _LATE_FOR and now - self._late_warned_at >= _WARN_AGAIN:
            self._late_warned_at = now
            logger.warning(
                "%spolls have been late for over %.0f s, now by %.1f s, with %d waits: unless Keyless answers 429, "
                "raise max_in_flight or max_polls_per_second, or give the process more CPU",
                self._who,
                _LATE_FOR,
                lag,
                waiting,
            )


def _outcome(wait: Wait) -> WaitOutcome:
    """Return how a wait ended."""
    if wait.cancelled():
        return WaitOutcome.CANCELLED
    result = wait.result()
    return next((outcome for kind, outcome in _OUTCOMES.items() if isinstance(result, kind)), WaitOutcome.FAILED)
