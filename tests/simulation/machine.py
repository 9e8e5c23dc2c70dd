"""Runs a story against the machine alone: a queue of events in virtual time takes the place of asyncio and HTTP.

Story, service, faults and promises are those of the whole client. The few lines here that stand for the rest of it make
creates that always succeed, lease waits to holds, and do with the machine what the poller does.
"""

from __future__ import annotations

import copy
import math
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final

from tenacity import wait_fixed

from aiokeyless import (
    ApprovalTicket,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    KeylessError,
    Operation,
    RequestTimeoutError,
    TransportError,
    wait_adaptive,
)
from aiokeyless._http.protocol import GET_OPERATION, Answer, read
from aiokeyless._http.redaction import Redaction
from aiokeyless._rules.circuit import CircuitState
from aiokeyless._waits.machine import Machine
from aiokeyless._waits.reporting import Reporter
from aiokeyless._waits.state import WAIT_SLOTS, Wait
from aiokeyless.models import Secret

from .actors import USER, leftovers, observe, observe_client, observe_lease
from .evidence import LEASE
from .faults import Request
from .history import History
from .service import Connection, Connections, Service, Stored, TooManyRequestsError
from .story import standstills
from .world import EPOCH, StuckError, Timeline, cancel, seeded

if TYPE_CHECKING:
    from aiokeyless import ApprovalUpdate
    from aiokeyless._waits.machine import BatchedResult
    from aiokeyless._waits.state import Poll, WaitResult

    from .actors import Actor, Leg, Process
    from .faults import Fate
    from .history import Exchange, ObservedWait
    from .story import Story
    from .world import Event

#: Seconds after which a connection is not kept.
MAX_AGE: Final = 60.0
#: Seconds for which a client knows by its own clock when it created an operation.
REMEMBERED: Final = 5.0
#: Seconds after a create within which no user approves.
FRESH: Final = 1.0
#: Seconds by which a deadline may be later than the end of a hold.
RESOLUTION: Final = 1e-6

_Target = str | ApprovalTicket
_REDACTION: Final = Redaction(Secret("key"))


class SimulatedWait(Wait):
    """A wait that is no future: it writes down its end at once. It may be the lease of some holds."""

    __slots__ = (*WAIT_SLOTS, "_is_cancelled", "_is_done", "_result", "_timeline", "expiry", "holders", "observed")

    def __init__(self, observed: ObservedWait, timeline: Timeline) -> None:
        self.observed = observed
        self.holders: list[Series] = []
        self.expiry: Event | None = None
        self._timeline = timeline
        self._is_done = self._is_cancelled = False

    def done(self) -> bool:
        return self._is_done

    def cancelled(self) -> bool:
        return self._is_cancelled

    def result(self) -> WaitResult:
        return self._result

    def set_result(self, result: WaitResult, /) -> None:
        assert not self._is_done, "a wait ends once"
        self._result = result
        if isinstance(result, Operation):
            self.observed.approved = result.to_dict()
            self._end("approved")
        else:
            self._end("held" if result is None else type(result).__name__)

    def cancel(self) -> None:
        """Note that its caller is gone."""
        self._is_cancelled = True
        self._end("cancelled")

    def _end(self, outcome: str) -> None:
        self._is_done = True
        self.observed.ended_at, self.observed.outcome = self._timeline.now, outcome
        for series in self.holders:
            series.end_soon()


class Updates:
    """The updates of a wait, which come in order until they are closed.

    Args:
        listening: Has it until then.
    """

    def __init__(self, listening: set[Updates]) -> None:
        self._polls = 0
        self._listening = listening
        listening.add(self)

    def send_nowait(self, item: ApprovalUpdate, /) -> None:
        assert self._polls <= item.polls, "updates come in order"
        assert self in self._listening, "no update comes after the end"
        self._polls = item.polls

    def close(self) -> None:
        self._listening.discard(self)


