"""What the poller keeps: a wait, the operation that is watched for it, and one look at that operation.

There are a hundred thousand of the first two in a process, so they are slotted and hold no more than they must.
Who changes them, and when, is the poller's business; here is what they mean.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from .approval import WaitRecord
from .models import Operation
from .protocol import GET_OPERATION

if TYPE_CHECKING:
    import asyncio

    from anyio.streams.memory import MemoryObjectSendStream
    from tenacity.wait import wait_base
    from yarl import URL

    from .errors import KeylessError
    from .models import ApprovalTicket, ApprovalUpdate
    from .schedule import wait_adaptive

Outcome = Operation | Exception


class Wait:
    """One wait. Whoever made it awaits `future`, which never raises: errors are results too."""

    __slots__ = (
        "attempt",
        "began",
        "booking",
        "deadline",
        "error",
        "final",
        "future",
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
        future: asyncio.Future[Outcome],
        *,
        began: float,
        origin: float,
        deadline: float,
        schedule: wait_base,
        ticket: ApprovalTicket | None,
        may_be_missing: bool,
        updates: MemoryObjectSendStream[ApprovalUpdate] | None,
    ) -> None:
        self.watch = watch
        self.future = future
        self.began = began
        self.origin = origin  # when the operation was created, as far as this wait knows
        self.deadline = deadline
        self.schedule = schedule
        self.ticket = ticket
        self.may_be_missing = may_be_missing
        self.updates = updates
        self.attempt = 1  # for the schedule: delays asked for, of pending answers only
        self.polls = 0
        self.seen: bytes | None = None  # the last pending answer: bytes are a third of the size of what they decode to
        self.error: KeylessError | None = None
        self.overtime = False  # its deadline has passed
        self.final: Look | None = None  # its final look, once that is under way
        self.listed = True  # in the poller's books
        self.booking: float | None = None

    def __lt__(self, other: Wait) -> bool:
        return self.watch < other.watch

    def record(self, now: float) -> WaitRecord:
        """Return what an error tells of this wait."""
        seen = GET_OPERATION.decode(self.seen) if self.seen is not None else None
        return WaitRecord(self.watch.operation_id, seen, self.error, self.polls, now - self.began, self.ticket)


class Watch:
    """One operation that is looked at, for one wait or for many."""

    __slots__ = (
        "booking",
        "dated",
        "due",
        "failures",
        "final_wanted",
        "live",
        "look",
        "looks",
        "number",
        "operation_id",
        "origin",
        "patient",
        "pending_at",
        "pupils",
        "url",
        "waits",
    )

    def __init__(self, number: int, operation_id: str, url: URL, origin: float) -> None:
        self.number = number  # in the order of their coming
        self.operation_id = operation_id
        self.url = url
        self.origin = origin
        self.dated = False  # whether origin is the operation's creation, from a ticket, and not just a wait's start
        self.waits: list[Wait] = []  # ended ones too, until there are many
        self.live = 0  # those that have not ended
        self.patient = 0  # those of them whose deadline is still to come
        self.look: Look | None = None  # the ordinary look under way
        self.looks = 0  # looks under way, final ones too
        self.due = math.inf  # of the next ordinary look; while one is under way: of the one that latecomers want
        self.final_wanted = False
        self.failures = 0  # transient ones in a row
        self.pending_at: float | None = None  # start of the last look that was answered with pending
        self.pupils: tuple[wait_adaptive, ...] = ()
        self.booking: float | None = None

    def __lt__(self, other: Watch) -> bool:
        return self.number < other.number  # of those due at the same time, the first to come

    def current(self) -> list[Wait]:
        """Return the waits that have not ended."""
        return [wait for wait in self.waits if not wait.future.done()]


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
        return not wait.future.done() and (not wait.overtime or wait.final is self)

    def stop(self, *, overdue: bool = False) -> None:
        """Cut the exchange off, once; overdue: since it took longer than an exchange may."""
        if self.cut:
            return
        self.cut = True
        self.overdue = overdue
        if self.under_way and self.task is not None:  # one that has not begun sees the mark when it does
            self.task.cancel()
