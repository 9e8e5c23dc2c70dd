"""What the poller keeps: a wait, the operation that is polled for it, and one poll of that operation.

A process may hold a hundred thousand of the first two, so they are slotted and hold no more than they must. The poller
and the dispatcher change them; the comments here state what each attribute means.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from aiokeyless._rules.approval import WaitRecord
from aiokeyless.models import Operation

from .packing import unpack_pending
from .timer_queue import Scheduled

if TYPE_CHECKING:
    from collections.abc import Collection

    from anyio.streams.memory import MemoryObjectSendStream
    from tenacity.wait import wait_base
    from yarl import URL

    from aiokeyless._rules.outcome import Outcome, PollFacts
    from aiokeyless.errors import KeylessError
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.schedule import wait_adaptive
    from aiokeyless.ticket import ApprovalTicket

    from .timer_queue import Entry

WaitResult = Operation | Exception | None  # None: a hold ended, and the operation is waited for later


class Wait(asyncio.Future[WaitResult], Scheduled):
    """One wait, and the future that its caller awaits. It never raises: errors are results too."""

    __slots__ = (
        "attempt",
        "deadline",
        "deadline_passed",
        "entry",
        "error",
        "final",
        "had_expired",
        "may_be_missing",
        "number",
        "origin",
        "polled",
        "polls",
        "registered",
        "schedule",
        "seen",
        "started_at",
        "ticket",
        "updates",
    )

    def __init__(
        self,
        polled: PolledOperation,
        loop: asyncio.AbstractEventLoop,
        *,
        started_at: float,
        origin: float,
        deadline: float,
        schedule: wait_base,
        ticket: ApprovalTicket | None,
        may_be_missing: bool,
        updates: MemoryObjectSendStream[ApprovalUpdate] | None,
    ) -> None:
        super().__init__(loop=loop)
        self.polled = polled
        self.started_at = started_at
        self.origin = origin  # when the operation was created, as far as this wait knows
        self.deadline = deadline
        self.schedule = schedule
        self.ticket = ticket
        self.may_be_missing = may_be_missing
        self.updates = updates
        self.number = 0  # for listeners, where there are any
        self.attempt = 1  # for the schedule: delays asked for, of pending answers only
        self.polls = 0
        self.seen: bytes | None = None  # the last pending answer, packed: a third of the size of what it unpacks to
        self.error: KeylessError | None = None
        self.deadline_passed = False
        self.final: Poll | None = None  # its final poll, once that has started
        self.had_expired = False  # before it began: its first poll is the final one, and no deadline bounds that
        self.registered = True  # known to the poller: it has not ended, or ended in this very turn of the loop
        self.entry: Entry | None = None  # in the queue of deadlines

    @property
    def sequence(self) -> float:  # type: ignore[override]  # read-only here
        """The sequence of its operation: the waits of one operation have no order among themselves."""
        return self.polled.sequence

    def record(self, now: float) -> WaitRecord:
        """Return what an error tells of this wait."""
        operation_id = self.polled.operation_id
        seen = unpack_pending(self.seen, operation_id) if self.seen is not None else None
        return WaitRecord(operation_id, seen, self.error, self.polls, now - self.started_at, self.ticket)


class Hold(Wait):
    """One piece of a longer wait: its deadline ends it without a final poll and without an error."""

    __slots__ = ()

    def is_paused(self) -> bool:
        """Return whether it ended and its target did not: its time is over, or its caller is gone."""
        return self.cancelled() or self.result() is None


class PolledOperation(Scheduled):
    """One operation that is polled, for one wait or for many."""

    __slots__ = (
        "before_deadline",
        "due",
        "entry",
        "failures",
        "final_poll_queued",
        "first",
        "is_retry",
        "learners",
        "live",
        "observed_from",
        "operation_id",
        "origin",
        "others",
        "pending_at",
        "poll",
        "sequence",
        "url",
    )

    def __init__(self, sequence: float, operation_id: str, url: URL, origin: float) -> None:
        # When its first wait began, and unique: of the operations due at the same time, the one that was waited for
        # first is polled first.
        self.sequence = sequence
        self.operation_id = operation_id
        self.url = url
        self.origin = origin
        self.first: Wait | None = None
        self.others: list[Wait] | None = None  # nearly every operation has a single wait: no list for it
        self.live = 0  # waits that have not ended
        self.before_deadline = 0  # of the live ones, those whose deadline has not passed
        self.poll: Poll | None = None  # the ordinary poll in flight
        self.due = math.inf  # of the next ordinary poll; while one is in flight, of the one after it
        self.final_poll_queued = False
        self.failures = 0  # transient ones in a row
        self.is_retry = False  # which of the dispatcher's queues it is in: it had failed when it was put there
        self.pending_at: float | None = None  # start of the last poll that was answered with pending
        # When it was first known to be pending: its creation, if it was waited for since then, else the start of the
        # first poll that was answered with pending. Before that nothing is learned of it.
        self.observed_from: float | None = None
        self.learners: tuple[wait_adaptive, ...] = ()
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
        """Remove a wait that has ended; its reference stays until more than half of them have."""
        self.live -= 1
        self.before_deadline -= not wait.deadline_passed
        if not self.live:
            self.first = self.others = None
        elif 1 + len(self.others or ()) > 2 * self.live:
            kept = self.active_waits()
            self.first = kept.pop(0) if kept else None  # none is left where all are about to leave
            self.others = kept or None

    def all_waits(self) -> list[Wait]:
        """Return the waits in the order in which they started, some that have ended among them."""
        if self.first is None:
            return []
        return [self.first, *(self.others or ())]

    def active_waits(self) -> list[Wait]:
        """Return the waits that have not ended."""
        return [wait for wait in self.all_waits() if not wait.done()]

    def is_waited_for(self) -> bool:
        """Return whether a wait has not ended."""
        return (self.first is not None and not self.first.done()) or any(not wait.done() for wait in self.others or ())

    def needs_final_poll(self) -> bool:
        """Return whether a wait's deadline has passed, and no final poll of it is in flight."""
        return any(wait.deadline_passed and wait.final is None for wait in self.active_waits())


