"""The table of cases against a worker, on a clock that moves; docs/rules.md says where it differs from the poller."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
from outcome_cases import (
    AUTH_TYPE,
    CASES,
    EXTERNAL_USER_ID,
    OPERATION_ID,
    PAYLOAD,
    USER_ID,
    OutcomeCase,
    Result,
    WorkerDoes,
)
from tenacity import wait_fixed
from tenacity.wait import wait_base
from waiting import PATIENCE, until

from aiokeyless import AuthenticationError, DecodeError, PermissionDeniedError
from aiokeyless._rules.approval import Rejection
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalEvent, ApprovalWorker, FailureReason, Outcome, submit_approval

from .reading import read

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tenacity import RetryCallState

    from aiokeyless import Operation
    from aiokeyless.worker.sqlite import SqliteBroker

pytestmark = pytest.mark.looptime

AT_THE_DEADLINE: Final = wait_fixed(60)  # the deadline cuts it, so that the final poll is the only one
REASONS: Final = {
    Rejection.OTHER_OPERATION: FailureReason.MISMATCH,
    Rejection.OTHER_USER: FailureReason.CONFLICT,
    Rejection.OTHER_PAYLOAD: FailureReason.CONFLICT,
    Rejection.OTHER_EXTERNAL_USER: FailureReason.CONFLICT,
    Rejection.OTHER_AUTH_TYPE: FailureReason.MISMATCH,
    Rejection.RESULT_IS_FALSE: FailureReason.INCONSISTENT,
    Rejection.UNKNOWN_STATE: FailureReason.INCONSISTENT,
}

each_case = pytest.mark.parametrize("case", CASES, ids=str)


class ArrangedSandbox(Sandbox):
    """A sandbox that answers every poll as a case says, from the moment in which the operation is created."""

    def __init__(self, case: OutcomeCase) -> None:
        super().__init__(auto_approve=self._arrange)
        self._case = case

    def _arrange(self, operation: Operation) -> None:
        self._case.arrange(self, operation.operation_id)

    def polls(self) -> int:
        return sum(record.method == "GET" and record.path.endswith(f"/{OPERATION_ID}") for record in self.requests)

    def tell_the_truth(self) -> None:
        self.recover()
        if OPERATION_ID in self.operations:
            self.tamper(OPERATION_ID)


class OnePoll(wait_base):
    """A schedule that sets one poll soon, and the next one in an hour."""

    def __init__(self, sandbox: ArrangedSandbox) -> None:
        self._sandbox = sandbox

    def __call__(self, retry_state: RetryCallState) -> float:
        return 3600.0 if self._sandbox.polls() > 1 else 0.05  # the first poll is that before the create


@asynccontextmanager
async def working(
    sandbox: Sandbox, broker: SqliteBroker, **options: Any
) -> AsyncGenerator[tuple[ApprovalWorker, asyncio.Task[None]]]:
    """Run a worker until it is not needed any more; then it is cancelled, since `stop` takes up to a second."""
    async with sandbox.client(max_attempts=1) as client:
        worker = ApprovalWorker(client, broker, **options)
        run = asyncio.create_task(worker.run())
        try:
            await until(lambda: worker.statistics.is_ready or run.done())
            yield worker, run
        finally:
            run.cancel()
            await asyncio.wait([run])


async def submit(broker: SqliteBroker, case: OutcomeCase, expires_in: float) -> None:
    await submit_approval(
        broker,
        USER_ID,
        operation_id=OPERATION_ID,
        operation_payload=PAYLOAD,
        external_user_id=EXTERNAL_USER_ID,
        expires_in=expires_in,
        require_auth_type=AUTH_TYPE,
        started_by=case.started_by,
    )


async def event_of(broker: SqliteBroker) -> ApprovalEvent:
    async with asyncio.timeout(PATIENCE):
        [event] = await read(broker)
    return event


def result_of(event: ApprovalEvent, case: OutcomeCase) -> Result:
    """Return the result that an event tells."""
    if event.outcome is Outcome.APPROVED:
        return Result.APPROVED
    if event.outcome is Outcome.EXPIRED:
        return Result.TIMED_OUT if event.answered else Result.UNANSWERED
    if case.rejection is not None:
        assert event.detail is not None
        assert (event.reason, event.detail.partition(": ")[0]) == (REASONS[case.rejection], case.rejection.value)
        return Result.REJECTED
    unreadable = isinstance(case.answer, DecodeError)
    assert event.reason == (FailureReason.UNREADABLE if unreadable else FailureReason.POLL_REFUSED)
    return Result.FAILED


@each_case
async def test_before_the_deadline_a_worker_does_what_the_table_says(case: OutcomeCase, memory: SqliteBroker) -> None:
    async with ArrangedSandbox(case) as sandbox:
        # Only a failure of the service is repeated sooner than the schedule says.
        has_backoff = case.worker_before is Result.TRANSIENT and not isinstance(case.answer, PermissionDeniedError)
        schedule = OnePoll(sandbox) if has_backoff else wait_fixed(0.05)
        async with working(sandbox, memory, schedule=schedule) as (worker, run):
            await submit(memory, case, expires_in=120)
            match case.worker_before:
                case Result.PENDING:
                    await until(lambda: sandbox.polls() >= 3)
                    assert worker.statistics.transient_failures == 0
                case Result.TRANSIENT:
                    await until(lambda: worker.statistics.transient_failures >= 2)
                case WorkerDoes.CREATE:
                    await until(lambda: worker.statistics.created >= 2)
                case WorkerDoes.END:
                    await until(run.done)
                    assert isinstance(run.exception(), AuthenticationError)
                case result:
                    assert result_of(await event_of(memory), case) is result
                    assert sandbox.polls() == 2  # and the one before the create
            if case.worker_before in {Result.PENDING, Result.TRANSIENT}:  # the wait went on, and finds the approval
                sandbox.tell_the_truth()
                sandbox.approve(
                    OPERATION_ID, user_id=USER_ID, operation_payload=PAYLOAD, external_user_id=EXTERNAL_USER_ID
                )
                assert (await event_of(memory)).outcome is Outcome.APPROVED


@each_case
async def test_by_the_final_poll_a_worker_does_what_the_table_says(case: OutcomeCase, memory: SqliteBroker) -> None:
    async with (
        ArrangedSandbox(case) as sandbox,
        working(sandbox, memory, schedule=AT_THE_DEADLINE, grace=0) as (worker, run),
    ):
        await submit(memory, case, expires_in=0.5)
        if case.worker_final is WorkerDoes.END:
            await until(run.done)
            assert isinstance(run.exception(), AuthenticationError)
        else:
            assert result_of(await event_of(memory), case) is case.worker_final
        # One before the create. A final poll that got no answer is repeated, also where the grace is over.
        assert worker.statistics.polls == 1 + (3 if case.worker_final is Result.UNANSWERED else 1)
        assert worker.statistics.created == (case.started_by == "backend")
