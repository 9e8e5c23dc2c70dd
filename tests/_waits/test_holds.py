"""Holds: leases on a wait that goes on for a while after each, so that a series of them is one wait."""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from leaks import armed_timers, tasks_since
from raw_server import now
from tenacity import wait_fixed

from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    ConfigurationError,
    KeylessClient,
    NotFoundError,
    Operation,
    OperationMismatchError,
    PermissionDeniedError,
    wait_adaptive,
)
from aiokeyless._waits.holds import LEASE
from aiokeyless.events import Event, WaitEnded, WaitOutcome, WaitStarted

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

USER = "0123456789ABCDEF"


def polls(sandbox: Sandbox, operation_id: str = "op") -> list[float]:
    return [r.at for r in sandbox.requests if r.method == "GET" and r.path.endswith(f"/{operation_id}")]


async def old_ticket(client: KeylessClient, **options: Any) -> ApprovalTicket:
    """Create an operation, and return its ticket once it is not fresh any more."""
    ticket = await client.create_operation(USER, operation_id="op", **options)
    await asyncio.sleep(1)
    return ticket


async def hold_on(
    client: KeylessClient,
    target: str | ApprovalTicket,
    *,
    pieces: int,
    seconds: float,
    gap: float = 0.0,
    **options: Any,
) -> Operation | None:
    """Hold again and again, as a browser with a long poll does."""
    for _ in range(pieces):
        operation = await client.hold_for_approval(target, seconds=seconds, **options)
        if operation is not None:
            return operation
        await asyncio.sleep(gap)
    return None


async def cut_off(holding: asyncio.Task[Any]) -> None:
    holding.cancel()
    with pytest.raises(asyncio.CancelledError):
        await holding


