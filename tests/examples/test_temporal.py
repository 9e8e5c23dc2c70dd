"""The Temporal example in the SDK's environment for activities, against a sandbox: there is no Temporal server here."""

from __future__ import annotations

import asyncio
import dataclasses
import sqlite3
import sys
import uuid
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from example_process import example_process
from ports import own_port
from temporalio import workflow
from temporalio.exceptions import ApplicationError
from temporalio.testing import ActivityEnvironment
from temporalio.worker.workflow_sandbox import SandboxedWorkflowRunner
from unshown import UNSHOWN
from waiting import PATIENCE, until

from aiokeyless import ApprovalTicket

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "temporal"))

import transfer as example
from activities import Approvals, Bank, Outcome, Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox


REQUEST = Request(operation_id="transfer-1", user_id="C0FFEE", payload="Transfer 40.00 to alice", expires_in=600)
SHORT = dataclasses.replace(REQUEST, expires_in=0.3)


class Attempt:
    """One attempt of the activity, and the details of its last heartbeat."""

    def __init__(self, client: KeylessClient, *, number: int = 1, details: tuple[Any, ...] = ()) -> None:
        self.details = details
        self.heartbeats = 0
        self.environment = ActivityEnvironment()
        info = ActivityEnvironment.default_info()
        self.environment.info = dataclasses.replace(info, attempt=number, heartbeat_details=details)
        self.environment.on_heartbeat = self._on_heartbeat
        self._activity = Approvals(client, heartbeat_every=0.1).wait_for_approval

    def _on_heartbeat(self, *details: Any) -> None:
        self.details = details
        self.heartbeats += 1

    async def run(self, request: Request = REQUEST) -> Outcome:
        return await self.environment.run(self._activity, request)


@contextmanager
def fails(kind: str, *, is_final: bool) -> Iterator[None]:
    """Expect an error of the activity, after which Temporal runs it again unless it is final."""
    with pytest.raises(ApplicationError) as raised:
        yield
    assert (raised.value.type, raised.value.non_retryable) == (kind, is_final)


def questions(sandbox: Sandbox) -> int:
    """How often a user was asked."""
    return sum(request.method == "POST" for request in sandbox.requests)


async def test_wait_heartbeats_its_ticket_and_ends_with_the_approval(client: KeylessClient, sandbox: Sandbox) -> None:
    attempt = Attempt(client)
    running = asyncio.create_task(attempt.run())
    await until(lambda: attempt.heartbeats > 2)
    assert ApprovalTicket.from_json(attempt.details[0]).operation_id == "transfer-1"
    assert "alice" not in str(attempt.details)
    sandbox.approve("transfer-1")
    assert await running is Outcome.APPROVED


async def test_another_worker_goes_on_with_the_ticket_and_asks_nobody_again(sandbox: Sandbox) -> None:
    async with sandbox.client() as client:
        first = Attempt(client)
        running = asyncio.create_task(first.run())
        await until(lambda: first.heartbeats > 0)
        running.cancel()  # as the worker does when it stops
        with pytest.raises(asyncio.CancelledError):
            await running
    async with sandbox.client() as client:
        second = Attempt(client, number=2, details=first.details)
        running = asyncio.create_task(second.run())
        await until(lambda: second.heartbeats > 0)
        sandbox.approve("transfer-1")
        assert await running is Outcome.APPROVED
    assert second.details == first.details  # the deadline too
    assert questions(sandbox) == 1


async def test_worker_that_died_before_a_heartbeat_loses_no_approval(client: KeylessClient, sandbox: Sandbox) -> None:
    await client.create_operation("C0FFEE", operation_id="transfer-1", operation_payload=REQUEST.payload)
    sandbox.approve("transfer-1")
    assert await Attempt(client, number=2).run() is Outcome.APPROVED


@pytest.mark.parametrize("number", [1, 2])
async def test_a_pin_transfers_nothing(client: KeylessClient, sandbox: Sandbox, number: int) -> None:
    if number == 2:  # the worker of the first attempt died before its first heartbeat
        await client.create_operation("C0FFEE", operation_id="transfer-1", operation_payload=REQUEST.payload)
    running = asyncio.create_task(Attempt(client, number=number).run())
    await until(lambda: "transfer-1" in sandbox.operations)
    sandbox.approve("transfer-1", auth_type="pin")
    with fails("OperationMismatchError", is_final=True):
        await running


async def test_approval_before_the_first_attempt_is_another_requests(client: KeylessClient, sandbox: Sandbox) -> None:
    await client.create_operation("C0FFEE", operation_id="transfer-1", operation_payload=REQUEST.payload)
    sandbox.approve("transfer-1")
    with fails("AlreadyApprovedError", is_final=True):
        await Attempt(client).run()


async def test_a_timeout_is_a_result_and_a_late_approval_changes_it_for_no_one(client: KeylessClient) -> None:
    assert await Attempt(client).run(SHORT) is Outcome.TIMED_OUT


