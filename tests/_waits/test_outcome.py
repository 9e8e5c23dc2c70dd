"""The table of cases against the poller, over real HTTP and with a clock that moves by itself."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest
from outcome_cases import AUTH_TYPE, CASES, EXTERNAL_USER_ID, OPERATION_ID, PAYLOAD, USER_ID, OutcomeCase, Result
from tenacity import wait_fixed

from aiokeyless import (
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    InconsistentOperationError,
    KeylessError,
    Operation,
    OperationMismatchError,
    StatusError,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiokeyless import ApprovalTicket, ApprovalUpdate, KeylessClient
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

each_case = pytest.mark.parametrize("case", CASES, ids=str)


def interval(case: OutcomeCase) -> float:
    """Return the seconds between polls: the first one comes while an operation is young, or long after."""
    return 2.0 if case.is_young else 10.0


async def create(client: KeylessClient) -> ApprovalTicket:
    return await client.create_operation(
        USER_ID,
        operation_id=OPERATION_ID,
        operation_payload=PAYLOAD,
        external_user_id=EXTERNAL_USER_ID,
        require_auth_type=AUTH_TYPE,
    )


@each_case
async def test_the_sandbox_answers_a_poll_as_the_table_says(case: OutcomeCase, sandbox: Sandbox) -> None:
    answer: Operation | KeylessError
    async with sandbox.client(max_attempts=1) as client:
        await create(client)
        case.arrange(sandbox, OPERATION_ID)
        try:
            answer = await client.get_operation(OPERATION_ID)
        except KeylessError as error:
            answer = error
    assert facts(answer) == facts(case.answer)


def facts(answer: Operation | KeylessError) -> tuple[object, ...]:
    """Return what decides in an answer."""
    if isinstance(answer, StatusError):
        return type(answer), answer.status, answer.retry_after
    if isinstance(answer, Operation):
        of_whom = answer.operation_id, answer.user_id, answer.operation_payload, answer.external_user_id
        return answer.state, answer.result, answer.auth_type, *of_whom
    return (type(answer),)


@each_case
async def test_ordinary_polls_do_as_the_table_says(case: OutcomeCase, sandbox: Sandbox, client: KeylessClient) -> None:
    ticket = msgspec.structs.replace(await create(client), started_by=case.started_by)
    updates = client.watch_approval(
        ticket, timeout=1000, schedule=wait_fixed(interval(case)), if_missing=case.if_missing
    )
    try:
        if case.was_seen:
            assert (await anext(updates)).operation is not None
        case.arrange(sandbox, OPERATION_ID)
        assert await result_of_the_next_poll(updates, case) is case.before
    finally:
        await updates.aclose()
    assert client.statistics.polls == 1 + case.was_seen
    assert client.statistics.transient_failures == (case.before is Result.TRANSIENT)


async def result_of_the_next_poll(updates: AsyncGenerator[ApprovalUpdate], case: OutcomeCase) -> Result:
    try:
        update = await anext(updates)
    except KeylessError as error:
        return result_of_an_end(error, case)
    if update.next_poll_in is None:
        assert update.operation is not None
        assert update.operation.is_approved
        return Result.APPROVED
    answer = update.operation or update.error
    assert answer is not None
    assert facts(answer) == facts(case.answer)
    if update.next_poll_in == pytest.approx(interval(case)):
        return Result.PENDING
    pause = case.answer.retry_after if isinstance(case.answer, StatusError) else None
    assert (pause or 0) <= update.next_poll_in <= max(0.5, pause or 0)  # 0.5: the first window of the backoff
    return Result.TRANSIENT


@each_case
async def test_final_polls_do_what_the_table_says(case: OutcomeCase, sandbox: Sandbox, client: KeylessClient) -> None:
    ticket = msgspec.structs.replace(await create(client), started_by=case.started_by)
    created_at = asyncio.get_running_loop().time()
    timeout = interval(case) * (1.5 if case.was_seen else 0.75)  # after one poll, or before any
    wait = asyncio.create_task(
        client.wait_for_approval(
            ticket, timeout=timeout, schedule=wait_fixed(interval(case)), if_missing=case.if_missing
        )
    )
    await asyncio.sleep(timeout - 0.1)
    assert client.statistics.polls == case.was_seen
    case.arrange(sandbox, OPERATION_ID)
    [end] = await asyncio.gather(wait, return_exceptions=True)
    assert isinstance(end, Operation | KeylessError)
    assert result_of_an_end(end, case) is case.final
    final_polls = client.statistics.polls - case.was_seen
    took = asyncio.get_running_loop().time() - created_at
    if case.final is Result.UNANSWERED:  # repeated for as long as a final poll may take
        assert final_polls > 1
        assert timeout < took <= timeout + 2 + 1e-6
    else:
        assert final_polls == 1
        assert took == pytest.approx(timeout)


def result_of_an_end(end: Operation | KeylessError, case: OutcomeCase) -> Result:
    """Return the result that a wait ended with."""
    if isinstance(end, Operation):
        return Result.APPROVED
    if isinstance(end, ApprovalUnknownError):
        assert end.last_error is not None
        assert facts(end.last_error) == facts(case.answer)
        return Result.UNANSWERED
    if isinstance(end, ApprovalTimeoutError):
        return Result.TIMED_OUT
    if isinstance(end, ApprovalError):
        assert case.rejection is not None
        assert type(end) is (OperationMismatchError if case.rejection.is_mismatch else InconsistentOperationError)
        assert case.rejection.value in str(end)
        return Result.REJECTED
    assert facts(end) == facts(case.answer)
    return Result.FAILED
