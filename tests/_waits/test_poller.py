"""Waits as tasks and timers: what can go wrong in the asyncio around the machine, on a clock that moves by itself.

What the rules decide is in `test_machine.py` and `tests/_rules`; the table of outcomes over HTTP in `test_outcome.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import sys
import traceback
import weakref
from datetime import UTC, datetime, timedelta
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import aiohttp
import msgspec
import pytest
from leaks import armed_timers, tasks_since
from mocked_service import URL, MockedService
from raw_server import now
from tenacity import wait_chain, wait_exponential, wait_fixed
from tenacity.wait import wait_base
from waiting import spin_until

from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ApprovalUpdate,
    AuthenticationError,
    ClientClosedError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    Operation,
    TransportError,
)
from aiokeyless._waits.machine import BATCH
from aiokeyless._waits.poller import Poller
from aiokeyless.events import PollEnded, WaitEnded

from .calls import operation

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

USER = "0123456789ABCDEF"
EVERY_SECOND = wait_fixed(1)


def polls(sandbox: Sandbox, operation_id: str | None = None) -> list[float]:
    """When the sandbox was polled."""
    return [
        record.at
        for record in sandbox.requests
        if record.method == "GET" and (operation_id is None or record.path.endswith(f"/{operation_id}"))
    ]


async def pending(client: KeylessClient, operation_id: str = "op", **options: Any) -> str:
    """Create an operation, and return its bare id once it is of some age."""
    await client.create_operation(USER, operation_id=operation_id, **options)
    return operation_id


async def settle() -> None:
    """Give callbacks that are ready their turns; no time passes."""
    for _ in range(20):
        await asyncio.sleep(0)


class TestLeakChecks:
    """The two checks that most tests of cancelling and closing end with would pass for nothing if they saw nothing."""

    async def test_they_see_a_wait_that_is_under_way(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        before = asyncio.all_tasks()
        sandbox.latency = 1
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
        await asyncio.sleep(0.5)
        (polling,) = tasks_since({*before, wait})
        assert len(armed_timers()) == 1
        await cancel([wait])
        assert polling.done()
        assert tasks_since(before) == set()
        assert armed_timers() == []

    async def test_they_do_not_count_a_server_in_the_same_loop(self, sandbox: Sandbox, client: KeylessClient) -> None:
        before = asyncio.all_tasks()
        await pending(client)
        sandbox.latency = 60
        call = asyncio.create_task(client.get_operation("op"))
        await asyncio.sleep(0.5)
        assert asyncio.all_tasks() > {*before, call}
        assert tasks_since(before) == {call}
        assert len(armed_timers()) == 1  # the deadline of the call
        await cancel([call])
        assert armed_timers() == []


class TestTickets:
    """What the poller knows of a ticket: by the loop's clock if its client made it, and by the wall clock if not."""

    async def test_the_clock_of_the_schedule_starts_at_the_creation(self, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER)
        await asyncio.sleep(10)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(asked), timeout=5)
        assert asked == pytest.approx([10, 12, 14])

    async def test_a_ticket_of_another_process_ages_by_the_wall_clock(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=60)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(asked), timeout=1)
        assert asked == [pytest.approx(60, abs=1)]

    async def test_a_ticket_of_the_future_is_as_old_as_its_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=-60)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(asked), timeout=1)
        assert asked == [pytest.approx(0, abs=0.01)]

    @pytest.mark.parametrize("how", ["resumed", "made by hand"])
    async def test_a_later_ticket_of_an_operation_has_its_own_lifetime(self, client: KeylessClient, how: str) -> None:
        await client.create_operation(USER, operation_id="op")
        await asyncio.sleep(200)
        if how == "resumed":
            ticket = await client.create_operation(USER, operation_id="op", if_exists="resume")
        else:
            ticket = ApprovalTicket.for_operation("op", user_id=USER)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert now() - start == pytest.approx(120, abs=1)

    async def test_what_was_created_is_forgotten_after_some_seconds(self, client: KeylessClient) -> None:
        for number in range(10):
            await client.create_operation(USER, operation_id=f"op{number}")
            await asyncio.sleep(1)
        assert len(client._opened.poller._created) == 6  # type: ignore[union-attr]


