"""What the poller keeps: a wait, the operation that is watched for it, and one look at that operation.

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

Outcome = Operation | Exception


class Wait(asyncio.Future[Outcome]):
    """One wait, which is the future that whoever made it awaits. It never raises: errors are results too."""

    __slots__ = (
        "attempt",
        "began",
        "booking",
        "deadline",
        "error",
        "final",
        "listed",
        "may_be_missing",
        "origin",
        "overtime",
        "polls",
        "schedule",
        "seen",
        "ticket",
        "updates",
        "watch",
    )

    def __init__(
        self,
        watch: Watch,
        loop: asyncio.AbstractEventLoop,
        *,
        began: float,
        origin: float,
        deadline: float,
        schedule: wait_base,
        ticket: ApprovalTicket | None,
        may_be_missing: bool,
        updates: MemoryObjectSendStream[ApprovalUpdate] | None,
    ) -> None:
        super().__init__(loop=loop)
        self.watch = watch
        self.began = began
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
        self.overtime = False  # its deadline has passed
        self.final: Look | None = None  # its final look, once that is under way
        self.listed = True  # in the poller's books
        self.booking: float | None = None

    def __lt__(self, other: Wait) -> bool:
        return self.watch < other.watch

    def record(self, now: float) -> WaitRecord:
        """Return what an error tells of this wait."""
        operation_id = self.watch.operation_id
        seen = unpack_pending(self.seen, operation_id) if self.seen is not None else None
        return WaitRecord(operation_id, seen, self.error, self.polls, now - self.began, self.ticket)


class Watch:
    """One operation that is looked at, for one wait or for many."""

    __slots__ = (
        "booking",
        "came",
        "dated",
        "due",
        "failures",
        "final_wanted",
        "first",
        "live",
        "look",
        "operation_id",
        "origin",
        "others",
        "patient",
        "pending_at",
        "pupils",
        "url",
    )

    def __init__(self, came: float, operation_id: str, url: URL, origin: float) -> None:
        self.came = came  # when, and no two at the same time
        self.operation_id = operation_id
        self.url = url
        self.origin = origin
        self.dated = False  # whether origin is the operation's creation, from a ticket, and not just a wait's start
        self.first: Wait | None = None
        self.others: list[Wait] | None = None  # for nearly every operation there is one wait alone: no list for it
        self.live = 0  # waits that have not ended
        self.patient = 0  # those of them whose deadline is still to come
        self.look: Look | None = None  # the ordinary look under way
        self.due = math.inf  # of the next ordinary look; while one is under way: of the one that latecomers want
        self.final_wanted = False
        self.failures = 0  # transient ones in a row
        self.pending_at: float | None = None  # start of the last look that was answered with pending
        self.pupils: tuple[wait_adaptive, ...] = ()
        self.booking: float | None = None

    def __lt__(self, other: Watch) -> bool:
        return self.came < other.came  # of those due at the same time, the first to come

    def join(self, wait: Wait) -> None:
        """Take a wait in."""
        if self.first is None:
            self.first = wait
        elif self.others is None:
            self.others = [wait]
        else:
            self.others.append(wait)
        self.live += 1
        self.patient += 1

    def part(self, wait: Wait) -> None:
        """Let go of a wait that has ended; it stays until more than half of them have."""
        self.live -= 1
        self.patient -= not wait.overtime
        if 1 + len(self.others or ()) > 2 * self.live:
            kept = self.current()
            self.first = kept.pop(0) if kept else None
            self.others = kept or None

    def waits(self) -> list[Wait]:
        """Return the waits in the order of their coming, some that have ended among them."""
        if self.first is None:
            return []
        return [self.first, *(self.others or ())]

    def current(self) -> list[Wait]:
        """Return the waits that have not ended."""
        return [wait for wait in self.waits() if not wait.done()]


class Look:
    """One request: for which waits it is made, and whether and why it was cut off."""

    __slots__ = ("counted_bad", "cut", "final", "members", "overdue", "sent_at", "task", "under_way", "watch")

    def __init__(self, watch: Watch, now: float, *, final: bool) -> None:
        self.watch = watch
        self.sent_at = now
        self.final = final
        self.members: list[Wait] = []
        self.task: asyncio.Task[None] | None = None
        self.under_way = False
        self.cut = False
        self.overdue = False
        self.counted_bad = False

    def serves(self, wait: Wait) -> bool:
        """Whether the answer still counts for a member: for one whose time is up, only that of its final look does."""
        return not wait.done() and (not wait.overtime or wait.final is self)

    def stop(self, *, overdue: bool = False) -> None:
        """Cut the exchange off, once; overdue: since it took longer than an exchange may."""
        if self.cut:
            return
        self.cut = True
        self.overdue = overdue
        if self.under_way and self.task is not None:  # one that has not begun sees the mark when it does
            self.task.cancel()
