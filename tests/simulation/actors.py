"""What applications do with the client: they create, wait, hold, iterate, give up, resume elsewhere and close.

An actor is data, so that a story can be told and cut down. It writes down what it was promised and what it got.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import math
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from unittest import mock

from tenacity import wait_fixed

from aiokeyless import ApprovalTicket, KeylessClient, Operation, wait_adaptive
from aiokeyless._http import transport
from aiokeyless.events import WaitEnded, WaitStarted

from .history import Known, ObservedClient, ObservedCreate, ObservedWait
from .people import NOBODY, Person
from .service import SimulatedSession
from .world import wall_clock, wall_clock_error

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator
    from datetime import datetime

    from aiokeyless._waits.state import Poll
    from aiokeyless.events import Event

    from .history import History
    from .service import Service

T = TypeVar("T")

USER = "0123456789ABCDEF"
#: The bounds of the default schedule's delays, as documented.
ADAPTIVE = (0.25, 20.0)

_Target = tuple[str | ApprovalTicket, bool]


@dataclass(frozen=True)
class Leg:
    """One wait of an actor, or one series of holds.

    Attributes:
        after: Seconds after the creation at which it starts.
        process: The number of the process that waits.
        how: By which method.
        timeout: Seconds; None: what the ticket has left, or the default.
        by_id: Whether it knows no more than the operation id.
        cancel_after: Seconds after which the caller gives up.
        every: Seconds between two polls; None: as the client's schedule says.
        hold: Seconds of each hold.
        gap: Seconds between two holds.
        handler: Seconds that `on_poll` takes.
    """

    after: float
    process: int
    how: Literal["wait", "report", "iterate", "hold", "many"] = "wait"
    timeout: float | None = None
    by_id: bool = False
    cancel_after: float = math.inf
    every: float | None = None
    hold: float = 10.0
    gap: float = 0.1
    handler: float = 0.0


@dataclass(frozen=True)
class Actor:
    """One operation, from its creation to the end of the last wait for it.

    Attributes:
        at: When it begins.
        name: Names its operation and its payload.
        process: The number of the process that creates.
        creates: Who makes the operation id: the application, the client, or the phone, which creates it by itself.
        lifetime: Seconds until the ticket expires.
        external_user_id: The application's own id of the user.
        takes_id_of: The actor whose operation id it takes.
        asks_for: The payload; by default one of its own.
        if_exists: What to do where the id is taken.
        cancel_create_after: Seconds after which the caller of the create gives up.
        person: Who is asked.
        legs: Its waits.
        is_compared: Whether its waits are to be as prompt as a loop.
    """

    at: float
    name: str
    process: int
    creates: Literal["application", "client", "phone"] = "client"
    lifetime: float = 120.0
    external_user_id: str | None = None
    takes_id_of: str | None = None
    asks_for: str | None = None
    if_exists: Literal["raise", "resume"] = "raise"
    cancel_create_after: float = math.inf
    person: Person = NOBODY
    legs: tuple[Leg, ...] = ()
    is_compared: bool = False

    @property
    def payload(self) -> str:
        """What the user is asked to approve."""
        return self.asks_for or f"Pay 40 to {self.name}"

    @property
    def operation_id(self) -> str:
        """Its operation id, unless the client makes one."""
        # The phone chooses any id; the client creates none with a slash.
        return f"{self.takes_id_of or self.name}{'/' if self.creates == 'phone' else ' '}ä?#%"


@dataclass(frozen=True)
class Process:
    """A process of the application, with one client at a time.

    Attributes:
        clock_error: Seconds by which its wall clock is ahead.
        jumps: When its wall clock is set, and by how many seconds.
        closes: When its client is closed, and replaced by a new one.
        rotates: When its key is replaced: the service refuses the one before from then on.
        lag: Seconds for which its function then returns the old one.
        has_no_key: When its function for the key raises or returns nothing.
    """

    max_in_flight: int = 64
    rate: float = 1000.0
    request_timeout: float = 10.0
    max_attempts: int = 3
    poll_cost: float = 0.3
    clock_error: float = 0.0
    jumps: tuple[tuple[float, float], ...] = ()
    closes: tuple[float, ...] = ()
    rotates: tuple[float, ...] = ()
    lag: float = 0.0
    has_no_key: tuple[tuple[float, float], ...] = ()

    def key(self, now: float) -> str:
        """Return its key at a time; the empty text if it has none."""
        if any(begins <= now < ends for begins, ends in self.has_no_key):
            return ""
        return f"key {sum(at + self.lag <= now for at in self.rotates)}"

    def accepts_until(self, key: str) -> float:
        """Return until when the service accepts a key."""
        number = int(key.removeprefix("key "))
        return self.rotates[number] if number < len(self.rotates) else math.inf

    def wall_clock_error(self, now: float) -> float:
        """Return the seconds by which its wall clock is ahead at a time."""
        return self.clock_error + sum(seconds for at, seconds in self.jumps if at <= now)


class Application:
    """One process while it runs: its client, and what is recorded of it.

    Args:
        process: What it is.
        number: Its number.
        service: The service that it uses.
    """

    client: KeylessClient

    def __init__(self, process: Process, number: int, service: Service) -> None:
        self._process = process
        self._number = number
        self._service = service
        self._generation = 0
        self.history = service.history
        self._created: dict[tuple[str, datetime], float] = {}  # by what tells the ticket from another of its operation
        self._holding: tuple[ObservedWait, _Target] | None = None  # a hold that begins in this very moment
        self._starting: ObservedWait | None = None  # a wait with a slow handler, likewise
        self._leases: dict[_Target, ObservedWait] = {}  # what is held
        self._numbers: dict[int, ObservedWait] = {}  # the same, by what the client calls them
        self.context = contextvars.copy_context()
        """Where its wall clock is the process's."""
        self.context.run(wall_clock_error.set, process.wall_clock_error)

    async def live(self, end: asyncio.Event) -> None:
        """Run clients until the end of the story, one after the other."""
        for until in (*self._process.closes, math.inf):
            self._open()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(None if until == math.inf else until):
                    await end.wait()
            await self._close()

    def _open(self) -> None:
        process = self._process
        self._generation += 1
        self.name = f"process {self._number}.{self._generation}"
        self.sessions: list[SimulatedSession] = []
        self._created, self._leases, self._numbers = {}, {}, {}
        self.client = KeylessClient(
            self._key if process.rotates or process.has_no_key else "key 0",
            base_url="https://keyless.test",
            request_timeout=process.request_timeout,
            max_attempts=process.max_attempts,
            max_in_flight=process.max_in_flight,
            max_polls_per_second=process.rate,
            schedule=wait_adaptive(poll_cost=process.poll_cost),
            listeners=[self._on_event],
        )
        with (
            mock.patch.object(transport, "_make_session", self._make_session),
            mock.patch.object(transport, "_make_untraced", lambda session, _settings: session),
        ):
            self.context.run(self.client._open)
        self.observed = self.history.clients[self.name] = ObservedClient(
            name=self.name,
            max_in_flight=process.max_in_flight,
            rate=process.rate,
            request_timeout=process.request_timeout,
            max_attempts=process.max_attempts,
            new_keys=tuple(at + process.lag for at in process.rotates),
            started_at=asyncio.get_running_loop().time(),
        )

    def _key(self) -> str:
        """Return the key, or write down that a poll gets none."""
        loop = asyncio.get_running_loop()
        key = self._process.key(loop.time())
        if not key:
            for poll in self._polls():
                self._service.refuse(self.name, poll.polled.operation_id, loop.time())
        return key

    def _make_session(self, *_settings: object, force_close: bool = False) -> SimulatedSession:
        session = SimulatedSession(
            self._service,
            self.name,
            force_close=force_close,
            accepts_until=self._process.accepts_until,
            is_polling=lambda: bool(self._polls()),
        )
        self.sessions.append(session)
        return session

    def _polls(self) -> list[Poll]:
        """Return the poll that the running task sends, if it sends one."""
        if self.client._opened is None:
            return []
        current, tasks = asyncio.current_task(), self.client._opened.poller._poll_tasks
        return [poll for poll, task in tasks.items() if task is current]

    async def _close(self) -> None:
        client, observed = self.client, self.observed
        observed.closed_at = asyncio.get_running_loop().time()
        await client.aclose()
        statistics = client.statistics
        under_way = sum(session.under_way for session in self.sessions)
        if under_way or statistics.waiting or statistics.in_flight:
            observed.leftovers.append(f"closed: {under_way} requests under way, {statistics}")

    def _note_leftovers(self, client: KeylessClient) -> None:
        """Note what is left where no wait is under way."""
        if client is not self.client:
            return
        if any(wait.ended_at == math.inf and wait.client == self.name for wait in self.history.waits):
            return
        if self.client._opened is None:
            return
        machine, statistics = self.client._opened.poller._machine, self.client.statistics
        queued = sum(map(len, machine._dispatcher._queues)), len(machine._deadlines)
        if any((statistics.waiting, statistics.in_flight, statistics.lag, *queued)):
            left = f"no wait is left: polls and deadlines queued: {queued}, {statistics}"
            self.observed.leftovers.append(left)

    # -- what actors call

    def run(self, call: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run a call in this process."""
        return asyncio.get_running_loop().create_task(call, context=self.context)

    async def create(self, actor: Actor) -> ApprovalTicket:
        """Create an actor's operation, and write down how that ended."""
        loop, history = asyncio.get_running_loop(), self.history
        own_id = None if actor.creates == "client" else actor.operation_id
        create = ObservedCreate(
            number=history.next_number(),
            client=self.name,
            operation_id=own_id,
            id_is_new=own_id is None,
            resumes=actor.if_exists == "resume",
            user_id=USER,
            payload=actor.payload,
            external_user_id=actor.external_user_id,
            started_at=loop.time(),
        )
        history.creates.append(create)
        try:
            ticket = await self.client.create_operation(
                USER.lower(),
                operation_id=own_id,
                operation_payload=actor.payload,
                external_user_id=actor.external_user_id,
                expires_in=actor.lifetime,
                if_exists=actor.if_exists,
            )
        except BaseException as error:
            create.outcome = _name(error)
            create.operation_id = getattr(error, "operation_id", None) or own_id
            create.was_sent = getattr(error, "sent", True)
            raise
        else:
            create.outcome = "reconciled" if ticket.reconciled else "created"
            create.operation_id = ticket.operation_id
            self._created[ticket.operation_id, ticket.created_at] = loop.time()
            return ticket
        finally:
            create.ended_at = loop.time()

    async def wait(self, leg: Leg, actor: Actor, target: str | ApprovalTicket) -> None:
        """Do one leg of an actor."""
        options: dict[str, Any] = {}
        if actor.creates == "phone":
            options["if_missing"] = "wait"
        if leg.every is not None:
            options["schedule"] = wait_fixed(leg.every)
        if leg.how == "hold":
            await self._hold_repeatedly(leg, actor, target, options)
            return
        if leg.timeout is not None:
            options["timeout"] = None if leg.timeout == math.inf else leg.timeout
        if leg.how == "many":
            await self._wait_for_many(leg, actor, [target, target, "nothing"], options)
            return
        wait = self._started(leg, actor, target)
        if leg.handler:
            self._starting, wait.handler = wait, leg.handler
            options["on_poll"] = lambda _: asyncio.sleep(leg.handler)
            with _observed(wait, self):
                wait.approved = (await self.client.wait_for_approval(target, **options)).to_dict()
            return
        with _observed(wait, self):
            wait.approved = (await _WAYS[leg.how](self.client, target, options)).to_dict()

    async def _hold_repeatedly(
        self, leg: Leg, actor: Actor, target: str | ApprovalTicket, options: dict[str, Any]
    ) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + (actor.lifetime if leg.timeout is None else leg.timeout)
        while loop.time() < until:
            hold = self._started(leg, actor, target, seconds=leg.hold)
            with _observed(hold, self):
                operation = await self.client.hold_for_approval(target, seconds=leg.hold, **options)
                hold.approved = None if operation is None else operation.to_dict()
            if hold.approved is not None:
                return
            await asyncio.sleep(leg.gap)

    async def _wait_for_many(
        self, leg: Leg, actor: Actor, targets: list[str | ApprovalTicket], options: dict[str, Any]
    ) -> None:
        waits = [self._started(leg, actor, target) for target in targets]
        try:
            async with aclosing(self.client.wait_for_approvals(targets, **options)) as outcomes:
                async for outcome in outcomes:
                    wait = next(w for w in waits if not w.outcome and w.operation_id == outcome.operation_id)
                    wait.outcome = "approved" if outcome.error is None else _name(outcome.error)
                    wait.approved = None if outcome.operation is None else outcome.operation.to_dict()
                    self._ended(wait)
        except BaseException as error:
            for wait in waits:
                if not wait.outcome:
                    wait.outcome = _name(error)
                    self._ended(wait)
            raise

    def _started(
        self, leg: Leg, actor: Actor, target: str | ApprovalTicket, *, seconds: float | None = None
    ) -> ObservedWait:
        """Write down a wait that starts now, or a hold of so many seconds."""
        now = asyncio.get_running_loop().time()
        wait = ObservedWait(
            number=self.history.next_number(),
            client=self.name,
            operation_id=target if isinstance(target, str) else target.operation_id,
            started_at=now,
            ticket=None,
            timeout=leg.timeout if leg.timeout is not None or not isinstance(target, str) else 120.0,
            hold=seconds,
            delays=ADAPTIVE if leg.every is None else (leg.every, leg.every),
            may_be_missing=actor.creates == "phone",
        )
        self.history.waits.append(wait)
        if isinstance(target, ApprovalTicket):
            wait.ticket = Known(
                user_id=target.user_id,
                payload=actor.payload,
                external_user_id=target.external_user_id,
                lifetime=(target.expires_at - target.created_at).total_seconds(),
            )
            created = self._created.get((target.operation_id, target.created_at))
            wait.made_here = created is not None
            by_wall_clock = max(0.0, (wall_clock() - target.created_at).total_seconds())
            wait.ages = (by_wall_clock,) if created is None else (now - created, by_wall_clock)
        self._holding = self._starting = None
        if seconds is not None:
            held = target, wait.may_be_missing
            wait.lease = self._leases.get(held)
            self._holding = wait, held
        return wait

    def _on_event(self, event: Event) -> None:
        """Write down the wait that a hold begins, and its end: it goes on between two holds.

        Likewise the end of one whose handler is slow: it returns later.
        """
        if isinstance(event, WaitStarted) and self._starting is not None:
            self._numbers[event.wait] = self._starting
            self._starting = None
        elif isinstance(event, WaitStarted) and self._holding is not None:
            hold, held = self._holding
            self._leases[held] = self._numbers[event.wait] = _observe_lease(self.history, hold)
            self._holding = None
        elif isinstance(event, WaitEnded) and event.wait in self._numbers:
            lease = self._numbers.pop(event.wait)
            lease.outcome = event.error or str(event.outcome)
            self._ended(lease)

    def _ended(self, wait: ObservedWait) -> None:
        if wait.handler and wait.ended_at < math.inf:
            wait.returned_at = asyncio.get_running_loop().time()
            return
        wait.ended_at = asyncio.get_running_loop().time()
        # A moment later: what was in flight for it is cancelled in the next turns of the loop.
        asyncio.get_running_loop().call_later(0.001, self._note_leftovers, self.client)


def _observe_lease(history: History, hold: ObservedWait) -> ObservedWait:
    """Write down the wait that a hold begins."""
    assert hold.hold is not None
    lease = replace(
        hold,
        number=history.next_number(),
        hold=None,
        lease=None,
        is_lease=True,
        timeout=math.inf if hold.ticket is None else None,
        patience=hold.hold,
    )
    hold.lease = lease
    history.waits.append(lease)
    return lease


@contextlib.contextmanager
def _observed(wait: ObservedWait, application: Application) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        wait.outcome = _name(error)
        raise
    else:
        wait.outcome = "nothing" if wait.approved is None else "approved"
    finally:
        application._ended(wait)


def _name(error: BaseException) -> str:
    return "cancelled" if isinstance(error, asyncio.CancelledError) else type(error).__name__


async def _report(client: KeylessClient, target: str | ApprovalTicket, options: dict[str, Any]) -> Operation:
    updates: list[Any] = []
    operation = await client.wait_for_approval(target, on_poll=updates.append, **options)
    assert updates[-1].operation == operation, "the approved update comes before the wait returns"
    assert [u.polls for u in updates] == sorted(u.polls for u in updates), "updates come in order"
    return operation


async def _iterate(client: KeylessClient, target: str | ApprovalTicket, options: dict[str, Any]) -> Operation:
    last: Operation | None = None
    async with aclosing(client.watch_approval(target, **options)) as updates:
        async for update in updates:
            last = update.operation
    assert last is not None, "the last update is the approved one"
    return last


async def _wait(client: KeylessClient, target: str | ApprovalTicket, options: dict[str, Any]) -> Operation:
    return await client.wait_for_approval(target, **options)


_WAYS: dict[str, Callable[[KeylessClient, str | ApprovalTicket, dict[str, Any]], Awaitable[Operation]]] = {
    "wait": _wait,
    "report": _report,
    "iterate": _iterate,
}


async def act(actor: Actor, applications: list[Application], service: Service) -> None:
    """Live the life of one actor, to the end of its last leg."""
    await asyncio.sleep(actor.at)
    creator = applications[actor.process]
    if actor.creates == "phone":
        now = asyncio.get_running_loop().time()
        service.store_by_phone(actor.operation_id, USER, actor.payload, now)
        ticket = creator.context.run(_ticket_for_phone, actor)
    else:
        task = creator.run(creator.create(actor))
        await _end(task, within=actor.cancel_create_after)
        if task.cancelled() or task.exception() is not None:
            return  # an application that could not create gives up
        ticket = task.result()
    ticket = ApprovalTicket.from_json(ticket.to_json())  # as it is kept between two processes
    await asyncio.gather(*(_do(leg, actor, applications[leg.process], ticket) for leg in actor.legs))


async def _do(leg: Leg, actor: Actor, application: Application, ticket: ApprovalTicket) -> None:
    await asyncio.sleep(leg.after)
    target = ticket.operation_id if leg.by_id else ticket
    await _end(application.run(application.wait(leg, actor, target)), within=leg.cancel_after)


def _ticket_for_phone(actor: Actor) -> ApprovalTicket:
    return ApprovalTicket.for_operation(
        actor.operation_id, user_id=USER, operation_payload=actor.payload, expires_in=actor.lifetime
    )


async def _end(task: asyncio.Task[Any], *, within: float) -> None:
    """Wait for the end of a task, and cancel it after so many seconds."""
    timer = None if within == math.inf else asyncio.get_running_loop().call_later(within, task.cancel)
    await asyncio.wait({task})
    if timer is not None:
        timer.cancel()
    if not task.cancelled():
        task.exception()  # it is written down already
