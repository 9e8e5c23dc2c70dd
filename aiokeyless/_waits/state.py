"""The state of the machine: a wait, the operation that is polled for it, and one poll of that operation.

A process may hold a hundred thousand waits and operations, so these have slots, and as few as possible. Only the
machine changes them, and the dispatcher its own attributes. Other modules only read them. The comments state what each
attribute means. Pure.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Protocol

from aiokeyless.models import Operation

from .timer_queue import Scheduled

if TYPE_CHECKING:
    from tenacity.wait import wait_base

    from aiokeyless.errors import KeylessError
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.schedule import wait_adaptive
    from aiokeyless.ticket import ApprovalTicket

    from .timer_queue import Entry

WaitResult = Operation | Exception | None  # None: the lease of a held wait expired


class WaitPhase(Enum):
    """What can still happen to a wait."""

    POLLING = auto()
    """Its deadline has not passed: the schedule or the backoff sets its polls."""
    FINAL = auto()
    """Its deadline has passed: only the answer to a final poll counts."""
    ENDED = auto()
    """It has its outcome, or its caller is gone."""


class Updates(Protocol):
    """Receives the updates of a wait."""

    def send_nowait(self, item: ApprovalUpdate, /) -> None:
        """Receive an update."""

    def close(self) -> None:
        """Expect no more updates."""


class Wait(Scheduled):
    """One wait. It has no slots of its own, so that it can be a future: see `WAIT_SLOTS`."""

    if TYPE_CHECKING:  # with empty slots, mypy would allow no assignment
        polled: PolledOperation
        ticket: ApprovalTicket | None
        schedule: wait_base
        updates: Updates | None
        phase: WaitPhase
        started_at: float
        origin: float  # when the operation was created, as far as this wait knows
        deadline: float
        had_expired: bool  # before it began: its first poll is the final one, and has no deadline
        may_be_missing: bool
        attempt: int  # for the schedule: the delays it was asked for, plus one; failures ask for none

        # When its own schedule would poll, if other waits share its polls. This is in the past while the wait is alone,
        # and before its first pending answer.
        own_due: float
        polls: int
        error: KeylessError | None  # the last one
        final: Poll | None  # its final poll, while that is in flight
        number: int  # for listeners, if there are any
        entry: Entry | None  # in the queue of deadlines
    else:
        __slots__ = ()

    @property
    def sequence(self) -> float:  # type: ignore[override]  # read-only here
        """The sequence of its operation: the waits of one operation have no order among themselves."""
        return self.polled.sequence

    @abstractmethod
    def done(self) -> bool:
        """Return whether it has a result, or its caller is gone."""

    @abstractmethod
    def cancelled(self) -> bool:
        """Return whether its caller is gone."""

    @abstractmethod
    def result(self) -> WaitResult:
        """Return its result."""

    @abstractmethod
    def set_result(self, result: WaitResult, /) -> None:
        """Give it its result, once."""


WAIT_SLOTS: Final = (
    *("attempt", "deadline", "entry", "error", "final", "had_expired", "may_be_missing", "number", "origin", "own_due"),
    *("phase", "polled", "polls", "schedule", "started_at", "ticket", "updates"),
)


class PolledOperation(Scheduled):
    """One operation that is polled, for one wait or for many."""

    __slots__ = (
        "before_deadline",
        "due",
        "entry",
        "failures",
        "final_poll_queued",
        "first",
        "learners",
        "live",
        "operation_id",
        "origin",
        "others",
        "pending_at",
        "poll",
        "rank",
        "sequence",
        "was_seen",
    )

    def __init__(self, sequence: float, operation_id: str, origin: float) -> None:
        # When its first wait began, and unique. Of the operations that are due at the same time, the one whose wait
        # began first is polled first.
        self.sequence = sequence
        self.operation_id = operation_id
        self.origin = origin
        self.first: Wait | None = None
        self.others: list[Wait] | None = None  # nearly every operation has a single wait: no list for it
        self.live = 0  # waits that have not ended
        self.before_deadline = 0  # of the live ones, those that are in the phase POLLING
        self.failures = 0  # transient ones in a row
        self.pending_at: float | None = None  # start of the last poll that was answered with pending
        self.was_seen = False  # an answer was the operation itself, and no 404
        self.learners: tuple[wait_adaptive, ...] = ()  # the schedules that learn from it
        # -- the dispatcher's
        self.poll: Poll | None = None  # the ordinary poll in flight
        self.due = math.inf  # of the next ordinary poll; while one is in flight, of the one after it
        self.rank = 0  # which of the queues it is in
        self.final_poll_queued = False
        self.entry: Entry | None = None

    def add(self, wait: Wait) -> None:
        """Add a wait."""
        if self.first is None:
            self.first = wait
        elif self.others is None:
            self.others = [wait]
        else:
            self.others.append(wait)
        self.live += 1
        self.before_deadline += 1

    def remove(self, wait: Wait) -> None:
        """Remove a wait that ends now. References to ended waits stay until more than half of all have ended."""
        self.live -= 1
        self.before_deadline -= wait.phase is WaitPhase.POLLING
        if not self.live:
            self.first = self.others = None
        elif 1 + len(self.others or ()) > 2 * self.live:
            kept = self.active_waits()
            self.first = kept.pop(0) if kept else None  # none is left if all are about to leave
            self.others = kept or None

    def all_waits(self) -> list[Wait]:
        """Return the waits in the order in which they started, including some that have ended."""
        return [] if self.first is None else [self.first, *(self.others or ())]

    def active_waits(self) -> list[Wait]:
        """Return the waits that have not ended, in the order in which they started."""
        first, others = self.first, self.others
        active = [] if first is None or first.done() else [first]
        return active if others is None else active + [wait for wait in others if not wait.done()]

    def needs_final_poll(self) -> bool:
        """Return whether a wait's deadline has passed, and no final poll of it is in flight."""
        return any(wait.phase is WaitPhase.FINAL and wait.final is None for wait in self.active_waits())