class Client:
    """The machine of one client, and around it what the poller does."""

    def __init__(self, process: Process, name: str, timeline: Timeline, service: Service) -> None:
        self.name = name
        self.history = service.history
        self.created: dict[tuple[str, datetime], float] = {}
        self._leases: dict[tuple[_Target, bool], SimulatedWait] = {}
        self._process = process
        self._timeline = timeline
        self._service = service
        self._observed = observe_client(self.history, process, name, timeline.now)
        self._exchanges: dict[Poll, tuple[Exchange, Event | None]] = {}
        self._connections = Connections()
        self._had_key = False
        self._decoded: dict[bytes, Operation] = {}
        self._listening: set[Updates] = set()
        self._timer: Event | None = None
        self._is_closed = False
        self._machine = Machine(
            Reporter(None, timeline.now),
            schedule=wait_adaptive(poll_cost=process.poll_cost),
            max_in_flight=process.max_in_flight,
            max_connections=math.inf,
            max_polls_per_second=process.rate,
            request_timeout=process.request_timeout,
            no_answer=lambda _, seconds: RequestTimeoutError(f"no answer in {seconds} s", method="GET", path=""),
        )

    # -- waits

    def start(self, observed: ObservedWait, leg: Leg, target: _Target) -> SimulatedWait:
        """Start a wait."""
        now, ticket = self._timeline.now, None if isinstance(target, str) else target
        if ticket is not None:
            age = now - self.created.get((ticket.operation_id, ticket.created_at), -math.inf)
            observed.made_here = age <= REMEMBERED
            if not observed.made_here:
                age = max(0.0, (_wall_clock(self._process, now) - ticket.created_at).total_seconds())
            observed.ages = (age,)
        wait = SimulatedWait(observed, self._timeline)
        self._machine.start(
            wait,
            now,
            observed.operation_id,
            ticket=ticket,
            age=observed.ages[0],
            is_fresh=observed.made_here and observed.ages[0] < FRESH,
            timeout=observed.timeout,
            schedule=None if leg.every is None else wait_fixed(leg.every),
            may_be_missing=observed.may_be_missing,
            patience=observed.patience,
            updates=Updates(self._listening) if leg.how in {"report", "iterate"} else None,
        )
        self._arm()
        return wait

    def leave(self, waits: list[SimulatedWait]) -> None:
        """End waits whose caller is gone."""
        for wait in waits:
            if not wait.done():
                wait.cancel()
                self._machine.leave(wait, self._timeline.now)
        self._arm()

    def close(self) -> None:
        """End all waits."""
        now, self._is_closed = self._timeline.now, True
        self._observed.closed_at = now
        self._leases = {}
        for wait in tuple(self._machine.waits()):
            self._machine.end(wait, ClientClosedError("the client was closed"), now)
            self._machine.leave(wait, now)
        self._arm()

    @property
    def is_idle(self) -> bool:
        """Whether no wait is under way."""
        return self._machine.is_idle

    def note_leftovers(self) -> None:
        """Note what is left if no wait is under way."""
        if self._machine.is_idle:
            self._observed.leftovers += leftovers(self._machine, self._timeline.now)
            left = len(self._exchanges), len(self._listening)
            if any(left):
                self._observed.leftovers.append(f"requests under way, and handlers that expect updates: {left}")

    # -- holds

    def hold(self, hold: ObservedWait, series: Series) -> SimulatedWait:
        """Join the wait that is held for a target, or start it."""
        key = series.target, hold.may_be_missing
        lease = self._leases.get(key)
        if lease is None:
            lease = self.start(observe_lease(self.history, hold), series.leg, series.target)
            self._leases[key] = lease
        hold.lease = lease.observed
        lease.holders.append(series)
        cancel(lease.expiry)
        return lease

    def release(self, lease: SimulatedWait, hold: ObservedWait, series: Series) -> None:
        """Let a wait go on for a while after its last hold, unless that returned its outcome."""
        key = series.target, hold.may_be_missing
        lease.holders.remove(series)
        if self._leases.get(key) is not lease:
            return
        if hold.outcome == lease.observed.outcome:
            del self._leases[key]
        elif not lease.holders:
            lease.expiry = self._timeline.at(self._timeline.now + LEASE, self._expire, key)

    def _expire(self, key: tuple[_Target, bool]) -> None:
        lease = self._leases.pop(key, None)
        if lease is not None:
            self._machine.end(lease, None, self._timeline.now)
            self._arm()

    # -- the machine

    def _arm(self) -> None:
        """Cut off what the machine wants to have cut, and set the timer."""
        now = self._timeline.now
        for poll in self._machine.take_cut():
            exchange, end = self._exchanges.pop(poll)
            cancel(end)
            exchange.ended_at, exchange.was_cut = now, True
            self._timeline.at(now, self._finish, poll, None)
        idle = self._is_closed or self._machine.is_idle
        when = math.inf if idle else max(now, self._machine.wake_at())
        if self._timer is None or self._timer[0] != when:
            cancel(self._timer)
            self._timer = None if when == math.inf else self._timeline.at(when, self._wake)
        if idle:
            self._timeline.at(now + 0.001, self.note_leftovers)

    def _wake(self) -> None:
        self._timer = None
        self._machine.expire(self._timeline.now)
        self._dispatch()

    def _dispatch(self) -> None:
        now = self._timeline.now
        while not self._is_closed and (poll := self._machine.next_poll(now)) is not None:
            self._send(poll, now)
        self._arm()

    def _send(self, poll: Poll, now: float) -> None:
        key = self._process.key(now)
        if not key:
            exchange, error = (
                self._service.refuse(self.name, poll.polled.operation_id, now),
                ConfigurationError("no key"),
            )
            error.key_was_good = self._had_key
            self._exchanges[poll] = exchange, self._timeline.at(now, self._refuse, poll, error)
            return
        self._had_key = True
        connection = Connection(now) if poll.circuit is CircuitState.OPEN else self._connections.take(now)
        exchange, request = self._service.receive(
            self.name,
            "GET",
            poll.polled.operation_id,
            now,
            is_poll=True,
            key_until=self._process.accepts_until(key),
            made_at=connection.made_at,
        )
        fate = self._service.fate(request)
        status, body = self._service.answer(request, fate, exchange.number)
        ends = now + fate.latency + (fate.pieces - 1) * fate.between_pieces
        event = None
        if ends < math.inf:
            event = self._timeline.at(ends, self._answer, poll, exchange, connection, fate, status, body)
        self._exchanges[poll] = exchange, event

    def _refuse(self, poll: Poll, error: KeylessError) -> None:
        del self._exchanges[poll]
        self._finish(poll, error)

    def _answer(  # noqa: PLR0917  # all of them belong to one answer
        self, poll: Poll, exchange: Exchange, connection: Connection, fate: Fate, status: int, body: bytes
    ) -> None:
        del self._exchanges[poll]
        exchange.ended_at = self._timeline.now
        if fate.is_refused or fate.is_lost or fate.is_truncated:
            exchange.was_refused = fate.is_refused
            answer: Operation | KeylessError = TransportError("no answer", method="GET", path="")
        else:
            exchange.status, exchange.body, exchange.retry_after = status, body, fate.retry_after
            self._keep(poll, connection, status)
            answer = self._decoded.get(body) or _decode(status, body, fate.retry_after)
            if isinstance(answer, Operation):
                self._decoded[body] = answer
        self._finish(poll, answer)

    def _keep(self, poll: Poll, connection: Connection, status: int) -> None:
        """Keep a connection, as the library's transport does."""
        is_well = poll.circuit is CircuitState.CLOSED or (poll.circuit is CircuitState.HALF_OPEN and status < 500)
        if is_well and poll.started_at < connection.made_at + MAX_AGE:
            self._connections.keep(connection, self._timeline.now)

    def _finish(self, poll: Poll, answer: Operation | KeylessError | None) -> None:
        more = self._machine.finish_poll(poll, answer, self._timeline.now)
        if more is not None:
            self._timeline.at(self._timeline.now, self._apply_more, more)
        self._dispatch()

    def _apply_more(self, rest: BatchedResult) -> None:
        if self._machine.apply_more(rest, self._timeline.now):
            self._timeline.at(self._timeline.now, self._apply_more, rest)
        self._arm()


