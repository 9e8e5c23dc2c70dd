"""What the poller keeps: a wait, the operation that is watched for it, and one poll at that operation.

There are a hundred thousand of the first two in a process, so they are slotted and hold no more than they must.
Who changes them, and when, is the poller's business; here is what they mean.
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from aiokeyless._rules.approval import WaitRecord
from aiokeyless.models import Operation

from .packing import unpack_pending

if TYPE_CHECKING:
    from anyio.streams.memory import MemoryObjectSendStream
    from tenacity.wait import wait_base
    from yarl import URL

    from aiokeyless.errors import KeylessError
    from aiokeyless.reports import ApprovalUpdate
    from aiokeyless.schedule import wait_adaptive
    from aiokeyless.ticket import ApprovalTicket

WaitResult = Operation | Exception


class Wait(asyncio.Future[WaitResult]):
    """One wait, which is the future that whoever made it awaits. It never raises: errors are results too."""

    __slots__ = (
        "attempt",
        "deadline",
        "deadline_passed",
        "error",
        "final",
        "may_be_missing",
        "origin",
        "polled",
        "polls",
        "registered",
        "schedule",
        "scheduled_at",
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
        self.attempt = 1  # for the schedule: delays asked for, of pending answers only
        self.polls = 0
        self.seen: bytes | None = None  # the last pending answer, packed: a third of the size of what it unpacks to
        self.error: KeylessError | None = None
        self.deadline_passed = False  # its deadline has passed
        self.final: Poll | None = None  # its final poll, once that is under way
        self.registered = True  # in the poller's books
        self.scheduled_at: float | None = None

    def __lt__(self, other: Wait) -> bool:
        return self.polled < other.polled

    def record(self, now: float) -> WaitRecord:
        """Return what an error tells of this wait."""
        operation_id = self.polled.operation_id
        seen = unpack_pending(self.seen, operation_id) if self.seen is not None else None
        return WaitRecord(operation_id, seen, self.error, self.polls, now - self.started_at, self.ticket)


class PolledOperation:
    """One operation that is looked at, for one wait or for many."""

    __slots__ = (
        "before_deadline",
        "creation_known",
        "due",
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
        "scheduled_at",
        "sequence",
        "url",
    )

    def __init__(self, sequence: float, operation_id: str, url: URL, origin: float) -> None:
        self.sequence = sequence  # when, and no two at the same time
        self.operation_id = operation_id
        self.url = url
        self.origin = origin
        self.creation_known = (
            False  # whether origin is the operation's creation, from a ticket, and not just a wait's start
        )
        self.first: Wait | None = None
        self.others: list[Wait] | None = None  # for nearly every operation there is one wait alone: no list for it
        self.live = 0  # waits that have not ended
        self.before_deadline = 0  # those of them whose deadline is still to come
        self.poll: Poll | None = None  # the ordinary poll under way
        self.due = math.inf  # of the next ordinary poll; while one is under way: of the one that latecomers want
        self.final_poll_queued = False
        self.failures = 0  # transient ones in a row
        self.pending_at: float | None = None  # start of the last poll that was answered with pending
        self.learners: tuple[wait_adaptive, ...] = ()
        self.scheduled_at: float | None = None

    def __lt__(self, other: PolledOperation) -> bool:
        return self.sequence < other.sequence  # of those due at the same time, the first to come

    def add(self, wait: Wait) -> None:
        """Take a wait in."""
        if self.first is None:
            self.first = wait
        elif self.others is None:
            self.others = [wait]
        else:
            self.others.append(wait)
        self.live += 1
        self.before_deadline += 1

    def remove(self, wait: Wait) -> None:
        """Let go of a wait that has ended; it stays until more than half of them have."""
        self.live -= 1
        self.before_deadline -= not wait.deadline_passed
        if 1 + len(self.others or ()) > 2 * self.live:
            kept = self.active_waits()
            self.first = kept.pop(0) if kept else None
            self.others = kept or None

    def all_waits(self) -> list[Wait]:
        """Return the waits in the order of their coming, some that have ended among them."""
        if self.first is None:
            return []
        return [self.first, *(self.others or ())]

    def active_waits(self) -> list[Wait]:
        """Return the waits that have not ended."""
        return [wait for wait in self.all_waits() if not wait.done()]


class Poll:
    """One request: for which waits it is made, and whether and why it was cut off."""

    __slots__ = (
        "counted_as_failure",
        "cut",
        "final",
        "members",
        "overdue",
        "polled",
        "started_at",
        "task",
        "under_way",
    )

    def __init__(self, polled: PolledOperation, now: float, *, final: bool) -> None:
        self.polled = polled
        self.started_at = now
        self.final = final
        self.members: list[Wait] = []
        self.task: asyncio.Task[None] | None = None
        self.under_way = False
        self.cut = False
        self.overdue = False
        self.counted_as_failure = False

    def serves(self, wait: Wait) -> bool:
        """Whether the answer still counts for a member: for one whose time is up, only that of its final poll does."""
        return not wait.done() and (not wait.deadline_passed or wait.final is self)

    def stop(self, *, overdue: bool = False) -> None:
        """Cut the exchange off, once; overdue: since it took longer than an exchange may."""
        if self.cut:
            return
        self.cut = True
        self.overdue = overdue
        if self.under_way and self.task is not None:  # one that has not begun sees the mark when it does
            self.task.cancel()