class Poll:
    """One poll, its waits, and whether and why it was cut off."""

    __slots__ = (
        "_undecided",
        "_unserved",
        "counted_as_failure",
        "final",
        "is_over",
        "is_overdue",
        "is_retry",
        "lag",
        "polled",
        "started_at",
        "waits",
    )

    def __init__(self, polled: PolledOperation, now: float, waits: list[Wait], *, final: bool) -> None:
        self.polled = polled
        self.started_at = now
        self.waits = waits  # those for which a pending answer counts
        self.final = final
        self.is_retry = False  # an ordinary one, of an operation that failed before
        self.lag = 0.0  # seconds by which it started late
        self.is_over = False  # it was cut off, or has ended: nothing stops it any more
        self.is_overdue = False  # it was cut off because it took longer than an exchange may
        self.counted_as_failure = False
        self._unserved = 0  # it no longer serves so many of the first waits, and never will
        self._undecided = 0  # it does not decide so many of the first waits, and never will

    def serves(self, wait: Wait) -> bool:
        """Return whether the answer counts for a wait. After the wait's deadline, only its final poll does."""
        return not wait.done() and (wait.phase is WaitPhase.POLLING or wait.final is self)

    def serves_any(self) -> bool:
        """Return whether the answer counts for any wait. Repeated calls do not check a wait again after a no."""
        while self._unserved < len(self.waits) and not self.serves(self.waits[self._unserved]):
            self._unserved += 1
        return self._unserved < len(self.waits)

    def is_awaited_as_final(self) -> bool:
        """Return whether it is the final poll of a wait that has not ended. After that, it may go on for others."""
        while self._undecided < len(self.waits) and not self._decides(self.waits[self._undecided]):
            self._undecided += 1
        return self._undecided < len(self.waits)

    def _decides(self, wait: Wait) -> bool:
        return wait.final is self and not wait.done()
