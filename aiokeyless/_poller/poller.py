"""All the waits of one client: two agendas, one timer, and few workers that look at what is due.

A wait is one slotted future. Waits for the same operation share a `Watch` and its looks. Workers are
tasks that take the next due look from the agenda themselves and exit when nothing is due, so that ten thousand waits
due at once cost the event loop no more than ``max_in_flight`` of them. What an answer means is `approval`'s to decide,
when to look next `schedule`'s, how much the service bears `health`'s; here is only the awaiting and the book-keeping.
"""

from __future__ import annotations

import asyncio
import contextvars
import copy
import itertools
import logging
import math
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

from aiokeyless._http.protocol import get_operation, is_transient
from aiokeyless._rules.approval import Distrust, Verdict, distrusted, judge, timed_out, unknown
from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.circuit import Health
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ClientClosedError,
    KeylessError,
    NotFoundError,
    RequestTimeoutError,
    StatusError,
    TransportError,
)
from aiokeyless.models import Operation
from aiokeyless.reports import ApprovalUpdate, ClientStatistics
from aiokeyless.schedule import next_delay, wait_adaptive

from .packing import pack_pending
from .state import Look, Wait, Watch
from .timer_queue import Agenda

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from anyio.streams.memory import MemoryObjectSendStream
    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless.ticket import ApprovalTicket

    from .state import Outcome

FINAL_LOOK: Final = 2.0  # seconds past the deadline within which the final poll is answered, or repeated if it fails
YOUNG: Final = 5.0  # seconds: a replica that lags may answer 404 about an operation that was just created
FRESH: Final = 1.0  # seconds within which nobody approves what was just created
_BATCH: Final = 128  # deadlines handled in one callback: many at once must not block the loop
_AFTER_BUG: Final = 0.1  # seconds until the timer fires again after it failed: a bug must not become a hot loop
# The clocks in use round to a microsecond or better; a timer that fired within it is not early.
_RESOLUTION: Final = 1e-6

logger = logging.getLogger("aiokeyless")


