"""The asyncio around the machine: one timer, the tasks that carry polls, turns of the loop, closing.

The machine decides everything about waits. A worker is a task that sends one poll after another, and exits when none
may start. So ten thousand waits that are due at once cost the event loop as little as ``max_in_flight`` of them.
"""

from __future__ import annotations

import asyncio
import functools
import itertools
import math
from collections import deque
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, TypedDict

from aiokeyless._http.protocol import operation_path
from aiokeyless._rules.outcome import YOUNG
from aiokeyless._tracing import context_without_traces
from aiokeyless.errors import ClientClosedError, KeylessError, TransportError

from .explanation import Explainer
from .machine import BATCH, EXPIRED_PATIENCE, FRESH, Machine
from .reporting import Reporter
from .state import WAIT_SLOTS, Wait, WaitPhase, WaitResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tenacity.wait import wait_base

    from aiokeyless._http.transport import Transport
    from aiokeyless._listeners import Listeners
    from aiokeyless.models import Operation
    from aiokeyless.reports import ClientStatistics
    from aiokeyless.ticket import ApprovalTicket, WaitTimeout

    from .machine import BatchedResult
    from .state import Poll, Updates

#: Seconds until the timer fires again after it raised. A bug must not become a hot loop.
_AFTER_BUG: Final = 0.1


class FutureWait(asyncio.Future[WaitResult], Wait):
    """One wait, and the future that its caller awaits. It never raises, since errors are results too."""

    __slots__ = WAIT_SLOTS


class WaitOptions(TypedDict):
    """The arguments of `Poller.start`."""

    operation_id: str
    ticket: ApprovalTicket | None
    timeout: WaitTimeout
    schedule: wait_base | None
    may_be_missing: bool