async def test_end_without_an_answer_is_retried_and_learns_the_outcome(client: KeylessClient, sandbox: Sandbox) -> None:
    sandbox.fail_next(503, None, method="GET")
    first = Attempt(client)
    with fails("ApprovalUnknownError", is_final=False):
        await first.run(SHORT)
    sandbox.approve("transfer-1")
    sandbox.recover()
    assert await Attempt(client, number=2, details=first.details).run(SHORT) is Outcome.APPROVED


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"user_id": "alice"}, "InvalidIdentifierError"),
        ({"operation_id": ""}, "InvalidIdentifierError"),
        ({"expires_in": -1.0}, "ConfigurationError"),
    ],
)
async def test_wrong_input_is_not_retried(client: KeylessClient, change: dict[str, Any], kind: str) -> None:
    with fails(kind, is_final=True):
        await Attempt(client).run(dataclasses.replace(REQUEST, **change))


@pytest.mark.parametrize(
    ("fault", "kind", "final"),
    [
        (lambda sandbox: sandbox.fail_next(400, None), "BadRequestError", True),
        (lambda sandbox: sandbox.fail_next(401, None), "AuthenticationError", False),
        (lambda sandbox: sandbox.fail_next(429, None), "RateLimitError", False),
        (lambda sandbox: sandbox.fail_next(503, None), "ServerError", False),
        (lambda sandbox: sandbox.drop_next(None), "TransportError", False),
    ],
    ids=["400", "401", "429", "503", "dropped"],
)
async def test_an_outage_is_retried_and_a_refused_request_is_not(
    sandbox: Sandbox, fault: Callable[[Sandbox], None], kind: str, *, final: bool
) -> None:
    fault(sandbox)
    async with sandbox.client(max_attempts=1) as client:
        with fails(kind, is_final=final):
            await Attempt(client).run()


async def test_an_answer_about_something_else_is_final_and_a_closed_client_is_not(sandbox: Sandbox) -> None:
    async with sandbox.client() as client:
        attempt = Attempt(client)
        running = asyncio.create_task(attempt.run())
        await until(lambda: attempt.heartbeats > 0)
        sandbox.tamper("transfer-1", state="approved", result=True, operation_payload="Transfer 1 to bob")
        with fails("OperationMismatchError", is_final=True):
            await running
    with fails("ClientClosedError", is_final=False):
        await Attempt(client).run()


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    with closing(sqlite3.connect(tmp_path / "transfers.sqlite3", isolation_level=None)) as database:
        yield Bank(database)


async def test_transfer_that_is_repeated_happens_once(bank: Bank) -> None:
    environment = ActivityEnvironment()
    assert await environment.run(bank.transfer, REQUEST)
    assert not await environment.run(bank.transfer, REQUEST)


@pytest.mark.parametrize(
    ("outcome", "called", "end"),
    [
        (Outcome.APPROVED, ["wait_for_approval", "transfer"], "Approved and transferred."),
        (Outcome.TIMED_OUT, ["wait_for_approval"], "Not approved in time. Nothing is transferred"),
    ],
)
async def test_workflow_transfers_what_was_approved_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch, outcome: Outcome, called: list[str], end: str
) -> None:
    calls: list[tuple[str, Request]] = []

    async def execute(method: Callable[..., object], request: Request, **_timeouts: object) -> object:
        calls.append((method.__name__, request))
        return outcome

    monkeypatch.setattr(workflow, "execute_activity_method", execute)
    monkeypatch.setattr(workflow, "uuid4", lambda: uuid.UUID(int=1))
    result = await example.Transfer().run(example.Order(user_id="C0FFEE", amount="40.00", payee="alice"))
    assert result.startswith(end)
    assert [name for name, _ in calls] == called
    assert {(request.payload, request.user_id) for _, request in calls} == {("Transfer 40.00 to alice", "C0FFEE")}


@pytest.mark.parametrize("payee", UNSHOWN)
async def test_workflow_asks_about_no_payee_whose_name_a_phone_does_not_show(payee: str) -> None:
    order = example.Order(user_id="C0FFEE", amount="40.00", payee=payee)  # outside Temporal, an activity would raise
    assert (await example.Transfer().run(order)).startswith("Not asked")


async def test_workflow_is_one_that_the_sdk_accepts() -> None:
    definition = workflow._Definition.must_from_class(example.Transfer)
    SandboxedWorkflowRunner().prepare_workflow(definition)


async def test_worker_says_that_it_cannot_reach_temporal(sandbox: Sandbox, tmp_path: Path) -> None:
    settings = {"TEMPORAL_ADDRESS": f"127.0.0.1:{own_port()}", "TRANSFERS_DB": str(tmp_path / "transfers.sqlite3")}
    folder = Path(example.__file__).parent
    async with example_process("run_worker.py", folder=folder, sandbox=sandbox, **settings) as worker:
        output, _ = await asyncio.wait_for(worker.communicate(), PATIENCE)
    # The SDK's own threads sometimes abort the interpreter while it ends; the message was printed before that.
    assert worker.returncode != 0
    assert output.startswith(b"there is no Temporal server at 127.0.0.1:")