class Poll:
    """One poll: for which waits it is made, and whether and why it was cut off."""

    __slots__ = (
        "_undecided",
        "_unserved",
        "counted_as_failure",
        "cut",
        "final",
        "is_retry",
        "lag",
        "overdue",
        "polled",
        "started_at",
        "task",
        "under_way",
        "waits",
    )

    def __init__(self, polled: PolledOperation, now: float, *, final: bool) -> None:
        self.polled = polled
        self.started_at = now
        self.final = final
        self.is_retry = False  # an ordinary one, of an operation that failed before
        self.lag = 0.0  # seconds after it was due at which it started
        self.waits: list[Wait] = []
        self.task: asyncio.Task[None] | None = None
        self.under_way = False
        self.cut = False
        self.overdue = False
        self.counted_as_failure = False
        self._unserved = 0  # so many of the first waits it no longer serves: they never come back
        self._undecided = 0  # so many of the first waits it does not decide, or no longer

    def add(self, wait: Wait) -> None:
        """Let it count for a hold that starts while it is in flight."""
        self.waits.append(wait)
        wait.polls += self.under_way

    def serves(self, wait: Wait) -> bool:
        """Return whether the answer counts for a wait: once its deadline has passed, only its final poll does."""
        return not wait.done() and (not wait.deadline_passed or wait.final is self)

    def serves_any(self) -> bool:
        """Return whether its answer counts for a wait; asked again and again, it checks each wait once."""
        while self._unserved < len(self.waits) and not self.serves(self.waits[self._unserved]):
            self._unserved += 1
        return self._unserved < len(self.waits)

    def is_awaited_as_final(self) -> bool:
        """Return whether it is the final poll of a wait that has not ended: it may go on for others after that."""
        while self._undecided < len(self.waits) and not self._decides(self.waits[self._undecided]):
            self._undecided += 1
        return not self.waits or self._undecided < len(self.waits)  # without any, it starts in this turn of the loop

    def _decides(self, wait: Wait) -> bool:
        return wait.final is self and not wait.done()

    def stop(self, *, overdue: bool = False) -> None:
        """Cut the exchange off, once; overdue: since it took longer than an exchange may."""
        if self.cut:
            return
        self.cut = True
        self.overdue = overdue
        if self.under_way and self.task is not None:  # one that has not started sees the mark when it does
            self.task.cancel()


class Applied:
    """The result of one poll while it is applied to its waits: what is the same for all batches of them."""

    __slots__ = ("delays", "failed", "outcomes", "poll", "retry_at", "served", "was_seen")

    def __init__(self, poll: Poll, active: list[Wait]) -> None:
        self.poll = poll
        # Nearly always by the first: it spares the polls a generator.
        self.was_seen = active[0].seen is not None or any(wait.seen is not None for wait in active)
        # The waits for which the poll was made.
        self.served: Collection[Wait] = poll.waits if len(poll.waits) == 1 else set(poll.waits)
        self.outcomes: dict[PollFacts, Outcome] = {}
        self.delays: dict[tuple[int, int], float | Exception] = {}  # by the id of the schedule and the attempt
        self.failed = False  # it was counted as a failure of the operation
        self.retry_at = math.inf  # the end of the backoff after that
