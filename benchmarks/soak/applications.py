"""The client's process: applications that wait for users in every way that the client offers, and write down the end.

As many applications as planned run at a time. Each application creates an operation, waits for its approval by one
of the methods, writes the outcome down, and begins again: nothing is kept, so that the memory of the process is that of
the client and of the waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
import uuid
from typing import TYPE_CHECKING, Final, NamedTuple

import aiohttp
import msgspec
from yarl import URL

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    KeylessClient,
    KeylessError,
    NotJsonError,
    OperationMismatchError,
    OperationState,
    RateLimitError,
    ServerError,
    TransportError,
    wait_adaptive,
)
from aiokeyless._waits.holds import LEASE
from benchmarks.baselines import BareClient, bare_session
from benchmarks.process import loop_factory
from benchmarks.server import API_KEY, Server, allow_many_sockets

from . import growth
from .journal import Writer
from .verdicts import BY_DEFAULT, HOLD, LOOP, Ending, Outcome

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from aiokeyless import Operation

_PAYLOAD: Final = "Approve wire transfer of $500 to account "
_POLL_COST: Final = 3.0  # seconds of lateness that a poll is worth: an hour on a machine that others use too
_BATCH: Final = 10
_IN_FLIGHT: Final = 256  # polls; three processes share two cores, so an answer can take long
_ASKS_FOR: Final = 120.0  # seconds after its ticket's end for which an application asks again


class Plan(NamedTuple):
    """What the applications do."""

    applications: int  # each has one wait under way, nearly all of the time
    in_batches: float  # of them, which wait by `wait_for_approvals`
    seconds: float
    ramp: float  # seconds within which the applications begin
    expires_in: float  # seconds
    sample: float  # seconds between two samples
    uvloop: bool  # whether they run on it, or on asyncio's own event loop


class Request(NamedTuple):
    """What an application asks a user."""

    user_id: str
    payload: str
    external_user_id: str | None


class Sample(NamedTuple):
    """The client and its process at one instant."""

    held: growth.Sample
    tasks: int
    waiting: int
    polls: int


class Applications:
    """All applications of one client, which write down how their waits ended."""

    def __init__(self, client: KeylessClient, plan: Plan, outcomes: Writer, source: random.Random) -> None:
        self._client = client
        self._plan = plan
        self._outcomes = outcomes
        self._source = source
        #: How often each method is chosen, beside the others.
        self._methods = {
            self._wait: 40,
            self._request: 10,
            self._hold: 15,
            self._shared: 15,
            self._cancelled: 6,
            self._resumed: 12,
        }

    async def run(self) -> None:
        """Run all applications for the planned time, then cancel them."""
        batches = int(self._plan.applications * self._plan.in_batches / _BATCH)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._repeat(k, self._batch)) for k in range(batches)]
            tasks += [
                group.create_task(self._repeat(k, self._one)) for k in range(self._plan.applications - batches * _BATCH)
            ]
            await asyncio.sleep(self._plan.seconds)
            for task in tasks:
                task.cancel()

    async def _repeat(self, number: int, application: Callable[[Request], Awaitable[object]]) -> None:
        await asyncio.sleep(self._source.uniform(0.0, self._plan.ramp))
        while True:
            payload = f"{_PAYLOAD}{self._source.randrange(10**9)}" if self._source.random() < 0.9 else ""
            external = f"user-{number}@example.com" if self._source.random() < 0.5 else None
            await application(Request(f"{number:016X}", payload, external))

    async def _one(self, request: Request) -> None:
        (method,) = self._source.choices([*self._methods], [*self._methods.values()])
        await method(request)

    # -- the methods

    async def _wait(self, request: Request) -> None:
        if ticket := await self._create(request):
            await self._until_known("wait_for_approval", ticket, self._client.wait_for_approval(ticket))

    async def _request(self, request: Request) -> None:
        operation_id = str(uuid.uuid4())
        waiting = self._client.request_approval(
            request.user_id,
            operation_id=operation_id,
            operation_payload=request.payload,
            external_user_id=request.external_user_id,
            expires_in=self._plan.expires_in,
        )
        deadline = time.monotonic() + self._plan.expires_in  # or later: it counts from the creation
        ending = await self._outcome("request_approval", operation_id, waiting, deadline)
        if ending is Ending.NOT_CREATED:
            await asyncio.sleep(self._source.uniform(1.0, 5.0))

    async def _hold(self, request: Request) -> None:
        """Wait piece by piece; each hold has bounds of its own, and what it returns late counts from the first one."""
        ticket = await self._create(request)
        started, ending = time.monotonic(), Ending.HELD
        until = started + self._plan.expires_in + _ASKS_FOR
        while ticket and ending in {Ending.HELD, Ending.UNKNOWN} and time.monotonic() < until:
            seconds = self._source.uniform(0.02, 0.2) * self._plan.expires_in
            hold = self._client.hold_for_approval(ticket, seconds=seconds)
            ending = await self._outcome(HOLD, ticket.operation_id, hold, _deadline(ticket), started=started)

    async def _shared(self, request: Request) -> None:
        """Wait for a ticket, and for its bare id with a timeout."""
        if ticket := await self._create(request):
            timeout = self._source.uniform(0.02, 0.8) * self._plan.expires_in
            waiting = self._client.wait_for_approval(ticket.operation_id, timeout=timeout)
            short = self._outcome("an id, with a timeout", ticket.operation_id, waiting, time.monotonic() + timeout)
            long = self._until_known("shared polls", ticket, self._client.wait_for_approval(ticket))
            await asyncio.gather(short, long)

    async def _cancelled(self, request: Request) -> None:
        if ticket := await self._create(request):
            await self._leave_early(ticket)

    async def _resumed(self, request: Request) -> None:
        ticket = await self._create(request)
        if ticket and await self._leave_early(ticket):
            text = ticket.to_json()
            await asyncio.sleep(self._source.uniform(0.0, 0.3) * self._plan.expires_in)
            ticket = ApprovalTicket.from_json(text)
            await self._until_known("resumed", ticket, self._client.wait_for_approval(ticket))

    async def _batch(self, request: Request) -> None:
        """Create a number of operations, and wait for all of them by one call."""
        tickets = [ticket for _ in range(_BATCH) if (ticket := await self._create(request))]
        deadlines = {ticket.operation_id: _deadline(ticket) for ticket in tickets}
        started = time.monotonic()
        async with contextlib.aclosing(self._client.wait_for_approvals(tickets)) as outcomes:
            async for outcome in outcomes:
                told = _told("wait_for_approvals", outcome.operation_id, started, outcome.operation or outcome.error)
                self._outcomes.write(msgspec.structs.replace(told, deadline=deadlines[outcome.operation_id]))

    # -- what they share

    async def _create(self, request: Request) -> ApprovalTicket | None:
        """Create an operation, with an id that the client makes; return None where the service did not confirm it."""
        try:
            return await self._client.create_operation(
                request.user_id,
                operation_payload=request.payload,
                external_user_id=request.external_user_id,
                expires_in=self._plan.expires_in,
            )
        except KeylessError as error:
            operation_id = getattr(error, "operation_id", None) or ""
            self._outcomes.write(_told("create_operation", operation_id, time.monotonic(), error))
        await asyncio.sleep(self._source.uniform(1.0, 5.0))
        return None

    async def _leave_early(self, ticket: ApprovalTicket) -> bool:
        """Wait, but not for long; return whether the wait was cancelled."""
        patience = asyncio.timeout(self._source.uniform(0.0, 0.5) * self._plan.expires_in)
        with contextlib.suppress(TimeoutError):
            async with patience:
                await self._until_known("cancelled", ticket, self._client.wait_for_approval(ticket))
        if not patience.expired():
            return False
        now = time.monotonic()
        self._outcomes.write(Outcome(ticket.operation_id, "cancelled", Ending.CANCELLED, now, now))
        return True

    async def _until_known(self, how: str, ticket: ApprovalTicket, waiting: Awaitable[Operation | None]) -> None:
        """Wait; where the outcome is unknown, ask again, as an application must."""
        ending = await self._outcome(how, ticket.operation_id, waiting, _deadline(ticket))
        until = time.monotonic() + ticket.remaining() + _ASKS_FOR
        while ending is Ending.UNKNOWN and time.monotonic() < until:
            await asyncio.sleep(self._source.uniform(0.5, 2.0))
            again = self._client.wait_for_approval(ticket)
            ending = await self._outcome("asked again", ticket.operation_id, again, _deadline(ticket))

    async def _outcome(
        self,
        how: str,
        operation_id: str,
        waiting: Awaitable[Operation | None],
        deadline: float,
        *,
        started: float | None = None,
    ) -> Ending:
        """Wait, write down how it ended, and return that."""
        started = time.monotonic() if started is None else started
        try:
            told = _told(how, operation_id, started, await waiting)
        except Exception as error:  # noqa: BLE001  # what a wait raises is what is measured
            told = _told(how, operation_id, started, error)
        told = msgspec.structs.replace(told, deadline=deadline)
        self._outcomes.write(told)
        return told.ending


class Beside(Applications):
    """Waits of a client with its default settings, and loops of one poll a second, in equal parts."""

    def __init__(
        self, client: KeylessClient, bare: BareClient, plan: Plan, outcomes: Writer, source: random.Random
    ) -> None:
        super().__init__(client, plan, outcomes, source)
        self._bare = bare
        self._methods = {self._by_default: 1, self._loop: 1}

    async def _by_default(self, request: Request) -> None:
        if ticket := await self._create(request):
            await self._until_known(BY_DEFAULT, ticket, self._client.wait_for_approval(ticket))

    async def _loop(self, request: Request) -> None:
        """Poll as a short program does that survives every error, and believes every answer."""
        ticket = await self._create(request)
        if ticket is None:
            return
        started, deadline = time.monotonic(), _deadline(ticket)
        approved = None
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError, aiohttp.ClientError, msgspec.MsgspecError, RuntimeError):
                async with asyncio.timeout(self._client.request_timeout):
                    told = await self._bare.get_operation(ticket.operation_id)
                if told.state == OperationState.APPROVED and told.result:
                    approved = told.operation_id, told.user_id, told.operation_payload or ""
                    break
            await asyncio.sleep(1.0)
        ending, ended = Ending.APPROVED if approved else Ending.TIMED_OUT, time.monotonic()
        self._outcomes.write(Outcome(ticket.operation_id, LOOP, ending, started, ended, deadline, approved))


def _deadline(ticket: ApprovalTicket) -> float:
    """Return until when an approval must be found."""
    return time.monotonic() + max(ticket.remaining(), 0.0)


def _told(how: str, operation_id: str, started: float, result: Operation | Exception | None) -> Outcome:
    """Put what a wait returned or raised into an outcome, without its deadline."""
    now = time.monotonic()
    if isinstance(result, Exception):
        ending = _ending(result)
        detail = f"{type(result).__name__}: {result}" if ending in {Ending.FAILED, Ending.MISMATCHED} else ""
        return Outcome(operation_id, how, ending, started, now, detail=detail)
    if result is None:
        return Outcome(operation_id, how, Ending.HELD, started, now)
    approved = None
    if result.is_approved:
        approved = result.operation_id, result.user_id, result.operation_payload or ""
    return Outcome(operation_id, how, Ending.APPROVED, started, now, approved=approved)


def _ending(error: Exception) -> Ending:
    match error:
        case AlreadyApprovedError():
            return Ending.ALREADY_APPROVED
        case ApprovalUnknownError():
            return Ending.UNKNOWN
        case ApprovalTimeoutError():
            return Ending.TIMED_OUT
        case OperationMismatchError():
            return Ending.MISMATCHED
        case TransportError() | ServerError() | RateLimitError() | NotJsonError():
            return Ending.NOT_CREATED  # they must not end a wait
    return Ending.FAILED


def _sample(client: KeylessClient) -> Sample:
    now = client.statistics
    return Sample(growth.Sample.take(), len(asyncio.all_tasks()), now.waiting, now.polls)


async def _keep_sampling(client: KeylessClient, samples: Writer, every: float) -> None:
    while True:
        await asyncio.sleep(every)
        samples.write(_sample(client))


async def _run(base_url: str, plan: Plan, folder: Path) -> None:
    source = random.Random(1)  # noqa: S311  # simulated applications, not keys
    with Writer(folder / "outcomes") as outcomes, Writer(folder / "samples") as samples:
        schedule = wait_adaptive(poll_cost=_POLL_COST)
        async with KeylessClient(API_KEY, base_url=base_url, schedule=schedule, max_in_flight=_IN_FLIGHT) as client:
            measuring = asyncio.create_task(_keep_sampling(client, samples, plan.sample))
            await Applications(client, plan, outcomes, source).run()
            measuring.cancel()
            await asyncio.wait([measuring])
            await asyncio.sleep(LEASE + plan.sample)  # so long the waits of the last holds go on
            samples.write(_sample(client))


def run(base_url: str, plan: Plan, folder: Path) -> None:
    """Run the applications, and write "outcomes" and "samples"; the main function of their process."""
    logging.getLogger("aiokeyless").setLevel(logging.ERROR)  # that the service fails is what is expected here
    allow_many_sockets()
    with asyncio.Runner(loop_factory=loop_factory(uvloop=plan.uvloop)) as runner:
        runner.run(_run(base_url, plan, folder))


async def _run_beside(base_url: str, plan: Plan, folder: Path) -> None:
    source = random.Random(2)  # noqa: S311  # simulated applications, not keys
    bare = BareClient(session := bare_session(), Server(URL(base_url).port or 0))
    with Writer(folder / "outcomes") as outcomes:
        async with session, KeylessClient(API_KEY, base_url=base_url) as client:
            await Beside(client, bare, plan, outcomes, source).run()


def run_beside(base_url: str, plan: Plan, folder: Path) -> None:
    """Run what is compared with plain loops, and add to "outcomes"; the main function of their process."""
    logging.getLogger("aiokeyless").setLevel(logging.ERROR)
    asyncio.run(_run_beside(base_url, plan, folder))
