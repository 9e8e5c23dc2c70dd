"""No sequence of answers makes a wait return an operation that is not approved: a machine that tries to find one.

It drives the real client against the real sandbox, on a clock of its own, and lies to it in every way it can.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import looptime
import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aiokeyless import ApprovalTicket, KeylessClient, KeylessError, Operation
from aiokeyless.sandbox import Sandbox
from aiokeyless.ticket import payload_digest

if TYPE_CHECKING:
    from collections.abc import Coroutine

USER = "0123456789ABCDEF"
OPERATIONS = ("one", "two")
GRACE = 2.0 + 0.001

# Most lies claim an approval, and differ from one in a detail: those are the ones that could pass.
lies = st.fixed_dictionaries(
    {
        "state": st.sampled_from(["approved", "approved", "approved", "pending", "denied", "APPROVED", ""]),
        "result": st.sampled_from([True, True, False]),
    },
    optional={
        "operation_id": st.sampled_from(["one", "two", "three", ""]),
        "user_id": st.sampled_from([USER, USER.lower(), "FFFF", ""]),
        "operation_payload": st.sampled_from(["Pay 40", "Pay 4000", "", None, msgspec.UNSET]),
        "external_user_id": st.sampled_from(["alice", "mallory", "", None, msgspec.UNSET]),
    },
)
bodies = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"",
            b"<html>",
            b"true",
            b'{"state":"approved","result":true}',
            b'{"id":1,"timestamp":"","nodeId":"","userId":"","apiKey":"","operationId":"one","result":true,"state":"approved"',
        ]
    ),
)


class Waits(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.loop = looptime.new_event_loop()
        self.sandbox = Sandbox()
        self.client: KeylessClient
        self.tickets: dict[str, ApprovalTicket] = {}
        self.started: list[tuple[asyncio.Task[Operation], str, ApprovalTicket | None, float]] = []
        self.checked: set[asyncio.Task[Operation]] = set()
        self.shown: set[str] = set()  # what the service has ever claimed to be approved

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.loop.run_until_complete(coroutine)

    @initialize(in_flight=st.sampled_from([1, 2, 64]))
    def begin(self, in_flight: int) -> None:
        async def begin() -> None:
            await self.sandbox.start()
            self.client = self.sandbox.client(max_in_flight=in_flight, request_timeout=3.0)
            for name in OPERATIONS:
                self.tickets[name] = await self.client.create_operation(
                    USER, operation_id=name, operation_payload="Pay 40", external_user_id="alice", expires_in=20
                )

        self.run(begin())

    @rule(name=st.sampled_from(OPERATIONS), by_ticket=st.booleans(), timeout=st.floats(0.01, 30))
    def wait(self, name: str, timeout: float, by_ticket: bool) -> None:
        ticket = self.tickets[name] if by_ticket else None

        async def begin() -> asyncio.Task[Operation]:
            return asyncio.create_task(self.client.wait_for_approval(ticket or name, timeout=timeout))

        task: asyncio.Task[Operation] = self.run(begin())
        self.started.append((task, name, ticket, self.loop.time() + timeout + GRACE))

    @precondition(lambda self: self.started)
    @rule(which=st.integers(0, 100))
    def remove(self, which: int) -> None:
        self.started[which % len(self.started)][0].cancel()

    @rule(name=st.sampled_from(OPERATIONS), lie=lies)
    def lie(self, name: str, lie: dict[str, Any]) -> None:
        self.sandbox.tamper(name, **lie)
        if lie["state"] == "approved" and lie["result"]:
            self.shown.add(name)

    @rule(name=st.sampled_from(OPERATIONS), lie=lies)
    def lie_to_a_wait(self, name: str, lie: dict[str, Any]) -> None:
        """The short way to what matters most, which chance alone takes too seldom."""
        self.sandbox.recover()
        self.sandbox.latency = 0
        self.lie(name, lie)
        self.wait(name, timeout=1.0, by_ticket=True)
        self.pass_time(5.0)

    @rule(name=st.sampled_from(OPERATIONS))
    def approve(self, name: str) -> None:
        self.sandbox.approve(name)
        self.shown.add(name)

    @rule(status=st.sampled_from([200, 302, 400, 401, 404, 408, 429, 500, 503]), times=st.integers(1, 8), body=bodies)
    def fail(self, status: int, times: int, body: bytes) -> None:
        self.sandbox.fail_next(status, times, body=body, retry_after=status % 7 or None)

    @rule(times=st.integers(1, 3))
    def drop(self, times: int) -> None:
        self.sandbox.drop_next(times)

    @rule()
    def recover(self) -> None:
        self.sandbox.recover()

    @rule(latency=st.sampled_from([0.0, 0.3, 5.0, 3600.0]))
    def slow_down(self, latency: float) -> None:
        self.sandbox.latency = latency

    @rule(delay=st.floats(0.001, 15))
    def pass_time(self, delay: float) -> None:
        self.run(asyncio.sleep(delay))

    @invariant()
    def no_wait_returns_what_is_not_approved(self) -> None:
        for task, name, ticket, end in self.started:
            if not task.done():
                assert self.loop.time() <= end, "a wait outlived its budget"
            elif task not in self.checked:
                self.checked.add(task)
                self.check(task, name, ticket)

    def check(self, task: asyncio.Task[Operation], name: str, ticket: ApprovalTicket | None) -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            assert isinstance(error, KeylessError)
            assert self.sandbox.api_key not in repr(error)
            return
        operation = task.result()
        assert name in self.shown
        assert (operation.state, operation.result, operation.operation_id) == ("approved", True, name)
        if ticket is not None:
            assert operation.user_id.upper() == ticket.user_id
            assert payload_digest(operation.operation_payload) == ticket.payload_sha256
            assert operation.external_user_id == ticket.external_user_id

    def teardown(self) -> None:
        async def end() -> set[asyncio.Task[Any]]:
            await asyncio.gather(*(task for task, *_ in self.started), return_exceptions=True)
            await self.client.aclose()
            await self.sandbox.aclose()
            return {task for task in asyncio.all_tasks() if task is not asyncio.current_task()}

        left_behind = self.run(end())
        waiting = self.client.statistics.waiting
        self.loop.close()
        self.no_wait_returns_what_is_not_approved()
        assert waiting == 0
        assert left_behind == set()


TestWaits = Waits.TestCase
TestWaits.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