class TestOneHold:
    async def test_it_returns_the_approval(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        asyncio.get_running_loop().call_later(3.5, sandbox.approve, "op")
        start = now()
        operation = await client.hold_for_approval(ticket, seconds=10, schedule=wait_fixed(1))
        assert operation is not None
        assert operation.is_approved
        assert now() - start == pytest.approx(4)
        assert client.statistics.approvals == 1

    async def test_the_shortest_hold_finds_an_approval(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        sandbox.approve("op")
        assert await client.hold_for_approval(ticket, seconds=0.001) is not None

    @pytest.mark.parametrize("target", ["ticket", "id"])
    async def test_it_ends_with_none_without_a_final_poll_and_is_no_timeout(
        self, sandbox: Sandbox, client: KeylessClient, target: str
    ) -> None:
        ticket = await old_ticket(client)
        start = now()
        held = ticket if target == "ticket" else "op"
        assert await client.hold_for_approval(held, seconds=10, schedule=wait_fixed(4)) is None
        assert now() - start == pytest.approx(10)
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 8])
        await asyncio.sleep(LEASE)
        assert client.statistics.timeouts == 0
        assert client.statistics.waiting == 0

    async def test_a_bare_id_has_no_end_of_its_own(self, client: KeylessClient) -> None:
        await old_ticket(client)
        assert await client.hold_for_approval("op", seconds=500, schedule=wait_fixed(50)) is None

    @pytest.mark.parametrize(("expires_in", "seconds"), [(11, 25), (11, 10)])
    async def test_where_the_ticket_ends_it_raises_what_a_wait_raises(
        self, sandbox: Sandbox, client: KeylessClient, expires_in: float, seconds: float
    ) -> None:
        ticket = await old_ticket(client, expires_in=expires_in)
        start = now()
        with pytest.raises(ApprovalTimeoutError) as caught:
            await client.hold_for_approval(ticket, seconds=seconds, schedule=wait_fixed(4))
        assert not isinstance(caught.value, ApprovalUnknownError)
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 8, start + 10], abs=0.01)
        assert client.statistics.timeouts == 1

    async def test_an_expired_ticket_gets_one_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=0.5)
        sandbox.approve("op")
        assert await client.hold_for_approval(ticket, seconds=10) is not None
        with pytest.raises(ApprovalTimeoutError):
            await client.hold_for_approval(await client.create_operation(USER, expires_in=1e-6), seconds=10)

    async def test_many_expired_tickets_are_all_answered(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=2) as client:
            tickets = [await client.create_operation(USER, expires_in=0.5) for _ in range(40)]
            await asyncio.sleep(1)
            for ticket in tickets[::2]:
                sandbox.approve(ticket.operation_id)
            sandbox.latency = 0.5
            holds = [client.hold_for_approval(ticket, seconds=25) for ticket in tickets]
            ends = await asyncio.gather(*holds, return_exceptions=True)
        assert [type(end) for end in ends] == [Operation, ApprovalTimeoutError] * 20

    async def test_an_unanswered_expired_ticket_ends_with_it(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=0.5)
        sandbox.latency = 9
        start = now()
        with pytest.raises(ApprovalUnknownError):
            await client.hold_for_approval(ticket, seconds=5)
        assert now() - start == pytest.approx(5 + 2)

    async def test_its_end_and_that_of_its_wait_may_be_one_moment(self, client: KeylessClient) -> None:
        await old_ticket(client)
        start = now()
        holding = asyncio.create_task(client.hold_for_approval("op", seconds=1, schedule=wait_fixed(60)))
        await asyncio.sleep(0.5)
        assert client._opened is not None
        (wait,) = client._opened.poller._machine.waits()
        asyncio.get_running_loop().call_at(start + 1, client._opened.poller.stop, wait)
        assert await holding is None
        assert now() == start + 1

    async def test_it_raises_what_ends_a_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        with pytest.raises(NotFoundError):
            await client.hold_for_approval("nope", seconds=10)
        assert await client.hold_for_approval("nope", seconds=10, if_missing="wait") is None
        ticket = await old_ticket(client)
        sandbox.tamper("op", user_id="FFFF", state="approved", result=True)
        with pytest.raises(OperationMismatchError):
            await client.hold_for_approval(ticket, seconds=10)

    @pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "10", None])
    async def test_a_length_that_is_no_positive_number_is_refused(self, client: KeylessClient, seconds: Any) -> None:
        with pytest.raises(ConfigurationError, match="seconds must be") as caught:
            await client.hold_for_approval("op", seconds=seconds)
        assert caught.value.argument == "seconds"

    async def test_a_wait_of_the_same_deadline_has_a_final_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        start = now()
        ends = await asyncio.gather(
            client.hold_for_approval(ticket, seconds=10, schedule=wait_fixed(4)),
            client.wait_for_approval(ticket, timeout=10, schedule=wait_fixed(4)),
            return_exceptions=True,
        )
        assert ends[0] is None
        assert isinstance(ends[1], ApprovalTimeoutError)
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 8, start + 10])

    async def test_cancelling_it_leaves_nothing_after_the_lease(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        before = asyncio.all_tasks()
        sandbox.latency = 1
        for passed in (0, 0.5, 1.5):  # before its poll, during it, between two
            holding = asyncio.create_task(client.hold_for_approval(ticket, seconds=10, schedule=wait_fixed(3)))
            await asyncio.sleep(passed)
            start = now()
            await cut_off(holding)
            assert now() == start
            assert client.statistics.waiting == 1
            await asyncio.sleep(LEASE + 0.01)
            assert tasks_since(before) == set()
            assert armed_timers() == []
            assert client.statistics.waiting == client.statistics.in_flight == 0

    async def test_holds_of_one_target_at_once_are_one_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await old_ticket(client)
        start = now()
        asyncio.get_running_loop().call_later(LEASE + 5, sandbox.approve, "op")
        held = await asyncio.gather(
            *(client.hold_for_approval("op", seconds=seconds, schedule=wait_fixed(4)) for seconds in (1, 18, 19))
        )
        assert [operation is not None for operation in held] == [False, True, True]
        assert polls(sandbox) == pytest.approx([start + 4 * number for number in range(5)])
        assert client.statistics.approvals == 1

    async def test_holds_at_once_raise_errors_of_their_own(self, client: KeylessClient) -> None:
        holds = [client.hold_for_approval("nope", seconds=5) for _ in range(2)]
        first, second = await asyncio.gather(*holds, return_exceptions=True)
        assert type(first) is type(second) is NotFoundError
        assert first is not second

    async def test_tickets_of_one_operation_share_polls_not_ends(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        other = ApprovalTicket.for_operation("op", user_id="FFFF")
        start = now()
        held, refused = await asyncio.gather(
            client.hold_for_approval(ticket, seconds=5, schedule=wait_fixed(2)),
            client.hold_for_approval(other, seconds=5, schedule=wait_fixed(2)),
            return_exceptions=True,
        )
        assert held is None
        assert isinstance(refused, OperationMismatchError)
        assert polls(sandbox) == pytest.approx([start, start + 2, start + 4])


class TestSeries:
    @pytest.mark.parametrize(("seconds", "gap"), [(1.1, 0), (2.2, 0), (10.1, 0), (5, 0.3), (0.5, 1), (25, 2)])
    @pytest.mark.parametrize("ends", ["in time", "cancelled"])
    async def test_it_polls_as_one_wait_would(
        self, sandbox: Sandbox, client: KeylessClient, seconds: float, gap: float, ends: str
    ) -> None:
        ticket = await old_ticket(client)
        schedule = wait_fixed(3)
        start = now()
        while now() < start + 30:
            hold = client.hold_for_approval(ticket, seconds=seconds if ends == "in time" else 60, schedule=schedule)
            holding = asyncio.create_task(hold)
            await asyncio.wait([holding], timeout=seconds)
            if ends == "cancelled":
                await cut_off(holding)
            else:
                assert await holding is None
            await asyncio.sleep(gap)
        times = polls(sandbox)
        assert times[0] == pytest.approx(start)
        assert len(times) <= 1 + (now() - start) // 3  # those of one wait
        assert all(3 - 1e-3 <= later - earlier <= 3 + gap + 1e-3 for earlier, later in pairwise(times))

    async def test_the_schedule_sets_a_new_tickets_first_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER, operation_id="op")
        start = now()
        await hold_on(client, ticket, pieces=20, seconds=0.25, schedule=wait_fixed(2))
        assert polls(sandbox) == pytest.approx([start + 2, start + 4], abs=1e-3)

    async def test_the_last_hold_of_a_ticket_has_a_final_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=11)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await hold_on(client, ticket, pieces=5, seconds=4, schedule=wait_fixed(3))
        assert polls(sandbox) == pytest.approx([start, start + 3, start + 6, start + 9, start + 10], abs=0.01)

    async def test_the_schedule_of_the_first_hold_counts(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        start = now()
        assert await client.hold_for_approval(ticket, seconds=0.5, schedule=wait_fixed(5)) is None
        assert await client.hold_for_approval(ticket, seconds=10.4, schedule=wait_fixed(1)) is None
        assert polls(sandbox) == pytest.approx([start, start + 5, start + 10])

    async def test_a_wait_between_two_holds_polls_at_once(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        assert await client.hold_for_approval(ticket, seconds=1, schedule=wait_fixed(5)) is None
        sandbox.approve("op")
        start = now()
        assert (await client.wait_for_approval(ticket)).is_approved
        assert now() == pytest.approx(start)

    async def test_an_unanswered_final_poll_ends_no_other_polls(self, sandbox: Sandbox, client: KeylessClient) -> None:
        """It took the place of the ordinary poll that was due."""
        await old_ticket(client)
        schedule = wait_fixed(4)
        waiting = asyncio.create_task(client.wait_for_approval("op", timeout=4, schedule=schedule))
        holding = asyncio.create_task(client.hold_for_approval("op", seconds=7, schedule=schedule))
        await asyncio.sleep(3)
        sandbox.latency = 9
        with pytest.raises(ApprovalUnknownError):
            await waiting
        assert await holding is None
        sandbox.latency = 0
        sandbox.approve("op")
        await asyncio.sleep(1)
        assert await client.hold_for_approval("op", seconds=10, schedule=schedule) is not None

    async def test_holds_of_an_operation_that_is_polled_for_others_add_one_poll_at_their_start(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await old_ticket(client)
        start = now()
        schedule = wait_fixed(3)
        waiting = asyncio.create_task(client.wait_for_approval(ticket, timeout=20, schedule=schedule))
        await asyncio.sleep(0.1)
        holds = [hold_on(client, ticket, pieces=40, seconds=s, schedule=schedule) for s in (0.4, 0.6, 1)]
        held = await asyncio.wait_for(asyncio.gather(*holds), 100)
        assert held == [None] * 3
        await asyncio.wait([waiting])
        times = [time for time in polls(sandbox) if time < start + 19.9]
        assert times == pytest.approx([start, *(start + 0.1 + 3 * n for n in range(7))], abs=0.05)

    async def test_a_failing_operation_is_not_polled_at_the_start_of_each_hold(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("aiokeyless._waits.machine.error_delay", lambda _failures: 4.0)
        ticket = await old_ticket(client)
        sandbox.fail_next(status=500, times=2, method="GET")
        start = now()
        for _ in range(10):  # the backoff does not depend on whose schedule it is
            assert await client.hold_for_approval(ticket, seconds=1, schedule=wait_fixed(2)) is None
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 8], abs=0.01)

    async def test_polls_from_before_a_create_are_forgotten(self, sandbox: Sandbox, client: KeylessClient) -> None:
        schedule = wait_fixed(50)
        assert await client.hold_for_approval("op", seconds=1, schedule=schedule, if_missing="wait") is None
        ticket = await old_ticket(client)
        sandbox.approve("op")
        assert await client.hold_for_approval(ticket, seconds=1, schedule=schedule) is not None


class TestBetweenTwoHolds:
    """A poll that is in flight when a hold ends goes on, and so does all that it leads to."""

    @pytest.mark.parametrize("gap", [0, 0.1, 2])
    async def test_a_slower_service_is_noticed(self, sandbox: Sandbox, client: KeylessClient, gap: float) -> None:
        ticket = await old_ticket(client)
        sandbox.latency = 1.5
        asyncio.get_running_loop().call_later(5, sandbox.approve, "op")
        start = now()
        operation = await hold_on(client, ticket, pieces=30, seconds=1, gap=gap, schedule=wait_fixed(1))
        assert operation is not None
        assert now() - start <= 5 + 1.5 + 1 + 1.5 + 2 * gap

    async def test_an_approval_is_the_next_ones_without_a_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        sandbox.approve("op")
        sandbox.latency = 2
        assert await client.hold_for_approval(ticket, seconds=1) is None
        await asyncio.sleep(5)
        start = now()
        operation = await client.hold_for_approval(ticket, seconds=1)
        assert operation is not None
        assert operation.is_approved
        assert now() == start
        assert client.statistics.polls == 1
        assert client.statistics.approvals == 1
        assert client.statistics.waiting == 0

    async def test_an_outcome_between_two_holds_is_taken_once(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await old_ticket(client)
        sandbox.fail_next(status=403, method="GET")
        sandbox.latency = 1
        assert await client.hold_for_approval("op", seconds=0.5) is None
        await asyncio.sleep(5)
        with pytest.raises(PermissionDeniedError):
            await client.hold_for_approval("op", seconds=2)
        assert await client.hold_for_approval("op", seconds=2, schedule=wait_fixed(60)) is None  # it has started anew
        assert len(polls(sandbox)) == 2

    async def test_an_outcome_is_kept_as_long_as_the_lease(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await old_ticket(client)
        sandbox.fail_next(status=403, method="GET")
        sandbox.latency = 1
        assert await client.hold_for_approval("op", seconds=0.5) is None
        await asyncio.sleep(LEASE + 0.1)
        assert await client.hold_for_approval("op", seconds=2) is None

    async def test_a_hold_cancelled_at_its_end_leaves_its_outcome(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await old_ticket(client)
        sandbox.approve("op")
        sandbox.latency = 1
        start = now()
        holding = asyncio.create_task(client.hold_for_approval("op", seconds=5))
        asyncio.get_running_loop().call_at(start + 1, holding.cancel)
        await asyncio.wait([holding])
        if holding.cancelled():
            assert await client.hold_for_approval("op", seconds=5) is not None
        assert len(polls(sandbox)) == 1

    async def test_a_ticket_that_ends_then_has_its_final_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=6)
        start = now()
        assert await client.hold_for_approval(ticket, seconds=2, schedule=wait_fixed(4)) is None
        await asyncio.sleep(6)
        with pytest.raises(ApprovalTimeoutError) as caught:
            await client.hold_for_approval(ticket, seconds=2, schedule=wait_fixed(4))
        assert now() - start == pytest.approx(8)
        assert caught.value.elapsed == pytest.approx(5)
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 5])

    async def test_it_goes_on_if_its_caller_is_cancelled(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client)
        sandbox.approve("op")
        sandbox.latency = 3
        holding = asyncio.create_task(client.hold_for_approval(ticket, seconds=10))
        await asyncio.sleep(1)
        await cut_off(holding)
        assert client.statistics.in_flight == 1
        assert await client.hold_for_approval(ticket, seconds=10) is not None
        assert len(polls(sandbox)) == 1

    async def test_it_ends_with_the_lease(self, sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
        async with sandbox.client(request_timeout=600) as client:
            ticket = await old_ticket(client, expires_in=900)
            sandbox.latency = 600
            other = asyncio.create_task(client.wait_for_approval("other"))
            assert await client.hold_for_approval(ticket, seconds=1) is None
            await asyncio.sleep(LEASE - 0.1)
            assert client.statistics.in_flight == 2
            await asyncio.sleep(0.2)
            assert client.statistics.in_flight == 1
            await cut_off(other)
            assert armed_timers() == []
        assert caplog.records == []

    async def test_nothing_is_remembered_after_ten_seconds(self, sandbox: Sandbox, client: KeylessClient) -> None:
        schedule = wait_fixed(600)
        await old_ticket(client)
        assert await client.hold_for_approval("op", seconds=1, schedule=schedule) is None
        await asyncio.sleep(LEASE - 0.1)
        assert await client.hold_for_approval("op", seconds=1, schedule=schedule) is None
        assert len(polls(sandbox)) == 1
        await asyncio.sleep(LEASE + 0.1)
        assert client.statistics.waiting == 0
        assert await client.hold_for_approval("op", seconds=1, schedule=schedule) is None
        assert len(polls(sandbox)) == 2

    async def test_it_is_one_wait_to_listeners(self, sandbox: Sandbox) -> None:
        events: list[Event] = []
        async with sandbox.client(listeners=[events.append]) as client:
            ticket = await old_ticket(client, expires_in=100)
            await hold_on(client, ticket, pieces=3, seconds=5, gap=1)
            assert not [event for event in events if isinstance(event, WaitEnded)]
            await asyncio.sleep(LEASE)
            (started,) = (event for event in events if isinstance(event, WaitStarted))
            (ended,) = (event for event in events if isinstance(event, WaitEnded))
            assert started.timeout == pytest.approx(99)
            assert (ended.outcome, ended.error) == (WaitOutcome.HELD, None)
            assert ended.seconds == pytest.approx(17 + LEASE)
            assert await client.hold_for_approval("op", seconds=1) is None
        assert [event.outcome for event in events if isinstance(event, WaitEnded)][1:] == [WaitOutcome.CLOSED]

    async def test_it_ends_in_no_callers_context(self, sandbox: Sandbox) -> None:
        caller, ends = ContextVar[str | None]("caller", default=None), []

        def listen(event: Event) -> None:
            if isinstance(event, WaitEnded):
                ends.append((event.outcome, caller.get()))

        async with sandbox.client(listeners=[listen]) as client:
            await old_ticket(client)
            caller.set("ann")
            await client.hold_for_approval("op", seconds=1)
            await asyncio.sleep(LEASE)
        assert ends == [(WaitOutcome.HELD, None)]

    async def test_telemetry_is_not_asked_without_explain(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=20)
        with pytest.raises(ApprovalTimeoutError):
            await hold_on(client, ticket, pieces=30, seconds=3)
        assert not [r for r in sandbox.requests if "/authentications" in r.path]

    async def test_it_is_one_wait_to_an_explanation(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await old_ticket(client, expires_in=20)
        sandbox.fail_authentication("op", error_code=30004)
        with pytest.raises(ApprovalTimeoutError) as caught:
            await hold_on(client, ticket, pieces=30, seconds=3, explain=True)
        assert [attempt.error_code for attempt in caught.value.attempts] == [30004]
        assert len([r for r in sandbox.requests if "/authentications" in r.path]) == 1
        assert await client.hold_for_approval("op", seconds=1, explain=True) is None
        await asyncio.sleep(LEASE)
        assert client.statistics.waiting == 0
        sandbox.requests.clear()
        await asyncio.sleep(600)
        assert list(sandbox.requests) == []

    async def test_closing_the_client_ends_it_at_once(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        before = asyncio.all_tasks()
        await old_ticket(client)
        holding = asyncio.create_task(client.hold_for_approval("other", seconds=60, if_missing="wait", explain=True))
        await asyncio.sleep(1)
        assert await client.hold_for_approval("op", seconds=1, explain=True) is None
        start = now()
        await client.aclose()
        assert now() == start
        with pytest.raises(ClientClosedError):
            await holding
        assert armed_timers() == []
        assert tasks_since(before) == set()


class Observed(wait_adaptive):
    """A schedule of a poll every 3 s that keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(min_interval=3, max_interval=3)
        self.told: list[tuple[float, float | None]] = []

    def observe(self, after: float, until: float | None) -> None:
        self.told.append((after, until))


class TestLearning:
    async def test_a_series_of_holds_is_observed_as_one_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        schedule = Observed()
        ticket = await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(13, sandbox.approve, "op")
        assert await hold_on(client, ticket, pieces=9, seconds=5.5, gap=2, schedule=schedule) is not None
        assert schedule.told == [pytest.approx((12, 15), abs=0.01)]

    async def test_holds_that_end_unapproved_are_observed_as_one_wait(self, client: KeylessClient) -> None:
        schedule = Observed()
        ticket = await client.create_operation(USER, operation_id="op")
        await hold_on(client, ticket, pieces=2, seconds=5, schedule=schedule)
        await asyncio.sleep(LEASE + 0.1)
        assert schedule.told[0][0] == pytest.approx(18, abs=0.01)
        assert [until for _, until in schedule.told] == [None]
