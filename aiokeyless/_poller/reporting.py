"""What the poller tells of itself: events for listeners, and the few log lines that concern all of its waits."""

from __future__ import annotations

import itertools
import logging
import math
from types import NoneType
from typing import TYPE_CHECKING, Final

from aiokeyless._rules.circuit import CircuitState
from aiokeyless.errors import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessError,
)
from aiokeyless.events import CircuitChanged, PollEnded, PollResult, WaitEnded, WaitOutcome, WaitStarted
from aiokeyless.models import Operation, OperationState

if TYPE_CHECKING:
    from aiokeyless._listeners import Listeners

    from .state import Poll, Wait

logger = logging.getLogger("aiokeyless")

_LATE: Final = 1.0  # seconds: a poll that starts later than it was due by so much is late
_LATE_FOR: Final = 5.0  # seconds for which all polls were late, until that is logged
_NUMBERS: Final = itertools.count(1)  # of all clients: a listener may serve several

#: How a wait with such a result ended; the first that fits.
_OUTCOMES: Final[dict[type, WaitOutcome]] = {
    Operation: WaitOutcome.APPROVED,
    NoneType: WaitOutcome.HELD,
    ApprovalUnknownError: WaitOutcome.UNKNOWN,
    ApprovalTimeoutError: WaitOutcome.TIMED_OUT,
    ApprovalError: WaitOutcome.REJECTED,
    ClientClosedError: WaitOutcome.CLOSED,
}


class Reporter:
    """Reports for one poller.

    Args:
        listeners: Whom to tell of events; None for nobody.
        now: The time.
    """

    def __init__(self, listeners: Listeners | None, now: float) -> None:
        self._listeners = listeners
        self._circuit = CircuitState.CLOSED
        self._circuit_since = now
        self._opened_at: float | None = None  # when the circuit opened, until it is closed
        self._late_since = math.inf
        self._late_logged = False

    @property
    def listens(self) -> bool:
        """Whether anybody is told of events: where nobody is, they are not built."""
        return self._listeners is not None

    # -- events of waits and polls

    def wait_started(self, wait: Wait) -> None:
        """Report a wait that was registered."""
        assert self._listeners is not None  # noqa: S101  # callers ask `listens`
        wait.number = next(_NUMBERS)
        left = 0.0 if wait.had_expired else wait.deadline - wait.started_at
        self._listeners.tell(
            WaitStarted(
                wait=wait.number,
                operation_id=wait.polled.operation_id,
                timeout=None if math.isinf(left) else left,
                traceparent=None if wait.ticket is None else wait.ticket.traceparent,
            )
        )

    def wait_ended(self, wait: Wait, now: float) -> None:
        """Report a wait that has ended or whose caller is gone."""
        assert self._listeners is not None  # noqa: S101
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

    def poll_ended(self, poll: Poll, answer: Operation | KeylessError | None, now: float) -> None:
        """Report a poll; `answer` is None where it was cut off since no wait needed it any more."""
        assert self._listeners is not None  # noqa: S101
        self._listeners.tell(
            PollEnded(
                waits=tuple([wait.number for wait in poll.waits]),
                operation_id=poll.polled.operation_id,
                result=_result(answer),
                error=type(answer).__name__ if isinstance(answer, KeylessError) else None,
                is_final=poll.final,
                seconds=now - poll.started_at,
                lag=poll.lag,
            )
        )

    # -- the circuit, and late polls

    def circuit_is(self, state: CircuitState, *, cause: KeylessError | None, waiting: int, now: float) -> None:
        """Report the circuit's state after a poll, if it has changed.

        Args:
            state: The state.
            cause: The failure of that poll; None if it was answered.
            waiting: Waits under way.
            now: The time.
        """
        if state is self._circuit:
            return
        previous, self._circuit = self._circuit, state
        seconds, self._circuit_since = now - self._circuit_since, now
        self._log_circuit(state, cause, waiting, now)
        if self._listeners is not None:
            name = None if cause is None else type(cause).__name__
            self._listeners.tell(
                CircuitChanged(state=state.value, previous=previous.value, cause=name, waiting=waiting, seconds=seconds)
            )

    def _log_circuit(self, state: CircuitState, cause: KeylessError | None, waiting: int, now: float) -> None:
        """Log when it opens first, and when it is closed again: between these it may go to and fro."""
        if state is CircuitState.OPEN and self._opened_at is None:
            self._opened_at = now
            logger.warning(
                "Keyless fails (last: %s), so the circuit is open: %d waits go on, with few polls until it answers",
                cause,
                waiting,
            )
        elif state is CircuitState.CLOSED and self._opened_at is not None:
            logger.info("Keyless answers again: the circuit is closed, %.1f s after it opened", now - self._opened_at)
            self._opened_at = None

    def poll_started(self, lag: float, now: float, *, waiting: int) -> None:
        """Log once when polls have been late for a while, though the service is well; again after they were not."""
        if lag < _LATE or self._circuit is not CircuitState.CLOSED:
            self._late_since = math.inf
            self._late_logged = False
            return
        self._late_since = min(self._late_since, now)
        if now - self._late_since > _LATE_FOR and not self._late_logged:
            self._late_logged = True
            logger.warning(
                "polls have been late for over %.0f s, now by %.1f s, with %d waits: raise max_in_flight or "
                "max_polls_per_second, or give the process more CPU",
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


def _result(answer: Operation | KeylessError | None) -> PollResult:
    """Return what one poll brought."""
    if answer is None:
        return PollResult.CUT_OFF
    if isinstance(answer, KeylessError):
        return PollResult.FAILED
    if answer.is_approved:
        return PollResult.APPROVED
    return PollResult.PENDING if answer.state == OperationState.PENDING else PollResult.INVALID