def _decode(status: int, body: bytes, retry_after: float | None) -> Operation | KeylessError:
    headers = {} if retry_after is None else {"Retry-After": f"{retry_after:g}"}
    try:
        return read(GET_OPERATION, "", Answer(status, headers, body), _REDACTION)
    except AuthenticationError as error:
        error.key_was_replaced = True  # nothing else is refused
        return error.with_traceback(None)
    except KeylessError as error:
        return error.with_traceback(None)


class Series:
    """The holds of one leg, one after the other."""

    def __init__(self, run: _Run, leg: Leg, actor: Actor, target: _Target) -> None:
        self.leg = leg
        self.target = target
        self._run = run
        self._timeline = run.timeline
        self._actor = actor
        self._until = self._timeline.now + (actor.lifetime if leg.timeout is None else leg.timeout)
        self._lease: SimulatedWait | None = None
        self._next: Event | None = None
        self._begin()

    def _begin(self) -> None:
        now, seconds = self._timeline.now, self.leg.hold
        if now >= self._until:
            return
        self._client = client = self._run.clients[self.leg.process]
        self._hold = observe(client.history, client.name, self.leg, self._actor, self.target, now, seconds=seconds)
        self._lease = client.hold(self._hold, self)
        if self._lease.done():  # between two holds
            self.end_soon()
        elif self._lease.deadline > now + seconds + RESOLUTION:
            self._next = self._timeline.at(now + seconds, self._end)

    def end_soon(self) -> None:
        """End the hold in this moment."""
        cancel(self._next)
        self._next = self._timeline.at(self._timeline.now, self._end)

    def _end(self) -> None:
        """End the hold: with the outcome of its wait, or with nothing if that goes on."""
        assert self._lease is not None
        wait = self._lease.observed
        self._hold.approved = wait.approved
        self._leave(self._lease, wait.outcome or "nothing")
        if not wait.outcome:
            self._next = self._timeline.at(self._timeline.now + self.leg.gap, self._begin)

    def cancel(self) -> None:
        """End the series, since its caller is gone."""
        cancel(self._next)
        if self._lease is not None:
            self._leave(self._lease, "cancelled")

    def _leave(self, lease: SimulatedWait, outcome: str) -> None:
        self._lease = None
        self._hold.ended_at, self._hold.outcome = self._timeline.now, outcome
        self._client.release(lease, self._hold, self)


