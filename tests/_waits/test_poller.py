"""The nine rules of a wait, each with its tests, on real HTTP and a clock that moves by itself."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import logging
import math
import sys
import traceback
import weakref
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from types import FrameType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec
import pytest
from leaks import armed_timers, tasks_since
from tenacity import wait_chain, wait_exponential, wait_fixed
from tenacity.wait import wait_base
from waiting import spin_until

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ApprovalUpdate,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    InconsistentOperationError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    Operation,
    OperationMismatchError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
    wait_adaptive,
)
from aiokeyless._waits.poller import Poller
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from tenacity import RetryCallState

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

USER = "0123456789ABCDEF"
EVERY_SECOND = wait_fixed(1)


def now() -> float:
    return asyncio.get_running_loop().time()


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

    async def test_they_see_a_wait_between_two_polls(self, client: KeylessClient) -> None:
        await pending(client)
        before = asyncio.all_tasks()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(10)))
        await asyncio.sleep(5)
        assert tasks_since(before) == {wait}
        assert len(armed_timers()) == 1
        await cancel([wait])

    async def test_they_do_not_count_a_server_in_the_same_loop(self, sandbox: Sandbox, client: KeylessClient) -> None:
        before = asyncio.all_tasks()
        await pending(client)
        sandbox.latency = 60
        call = asyncio.create_task(client.get_operation("op"))
        await asyncio.sleep(0.5)
        assert asyncio.all_tasks() > {*before, call}
        assert tasks_since(before) == {call}
        assert armed_timers() == []
        await cancel([call])


class TestRule1FirstPoll:
    """Rule 1 of docs/rules.md."""

    async def test_an_approval_that_is_already_there_is_found_at_once(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.approve("op")
        start = now()
        operation = await client.wait_for_approval("op")
        assert operation.is_approved
        assert now() == start
        assert client.statistics.polls == 1

    async def test_an_approval_that_is_already_there_is_found_with_a_tiny_timeout(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.latency = 0.5
        assert (await client.wait_for_approval("op", timeout=0.001)).is_approved

    async def test_a_ticket_made_just_now_is_first_polled_when_the_schedule_says(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await client.create_operation(USER)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=wait_fixed(3), timeout=7)
        assert polls(sandbox) == pytest.approx([start + 3, start + 6, start + 7])

    async def test_a_ticket_made_a_second_ago_is_polled_at_once(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER)
        await asyncio.sleep(1)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=wait_fixed(3), timeout=4)
        assert polls(sandbox) == pytest.approx([start, start + 3, start + 4])

    async def test_a_ticket_of_another_client_is_polled_at_once(self, sandbox: Sandbox, client: KeylessClient) -> None:
        async with sandbox.client() as creator:
            ticket = await creator.create_operation(USER)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=wait_fixed(3), timeout=4)
        assert polls(sandbox) == pytest.approx([start, start + 3, start + 4])

    async def test_the_clock_of_the_schedule_starts_at_the_creation(self, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER)
        await asyncio.sleep(10)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(2, asked), timeout=5)
        assert asked == pytest.approx([10, 12, 14])

    async def test_the_clock_of_the_schedule_starts_with_the_wait_for_a_bare_id(self, client: KeylessClient) -> None:
        await pending(client)
        await asyncio.sleep(10)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=Recording(2, asked), timeout=5)
        assert asked == pytest.approx([0, 2, 4])

    async def test_the_age_of_a_ticket_of_another_process_is_taken_from_the_wall_clock(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=60)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(2, asked), timeout=1)
        assert asked == [pytest.approx(60, abs=1)]

    async def test_a_ticket_from_the_future_is_as_old_as_the_wait(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=-60)
        asked: list[float | None] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=Recording(2, asked), timeout=1)
        assert asked == [pytest.approx(0, abs=0.01)]

    async def test_polls_are_served_in_the_order_in_which_they_are_due(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=1) as client:
            for name in ("a", "b", "c", "d"):
                await pending(client, name)
            sandbox.requests.clear()
            sandbox.latency = 1
            waits = [asyncio.create_task(client.wait_for_approval(n, schedule=wait_fixed(0.02))) for n in "abcd"]
            await asyncio.sleep(12.5)
            polled = [record.path[-1] for record in sandbox.requests[:12]]
            assert sorted(polled[:4]) == list("abcd")  # due at the same time
            assert polled == 3 * polled[:4]
            await cancel(waits)

    async def test_what_was_created_is_forgotten_after_some_seconds(self, client: KeylessClient) -> None:
        for number in range(10):
            await client.create_operation(USER, operation_id=f"op{number}")
            await asyncio.sleep(1)
        assert len(client._poller._created) <= 6  # type: ignore[union-attr]


class TestRule2Approved:
    """Rule 2 of docs/rules.md."""

    @pytest.mark.parametrize(
        ("change", "error"),
        [
            ({"operation_id": "other", "state": "approved", "result": True}, OperationMismatchError),
            ({"user_id": "FFFF", "state": "approved", "result": True}, OperationMismatchError),
            ({"operation_payload": "Pay 4000", "state": "approved", "result": True}, OperationMismatchError),
            ({"external_user_id": "mallory", "state": "approved", "result": True}, OperationMismatchError),
            ({"operation_id": "other"}, OperationMismatchError),
            ({"user_id": "FFFF"}, OperationMismatchError),
            ({"operation_payload": "Pay 4000"}, OperationMismatchError),
            ({"external_user_id": msgspec.UNSET}, OperationMismatchError),
            ({"state": "approved", "result": False}, InconsistentOperationError),
            ({"state": "denied"}, InconsistentOperationError),
        ],
        ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
    )
    async def test_what_is_not_the_approval_of_this_operation_raises_at_the_first_poll(
        self, sandbox: Sandbox, client: KeylessClient, change: dict[str, Any], error: type[ApprovalError]
    ) -> None:
        ticket = await client.create_operation(USER, operation_payload="Pay 40", external_user_id="alice")
        sandbox.tamper(ticket.operation_id, **change)
        with pytest.raises(error) as caught:
            await client.wait_for_approval(ticket, schedule=EVERY_SECOND)
        assert client.statistics.polls == 1
        assert client.statistics.approvals == 0
        assert caught.value.ticket == ticket
        assert caught.value.operation_id == ticket.operation_id
        assert caught.value.last_operation is not None
        assert caught.value.polls == 1
        assert "Pay" not in str(caught.value)

    async def test_an_answer_about_another_operation_raises_for_a_bare_id_too(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.tamper("op", operation_id="other", state="approved", result=True)
        with pytest.raises(OperationMismatchError):
            await client.wait_for_approval("op")

    async def test_a_user_id_in_lower_case_is_the_same_user(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await client.create_operation("abcdef")
        sandbox.tamper(ticket.operation_id, user_id="abcdef", state="approved", result=True)
        assert (await client.wait_for_approval(ticket)).is_approved

    async def test_a_mismatch_ends_only_the_wait_whose_ticket_shows_it(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await client.create_operation(USER, operation_id="op", operation_payload="Pay 40")
        sandbox.approve("op")
        sandbox.tamper("op", operation_payload="Pay 4000", state="approved", result=True)
        by_ticket, by_id = await asyncio.gather(
            client.wait_for_approval(ticket), client.wait_for_approval("op"), return_exceptions=True
        )
        assert isinstance(by_ticket, OperationMismatchError)
        assert isinstance(by_id, Operation)


class TestRule3OneBudget:
    """Rule 3 of docs/rules.md."""

    async def test_a_final_poll_starts_exactly_at_the_deadline(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        start = now()
        with pytest.raises(ApprovalTimeoutError) as caught:
            await client.wait_for_approval("op", schedule=wait_fixed(4), timeout=10)
        assert polls(sandbox) == pytest.approx([start, start + 4, start + 8, start + 10])
        assert not isinstance(caught.value, ApprovalUnknownError)
        assert caught.value.polls == 4
        assert caught.value.elapsed == pytest.approx(10)
        assert caught.value.last_operation is not None
        assert caught.value.last_operation.state == "pending"
        assert caught.value.ticket is None
        assert client.statistics.timeouts == 1

    async def test_a_hanging_server_does_not_hang_the_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 3600
        start = now()
        with pytest.raises(ApprovalUnknownError) as caught:
            await client.wait_for_approval("op", timeout=5)
        assert now() - start == pytest.approx(7)
        assert isinstance(caught.value.last_error, RequestTimeoutError)
        assert isinstance(caught.value, ApprovalTimeoutError | TimeoutError)
        assert polls(sandbox) == pytest.approx([start, start + 5])  # the first was cut for the final one

    async def test_a_final_poll_is_cut_after_the_request_timeout_and_repeated(self, sandbox: Sandbox) -> None:
        async with sandbox.client(request_timeout=0.5) as client:
            await pending(client)
            start = now()
            asyncio.get_running_loop().call_at(start + 4.9, setattr, sandbox, "latency", 3600)
            asyncio.get_running_loop().call_at(start + 5.4, setattr, sandbox, "latency", 0)
            asyncio.get_running_loop().call_at(start + 4.9, sandbox.approve, "op")
            assert (await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5)).is_approved
            assert 5.5 < now() - start <= 6.0 + 1e-6
            assert polls(sandbox)[1] == pytest.approx(start + 5)

    async def test_final_polls_that_hang_end_two_seconds_after_the_deadline(self, sandbox: Sandbox) -> None:
        async with sandbox.client(request_timeout=0.5) as client:
            await pending(client)
            sandbox.latency = 3600
            start = now()
            with pytest.raises(ApprovalUnknownError) as caught:
                await client.wait_for_approval("op", timeout=5)
            assert 6.5 - 1e-6 <= now() - start <= 7 + 1e-6
            assert isinstance(caught.value.last_error, RequestTimeoutError)

    async def test_a_slow_answer_to_the_final_poll_counts(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.latency = 1.9
        start = now()
        assert (await client.wait_for_approval("op", timeout=0.5)).is_approved
        assert now() - start == pytest.approx(2.4)

    async def test_a_poll_that_hangs_is_cut_after_the_request_timeout_and_repeated(self, sandbox: Sandbox) -> None:
        async with sandbox.client(request_timeout=3.0) as client:
            await pending(client)
            sandbox.latency = 3600
            start = now()
            asyncio.get_running_loop().call_later(2, setattr, sandbox, "latency", 0)
            asyncio.get_running_loop().call_later(2, sandbox.approve, "op")
            assert (await client.wait_for_approval("op")).is_approved
            assert 3 <= now() - start <= 3.5  # the backoff starts within half a second
            assert client.statistics.transient_failures == 1

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
    async def test_a_transient_failure_at_the_deadline_never_costs_an_approval_that_came_in_time(
        self, sandbox: Sandbox, client: KeylessClient, status: int
    ) -> None:
        await pending(client)
        start = now()
        asyncio.get_running_loop().call_at(start + 4.9, sandbox.approve, "op")
        asyncio.get_running_loop().call_at(start + 4.9, sandbox.fail_next, status, 2)
        updates: list[ApprovalUpdate] = []
        operation = await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5, on_poll=updates.append)
        assert operation.is_approved
        assert now() - start <= 6
        assert [update.polls for update in updates] == [1, 2, 3, 4]
        assert all(0 < (update.next_poll_in or 0) <= 0.5 for update in updates[1:3])
        assert len(polls(sandbox)) == 4

    async def test_a_slow_repeat_is_cut_two_seconds_after_the_deadline(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, sandbox.fail_next, 503)
        asyncio.get_running_loop().call_later(5.01, setattr, sandbox, "latency", 3600)
        start = now()
        with pytest.raises(ApprovalUnknownError) as caught:
            await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5)
        assert now() - start == pytest.approx(7)
        assert isinstance(caught.value.last_error, RequestTimeoutError)

    @pytest.mark.parametrize("status", [408, 425, 500, 502, 504])
    async def test_a_retry_after_on_another_status_costs_no_approval_that_came_in_time(
        self, sandbox: Sandbox, client: KeylessClient, status: int
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, sandbox.approve, "op")
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(status, retry_after=30))
        assert (await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5)).is_approved

    async def test_waits_of_one_operation_share_the_repeated_final_polls(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, sandbox.fail_next, 503, 2)
        asyncio.get_running_loop().call_later(4.9, sandbox.approve, "op")
        waits = [client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5) for _ in range(300)]
        assert all(operation.is_approved for operation in await asyncio.gather(*waits))
        assert len(polls(sandbox)) == 4

    async def test_deadlines_that_follow_each_other_share_the_repeated_final_polls(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, sandbox.fail_next, 503, None)
        start = now()
        outcomes = await asyncio.gather(
            *(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5 + n / 100) for n in range(100)),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} == {ApprovalUnknownError}
        assert now() - start <= 8
        assert len(polls(sandbox)) <= 1 + 100 + 30

    async def test_a_wait_that_leaves_between_final_polls_takes_nothing_from_the_others(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(429, retry_after=1))
        asyncio.get_running_loop().call_later(4.9, sandbox.approve, "op")
        before = asyncio.all_tasks()
        first, second = (
            asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5)) for _ in range(2)
        )
        await asyncio.sleep(5.5)
        await cancel([first])
        assert (await second).is_approved
        assert tasks_since(before) == set()
        assert armed_timers() == []

    async def test_cancelling_between_final_polls_leaves_nothing_behind(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(429, retry_after=1))
        before = asyncio.all_tasks()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(5.5)
        await cancel([wait])
        assert tasks_since(before) == set()
        assert armed_timers() == []
        assert len(client._poller._machine._deadlines) == 0  # type: ignore[union-attr]
        sandbox.requests.clear()
        await asyncio.sleep(10)
        assert sandbox.requests == []

    async def test_an_ordinary_poll_that_hangs_as_the_repeat_ends_with_the_two_seconds(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        start = now()
        before_deadline = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(5.01), timeout=60))
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(504))
        asyncio.get_running_loop().call_later(5.005, setattr, sandbox, "latency", 3600)
        with pytest.raises(ApprovalUnknownError):
            await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5)
        assert now() - start == pytest.approx(7)
        await cancel([before_deadline])

    async def test_cancelling_a_worker_from_outside_costs_no_final_poll(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
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

    async def test_too_many_waits_do_not_make_one_last_longer(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=2) as client:
            for number in range(20):
                await pending(client, f"op{number}")
            sandbox.latency = 0.9
            start = now()
            outcomes = await asyncio.gather(
                *(client.wait_for_approval(f"op{number}", timeout=0.5) for number in range(20)), return_exceptions=True
            )
            assert now() - start <= 2.5 + 1e-6
            kinds = [type(outcome) for outcome in outcomes]
            assert kinds.count(ApprovalTimeoutError) == 16  # four times two at a time, twice in two seconds
            assert kinds.count(ApprovalUnknownError) == 4

    async def test_final_polls_come_before_ordinary_ones(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=1) as client:
            for name in ("a", "b", "late"):
                await pending(client, name)
            sandbox.latency = 0.9
            busy = [asyncio.create_task(client.wait_for_approval(n, schedule=wait_fixed(0.02))) for n in "ab"]
            await asyncio.sleep(0)
            with pytest.raises(ApprovalTimeoutError) as caught:
                await client.wait_for_approval("late", timeout=2)
            assert not isinstance(caught.value, ApprovalUnknownError)
            await cancel(busy)

    async def test_a_shared_poll_is_not_cut_for_the_deadline_of_one(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.latency = 3
        start = now()
        before_deadline = asyncio.create_task(client.wait_for_approval("op", timeout=60))
        with pytest.raises(ApprovalUnknownError):
            await client.wait_for_approval("op", timeout=0.5)
        assert now() - start == pytest.approx(2.5)
        assert polls(sandbox) == pytest.approx([start, start + 0.5])  # the final poll was a request of its own
        sandbox.approve("op")
        await before_deadline
        assert sandbox.requests[1].status == 200  # and the shared one was answered

    async def test_a_final_poll_also_counts_for_waits_that_go_on(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.tamper("op", state="pending", result=False)
        start = now()
        before_deadline = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(8), timeout=60))
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=wait_fixed(8), timeout=5)
        sandbox.tamper("op")
        assert (await before_deadline).is_approved
        assert polls(sandbox) == pytest.approx([start, start + 5, start + 8])

    async def test_deadlines_one_after_the_other_get_a_poll_each(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 1.5
        start = now()
        outcomes = await asyncio.gather(
            *(client.wait_for_approval("op", timeout=10 + delay, schedule=wait_fixed(50)) for delay in (0, 0.5, 1)),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} == {ApprovalTimeoutError}
        assert now() - start == pytest.approx(12.5)
        assert polls(sandbox)[-3:] == pytest.approx([start + 10, start + 10.5, start + 11])

    async def test_the_default_budget_of_a_ticket_is_what_is_left_until_it_expires(self, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER, expires_in=30)
        start = now()
        await asyncio.sleep(20)
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert now() - start == pytest.approx(30)

    async def test_the_default_budget_of_a_ticket_of_another_process_comes_from_the_wall_clock(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=90)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert now() - start == pytest.approx(30, abs=1)

    async def test_a_ticket_of_a_machine_whose_clock_is_ahead_has_no_more_than_its_lifetime_left(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=-3600)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert now() - start == pytest.approx(120)

    @pytest.mark.parametrize("how", ["resumed", "made by hand"])
    async def test_a_later_ticket_of_an_operation_that_this_client_created_has_its_own_lifetime(
        self, client: KeylessClient, how: str
    ) -> None:
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

    async def test_a_ticket_that_expired_before_it_was_created_has_nothing_left(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await _ticket_of_another_client(sandbox)
        ticket = msgspec.structs.replace(ticket, created_at=ticket.expires_at, expires_at=ticket.created_at)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert now() == start

    async def test_an_expired_ticket_gets_one_poll_the_final_one(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=500)
        start = now()
        with pytest.raises(ApprovalTimeoutError) as caught:
            await client.wait_for_approval(ticket)
        assert now() == start
        assert caught.value.polls == len(polls(sandbox)) == 1
        sandbox.approve(ticket.operation_id)
        assert (await client.wait_for_approval(ticket)).is_approved

    async def test_the_poll_of_an_expired_ticket_may_take_the_request_timeout(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=500)
        sandbox.approve(ticket.operation_id)
        sandbox.latency = 5
        assert (await client.wait_for_approval(ticket)).is_approved

    async def test_the_poll_of_an_expired_ticket_is_repeated_for_two_seconds_where_it_fails(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = aged(await _ticket_of_another_client(sandbox), seconds=500)
        sandbox.approve(ticket.operation_id)
        sandbox.fail_next(503)
        assert (await client.wait_for_approval(ticket)).is_approved
        sandbox.fail_next(503, times=None)
        failed_at: list[float] = []  # the two seconds begin with the first failure, which takes a real exchange
        with pytest.raises(ApprovalUnknownError):
            await client.wait_for_approval(ticket, on_poll=lambda _update: failed_at.append(now()))
        assert now() - failed_at[0] <= 2

    async def test_the_default_budget_of_an_id_is_two_minutes(self, client: KeylessClient) -> None:
        await pending(client)
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op")
        assert now() - start == pytest.approx(120)

    @pytest.mark.parametrize("timeout", [None, math.inf])
    async def test_no_budget_has_no_end(self, sandbox: Sandbox, client: KeylessClient, timeout: float | None) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(10_000, sandbox.approve, "op")
        assert (await client.wait_for_approval("op", timeout=timeout, schedule=wait_fixed(1_000))).is_approved


class TestRule4TransientFailures:
    """Rule 4 of docs/rules.md."""

    @pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
    async def test_one_transient_failure_never_costs_an_approval(
        self, sandbox: Sandbox, client: KeylessClient, status: int
    ) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.fail_next(status)
        start = now()
        assert (await client.wait_for_approval("op")).is_approved
        assert now() - start <= 0.5
        assert client.statistics.transient_failures == 1

    async def test_a_minute_of_503_never_costs_an_approval(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.fail_next(503, times=None)
        asyncio.get_running_loop().call_later(30, sandbox.approve, "op")
        asyncio.get_running_loop().call_later(60, sandbox.recover)
        start = now()
        assert (await client.wait_for_approval("op")).is_approved
        assert now() - start <= 91
        assert len(polls(sandbox)) <= 40

    async def test_failures_have_a_pace_of_their_own(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.fail_next(503, times=4)
        start = now()
        updates: list[ApprovalUpdate] = []
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=wait_fixed(100), timeout=30, on_poll=updates.append)
        gaps = [b - a for a, b in pairwise(polls(sandbox))]
        assert all(gap <= most for gap, most in zip(gaps[:4], (0.5, 1, 2, 4), strict=True))
        assert [isinstance(update.error, ServerError) for update in updates] == [True] * 4 + [False] * 2
        assert all(u.next_poll_in is not None and u.next_poll_in <= 4 for u in updates[:4])
        assert polls(sandbox)[-1] == pytest.approx(start + 30)

    async def test_an_open_circuit_probes_at_the_same_rate_for_any_number_of_waits(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        sandbox.latency = 0.05
        for number in range(1000):
            sandbox.approve(f"op{number}", user_id=USER)
        sandbox.fail_next(503, times=None)
        start = now()
        asyncio.get_running_loop().call_later(60, sandbox.recover)
        outcomes = await asyncio.gather(*(client.wait_for_approval(f"op{number}") for number in range(1000)))
        assert all(operation.is_approved for operation in outcomes)
        during = [at for at in polls(sandbox) if at - start < 60]
        assert len(during) <= 64 + 40  # what was in flight when it opened, then probes
        assert len(polls(sandbox)) == len(during) + 1000
        assert now() - start <= 60 + 30 + 10

    async def test_probes_go_one_at_a_time(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for number in range(20):
            await pending(client, f"op{number}")
        sandbox.fail_next(503, times=None)
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(20)]
        await asyncio.sleep(1)
        sandbox.latency = 3600  # now it hangs, and each probe gives way to the next one after a second
        sandbox.requests.clear()
        await asyncio.sleep(40)
        hanging = [record for record in sandbox.requests if record.status is None]
        assert 7 <= len(hanging) <= 16
        gaps = [b - a for a, b in pairwise(polls(sandbox))]
        assert all(gap >= 1 for gap in gaps)
        assert all(gap >= 2.5 for gap in gaps[4:])
        await cancel(waits)

    async def test_a_single_wait_after_an_outage_closes_the_circuit_within_two_minutes(
        self, sandbox: Sandbox, client: KeylessClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, "aiokeyless")
        for number in range(6):
            await pending(client, f"op{number}")
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}", timeout=None)) for number in range(6)]
        await asyncio.sleep(10)
        sandbox.fail_next(503, times=None)
        await asyncio.sleep(60)
        assert client.statistics.circuit == "open"
        sandbox.recover()
        await cancel(waits[1:])
        await asyncio.sleep(120)
        assert client.statistics.circuit == "closed"
        assert "Keyless answers again" in caplog.text
        await cancel(waits[:1])

    async def test_polls_that_hang_since_before_an_outage_keep_no_others_from_starting(self, sandbox: Sandbox) -> None:
        async with sandbox.client(request_timeout=120, schedule=wait_fixed(2)) as client:
            for number in range(62):
                await pending(client, f"op{number}")
            waits = [asyncio.create_task(client.wait_for_approval(f"op{number}", timeout=None)) for number in range(6)]
            await asyncio.sleep(1)
            sandbox.latency = 3600
            waits += [asyncio.create_task(client.wait_for_approval(f"op{n}", timeout=None)) for n in range(6, 62)]
            await asyncio.sleep(0.5)
            sandbox.latency = 0
            sandbox.fail_next(503, times=None)
            await asyncio.sleep(20)
            assert (client.statistics.circuit, client.statistics.in_flight) == ("open", 56)
            sandbox.recover()
            await cancel(waits[1:6])
            sandbox.requests.clear()
            await asyncio.sleep(90)
            assert len(polls(sandbox, "op0")) >= 30  # 16 where it stops with the circuit closed
            assert client.statistics.in_flight == 56
            await cancel([waits[0], *waits[6:]])

    async def test_callers_that_give_up_while_the_service_hangs_do_not_make_probes_more_frequent(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        for number in range(20):
            await pending(client, f"op{number}")
        sandbox.fail_next(503, times=None)
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(10)]
        await asyncio.sleep(20)
        sandbox.recover()
        sandbox.latency = 3600  # now it hangs
        start = now()
        for number in range(10, 130):
            waits.append(asyncio.create_task(client.wait_for_approval(f"op{number % 20}")))
            await asyncio.sleep(0.5)
            await cancel([waits.pop(0)])
        probes = [at for at in polls(sandbox) if start < at < start + 60]
        assert 10 <= len(probes) <= 24
        assert all(b - a >= 2.5 - 1e-6 for a, b in pairwise(probes))
        await cancel(waits)

    async def test_after_an_outage_the_client_opens_up_step_by_step(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=16) as client:
            sandbox.latency = 1
            for number in range(100):
                sandbox.approve(f"op{number}", user_id=USER)
            sandbox.fail_next(503, times=None)
            asyncio.get_running_loop().call_later(20, sandbox.recover)
            await asyncio.gather(*(client.wait_for_approval(f"op{number}") for number in range(100)))
            rounds: dict[float, int] = {}
            for record in sandbox.requests:
                if record.status == 200:
                    rounds[round(record.at, 3)] = rounds.get(round(record.at, 3), 0) + 1
            assert list(rounds.values())[:5] == [1, 2, 4, 8, 16]
            assert max(rounds.values()) <= 16

    async def test_retry_after_delays_all_waits(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for name in ("a", "b", "c"):
            await pending(client, name)
        waits = [asyncio.create_task(client.wait_for_approval(n, schedule=EVERY_SECOND)) for n in "abc"]
        await asyncio.sleep(0.5)
        sandbox.fail_next(429, times=2, retry_after=20)
        await asyncio.sleep(0.6)
        sandbox.requests.clear()
        start = now()
        await asyncio.sleep(18.5)
        assert sandbox.requests == []
        assert client.statistics.lag > 10
        await asyncio.sleep(5)
        assert {record.path[-1] for record in sandbox.requests} == {"a", "b", "c"}
        assert min(polls(sandbox)) >= start + 19
        await cancel(waits)

    async def test_the_statistics_tell_how_the_service_fares(self, sandbox: Sandbox, client: KeylessClient) -> None:
        seen = [client.statistics.circuit]  # before first use
        for number in range(5):
            await pending(client, f"op{number}")
        sandbox.fail_next(503, times=5)
        waits = [
            asyncio.create_task(client.wait_for_approval(f"op{number}", timeout=None, schedule=EVERY_SECOND))
            for number in range(5)
        ]
        for _ in range(1200):
            await asyncio.sleep(0.1)
            seen.append(client.statistics.circuit)
        assert [circuit for circuit, _ in groupby(seen)] == ["closed", "open", "half_open", "closed"]
        assert {type(circuit) for circuit in seen} == {str}
        await cancel(waits)

    async def test_retry_after_delays_by_two_minutes_at_most(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.fail_next(503, retry_after=86_400)
        start = now()
        assert (await client.wait_for_approval("op", timeout=600)).is_approved
        assert now() - start == pytest.approx(120)

    async def test_a_final_poll_goes_during_a_retry_after(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.approve("op")
        sandbox.fail_next(503, retry_after=100)
        start = now()
        assert (await client.wait_for_approval("op", timeout=10)).is_approved
        assert polls(sandbox) == pytest.approx([start, start + 10])

    async def test_repeated_final_polls_go_one_at_a_time_while_the_circuit_is_open(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=64) as client:
            for number in range(200):
                await pending(client, f"op{number}")
            sandbox.fail_next(503, times=None)
            sandbox.latency = 0.01
            start = now()
            outcomes = await asyncio.gather(
                *(client.wait_for_approval(f"op{number}", timeout=20) for number in range(200)), return_exceptions=True
            )
            assert {type(outcome) for outcome in outcomes} == {ApprovalUnknownError}
            assert now() - start <= 22 + 1e-6
            at = [at for at in polls(sandbox) if at > start + 20 - 1e-6]
            assert len(at) <= 201
            assert all(b - a >= 0.01 - 1e-6 for a, b in pairwise(at[1:]))  # beside a probe, perhaps

    @pytest.mark.parametrize("timeout", [11, 15])
    async def test_a_final_poll_that_hangs_holds_up_no_other_of_its_operation(
        self, sandbox: Sandbox, timeout: float
    ) -> None:
        async with sandbox.client(max_in_flight=1, schedule=wait_fixed(60)) as client:
            await pending(client)
            sandbox.requests.clear()
            start = now()
            ends = asyncio.create_task(client.wait_for_approval("op", timeout=10))
            other = asyncio.create_task(client.wait_for_approval("op", timeout=timeout))
            await asyncio.sleep(9)
            sandbox.latency = 3600  # the final poll hangs
            await asyncio.sleep(1.5)
            sandbox.latency = 0
            sandbox.approve("op")
            assert (await other).is_approved
            assert polls(sandbox) == pytest.approx([start, start + 10, start + timeout])
            await asyncio.gather(ends, return_exceptions=True)

    async def test_a_poll_that_was_cut_is_neither_good_nor_bad(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.latency = 3600
        for _ in range(10):
            task = asyncio.create_task(client.wait_for_approval("op"))
            await asyncio.sleep(1)
            await cancel([task])
        assert client.statistics.transient_failures == 0
        sandbox.latency = 0
        sandbox.approve("op")
        start = now()
        await client.wait_for_approval("op")
        assert now() == start

    async def test_a_404_is_a_good_answer(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.fail_next(503, times=4)
        sandbox.fail_next(404)
        sandbox.fail_next(503, times=4)
        sandbox.approve("op")
        start = now()
        assert (await client.wait_for_approval("op", if_missing="wait", schedule=EVERY_SECOND)).is_approved
        assert len(polls(sandbox)) == 10
        assert now() - start <= 2 * 7.5 + 1

    async def test_single_calls_are_neither_delayed_nor_counted(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.fail_next(503, retry_after=100)
        wait = asyncio.create_task(client.wait_for_approval("op"))
        await asyncio.sleep(1)
        start = now()
        await client.get_operation("op")
        assert now() == start
        assert client.statistics.polls == 1
        await cancel([wait])

    async def test_a_final_poll_that_fails_leaves_the_outcome_unknown(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4, sandbox.fail_next, 503, None)
        updates: list[ApprovalUpdate] = []
        with pytest.raises(ApprovalUnknownError) as caught:
            await client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5, on_poll=updates.append)
        assert isinstance(caught.value.last_error, ServerError)
        assert caught.value.last_operation is None
        assert updates[-1].error is caught.value.last_error
        assert updates[-1].next_poll_in is None


class TestRule5EverythingElse:
    """Rule 5 of docs/rules.md."""

    @pytest.mark.parametrize("status", [301, 307, 400, 401, 403, 404, 406, 409, 415, 418])
    async def test_other_statuses_end_the_wait_at_once(
        self, sandbox: Sandbox, client: KeylessClient, status: int
    ) -> None:
        await pending(client)
        sandbox.fail_next(status)
        with pytest.raises(StatusError) as caught:
            await client.wait_for_approval("op")
        assert caught.value.status == status
        assert client.statistics.polls == 1

    async def test_each_of_many_waits_gets_an_error_of_its_own(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        sandbox.fail_next(401, times=1)
        errors = await asyncio.gather(*(client.wait_for_approval("op") for _ in range(3)), return_exceptions=True)
        assert [type(error) for error in errors] == [AuthenticationError] * 3
        assert len({id(error) for error in errors}) == 3

    async def test_a_missing_operation_counts_as_pending_where_the_phone_will_create_it(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        asyncio.get_running_loop().call_later(7, lambda: sandbox.approve("by-phone", user_id=USER))
        updates: list[ApprovalUpdate] = []
        operation = await client.wait_for_approval("by-phone", if_missing="wait", on_poll=updates.append)
        assert operation.is_approved
        assert all(isinstance(update.error, NotFoundError) for update in updates[:-1])
        assert updates[0].operation is None

    async def test_an_operation_that_never_came_into_being_times_out(self, client: KeylessClient) -> None:
        with pytest.raises(ApprovalTimeoutError, match="missing") as caught:
            await client.wait_for_approval("by-phone", if_missing="wait", timeout=5)
        assert not isinstance(caught.value, ApprovalUnknownError)
        assert caught.value.last_operation is None
        assert isinstance(caught.value.last_error, NotFoundError)

    async def test_404s_after_the_operation_was_seen_are_no_failure_of_the_service(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        for name in ("op", "other"):
            await pending(client, name)
        wait = asyncio.create_task(client.wait_for_approval("op", timeout=None))
        await asyncio.sleep(1)
        sandbox.forget("op")
        await asyncio.sleep(600)
        assert not wait.done()
        assert client.statistics.transient_failures >= 10
        sandbox.approve("other")
        start = now()
        assert (await client.wait_for_approval("other")).is_approved
        assert now() == start
        assert len(polls(sandbox, "op")) <= 300
        await cancel([wait])

    async def test_a_404_is_transient_for_waits_that_started_after_the_operation_was_seen(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        first = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60)))
        await asyncio.sleep(1)
        sandbox.fail_next(404)
        second = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60)))
        await asyncio.sleep(0.1)
        sandbox.approve("op")
        assert (await second).is_approved
        assert (await first).is_approved

    async def test_a_missing_operation_ends_one_wait_and_not_the_other(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        asyncio.get_running_loop().call_later(3, lambda: sandbox.approve("op", user_id=USER))
        one, other = await asyncio.gather(
            client.wait_for_approval("op"), client.wait_for_approval("op", if_missing="wait"), return_exceptions=True
        )
        assert isinstance(one, NotFoundError)
        assert isinstance(other, Operation)


class TestRule6SingleFlight:
    """Rule 6 of docs/rules.md."""

    async def test_a_thousand_waits_for_one_operation_make_as_many_requests_as_one(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(9.5, sandbox.approve, "op")
        start = now()
        operations = await asyncio.gather(
            *(client.wait_for_approval("op", schedule=wait_fixed(2)) for _ in range(1000))
        )
        assert len(operations) == 1000
        assert polls(sandbox) == pytest.approx([start + at for at in (0, 2, 4, 6, 8, 10)])
        assert client.statistics.approvals == 1000

    async def test_a_thousand_waits_on_the_adaptive_schedule_share_their_polls_too(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(9.5, sandbox.approve, "op")
        await asyncio.gather(*(client.wait_for_approval(ticket) for _ in range(1000)))
        assert len(polls(sandbox)) <= 20

    async def test_the_last_one_leaving_stops_the_polling(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        waits = [asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND)) for _ in range(3)]
        await asyncio.sleep(3.5)
        await cancel(waits)
        sandbox.requests.clear()
        await asyncio.sleep(60)
        assert sandbox.requests == []

    async def test_a_later_wait_with_the_same_schedule_is_noticed_as_if_it_were_alone(self, sandbox: Sandbox) -> None:
        async with sandbox.client(schedule=wait_exponential(multiplier=1, max=60)) as client:
            await pending(client)
            first = asyncio.create_task(client.wait_for_approval("op", timeout=200))
            await asyncio.sleep(50)  # it polls a minute apart by now
            sandbox.requests.clear()
            start = now()
            with pytest.raises(ApprovalTimeoutError):
                await client.wait_for_approval("op", timeout=10)
            assert polls(sandbox) == pytest.approx([start + at for at in (0, 1, 3, 7, 10)])
            await cancel([first])


class TestRule7Cancellation:
    """Rule 7 of docs/rules.md."""

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

    async def test_cancelling_at_any_turn_of_the_loop_leaves_nothing_behind(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
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
        assert len(client._poller._machine._dispatcher) == len(client._poller._machine._deadlines) == 0  # type: ignore[union-attr]

    async def test_cancelling_while_the_deadline_passes_is_a_cancellation(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.latency = 3600
        wait = asyncio.create_task(client.wait_for_approval("op", timeout=5))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(1)
        loop.call_at(loop.time() + 6, wait.cancel)  # the very instant at which the final poll had its time
        with pytest.raises(asyncio.CancelledError):
            await wait

    async def test_cancelling_all_tasks_does_not_hang_a_wait_that_survives(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        sandbox.latency = 1
        before = asyncio.all_tasks()
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND))
        await asyncio.sleep(0.5)
        (worker,) = tasks_since({*before, wait})
        worker.cancel()
        await settle()
        sandbox.approve("op")
        assert (await wait).is_approved

    async def test_a_worker_that_is_cancelled_before_it_started_does_not_hang_the_wait(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await pending(client)
        sandbox.approve("op")
        killed = kill_next_worker(monkeypatch)
        assert (await client.wait_for_approval("op")).is_approved
        assert killed[0].cancelled()

    async def test_waits_do_not_inherit_the_context_of_the_first_caller(self, client: KeylessClient) -> None:
        variable = contextvars.ContextVar("variable", default="unset")
        seen: list[str] = []

        class Spy(wait_base):
            def __call__(self, retry_state: RetryCallState) -> float:
                seen.append(variable.get())
                return 1.0

        await pending(client)
        variable.set("of the first")
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=Spy(), timeout=5)
        assert set(seen) == {"unset"}


class TestRule8OnPoll:
    """Rule 8 of docs/rules.md."""

    async def test_updates_come_in_order_and_the_approved_one_before_the_wait_returns(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
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

    async def test_polls_go_on_while_on_poll_runs(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        start = now()

        async def slow(_update: ApprovalUpdate) -> None:
            await asyncio.sleep(7)

        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=wait_fixed(2), timeout=5, on_poll=slow)
        assert polls(sandbox) == pytest.approx([start, start + 2, start + 4, start + 5])
        assert now() - start == pytest.approx(14)  # its own time is not in the budget; it gets the newest update

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

    async def test_a_stop_iteration_of_an_async_on_poll_is_the_cause_of_what_is_raised(
        self, client: KeylessClient
    ) -> None:
        async def explode(_update: ApprovalUpdate) -> None:
            next(iter(()))

        await pending(client)
        with pytest.raises(RuntimeError, match="StopIteration") as caught:
            await client.wait_for_approval("op", on_poll=explode)
        assert isinstance(caught.value.__cause__, StopIteration)
        assert client.statistics.waiting == 0

    @pytest.mark.parametrize("error", [StopAsyncIteration, GeneratorExit, asyncio.CancelledError])
    async def test_what_ends_iterations_and_tasks_is_raised_as_it_is(
        self, client: KeylessClient, error: type[BaseException]
    ) -> None:
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

    async def test_a_poll_that_serves_one_with_and_one_without_on_poll_serves_both(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        updates: list[ApprovalUpdate] = []
        outcomes = await asyncio.gather(
            client.wait_for_approval("op", timeout=3),
            client.wait_for_approval("op", timeout=3, on_poll=updates.append),
            return_exceptions=True,
        )
        assert {type(outcome) for outcome in outcomes} == {ApprovalTimeoutError}
        assert len(updates) == len(polls(sandbox))


class TestRule9NotADenial:
    """Rule 9 of docs/rules.md."""

    async def test_a_timeout_carries_what_is_needed_to_check_again(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        ticket = await client.create_operation(USER, expires_in=10)
        with pytest.raises(ApprovalTimeoutError, match="not a denial") as caught:
            await client.wait_for_approval(ticket)
        sandbox.approve(ticket.operation_id)
        assert caught.value.ticket == ticket
        assert (await client.wait_for_approval(ticket)).is_approved

    async def test_nothing_creates_a_second_operation(self, sandbox: Sandbox, client: KeylessClient) -> None:
        with pytest.raises(ApprovalTimeoutError):
            await client.request_approval(USER, expires_in=10)
        assert len(sandbox.operations) == 1


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

    async def test_a_strategy_of_nothing_does_not_spin(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", schedule=wait_fixed(0), timeout=1)
        assert len(polls(sandbox)) <= 51

    @pytest.mark.parametrize("value", ["2", None, math.nan, timedelta(seconds=2)])
    async def test_a_schedule_that_returns_no_number_ends_the_wait(self, client: KeylessClient, value: object) -> None:
        await pending(client)

        class Broken(wait_base):
            def __call__(self, retry_state: RetryCallState) -> Any:
                return value

        with pytest.raises(ConfigurationError):
            await client.wait_for_approval("op", schedule=Broken())
        assert client.statistics.waiting == 0

    async def test_the_schedule_of_the_client_is_the_default(self, sandbox: Sandbox) -> None:
        async with sandbox.client(schedule=wait_fixed(7)) as client:
            await pending(client)
            start = now()
            with pytest.raises(ApprovalTimeoutError):
                await client.wait_for_approval("op", timeout=15)
            assert polls(sandbox) == pytest.approx([start, start + 7, start + 14, start + 15])


class RecordingObservations(wait_adaptive):
    """Polls every two seconds, and records its observations."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: list[tuple[float, float | None]] = []

    def __call__(self, retry_state: RetryCallState) -> float:
        return 2.0

    def observe(self, after: float, until: float | None) -> None:
        self.observed.append((round(after, 6), None if until is None else round(until, 6)))