class Poller:
    """The waits of one client.

    Args:
        transport: What sends the looks.
        schedule: When to look, for waits that bring no schedule of their own.
        max_in_flight: Looks under way at once.
    """

    def __init__(self, transport: Transport, *, schedule: wait_base, max_in_flight: int) -> None:
        self._transport = transport
        self._schedule = schedule
        self._pupils = (schedule,) if isinstance(schedule, wait_adaptive) else ()
        self._max_in_flight = max_in_flight
        self._loop = asyncio.get_running_loop()
        # Not the context of whoever happened to be first: its trace and its logging variables are not ours.
        self._context = contextvars.Context()
        self._health = Health(max_in_flight)
        self._watches: dict[str, Watch] = {}
        self._looks: Agenda[Watch] = Agenda()
        self._deadlines: Agenda[Wait] = Agenda()
        self._finals: deque[tuple[float, Watch]] = deque()  # final polls that wait for a slot, and since when
        self._flying: dict[Look, None] = {}  # looks under way, oldest first
        self._finals_flying = 0
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf  # kept here, since uvloop's handles of what is due at once do not tell
        self._created: dict[str, float] = {}
        self._came = -math.inf
        self._waiting = 0
        self._polls = 0
        self._approvals = 0
        self._timeouts = 0
        self._failures = 0
        self.closed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()  # once it is closed and no wait is left

    # -- what the client calls

    def created(self, operation_id: str) -> None:
        """Remember on the loop's clock that an operation was created just now."""
        now = self._loop.time()
        self._created.pop(operation_id, None)
        while self._created and now - self._created[oldest := next(iter(self._created))] > YOUNG:
            del self._created[oldest]
        self._created[operation_id] = now

    def start(
        self,
        operation_id: str,
        *,
        ticket: ApprovalTicket | None,
        timeout: float | None,
        schedule: wait_base | None,
        may_be_missing: bool,
        updates: MemoryObjectSendStream[ApprovalUpdate] | None = None,
    ) -> Wait:
        """Begin a wait. Whoever calls this must `leave` it.

        Args:
            operation_id: What to wait for.
            ticket: What is known about it; None for a bare id.
            timeout: Seconds; infinity for no end; None for what the ticket has left.
            schedule: When to look; None for the client's.
            may_be_missing: Whether 404 counts as pending.
            updates: Where an update goes for each look; closed when the wait ends.
        """
        if self.closed:
            raise ClientClosedError("the client is closed; look at the operation with get_operation of another client")
        now = self._loop.time()
        age = self._age(ticket, now)
        if timeout is None:
            timeout = math.inf if ticket is None else _left(ticket, age)
        schedule = schedule or self._schedule
        fresh = ticket is not None and operation_id in self._created and age < FRESH
        first = now + (next_delay(schedule, attempt_number=1, since_start=age) if fresh else 0.0)
        origin = now - age if age else now  # the same float twice, not two of them: there are many waits
        watch = self._watch(operation_id, now, origin, ticket)
        wait = Wait(
            watch,
            self._loop,
            began=now,
            origin=origin,
            deadline=now + timeout,
            schedule=schedule,
            ticket=ticket,
            may_be_missing=may_be_missing,
            updates=updates,
        )
        wait.attempt += fresh
        watch.join(wait)
        self._waiting += 1
        if schedule is self._schedule and not watch.pupils:
            watch.pupils = self._pupils  # one tuple for all, as nearly all are
        elif isinstance(schedule, wait_adaptive) and schedule not in watch.pupils:
            watch.pupils += (schedule,)
        if wait.deadline < math.inf:
            self._deadlines.book(wait, wait.deadline)
        if first < wait.deadline:
            self._want(watch, first)
        self._arm(now)
        return wait

    def leave(self, wait: Wait) -> None:
        """End a wait that nobody awaits any more; harmless after it has ended."""
        if wait.listed:
            wait.cancel()
            self._close(wait)

    async def aclose(self) -> None:
        """End all waits with `ClientClosedError`, and what is in flight for them.

        Once begun, it goes on by itself, whatever becomes of the caller; a second call waits for the first.
        """
        if not self.closed:
            self.closed = True
            self._disarm()
            self._end_batch(wait for watch in tuple(self._watches.values()) for wait in watch.current())
        await asyncio.shield(self._ended)
        while tasks := [look.task for look in self._flying if look.task is not None]:
            await asyncio.wait(tasks)

    def _end_batch(self, waits: Iterator[Wait]) -> None:
        """End some of the waits; the rest in callbacks, which nobody can cancel."""
        batch = tuple(itertools.islice(waits, _BATCH))
        if not batch:
            self._ended.set_result(None)
            return
        self._loop.call_soon(self._end_batch, waits, context=self._context)  # first, whatever is raised below
        for wait in batch:
            self._end(
                wait,
                ClientClosedError(
                    f"the client was closed while operation {wait.watch.operation_id!r} was waited for; "
                    "look at it with get_operation of another client"
                ),
            )

    def statistics(self) -> ClientStatistics:
        """Return the counts as of now."""
        now = self._loop.time()
        due = self._looks.first()
        late = [0.0] if due is None else [0.0, now - due]
        if self._finals and self._lacks_final(self._finals[0][1]):  # the oldest comes first
            late.append(now - self._finals[0][0])
        return ClientStatistics(
            waiting=self._waiting,
            in_flight=len(self._flying),
            polls=self._polls,
            approvals=self._approvals,
            timeouts=self._timeouts,
            transient_failures=self._failures,
            lag=max(late),
        )

    # -- times

    def _age(self, ticket: ApprovalTicket | None, now: float) -> float:
        """Return the seconds since the operation was created: 0 for a bare id, whose clock starts with the wait."""
        if ticket is None:
            return 0.0
        created = self._created.get(ticket.operation_id)
        if created is not None:
            return now - created
        return max(0.0, (datetime.now(UTC) - ticket.created_at).total_seconds())

    # -- watches and waits

    def _watch(self, operation_id: str, now: float, origin: float, ticket: ApprovalTicket | None) -> Watch:
        watch = self._watches.get(operation_id)
        if watch is None:
            self._came = max(now, math.nextafter(self._came, math.inf))  # a coarse clock may show a time twice
            watch = Watch(self._came, operation_id, self._transport.url(get_operation(operation_id)), origin)
            self._watches[operation_id] = watch
        watch.origin = min(watch.origin, origin)
        watch.dated = watch.dated or ticket is not None
        return watch

    def _end(self, wait: Wait, outcome: Outcome) -> None:
        """Give a wait its outcome."""
        if wait.done():  # cancelled in this very turn of the loop: whoever awaited it is about to leave
            return
        wait.set_result(outcome)
        if isinstance(outcome, Operation):
            self._approvals += 1
        elif isinstance(outcome, ApprovalTimeoutError):
            self._timeouts += 1
        self._close(wait)

    def _close(self, wait: Wait) -> None:
        """Take a wait that has ended out of the books; the last one stops the looks."""
        watch = wait.watch
        wait.listed = False
        wait.seen = None  # the agenda may keep the wait for a while
        self._deadlines.cancel(wait)
        if wait.updates is not None:
            wait.updates.close()
        watch.part(wait)
        self._waiting -= 1
        if not watch.live:
            self._unwatch(watch)

    def _unwatch(self, watch: Watch) -> None:
        del self._watches[watch.operation_id]
        self._do_not_want(watch)
        for look in self._flying:
            if look.watch is watch:
                look.stop()
        if not self._watches:
            self._finals.clear()
            self._disarm()
        if watch.pending_at is not None:
            self._teach(watch, watch.pending_at, None)

    def _teach(self, watch: Watch, after: float | None, until: float | None) -> None:
        """Tell the schedules when the operation was approved, or until when it was not; once an operation."""
        pupils, watch.pupils = watch.pupils, ()
        for pupil in pupils:
            try:
                pupil.observe(
                    0.0 if after is None else max(0.0, after - watch.origin),
                    None if until is None else max(0.0, until - watch.origin),
                )
            except Exception:
                # A subclass of somebody's. What is not learned costs requests; an approval it must not cost.
                logger.exception("the schedule %r failed to learn from an observation", pupil)

    def _do_not_want(self, watch: Watch) -> None:
        self._looks.cancel(watch)
        watch.due = math.inf

    def _want(self, watch: Watch, due: float) -> None:
        """See to it that an ordinary look comes by then; after the one under way, if there is one."""
        if due < watch.due:
            watch.due = due
            if watch.look is None:
                self._looks.book(watch, due)

    # -- the timer

    def _arm(self, now: float) -> None:
        """Set the timer for the next thing that time alone brings about; what awaits a landing needs none."""
        if self.closed:
            return
        when = self._next_event(now)
        if when < self._timer_at:
            self._disarm()
            self._timer = self._loop.call_at(when, self._wake, context=self._context)
            self._timer_at = when

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_at = math.inf

    def _next_event(self, now: float) -> float:
        if self._finals and not self._finals_flying and len(self._flying) < self._max_in_flight:
            return now  # where a worker was cancelled
        deadline = self._deadlines.first()
        when = math.inf if deadline is None else deadline
        for look in self._flying:  # the oldest comes first
            if not look.cut:
                when = min(when, look.sent_at + self._transport.request_timeout)
                break
        if len(self._flying) < self._max_in_flight and self._counted() < self._health.limit:
            due = self._looks.first()
            if due is not None:
                when = min(when, max(due, self._health.opens_at()))
        return max(when, now)

    def _wake(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = self._loop.time()
        again = now + _AFTER_BUG
        try:
            self._cut_overdue(now)
            self._expire(now)
            self._dispatch(now)
            again = now
        finally:  # what is raised goes on to the loop, which logs it; the other waits must not hang for it
            self._arm(again)

    def _cut_overdue(self, now: float) -> None:
        for look in self._flying:
            if look.sent_at + self._transport.request_timeout > now + _RESOLUTION:
                break
            look.stop(overdue=True)

    def _expire(self, now: float) -> None:
        """Handle deadlines: first a final look is wanted, and when that had its time, the wait ends."""
        hanging: set[Look] = set()
        for _ in range(_BATCH):
            wait = self._deadlines.take(now + _RESOLUTION)
            if wait is None:
                break
            try:
                self._expire_one(wait, now, hanging)
            except Exception as error:  # noqa: BLE001  # a bug: it must end the wait that it concerns, and not hang it
                self._end(wait, error)
        for look in hanging:
            # A look that began before the deadline does not count at the deadline; others may still need it.
            if not any(look.serves(wait) for wait in look.members):
                look.stop()

    def _expire_one(self, wait: Wait, now: float, hanging: set[Look]) -> None:
        if not wait.overtime:
            self._begin_overtime(wait.watch, now)
            self._want_final(wait.watch, wait.deadline)
            if wait.watch.look is not None:
                hanging.add(wait.watch.look)
        elif now + _RESOLUTION < wait.deadline + FINAL_LOOK:  # the pause after a final poll that failed is over
            self._want_final(wait.watch, now)
        else:
            self._end_unanswered(wait, now)

    def _begin_overtime(self, watch: Watch, now: float) -> None:
        """Take note of all waits of an operation whose time is up: nothing but a final poll counts for them now."""
        for wait in watch.waits():
            if wait.deadline <= now + _RESOLUTION and wait.listed and not wait.overtime:
                wait.overtime = True
                watch.patient -= 1
        if not watch.patient:
            self._do_not_want(watch)

    def _want_final(self, watch: Watch, due: float) -> None:
        """See to it that all waits of an operation whose time is up share one final poll."""
        for wait in watch.waits():
            end = wait.deadline + FINAL_LOOK
            if wait.overtime and wait.listed and wait.booking != end:
                self._deadlines.book(wait, end)
        if not watch.final_wanted:
            watch.final_wanted = True
            self._finals.append((due, watch))

    def _lacks_final(self, watch: Watch) -> bool:
        """Whether a wait's time is up, and no final poll of it is under way."""
        return any(wait.overtime and wait.final is None for wait in watch.current())

    def _end_unanswered(self, wait: Wait, now: float) -> None:
        """End a wait whose final polls had their time, or never found a slot."""
        look = wait.final
        if look is not None:
            wait.error = self._no_answer(wait.watch, now - look.sent_at)
            if not look.counted_bad:  # it may be the final look of many
                look.counted_bad = True
                self._failures += 1
                self._health.bad(now, sent_at=look.sent_at, is_probe=False)
        self._end(wait, unknown(wait.record(now)))

    # -- looks

    def _counted(self) -> int:
        """Return the looks under way that take room: while the service recovers, those of better days do not."""
        if self._health.is_open:
            return len(self._flying)
        return sum(look.sent_at >= self._health.since for look in self._flying)

    def _dispatch(self, now: float) -> None:
        """Start workers for what is due, as many as there is room for."""
        while (look := self._take(now)) is not None:
            # Not by the loop's task factory, which is the application's. An eager one would run the worker here and
            # now, in a context that is entered already: that fails, and asyncio then takes no task of the loop for the
            # current one any more. Another one may raise, or take no context.
            look.task = asyncio.Task(self._work(look), loop=self._loop, context=self._context)
            look.task.add_done_callback(self._worker_gone)

    def _take(self, now: float) -> Look | None:
        """Take the next look that may be sent now: final looks first, then what has been due longest."""
        if len(self._flying) >= self._max_in_flight or self.closed:
            return None
        room = self._health.room(now + _RESOLUTION) - self._counted()
        while self._finals and (self._finals_flying == 0 or (room > 0 and not self._health.gated(now))):
            _, watch = self._finals.popleft()
            watch.final_wanted = False
            if self._lacks_final(watch):
                return self._new_look(watch, now, final=True)
        if room > 0:
            due = self._looks.take(now + _RESOLUTION)
            if due is not None:
                return self._new_look(due, now, final=False)
        return None

    def _new_look(self, watch: Watch, now: float, *, final: bool) -> Look:
        look = Look(watch, now, final=final)
        self._flying[look] = None
        if final:
            self._finals_flying += 1
        else:
            watch.look = look
        if not final or watch.due <= now + _RESOLUTION:  # a final look does for an ordinary one that is due
            self._looks.cancel(watch)
            watch.due = math.inf
        return look

    async def _work(self, look: Look | None) -> None:
        """Send looks as long as there are any to send."""
        while look is not None:
            try:
                await self._send(look)
            except BaseException:  # somebody cancelled this task
                self._abandon(look)
                raise
            now = self._loop.time()
            self._land(look, now)
            task = look.task
            look = self._take(now)
            if look is not None:
                look.task = task
            self._dispatch(now)
            self._arm(now)

    def _worker_gone(self, task: asyncio.Task[None]) -> None:
        """Clean up behind a worker that somebody else cancelled, perhaps before it began."""
        for look in tuple(self._flying):
            if look.task is task:
                self._abandon(look)
        if self._watches:
            self._arm(self._loop.time())

    def _abandon(self, look: Look) -> None:
        """Take a look whose worker somebody cancelled out of the books; it costs no wait its final poll."""
        now = self._loop.time()
        for wait in look.members:
            if wait.final is look:
                wait.final = None
        self._land(look, now)
        if self._lacks_final(look.watch):
            self._want_final(look.watch, now)

    async def _send(self, look: Look) -> None:
        if look.cut:  # everybody left before it began
            return
        try:
            self._begin(look)
            self._process(look, await self._fetch(look))
        except Exception as error:  # noqa: BLE001  # a bug: it must end the waits that it concerns, not poll on and on
            for wait in look.watch.current():
                self._end(wait, error)

    async def _fetch(self, look: Look) -> Operation | KeylessError | None:
        """Do the exchange; None where it was cut off because nobody could use it any more."""
        try:
            return await self._transport.look(look.watch.url)
        except asyncio.CancelledError:
            assert look.task is not None  # noqa: S101  # it runs this
            # Ours, by look.stop(), or somebody's who cancels this task: that one is not ours to swallow.
            if (look.task.uncancel() if look.cut else look.task.cancelling()) > 0:
                raise
            if look.cut:
                return self._no_answer(look.watch, self._transport.request_timeout) if look.overdue else None
            # Nobody cancelled this task: something inside the session was, such as a task of a middleware.
            path = self._transport.path(look.watch.url)
            return TransportError(f"GET {path}: the exchange was cancelled inside the session", method="GET", path=path)
        except KeylessError as error:
            return _bare(error)
        finally:
            look.under_way = False

    def _begin(self, look: Look) -> None:
        look.under_way = True
        look.sent_at = self._loop.time()
        look.members = look.watch.current()
        self._polls += 1
        for wait in look.members:
            wait.polls += 1
            if wait.overtime and wait.final is None:
                wait.final = look

    def _land(self, look: Look, now: float) -> None:
        """Take a look out of the books, and see to it that another one follows if one is needed."""
        del self._flying[look]
        watch = look.watch
        if look.final:
            self._finals_flying -= 1
        else:
            watch.look = None
        if not watch.live or watch.look is not None:
            return
        if watch.due == math.inf and watch.patient:
            watch.due = now  # it was cut off, or came to nothing, and somebody still waits
        if watch.due < math.inf and watch.booking is None:
            self._looks.book(watch, watch.due)

    def _no_answer(self, watch: Watch, seconds: float) -> RequestTimeoutError:
        path = self._transport.path(watch.url)
        return RequestTimeoutError(f"GET {path} got no answer within {seconds:.3g} s", method="GET", path=path)

    # -- what a look brought

    def _process(self, look: Look, brought: Operation | KeylessError | None) -> None:
        if brought is None:  # cut off, and neither good nor bad
            return
        if isinstance(brought, KeylessError):
            self._failed(look, brought)
        else:
            self._answered(look, brought)

    def _answered(self, look: Look, operation: Operation) -> None:
        now = self._loop.time()
        self._health.good(now, sent_at=look.sent_at)
        watch = look.watch
        watch.failures = 0
        verdicts = [(wait, judge(operation, watch.operation_id, wait.ticket)) for wait in watch.current()]
        if any(verdict is Verdict.APPROVED for _, verdict in verdicts):
            if watch.dated or watch.pending_at is not None:
                self._teach(watch, watch.pending_at, now)
            watch.pupils = ()
        members = set(look.members)
        pending: list[Wait] = []
        for wait, verdict in verdicts:
            if verdict is Verdict.APPROVED:  # counts for whoever came later, too
                wait.polls = max(wait.polls, 1)
                self._update(wait, now, operation=operation)
                self._end(wait, operation)
            elif wait not in members:
                continue
            elif isinstance(verdict, Distrust):
                self._end(wait, distrusted(verdict, wait.record(now)._replace(last_operation=operation)))
            else:
                pending.append(wait)
        if pending:
            seen = pack_pending(operation)
            for wait in pending:
                wait.seen = seen
        self._still_pending(look, pending, now, operation=operation)

    def _failed(self, look: Look, error: KeylessError) -> None:
        now = self._loop.time()
        members = [wait for wait in look.members if not wait.done()]
        if is_transient(error):
            hold = error.retry_after if isinstance(error, StatusError) and error.status in {429, 503} else None
            self._health.bad(now, sent_at=look.sent_at, is_probe=not look.final, hold=hold)
            self._failed_for_now(look, members, error, now)
            return
        self._health.good(now, sent_at=look.sent_at)
        missing = isinstance(error, NotFoundError)
        if missing and any(wait.seen is not None for wait in members):
            # It was there, so this is a replica that lags, or a gateway. The service answers, so its health is good;
            # only this operation is polled again with a backoff.
            self._failed_for_now(look, members, error, now)
            return
        look.watch.failures = 0
        pending: list[Wait] = []
        for wait in members:
            young = wait.ticket is not None and look.sent_at - wait.origin < YOUNG
            if missing and (wait.may_be_missing or young):
                wait.error = error
                pending.append(wait)
            else:
                self._end(wait, _own(error, members))
        self._still_pending(look, pending, now, error=error)

    def _failed_for_now(self, look: Look, members: list[Wait], error: KeylessError, now: float) -> None:
        """Go on after a transient failure, with a backoff of its own."""
        self._failures += 1
        watch = look.watch
        watch.failures += 1
        # While the service is down, its health paces the probes, and this wait takes its turn.
        if watch.patient:
            self._want(watch, now if self._health.is_down else now + error_delay(watch.failures))
        again = now + max(error_delay(1), error.retry_after or 0.0 if isinstance(error, StatusError) else 0.0)
        for wait in members:
            wait.error = error
            if wait.final is look:
                self._repeat_final(wait, again, now)
            else:
                self._update(wait, now, error=error, due=max(watch.due, self._health.opens_at()))

    def _repeat_final(self, wait: Wait, again: float, now: float) -> None:
        """Repeat a final poll that failed: an error at the wrong moment must not cost an approval that came in time.

        Where that is too late, as by a long ``Retry-After``, the wait ends at once: there is nothing left to wait for.
        """
        wait.final = None
        if again < wait.deadline + FINAL_LOOK:
            self._deadlines.book(wait, again)
            self._update(wait, now, error=wait.error, due=again)
        else:
            self._update(wait, now, error=wait.error)
            self._end(wait, unknown(wait.record(now)))

    def _still_pending(
        self,
        look: Look,
        waits: list[Wait],
        now: float,
        *,
        operation: Operation | None = None,
        error: KeylessError | None = None,
    ) -> None:
        """Go on with waits whose operation is pending, or end those whose final look this was."""
        if not waits:
            return
        watch = look.watch
        watch.pending_at = look.sent_at if watch.pending_at is None else max(watch.pending_at, look.sent_at)
        going_on: list[Wait] = []
        for wait in waits:
            if wait.final is look:
                self._update(wait, now, operation=operation, error=error)
                self._end(wait, timed_out(wait.record(now)))
            elif not wait.overtime:
                going_on.append(wait)
        going_on = self._schedule_next(watch, going_on, now)
        for wait in going_on:
            self._update(wait, now, operation=operation, error=error, due=watch.due)

    def _schedule_next(self, watch: Watch, waits: list[Wait], now: float) -> list[Wait]:
        """Ask each schedule once and take the soonest delay; return the waits whose schedule answered."""
        delays: dict[int, float | Exception] = {}
        for wait in waits:
            if id(wait.schedule) not in delays:
                try:
                    delays[id(wait.schedule)] = next_delay(
                        wait.schedule, attempt_number=wait.attempt, since_start=now - watch.origin
                    )
                except KeylessError as error:
                    delays[id(wait.schedule)] = error
            wait.attempt += 1
        for wait in waits:
            delay = delays[id(wait.schedule)]
            if isinstance(delay, Exception):
                self._end(wait, copy.copy(delay))
        good = [delay for delay in delays.values() if isinstance(delay, float)]
        if good:
            self._want(watch, now + min(good))
        return [wait for wait in waits if not wait.done()]

    def _update(
        self,
        wait: Wait,
        now: float,
        *,
        operation: Operation | None = None,
        error: KeylessError | None = None,
        due: float | None = None,
    ) -> None:
        if wait.updates is None:
            return
        last = wait.deadline + FINAL_LOOK if wait.overtime else wait.deadline
        wait.updates.send_nowait(
            ApprovalUpdate(
                operation=operation,
                error=error,
                polls=wait.polls,
                elapsed=now - wait.began,
                next_poll_in=None if due is None else max(0.0, min(due, last) - now),
            )
        )


def _left(ticket: ApprovalTicket, age: float) -> float:
    """Return what a ticket has left: never more than its lifetime, also where another machine's clock is ahead."""
    return max(0.0, (ticket.expires_at - ticket.created_at).total_seconds() - age)


def _bare(error: KeylessError) -> KeylessError:
    """Strip an error of what pins frames: a wait may keep it for minutes, and their locals hold whole bodies.

    No cause either: aiohttp's have tracebacks of their own, also in attributes, and the message names them.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _own(error: KeylessError, members: Iterable[Wait]) -> KeylessError:
    """Return the error itself where one wait raises it, else a copy for each: tracebacks must not pile up on one."""
    if len(list(members)) == 1:
        return error
    return copy.copy(error)