class TestCancellation:
    @pytest.mark.parametrize("after", [0.0, 0.2, 0.7, 3.0])
    @pytest.mark.parametrize("latency", [0.0, 0.5, 100.0])
    async def test_cancelling_a_wait_leaves_nothing_behind(
        self, sandbox: Sandbox, client: KeylessClient, after: float, latency: float
    ) -> None:
        await pending(client)
        sandbox.latency = latency
        before = asyncio.all_tasks()
        start = now()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
        await asyncio.sleep(after)
        await cancel([wait])
        assert now() - start == pytest.approx(after)
        assert tasks_since(before) == set()
        assert armed_timers() == []
        assert client.statistics.waiting == 0
        assert client.statistics.in_flight == 0

    async def test_cancelling_at_any_turn_leaves_nothing(self, sandbox: Sandbox) -> None:
        events: list[Event] = []
        async with sandbox.client(listeners=[events.append]) as client:
            await pending(client)
            before = asyncio.all_tasks()
            for turns in range(40):
                wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
                for _ in range(turns):
                    await asyncio.sleep(0)
                await cancel([wait])
                await asyncio.sleep(0)
                assert tasks_since(before) == set()
                assert armed_timers() == []
            sandbox.approve("op")
            assert (await client.wait_for_approval("op")).is_approved
        results = [event.result for event in events if isinstance(event, PollEnded)]
        assert set(results[:-1]) <= {"cut_off", "pending"}

    async def test_cancelling_all_of_many_leaves_nothing_behind(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for number in range(200):
            await pending(client, f"op{number}")
        before = asyncio.all_tasks()
        sandbox.latency = 0.3
        waits = [asyncio.create_task(client.wait_for_approval(f"op{n}", timeout=t)) for n in range(200) for t in (1, 9)]
        await asyncio.sleep(1.1)
        await cancel(waits)
        await settle()  # they leave in batches
        assert tasks_since(before) == set()
        assert armed_timers() == []
        machine = client._open().poller._machine
        assert sum(map(len, machine._dispatcher._queues)) == len(machine._deadlines) == 0

    async def test_cancelling_between_final_polls_leaves_nothing(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(429, retry_after=1))
        before = asyncio.all_tasks()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(5.5)
        await cancel([wait])
        assert tasks_since(before) == set()
        assert armed_timers() == []
        assert len(client._opened.poller._machine._deadlines) == 0  # type: ignore[union-attr]
        sandbox.requests.clear()
        await asyncio.sleep(10)
        assert sandbox.requests == []

    async def test_cancelling_a_worker_costs_no_final_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 0.5
        before = asyncio.all_tasks()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(4.5)
        sandbox.approve("op")
        await asyncio.sleep(0.75)
        (worker,) = tasks_since({*before, wait})
        await cancel([worker])
        assert (await wait).is_approved
        assert now() == pytest.approx(5.75)
        assert client.statistics.transient_failures == 0

    async def test_a_worker_that_is_cancelled_before_it_started_costs_no_final_poll(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await pending(client)
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(4.5)
        sandbox.approve("op")
        killed = kill_next_worker(monkeypatch)
        assert (await wait).is_approved
        assert killed[0].cancelled()

    async def test_cancelling_at_the_deadline_is_a_cancellation(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 3600
        wait = asyncio.create_task(client.wait_for_approval("op", timeout=5))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1)
        loop.call_at(loop.time() + 6, wait.cancel)  # the very instant at which the final poll had its time
        with pytest.raises(asyncio.CancelledError):
            await wait

    async def test_waits_do_not_inherit_the_context_of_the_first_caller(self, sandbox: Sandbox) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen: list[str] = []

        class Spy(wait_base):
            def __call__(self, retry_state: RetryCallState) -> float:
                seen.append(variable.get())
                return 1.0

        def listen(event: Event) -> None:
            if isinstance(event, WaitEnded):
                seen.append(variable.get())

        async with sandbox.client(listeners=[listen]) as client:
            await pending(client)
            variable.set("of the first")
            with pytest.raises(ApprovalTimeoutError):
                await client.wait_for_approval("op", schedule=Spy(), timeout=5)
            sandbox.latency = 60
            with pytest.raises(ApprovalUnknownError):  # which the timer ends, and no poll
                await client.wait_for_approval("op", timeout=5)
        assert seen == ["unset"] * 7


class TestOnPoll:
    async def test_updates_come_in_order_and_the_approved_last(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.5, sandbox.approve, "op")
        updates: list[ApprovalUpdate] = []
        tasks = set()

        async def on_poll(update: ApprovalUpdate) -> None:
            tasks.add(asyncio.current_task())
            updates.append(update)
            await asyncio.sleep(0)

        operation = await client.wait_for_approval("op", schedule=wait_fixed(2), on_poll=on_poll)
        assert [update.polls for update in updates] == [1, 2, 3, 4]
        assert [update.elapsed for update in updates] == pytest.approx([0, 2, 4, 6])
        assert [update.next_poll_in for update in updates] == [pytest.approx(2)] * 3 + [None]
        assert updates[-1].operation is operation
        assert all(update.operation is not None and not update.operation.is_approved for update in updates[:-1])
        assert tasks == {asyncio.current_task()}

    async def test_what_on_poll_raises_ends_the_wait(self, client: KeylessClient) -> None:
        await pending(client)
        before = asyncio.all_tasks()

        def explode(_update: ApprovalUpdate) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            await client.wait_for_approval("op", on_poll=explode)
        assert client.statistics.waiting == 0
        assert armed_timers() == []
        assert tasks_since(before) == set()

    async def test_a_stop_iteration_of_on_poll_is_reported_as_such(self, client: KeylessClient) -> None:
        await pending(client)
        with pytest.raises(RuntimeError, match="on_poll raised StopIteration") as caught:
            await client.wait_for_approval("op", on_poll=lambda _: next(iter(())))
        assert isinstance(caught.value.__cause__, StopIteration)
        assert client.statistics.waiting == 0

    @pytest.mark.parametrize("error", [StopAsyncIteration, GeneratorExit, asyncio.CancelledError])
    async def test_what_ends_tasks_is_raised_as_it_is(self, client: KeylessClient, error: type[BaseException]) -> None:
        def explode(_update: ApprovalUpdate) -> None:
            raise error

        async def explode_later(_update: ApprovalUpdate) -> None:
            await asyncio.sleep(0)
            raise error

        await pending(client)
        for on_poll in (explode, explode_later):
            with pytest.raises(error):
                await client.wait_for_approval("op", on_poll=on_poll)
        assert client.statistics.waiting == 0


class TestSchedules:
    @pytest.mark.parametrize(
        ("schedule", "expected"),
        [
            (wait_exponential(multiplier=1, max=8), [0, 1, 3, 7, 15, 20]),
            (wait_chain(wait_fixed(2), wait_fixed(9)), [0, 2, 11, 20]),
            (wait_fixed(2) + wait_fixed(4), [0, 6, 12, 18, 20]),
            (wait_fixed(10_000), [0, 20]),
        ],
        ids=["exponential", "chain", "sum", "long"],
    )
    async def test_any_strategy_of_tenacity_paces_a_wait(
        self, sandbox: Sandbox, client: KeylessClient, schedule: wait_base, expected: list[float]
    ) -> None:
        await pending(client)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=schedule, timeout=20)
        assert [at - start for at in polls(sandbox)] == pytest.approx(expected)

    async def test_the_schedule_of_the_client_is_the_default(self, sandbox: Sandbox) -> None:
        async with sandbox.client(schedule=wait_fixed(7)) as client:
            await pending(client)
            start = now()
            with pytest.raises(ApprovalTimeoutError):
                await client.wait_for_approval("op", timeout=15)
            assert polls(sandbox) == pytest.approx([start, start + 7, start + 14, start + 15])


async def test_no_task_of_a_wait_is_made_by_the_loops_task_factory(sandbox: Sandbox, client: KeylessClient) -> None:
    """It is the application's: it may raise, run tasks at once, or take no context."""

    def raising(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
        if "poller" in coro.cr_code.co_filename:  # the sandbox needs tasks too
            coro.close()
            raise ZeroDivisionError
        return asyncio.Task(coro, loop=loop, **options)

    await pending(client)  # makes the connection, with tasks of aiohttp's
    loop = asyncio.get_running_loop()
    loop.call_later(5, sandbox.approve, "op")
    loop.set_task_factory(raising)
    try:
        async with asyncio.timeout(10):
            assert (await client.wait_for_approval("op", schedule=EVERY_SECOND)).is_approved
    finally:
        loop.set_task_factory(None)


async def test_after_a_failure_a_poll_uses_a_new_connection(
    client: KeylessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    renewals: list[bool] = []

    async def poll(_transport: object, operation_id: str, is_renewal: bool) -> Operation:  # as it is called
        renewals.append(is_renewal)
        if len(renewals) == 1:
            raise TransportError("lost", method="GET", path="/")
        return operation(operation_id, approved=True)

    monkeypatch.setattr("aiokeyless._http.transport.Transport.poll", poll)
    await client.wait_for_approval("op", schedule=EVERY_SECOND)
    assert renewals == [False, True]


class OddError(BaseException):
    """Neither an exception nor a cancellation."""


@pytest.mark.parametrize(
    ("raised", "words"),
    [
        (OddError("a secret"), " got no answer (OddError at "),
        (GeneratorExit, " got no answer within 0 s"),
        (aiohttp.ClientConnectorError(Mock(), OSError(111, "refused")), " got no answer (ClientConnectorError"),
        (asyncio.CancelledError, ": the exchange was cancelled inside the session"),
    ],
)
async def test_whatever_a_session_raises_is_retried_with_the_backoff_and_keeps_no_traceback(
    mocked: MockedService, raised: BaseException | type[BaseException], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    mocked.get("/v2/operations/op", exception=raised, repeat=True)
    async with KeylessClient("key", base_url=URL) as client:
        waits = [client.wait_for_approval("op", timeout=20) for _ in range(BATCH + 1)]
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
    unknown = [outcome for outcome in outcomes if isinstance(outcome, ApprovalUnknownError)]
    assert len(unknown) == len(waits)
    for outcome in unknown:
        assert isinstance(outcome.last_error, TransportError)
        assert str(outcome.last_error).startswith(f"GET /v2/operations/op{words}")
        assert (outcome.last_error.method, outcome.last_error.path) == ("GET", "/v2/operations/op")
        assert str(outcome.last_error) in str(outcome)
        assert "secret" not in str(outcome)
        assert all(not isinstance(thing, FrameType | TracebackType) for thing in reachable(outcome.last_error))
        assert 10 < outcome.polls < 60
    # asyncio reports each worker that ends so. It does so at once, and not in a later test.
    reports = [record for record in caplog.records if record.name == "asyncio"]
    assert len(reports) == (len(mocked.sent_headers) if raised is GeneratorExit else 0)


class TestBugs:
    """What the poller or what it calls should never do hangs no wait, makes no hot loop, and is reported."""

    async def test_a_timer_that_fails_is_reported_and_fires_again(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop = asyncio.get_running_loop()
        reported: list[dict[str, Any]] = []
        loop.set_exception_handler(lambda _loop, context: reported.append(context))
        await pending(client)
        start = now()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
        await asyncio.sleep(3.5)
        with monkeypatch.context() as patch:
            patch.setattr("aiokeyless._waits.machine.Machine.expire", broken)
            await asyncio.sleep(10)
        sandbox.approve("op")
        assert (await wait).is_approved
        assert now() - start <= 14
        assert 10 <= len(reported) <= 110
        assert isinstance(reported[0]["exception"], ZeroDivisionError)

    @pytest.mark.parametrize(("name", "waits"), [("evaluate", 1), ("poll_verdict", 2), ("Machine.finish_poll", 2)])
    async def test_one_in_a_poll_ends_the_waits_that_it_concerns(
        self,
        client: KeylessClient,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
        name: str,
        waits: int,
    ) -> None:
        await pending(client)
        monkeypatch.setattr(f"aiokeyless._waits.machine.{name}", broken)
        outcomes = await asyncio.gather(*(client.wait_for_approval("op") for _ in range(waits)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * waits
        assert armed_timers() == []
        assert caplog.records == []

    async def test_what_no_exchange_should_raise_ends_the_waits(
        self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        events: list[Event] = []
        monkeypatch.setattr("aiokeyless._http.transport.Transport.poll", broken)
        async with sandbox.client(listeners=[events.append]) as client:
            with pytest.raises(ZeroDivisionError):
                await client.wait_for_approval("op")
            assert client.statistics.polls == 1
        [ended] = (event for event in events if isinstance(event, WaitEnded))
        assert (ended.error, ended.seconds) == ("ZeroDivisionError", 0.0)


def kill_next_worker(monkeypatch: pytest.MonkeyPatch) -> list[asyncio.Task[None]]:
    """Cancel the next worker before it starts; the list then contains it."""
    killed: list[asyncio.Task[None]] = []
    dispatch = Poller._dispatch

    def killing(poller: Poller, at: float) -> None:
        dispatch(poller, at)
        killed.extend(poller._workers)
        for task in killed:
            task.cancel()
        if killed:
            monkeypatch.setattr(Poller, "_dispatch", dispatch)

    monkeypatch.setattr(Poller, "_dispatch", killing)
    return killed


def broken(*_: object, **__: object) -> None:
    raise ZeroDivisionError


async def many(client: KeylessClient, **options: Any) -> list[asyncio.Task[Operation]]:
    """Start so many waits that closing the client ends them in several turns of the loop."""
    waits = [client.wait_for_approval(f"op{number}", if_missing="wait", **options) for number in range(5 * BATCH)]
    tasks = [asyncio.create_task(wait) for wait in waits]
    await asyncio.sleep(0.5)
    return tasks


async def ends(waits: list[asyncio.Task[Operation]]) -> set[type]:
    return {type(outcome) for outcome in await asyncio.gather(*waits, return_exceptions=True)}


class TestClosing:
    @pytest.mark.parametrize("latency", [0.0, 100.0])
    async def test_closing_ends_the_waits_under_way(self, sandbox: Sandbox, latency: float) -> None:
        before = asyncio.all_tasks()
        client = sandbox.client()
        sandbox.latency = latency
        waits = await many(client)
        start = now()
        await client.aclose()
        assert await ends(waits) == {ClientClosedError}
        assert now() == start
        assert armed_timers() == []
        assert tasks_since(before) == set()

    @pytest.mark.parametrize("turns", range(1, 6))
    async def test_a_cancelled_closing_goes_on_by_itself(self, sandbox: Sandbox, turns: int) -> None:
        before = asyncio.all_tasks()
        client = sandbox.client()
        sandbox.latency = 100
        waits = await many(client)
        start = now()
        closing = asyncio.create_task(client.aclose())
        for _ in range(turns):
            await asyncio.sleep(0)
        await cancel([closing])
        assert closing.cancelled()
        assert await ends(waits) == {ClientClosedError}
        assert now() == start
        await client.aclose()
        assert armed_timers() == []
        assert tasks_since(before) == set()
        assert client._opened is not None
        assert client._opened.transport._session.closed

    async def test_a_second_closing_waits_for_the_first(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        sandbox.latency = 100
        waits = await many(client)
        first = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        await client.aclose()
        assert first.done()
        assert client.statistics.waiting == client.statistics.in_flight == 0
        assert client._opened is not None
        assert client._opened.transport._session.closed
        assert await ends(waits) == {ClientClosedError}

    async def test_cancelling_all_tasks_does_not_stop_the_closing(self, sandbox: Sandbox) -> None:
        before = asyncio.all_tasks()
        client = sandbox.client()
        sandbox.latency = 100
        waits = await many(client)
        closing = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = tasks_since(before) - set(waits)
        assert closing in others
        for task in others:
            task.cancel()
        assert await ends(waits) == {ClientClosedError}
        with pytest.raises(asyncio.CancelledError):
            await closing
        await settle()
        assert tasks_since(before) == set()
        assert client._opened is not None
        assert client._opened.transport._session.closed

    async def test_each_closing_awaits_slow_exchanges(self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
        async def slow(*_: object) -> None:  # as a middleware of a borrowed session may be
            try:
                await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(1)

        client = sandbox.client()
        await pending(client)
        monkeypatch.setattr("aiokeyless._http.transport.Transport.poll", slow)
        wait = asyncio.create_task(client.wait_for_approval("op"))
        await asyncio.sleep(0.5)
        assert client._opened is not None
        first = asyncio.create_task(client._opened.poller.aclose())
        with pytest.raises(ClientClosedError, match="operation 'op'"):
            await wait
        assert now() == 0.5
        await client._opened.poller.aclose()
        await first
        assert now() == 1.5
        await client.aclose()

    async def test_closing_while_final_polls_queue_does_not_spin(self, sandbox: Sandbox) -> None:
        client = sandbox.client(max_in_flight=1)
        sandbox.latency = 1
        waits = await many(client, timeout=1)
        await asyncio.sleep(1)
        sent = client.statistics.polls
        await client.aclose()
        assert await ends(waits) == {ClientClosedError}
        assert client.statistics.polls == sent
        assert armed_timers() == []

    async def test_a_wait_that_is_cancelled_as_the_client_closes_is_cancelled(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        await pending(client)
        wait = asyncio.create_task(client.wait_for_approval("op"))
        await asyncio.sleep(0.5)
        wait.cancel()
        await client.aclose()
        with pytest.raises(asyncio.CancelledError):
            await wait


def reachable(*roots: object) -> list[object]:
    """All that is reachable from these objects, by the garbage collector's account; classes and modules left out."""
    seen: dict[int, object] = {}
    left: list[object] = list(roots)
    while left:
        thing = left.pop()
        if id(thing) not in seen and not isinstance(thing, type | ModuleType):
            seen[id(thing)] = thing
            left += gc.get_referents(thing)
    return list(seen.values())


class TestKeptErrors:
    """A wait may keep its last error for minutes, and there are a hundred thousand waits."""

    BODY = b"page " * 50_000

    @pytest.mark.parametrize("status", [200, 404, 503])
    async def test_a_kept_error_keeps_no_body(self, sandbox: Sandbox, client: KeylessClient, status: int) -> None:
        sandbox.fail_next(status, None, body=self.BODY, content_type="text/html")
        updates: list[ApprovalUpdate] = []
        wait = asyncio.create_task(client.wait_for_approval("op", if_missing="wait", on_poll=updates.append))
        await asyncio.sleep(1)
        error = updates[-1].error
        assert isinstance(error, KeylessError)
        assert (error.__traceback__, error.__context__, error.__cause__) == (None, None, None)
        assert all(not isinstance(thing, FrameType | TracebackType) for thing in reachable(error))
        assert sum(sys.getsizeof(thing) for thing in reachable(error)) < 20_000
        await cancel([wait])

    async def test_what_a_wait_raises_has_a_traceback_of_its_own(self, sandbox: Sandbox, client: KeylessClient) -> None:
        sandbox.fail_next(401, body=self.BODY)
        outcomes = await asyncio.gather(*(client.wait_for_approval("op") for _ in range(2)), return_exceptions=True)
        for error in outcomes:
            assert isinstance(error, AuthenticationError)
            frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
            assert frames[-1].f_code.co_name == "_result"
            assert all(self.BODY not in frame.f_locals.values() for frame in frames)
        assert isinstance(outcomes[0], Exception)
        assert isinstance(outcomes[1], Exception)
        assert outcomes[0].__traceback__ is not outcomes[1].__traceback__


class TestNothingGrows:
    async def test_ended_waits_are_freed(self, sandbox: Sandbox, client: KeylessClient) -> None:
        from aiokeyless._waits.state import PolledOperation

        def kept() -> list[PolledOperation]:  # each wait has one
            polled = [thing for thing in gc.get_objects() if type(thing) is PolledOperation]
            return [one for one in polled if one.operation_id.startswith("freed-")]

        for number in range(50):
            sandbox.approve(f"freed-{number}", user_id=USER)
            await client.wait_for_approval(f"freed-{number}", timeout=10_000)
        gc.collect()
        await spin_until(lambda: not kept())

    async def test_the_error_of_a_wait_keeps_no_frame(self, sandbox: Sandbox, client: KeylessClient) -> None:
        class Request:
            """What an application has in a variable while it waits."""

        async def handler() -> weakref.ref[Request]:
            request = Request()
            with contextlib.suppress(NotFoundError):
                await client.wait_for_approval("missing", timeout=10_000)
            return weakref.ref(request)

        kept = await handler()
        await spin_until(lambda: kept() is None)

    @pytest.mark.parametrize("ending", ["approved", "timed out", "failed", "held", "updates", "cancelled"])
    async def test_no_wait_leaves_garbage_behind(self, sandbox: Sandbox, client: KeylessClient, ending: str) -> None:
        """A process with very many waits would stop for it, and take more memory until it does."""

        async def wait() -> None:
            ticket = await client.create_operation(USER, expires_in=60)
            if ending == "approved":
                asyncio.get_running_loop().call_later(5, sandbox.approve, ticket.operation_id)
                await client.wait_for_approval(ticket)
            elif ending == "held":
                await client.hold_for_approval(ticket, seconds=10)
            elif ending == "cancelled":
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(10):
                        await client.wait_for_approval(ticket)
            elif ending == "failed":
                with pytest.raises(NotFoundError):
                    await client.wait_for_approval("nonesuch")
                with pytest.raises(NotFoundError):
                    await client.hold_for_approval("nonesuch", seconds=10)
            elif ending == "updates":
                with pytest.raises(ApprovalTimeoutError):
                    async for _ in client.watch_approval(ticket):
                        pass
            else:
                with pytest.raises(ApprovalTimeoutError):
                    await client.wait_for_approval(ticket)

        await wait()  # what is made once
        gc.collect()
        gc.disable()
        try:
            await wait()
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            left = [thing for thing in gc.garbage if type(thing).__module__.startswith("aiokeyless")]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()
        assert left == []

    async def test_statistics_count_what_happened(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 1
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
        await asyncio.sleep(0.5)
        assert (client.statistics.waiting, client.statistics.in_flight, client.statistics.polls) == (1, 1, 1)
        assert (client.statistics.lag, client.statistics.rate_limit) == (0, 1000)
        sandbox.approve("op")
        await wait
        assert (client.statistics.waiting, client.statistics.in_flight) == (0, 0)
        assert (client.statistics.approvals, client.statistics.timeouts) == (1, 0)

    async def test_the_pause_before_another_final_poll_is_no_lag(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(429, retry_after=1))
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(5.9)
        assert client.statistics.lag == 0
        await cancel([wait])


class Recording(wait_base):
    """Every two seconds, recording the ages that it is called with."""

    def __init__(self, ages: list[float | None]) -> None:
        self._ages = ages

    def __call__(self, retry_state: RetryCallState) -> float:
        self._ages.append(retry_state.seconds_since_start)
        return 2.0


async def _ticket_of_another_client(sandbox: Sandbox) -> ApprovalTicket:
    async with sandbox.client() as creator:
        return await creator.create_operation(USER)


def aged(ticket: ApprovalTicket, *, seconds: float) -> ApprovalTicket:
    """The same ticket, made so long ago."""
    earlier = timedelta(seconds=seconds)
    assert ticket.created_at.tzinfo is UTC
    assert isinstance(ticket.created_at, datetime)
    return msgspec.structs.replace(
        ticket, created_at=ticket.created_at - earlier, expires_at=ticket.expires_at - earlier
    )


async def cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