class TestLearning:
    async def test_an_approval_is_observed_between_the_polls_around_it(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER)
        sandbox.latency = 0.5
        asyncio.get_running_loop().call_later(3, sandbox.approve, ticket.operation_id)
        await client.wait_for_approval(ticket, schedule=schedule)
        # polls at 2 (answered 2.5) and 4.5 (answered 5): the answer may be as old as its arrival
        assert schedule.observed == [(2.0, 5.0)]

    async def test_an_approval_at_the_first_poll_of_a_ticket_is_observed_since_its_creation(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER)
        sandbox.approve(ticket.operation_id)
        await client.wait_for_approval(ticket, schedule=schedule)
        assert schedule.observed == [(0.0, 2.0)]

    async def test_only_the_piece_of_a_wait_that_began_with_its_operation_is_observed(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER)
        asyncio.get_running_loop().call_later(9, sandbox.approve, ticket.operation_id)
        await asyncio.sleep(0.5)
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=schedule, timeout=5)
        await client.wait_for_approval(ticket, schedule=schedule)
        assert schedule.observed == [(5.5, None)]

    async def test_an_approval_that_is_seen_for_others_later_is_observed(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER)
        asyncio.get_running_loop().call_later(9, sandbox.approve, ticket.operation_id)
        began = asyncio.create_task(client.wait_for_approval(ticket, schedule=schedule, timeout=5))
        assert (await client.wait_for_approval(ticket, schedule=schedule)).is_approved
        assert schedule.observed == [(8.0, 10.0)]
        await asyncio.gather(began, return_exceptions=True)

    async def test_a_ticket_that_joins_the_wait_for_its_id_later_is_not_observed(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER)
        await asyncio.sleep(30)
        asyncio.get_running_loop().call_later(5, sandbox.approve, ticket.operation_id)
        await asyncio.gather(
            client.wait_for_approval(ticket.operation_id, schedule=schedule),
            client.wait_for_approval(ticket, schedule=schedule),
        )
        assert schedule.observed == []

    async def test_a_timeout_is_observed_until_its_last_pending_poll(self, client: KeylessClient) -> None:
        schedule = RecordingObservations()
        ticket = await client.create_operation(USER, operation_id="op")
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket, schedule=schedule, timeout=5)
        assert schedule.observed == [(5.0, None)]

    async def test_a_schedule_that_cannot_learn_costs_no_approval(
        self, sandbox: Sandbox, client: KeylessClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        class Dull(RecordingObservations):
            def observe(self, after: float, until: float | None) -> None:
                raise ZeroDivisionError

        ticket = await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(5, sandbox.approve, "op")
        with caplog.at_level(logging.ERROR, "aiokeyless"):
            assert (await client.wait_for_approval(ticket, schedule=Dull())).is_approved
        assert "failed to learn" in caplog.text


class TestTaskFactories:
    """The loop's task factory is the application's; whatever it does, no wait may hang for it."""

    @pytest.mark.skipif(not hasattr(asyncio, "eager_task_factory"), reason="eager tasks need Python 3.12")
    async def test_an_eager_one_does_not_freeze_the_loop(self, sandbox: Sandbox, client: KeylessClient) -> None:
        loop = asyncio.get_running_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # not there on Python 3.11
        await pending(client)
        loop.call_later(5, sandbox.approve, "op")
        waits = [asyncio.create_task(client.wait_for_approval("op", schedule=EVERY_SECOND)) for _ in range(3)]
        async with asyncio.timeout(10):
            assert all(operation.is_approved for operation in await asyncio.gather(*waits))

    async def test_one_that_raises_hangs_no_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        def raising(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
            if "poller" in coro.cr_code.co_filename:  # the sandbox needs tasks too
                coro.close()
                raise ZeroDivisionError
            return asyncio.Task(coro, loop=loop, **options)

        await self.wait_under(raising, sandbox, client)

    async def test_one_that_takes_no_context_hangs_no_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await self.wait_under(lambda loop, coro: asyncio.Task(coro, loop=loop), sandbox, client)

    async def wait_under(self, factory: Any, sandbox: Sandbox, client: KeylessClient) -> None:
        await pending(client)  # makes the connection, with tasks of aiohttp's
        loop = asyncio.get_running_loop()
        loop.call_later(5, sandbox.approve, "op")
        loop.set_task_factory(factory)
        try:
            async with asyncio.timeout(10):
                assert (await client.wait_for_approval("op", schedule=EVERY_SECOND)).is_approved
        finally:
            loop.set_task_factory(None)


class OddError(BaseException):
    """Neither an exception nor a cancellation."""


class TestHooks:
    """Tracing hooks and middlewares of a borrowed session can raise anything."""

    @pytest.mark.parametrize("kind", [OddError, GeneratorExit, ZeroDivisionError, asyncio.CancelledError])
    async def test_what_a_hook_raises_is_retried_with_the_backoff(
        self, sandbox: Sandbox, kind: type[BaseException], caplog: pytest.LogCaptureFixture
    ) -> None:
        async def start(*_: object) -> None:
            raise kind

        hooks = aiohttp.TraceConfig()
        hooks.on_request_start.append(start)
        async with aiohttp.ClientSession(trace_configs=[hooks]) as session, sandbox.client(session=session) as client:
            with pytest.raises(ApprovalUnknownError) as caught:
                await client.wait_for_approval("op", timeout=20)
        assert caught.value.polls < 60
        assert len(caplog.records) < 60


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
        self, client: KeylessClient, monkeypatch: pytest.MonkeyPatch, name: str, waits: int
    ) -> None:
        await pending(client)
        monkeypatch.setattr(f"aiokeyless._waits.machine.{name}", broken)
        outcomes = await asyncio.gather(*(client.wait_for_approval("op") for _ in range(waits)), return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [ZeroDivisionError] * waits
        assert armed_timers() == []

    async def test_one_at_the_deadline_ends_the_wait_that_it_concerns(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await pending(client)
        sandbox.latency = 3600
        monkeypatch.setattr("aiokeyless._waits.machine.unknown_error", broken)
        with pytest.raises(ZeroDivisionError):
            await client.wait_for_approval("op", timeout=5)

    async def test_what_no_exchange_should_raise_ends_the_waits(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await pending(client)
        monkeypatch.setattr("aiokeyless._http.transport.Transport.poll", broken)
        with pytest.raises(ZeroDivisionError):
            await client.wait_for_approval("op")
        assert client.statistics.polls == 1

    async def test_an_exchange_that_is_cancelled_from_inside_is_a_transient_failure(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def cancelled(*_: object) -> None:  # as by a middleware that awaits a task of its own
            raise asyncio.CancelledError

        await pending(client)
        monkeypatch.setattr("aiokeyless._http.transport.Transport.poll", cancelled)
        with pytest.raises(ApprovalUnknownError) as caught:
            await client.wait_for_approval("op", timeout=60)
        assert isinstance(caught.value.last_error, TransportError)
        assert client.statistics.polls <= 60


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


class TestClosing:
    @pytest.mark.parametrize("latency", [0.0, 100.0])
    @pytest.mark.parametrize("count", [3, 200])
    async def test_closing_ends_the_waits_under_way(self, sandbox: Sandbox, latency: float, count: int) -> None:
        client = sandbox.client()
        for number in range(count):
            await pending(client, f"op{number}")
        before = asyncio.all_tasks()
        sandbox.latency = latency
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(count)]
        await asyncio.sleep(0.5)
        start = now()
        await client.aclose()
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ClientClosedError}
        assert now() == start
        assert armed_timers() == []
        assert tasks_since(before) == set()

    @pytest.mark.parametrize("turns", range(1, 7))
    async def test_a_cancelled_closing_goes_on_by_itself(self, sandbox: Sandbox, turns: int) -> None:
        client = sandbox.client()
        for number in range(1000):
            await pending(client, f"op{number}")
        before = asyncio.all_tasks()
        sandbox.latency = 100
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(1000)]
        await asyncio.sleep(0.5)
        start = now()
        closing = asyncio.create_task(client.aclose())
        for _ in range(turns):
            await asyncio.sleep(0)
        await cancel([closing])
        assert closing.cancelled()
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ClientClosedError}
        assert now() == start
        await client.aclose()
        assert armed_timers() == []
        assert tasks_since(before) == set()
        assert client._transport is not None
        assert client._transport._session.closed

    async def test_a_second_closing_waits_for_the_first(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        for number in range(1000):
            await pending(client, f"op{number}")
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(1000)]
        await asyncio.sleep(0.5)
        first = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        await client.aclose()
        assert first.done()
        assert client.statistics.waiting == client.statistics.in_flight == 0
        assert client._transport is not None
        assert client._transport._session.closed
        await asyncio.gather(*waits, return_exceptions=True)

    async def test_cancelling_all_tasks_does_not_stop_the_closing(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        for number in range(1000):
            await pending(client, f"op{number}")
        before = asyncio.all_tasks()
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}")) for number in range(1000)]
        await asyncio.sleep(0.5)
        closing = asyncio.create_task(client.aclose())
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        others = tasks_since(before) - set(waits)
        assert closing in others
        for task in others:
            task.cancel()
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ClientClosedError}
        with pytest.raises(asyncio.CancelledError):
            await closing
        await settle()
        assert tasks_since(before) == set()
        assert client._transport is not None
        assert client._transport._session.closed

    async def test_each_closing_waits_for_an_exchange_that_is_slow_to_end(
        self, sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
    ) -> None:
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
        assert client._poller is not None
        first = asyncio.create_task(client._poller.aclose())
        with pytest.raises(ClientClosedError):
            await wait
        assert now() == 0.5
        await client._poller.aclose()
        await first
        assert now() == 1.5
        await client.aclose()

    async def test_closing_while_final_polls_queue_does_not_spin(self, sandbox: Sandbox) -> None:
        client = sandbox.client(max_in_flight=1)
        for number in range(1000):
            await pending(client, f"op{number}")
        sandbox.latency = 1
        waits = [asyncio.create_task(client.wait_for_approval(f"op{number}", timeout=1)) for number in range(1000)]
        await asyncio.sleep(1.5)
        await client.aclose()
        outcomes = await asyncio.gather(*waits, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ClientClosedError}
        assert armed_timers() == []

    async def test_a_wait_on_a_closed_client_raises(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        await client.aclose()
        with pytest.raises(ClientClosedError):
            await client.wait_for_approval("op")

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

    async def test_a_kept_error_of_the_connection_keeps_no_traceback(self) -> None:
        async with Sandbox() as gone:
            address = gone.url
        async with KeylessClient("key", base_url=address) as client:
            with pytest.raises(ApprovalUnknownError) as caught:
                await client.wait_for_approval("op", timeout=1)
        error = caught.value.last_error
        assert isinstance(error, TransportError)
        assert all(not isinstance(thing, FrameType | TracebackType) for thing in reachable(error))

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

        for number in range(300):
            sandbox.approve(f"freed-{number}", user_id=USER)
            await client.wait_for_approval(f"freed-{number}", timeout=10_000)
        gc.collect()
        await spin_until(lambda: not kept())

    async def test_the_error_of_an_ended_wait_keeps_no_frame_of_the_application(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
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
    async def test_no_wait_leaves_work_to_the_garbage_collector(
        self, sandbox: Sandbox, client: KeylessClient, ending: str
    ) -> None:
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
        assert client.statistics.lag == 0
        sandbox.approve("op")
        await wait
        assert (client.statistics.waiting, client.statistics.in_flight) == (0, 0)
        assert (client.statistics.approvals, client.statistics.timeouts) == (1, 0)

    async def test_lag_shows_that_there_are_too_many_waits(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_in_flight=1) as client:
            for number in range(10):
                await pending(client, f"op{number}")
            sandbox.latency = 1
            waits = [asyncio.create_task(client.wait_for_approval(f"op{n}", timeout=5.5)) for n in range(10)]
            await asyncio.sleep(4.75)
            assert client.statistics.lag == pytest.approx(4.75)
            await asyncio.sleep(1.5)
            assert client.statistics.lag == pytest.approx(0.75)  # of the final polls
            await cancel(waits)

    async def test_the_pause_before_a_repeated_final_poll_is_no_lag(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        await pending(client)
        asyncio.get_running_loop().call_later(4.9, lambda: sandbox.fail_next(429, retry_after=1))
        wait = asyncio.create_task(client.wait_for_approval("op", schedule=wait_fixed(60), timeout=5))
        await asyncio.sleep(5.9)
        assert client.statistics.lag == 0
        await cancel([wait])


class Recording(wait_base):
    """A fixed interval that records what it is called with."""

    def __init__(self, delay: float, ages: list[float | None] | None = None, attempts: list[int] | None = None) -> None:
        self._delay = delay
        self._ages = [] if ages is None else ages
        self._attempts = [] if attempts is None else attempts

    def __call__(self, retry_state: RetryCallState) -> float:
        self._ages.append(retry_state.seconds_since_start)
        self._attempts.append(retry_state.attempt_number)
        return self._delay


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


def limit_polls(client: KeylessClient, limit: int) -> None:
    """Let the service answer 429 to the polls beyond so many in a second."""
    transport, _ = client._open()
    poll = transport.poll
    answered: list[float] = []

    async def limited(operation_id: str) -> Operation:
        if len(answered) >= limit and answered[-limit] > now() - 1:
            await asyncio.sleep(0.02)
            raise RateLimitError(status=429, method="GET", path=f"/v2/operations/{operation_id}")
        answered.append(now())
        return await poll(operation_id)

    transport.poll = limited  # type: ignore[method-assign]


class TestRate:
    """Of ``max_polls_per_second``: "The rate" in docs/rules.md."""

    async def test_polls_above_the_rate_run_late_and_the_statistics_tell(self, sandbox: Sandbox) -> None:
        async with sandbox.client(max_polls_per_second=5) as client:
            names = [await pending(client, f"op{n}") for n in range(20)]
            waits = [asyncio.create_task(client.wait_for_approval(n, schedule=EVERY_SECOND)) for n in names]
            await asyncio.sleep(2)
            assert client.statistics.lag == pytest.approx(2, abs=0.1)
            await asyncio.sleep(38)
            assert len(polls(sandbox)) == pytest.approx(5 + 5 * 40, abs=3)
            assert client.statistics.rate_limit == 5
            assert {record.path for record in sandbox.requests} >= {f"/v2/operations/{name}" for name in names}
            sandbox.approve("op7")
            await asyncio.wait_for(waits[7], 5)  # each is polled every four seconds
            await cancel(waits)

    @pytest.mark.parametrize("status", [429, 503])
    async def test_a_429_halves_the_rate_and_no_other_failure_does(self, sandbox: Sandbox, status: int) -> None:
        async with sandbox.client(max_polls_per_second=None) as client:
            assert client.statistics.rate_limit is None
            names = [await pending(client, f"op{n}") for n in range(20)]
            assert client.statistics.rate_limit is None
            waits = [asyncio.create_task(client.wait_for_approval(n, schedule=EVERY_SECOND)) for n in names]
            await asyncio.sleep(10.5)
            sandbox.fail_next(status, times=2)
            await asyncio.sleep(1)
            rate = client.statistics.rate_limit
            assert rate is None if status == 503 else rate is not None and 5 < rate < 20
            await cancel(waits)
            await asyncio.sleep(130)
            assert client.statistics.rate_limit is None

    async def test_a_service_with_a_limit_loses_nobody(self, sandbox: Sandbox) -> None:
        async with sandbox.client() as client:
            names = [await pending(client, f"op{n}") for n in range(20)]
            limit_polls(client, 10)
            waits = [asyncio.create_task(client.wait_for_approval(n, schedule=EVERY_SECOND)) for n in names]
            await asyncio.sleep(30)
            refused = client.statistics.transient_failures
            await asyncio.sleep(30)
            assert client.statistics.transient_failures - refused < 60  # of twenty polls a second that are due
            for name in names:
                sandbox.approve(name)
            operations = await asyncio.gather(*waits)
            assert all(operation.is_approved for operation in operations)
            assert client.statistics.transient_failures > 0
