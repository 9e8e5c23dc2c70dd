"""The state of the machine: a wait, the operation that is polled for it, and one poll of that operation.

A process may hold a hundred thousand waits and operations, so these have slots, and as few as possible. Only the
machine changes them, and the dispatcher its own attributes. Other modules only read them. Pure.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Final, Protocol

import msgspec

from aiokeyless._rules.final import may_start
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
    """Its deadline has passed: only the answer to a poll from then on counts."""
    ENDED = auto()
    """It has its outcome, or its caller is gone."""


class Updates(Protocol):
    """Receives the updates of a wait."""

    def send_nowait(self, item: ApprovalUpdate, /) -> None:
        """Receive an update."""

    def close(self) -> None:
        """Expect no more updates."""


class Wait(Scheduled):
    """One wait. Its attributes are the slots of a subclass, see `WAIT_SLOTS`, so that this can be a future."""

    __slots__ = tuple[str, ...]()  # if it were a plain (), mypy would allow no assignment

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
    final_poll: Poll | None  # in flight, and started at its deadline or later; if it had expired, its first poll
    had_final_poll: bool  # there is one, or was one that failed
    number: int  # for listeners, if there are any
    entry: Entry | None  # in the queue of deadlines

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


WAIT_SLOTS: Final = tuple(Wait.__annotations__)


class _Opaque:
    """Shows no attribute. Error reporters print local variables, and there may be a hundred thousand waits."""

    __slots__ = ()
    __repr__ = object.__repr__

    def __rich_repr__(self) -> Any:  # as msgspec has it
        return iter(())


class PolledOperation(_Opaque, Scheduled, msgspec.Struct, eq=False):
    """One operation that is polled, for one wait or for many."""

    operation_id: str
    origin: float
    waits: list[Wait] = []
    """In the order in which they started. Some may have ended."""
    live: int = 0
    """Waits that have not ended."""
    before_deadline: int = 0
    """Of the live ones, those that are in the phase POLLING."""
    failures: int = 0
    """Transient ones in a row."""
    unexpected_since: float = math.inf
    """When the first of these came that the service would not give; if there is none, infinity, or any earlier time."""
    pending_at: float | None = None
    """Start of the last poll that was answered with pending."""
    was_seen: bool = False
    """Whether an answer was the operation itself, and no 404."""
    learners: tuple[wait_adaptive, ...] = ()
    """The schedules that learn from it."""

    # -- the dispatcher's

    poll: Poll | None = None
    """The ordinary poll in flight."""
    due: float = math.inf
    """When the next ordinary poll is due; while one is in flight, the one after it."""
    rank: int = 0
    """Which of the queues it is in."""
    entry: Entry | None = None

    def add(self, wait: Wait) -> None:
        """Add a wait."""
        if self.waits:
            self.waits.append(wait)
        else:
            self.waits = [wait]  # nearly always the only one: append would make room for four
        self.live += 1
        self.before_deadline += 1

    def remove(self, wait: Wait) -> None:
        """Remove a wait that ends now. References to ended waits stay until more than half of all have ended."""
        self.live -= 1
        self.before_deadline -= wait.phase is WaitPhase.POLLING
        if len(self.waits) > 2 * self.live:
            self.waits = self.active_waits()

    def active_waits(self) -> list[Wait]:
        """Return the waits that have not ended, in the order in which they started."""
        return [wait for wait in self.waits if not wait.done()]

    def needs_final_poll(self, now: float) -> bool:
        """Return whether a wait's deadline has passed, no final poll for it is in flight, and one may still start."""
        return any(
            wait.phase is WaitPhase.FINAL and wait.final_poll is None and may_start(wait.deadline - now)
            for wait in self.active_waits()
        )


class Poll(_Opaque, msgspec.Struct, eq=False):
    """One poll, its waits, and whether and why it was cut off."""

    polled: PolledOperation
    started_at: float
    waits: list[Wait]
    """Those for which a pending answer counts."""
    lag: float = 0.0
    """Seconds by which it started late."""
    final: bool = False
    """Whether it takes no slot, for waits whose deadline has passed. An ordinary one is final to an expired wait."""
    is_renewal: bool = False
    """Whether it uses a new connection, since the kept ones may be at fault."""
    is_over: bool = False
    """Whether it was cut off, or has ended: nothing stops it any more."""
    is_overdue: bool = False
    """Whether it was cut off because it took longer than an exchange may."""
    is_unanswered: bool = False
    """Whether it counted as a failure already, when a wait ended without its answer."""
    unserved: int = 0
    """It no longer serves so many of the first waits, and never will."""

    def serves(self, wait: Wait) -> bool:
        """Return whether the answer counts for a wait. After the wait's deadline, only its final poll does."""
        return not wait.done() and (wait.phase is WaitPhase.POLLING or wait.final_poll is self)

    def serves_any(self) -> bool:
        """Return whether the answer counts for any wait. Repeated calls do not check a wait again after a no."""
        while self.unserved < len(self.waits) and not self.serves(self.waits[self.unserved]):
            self.unserved += 1
        return self.unserved < len(self.waits)