class Poller:
    """The waits of one client. The arguments are those of the client."""

    def __init__(
        self,
        transport: Transport,
        *,
        schedule: wait_base,
        max_in_flight: int,
        max_polls_per_second: float | None = None,
        listeners: Listeners | None = None,
        name: str | None = None,
    ) -> None:
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        # Not the context of the first caller, whose trace and logging variables concern only its own call.
        self._context = context_without_traces()
        self._reporter = Reporter(listeners, name)
        self._machine = Machine(
            self._reporter,
            schedule=schedule,
            max_in_flight=max_in_flight,
            max_connections=transport.max_connections,
            max_polls_per_second=max_polls_per_second,
            request_timeout=transport.request_timeout,
            path_of=self._path_of,
        )
        self.explainer: Explainer = Explainer(transport)
        """Explains those waits that are to be explained."""
        self._created: dict[tuple[str, datetime], float] = {}  # by id and `created_at`: a later ticket has a later one
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = math.inf  # kept here, since uvloop's handle of a callback due at once lacks it
        self._workers: set[asyncio.Task[None]] = set()
        self._poll_tasks: dict[Poll, asyncio.Task[None]] = {}  # in which a poll can be cut off
        self._leaving: deque[FutureWait] = deque()  # their callers are gone
        self._left = 0  # waits that left in this turn of the loop; if any did, a callback is set for the next turn
        self._is_closed = False
        self._ended: asyncio.Future[None] = self._loop.create_future()  # once it is closed and no wait is left

    # -- waits

    def record_creation(self, ticket: ApprovalTicket) -> None:
        """Record, by the loop's clock, that the operation of a ticket was created just now."""
        now = self._loop.time()
        while self._created and now - self._created[oldest := next(iter(self._created))] > YOUNG:
            del self._created[oldest]
        self._created[ticket.operation_id, ticket.created_at] = now

    def start(
        self,
        operation_id: str,
        *,
        ticket: ApprovalTicket | None,
        timeout: WaitTimeout,
        schedule: wait_base | None,
        may_be_missing: bool,
        patience: float = EXPIRED_PATIENCE,
        updates: Updates | None = None,
    ) -> FutureWait:
        """Start a wait; the caller must `leave` it. The arguments are those of `Machine.start`."""
        if self._is_closed:
            raise ClientClosedError("the client is closed; wait for the operation with another one")
        now = self._loop.time()
        created = age = None
        if ticket is not None:
            created = self._created.get((ticket.operation_id, ticket.created_at))
            age = now - created if created is not None else (datetime.now(UTC) - ticket.created_at).total_seconds()
        wait = FutureWait(loop=self._loop)
        self._machine.start(
            wait,
            now,
            operation_id,
            ticket=ticket,
            age=max(0.0, age or 0.0),
            is_fresh=created is not None and now - created < FRESH,
            timeout=timeout,
            schedule=schedule,
            may_be_missing=may_be_missing,
            patience=patience,
            updates=updates,
        )
        self._arm(now)
        return wait

    def stop(self, wait: Wait) -> None:
        """End a held wait with None, since its lease has expired; harmless after it has ended."""
        now = self._loop.time()
        self._machine.end(wait, None, now)
        self._arm(now)

    def leave(self, wait: FutureWait) -> None:
        """End a wait whose caller is gone; harmless after it has ended.

        If very many leave in one turn of the loop, the first ones leave at once and the others in the next turns.
        """
        if wait.phase is WaitPhase.ENDED:
            return
        wait.cancel()
        if self._left < BATCH:
            now = self._loop.time()
            self._machine.leave(wait, now)
            self._arm(now)
        else:
            self._leaving.append(wait)
        self._left += 1
        if self._left == 1:
            self._loop.call_soon(self._leave_batch, context=self._context)

    def leave_all(self, waits: Iterable[FutureWait]) -> None:
        """End all waits of one caller, as `leave` does."""
        left = [wait for wait in waits if wait.phase is not WaitPhase.ENDED]
        for wait in left[:BATCH]:
            self.leave(wait)
        self._leaving.extend(left[BATCH:])

    def _leave_batch(self) -> None:
        """End some of the waits that are about to leave. Called once a turn, as long as any left in the last turn."""
        batch = [self._leaving.popleft() for _ in range(min(BATCH, len(self._leaving)))]
        self._left = len(batch)
        if not batch:
            return
        self._loop.call_soon(self._leave_batch, context=self._context)  # first, in case the code below raises
        now = self._loop.time()
        for wait in batch:
            wait.cancel()  # no effect on one that has ended
            self._machine.leave(wait, now)
        self._arm(now)

    def statistics(self) -> ClientStatistics:
        """Return the counts as of now."""
        return self._machine.statistics(self._loop.time())

    # -- closing

    async def aclose(self) -> None:
        """End all waits with `ClientClosedError`, and their polls.

        Once started, it completes by itself, even if the caller is cancelled. A second call waits for the first.
        """
        if not self._is_closed:
            self._is_closed = True
            self._disarm()
            self._close_batch(self._machine.waits())
        await asyncio.shield(self._ended)
        while self._workers:
            await asyncio.wait(self._workers)
        self._machine.close(self._loop.time())
        await self.explainer.aclose()

    def _close_batch(self, waits: Iterator[Wait]) -> None:
        """End some of the waits, and the rest in callbacks, which no caller can cancel."""
        batch = tuple(itertools.islice(waits, BATCH))
        if not batch:
            self._ended.set_result(None)
            return
        self._loop.call_soon(self._close_batch, waits, context=self._context)  # first, in case the code below raises
        now = self._loop.time()
        for wait in batch:
            error = ClientClosedError(
                f"the client was closed while operation {wait.polled.operation_id!r} was waited for; "
                "its outcome is unknown: wait for it again with another client"
            )
            self._machine.end(wait, error, now)
            self._machine.leave(wait, now)  # if its caller is gone
        self._cut_off()

    # -- the timer

    def _arm(self, now: float) -> None:
        """Cut off the polls that no wait needs any more, and set the timer for `wake_at` if that is sooner."""
        self._cut_off()
        if self._is_closed or self._machine.is_idle:
            self._disarm()
            return
        when = max(now, self._machine.wake_at())
        if when < self._timer_at:
            self._disarm()
            self._timer_at = when
            self._timer = self._loop.call_at(when, self._wake, context=self._context)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._timer_at = math.inf

    def _wake(self) -> None:
        self._timer = None
        self._timer_at = math.inf
        now = self._loop.time()
        again = now + _AFTER_BUG
        try:
            self._machine.expire(now)
            self._dispatch(now)
            again = now
        finally:  # the loop logs the exception; the other waits must not hang because of it
            self._arm(again)

    def _cut_off(self) -> None:
        for poll in self._machine.take_cut():
            task = self._poll_tasks.get(poll)
            if task is not None:  # a poll that has not started yet checks `is_over` when it does
                task.cancel()

    # -- polls

    def _dispatch(self, now: float) -> None:
        """Start workers for the polls that may start."""
        while not self._is_closed and (poll := self._machine.next_poll(now)) is not None:
            # Not by the loop's task factory, which belongs to the application. An eager factory would run the worker at
            # once, in a context that is entered already. That fails, and from then on asyncio finds no current task in
            # this loop. Another factory may raise, or accept no context.
            worker = asyncio.Task(self._work(poll), loop=self._loop, context=self._context)
            self._workers.add(worker)
            worker.add_done_callback(functools.partial(self._on_worker_end, poll), context=self._context)

    async def _work(self, poll: Poll | None) -> None:
        """Send one poll after another, for as long as any may start."""
        worker = asyncio.current_task(self._loop)
        assert worker is not None  # noqa: S101  # it runs this
        machine, clock, send = self._machine, self._loop.time, self._transport.poll
        while poll is not None:
            more: BatchedResult | None = None
            answer: Operation | KeylessError | None = None
            try:
                if not poll.is_over:  # else the last wait left before it started
                    self._poll_tasks[poll] = worker
                    try:
                        answer = await send(poll.polled.operation_id, poll.is_renewal)
                    except KeylessError as error:
                        answer = _strip_frames(error)
                    except asyncio.CancelledError as cancellation:
                        answer = self._after_cancellation(poll, worker, cancellation)
                    finally:
                        del self._poll_tasks[poll]
                now = clock()
                more = machine.finish_poll(poll, answer, now)
            except Exception as error:  # noqa: BLE001  # a bug: it must end the waits that it concerns, and not poll forever
                now = clock()
                machine.fail_poll(poll, error, now)
            except BaseException as error:  # this task was cancelled from outside, or a hook raised GeneratorExit
                is_failure = not isinstance(error, asyncio.CancelledError)
                self._finish(poll, machine.no_answer(poll, clock()) if is_failure else None)
                del worker  # it keeps the error, which keeps this frame: asyncio reports it when nothing keeps it
                raise
            if more is not None:
                self._loop.call_soon(self._apply_more, more, context=self._context)
            poll = None if self._is_closed else machine.next_poll(now)
            if poll is None or not machine.is_settled(self._timer_at):
                if poll is not None:
                    self._dispatch(now)
                self._arm(now)

    def _after_cancellation(
        self, poll: Poll, worker: asyncio.Task[None], cancellation: asyncio.CancelledError
    ) -> KeylessError | None:
        """Return the result of a cancelled exchange. If the worker was cancelled from outside, raise."""
        if (worker.uncancel() if poll.is_over else worker.cancelling()) > 0:
            raise cancellation
        if poll.is_over:
            return None
        # This task was not cancelled: something inside the session was, such as a task of a middleware.
        path = operation_path(poll.polled.operation_id)
        return TransportError(f"GET {path}: the exchange was cancelled inside the session", method="GET", path=path)

    def _path_of(self, operation_id: str) -> str:
        # A method: it references this poller, so a client that outlives the modules at exit is not freed after them.
        # Otherwise aiohttp's sessions print errors then.
        return operation_path(operation_id)

    def _apply_more(self, result: BatchedResult) -> None:
        """Apply a result to the next of very many waits, in callbacks, which no caller can cancel."""
        now = self._loop.time()
        if self._machine.apply_more(result, now):
            self._loop.call_soon(self._apply_more, result, context=self._context)
        self._arm(now)

    def _on_worker_end(self, first: Poll, worker: asyncio.Task[None]) -> None:
        self._workers.discard(worker)
        if worker.cancelled():  # from outside, perhaps before it started its first poll
            self._finish(first, None)

    def _finish(self, poll: Poll, answer: KeylessError | None) -> None:
        """End a poll without an answer, in a worker that ends; harmless after it has ended."""
        now = self._loop.time()
        more = self._machine.finish_poll(poll, answer, now)
        if more is not None:
            self._loop.call_soon(self._apply_more, more, context=self._context)
        self._arm(now)


def _strip_frames(error: KeylessError) -> KeylessError:
    """Strip an error of its references to frames, whose locals hold whole bodies. A wait may keep it for minutes.

    Its cause goes too, since aiohttp's exceptions have tracebacks even in attributes. The message names the cause.
    """
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error