class _Run:
    """One story, while it runs."""

    def __init__(self, story: Story, history: History) -> None:
        self.timeline = Timeline()
        people = {actor.payload: actor.person for actor in reversed(story.actors)}
        self._story = story
        self._service = Service(story.seed, copy.deepcopy(story.faults), people, history)
        self.clients = [self._open(number, 1) for number in range(len(story.processes))]

    def run(self) -> None:
        for number, process in enumerate(self._story.processes):
            for generation, at in enumerate(process.closes, 2):
                self.timeline.at(at, self._reopen, number, generation)
        for actor in self._story.actors:
            self.timeline.at(actor.at, self._create, actor)
        for begins, ends in self._service.history.standstills:
            self.timeline.at(begins, self.timeline.stand_still, ends)
        self.timeline.run()
        if not all(client.is_idle for client in self.clients):
            raise StuckError("a wait waits for something that never happens")
        for client in self.clients:
            client.close()
        self.timeline.run()

    def _open(self, number: int, generation: int) -> Client:
        process = self._story.processes[number]
        return Client(process, f"process {number}.{generation}", self.timeline, self._service)

    def _reopen(self, number: int, generation: int) -> None:
        self.clients[number].close()
        self.clients[number] = self._open(number, generation)

    def _create(self, actor: Actor) -> None:
        """Create an operation, whatever the weather; it is the answer that takes its time."""
        now, operation_id = self.timeline.now, actor.operation_id
        if actor.creates == "phone":
            self._service.store_by_phone(operation_id, USER, actor.payload, now)
            self._begin_legs(actor)
            return
        fate = self._service.fate(Request(now, "POST", operation_id, USER, b"", ""))
        stored = self._service.operations.get(operation_id)
        if stored is None:
            new = Stored(operation_id, USER, actor.payload, actor.external_user_id, created_at=now)
            self._service.store(new)
        elif (
            actor.if_exists == "raise"
            or (stored.payload, stored.external_user_id) != (actor.payload, actor.external_user_id)
            or stored.approved_at <= now
        ):
            return
        latency = min(fate.latency, 0.5)
        if actor.cancel_create_after > latency:
            self.timeline.at(now + latency, self._begin_legs, actor)

    def _begin_legs(self, actor: Actor) -> None:
        now, creator = self.timeline.now, self.clients[actor.process]
        ticket = ApprovalTicket.for_operation(
            actor.operation_id,
            user_id=USER,
            operation_payload=actor.payload,
            external_user_id=actor.external_user_id,
            created_at=_wall_clock(self._story.processes[actor.process], now),
            expires_in=actor.lifetime,
        )
        if actor.creates != "phone":
            creator.created[ticket.operation_id, ticket.created_at] = now
        for leg in actor.legs:
            self.timeline.at(now + leg.after, self._begin_leg, leg, actor, ticket)

    def _begin_leg(self, leg: Leg, actor: Actor, ticket: ApprovalTicket) -> None:
        target: _Target = ticket.operation_id if leg.by_id else ticket
        client, now = self.clients[leg.process], self.timeline.now
        if leg.how == "hold":
            leave = Series(self, leg, actor, target).cancel
        else:
            targets = [target, target, "nothing"] if leg.how == "many" else [target]
            waits = [observe(client.history, client.name, leg, actor, each, now) for each in targets]
            started = [client.start(wait, leg, each) for wait, each in zip(waits, targets, strict=True)]
            leave = partial(client.leave, started)
        if leg.cancel_after < math.inf:
            self.timeline.at(now + leg.cancel_after, leave)


def _wall_clock(process: Process, now: float) -> datetime:
    return EPOCH + timedelta(seconds=now + process.wall_clock_error(now))


def run(story: Story) -> History:
    """Run a story to its end."""
    history = History(standstills=standstills(story))
    with seeded(story.seed):
        machines = _Run(story, history)
        try:
            machines.run()
        except (StuckError, TooManyRequestsError) as error:
            history.problems.append(f"{type(error).__name__}: {error}")
    history.ended_at = machines.timeline.now
    return history
