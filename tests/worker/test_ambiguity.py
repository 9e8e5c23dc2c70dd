"""The table of failed creates against a worker: what may have taken effect is waited for, whatever a replica says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from ambiguity_cases import ANSWERED, OPERATION_ID, USER_ID, AmbiguityCase
from waiting import until

from aiokeyless import AuthenticationError, ConflictError
from aiokeyless.worker import FailureReason, Outcome, submit_approval

from .reading import read, working

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize("case", ANSWERED, ids=str)
async def test_what_may_have_been_created_is_waited_for_although_a_replica_does_not_have_it_yet(
    case: AmbiguityCase, sandbox: Sandbox
) -> None:
    async with working(sandbox) as (_, broker):
        case.fail(sandbox)
        sandbox.fail_next(404, times=2, method="GET")  # before the create there is nothing; then the replica lags
        await submit_approval(broker, USER_ID, operation_id=OPERATION_ID)
        await until(lambda: OPERATION_ID in sandbox.operations)
        await asyncio.sleep(10)
        sandbox.approve(OPERATION_ID)
        [event] = await read(broker)
    if case.may_have_taken_effect:
        assert event.outcome is Outcome.APPROVED, event.detail
    else:  # a create that is repeated finds an operation of somebody else
        is_repeated = case.error.is_transient or isinstance(case.error, AuthenticationError | ConflictError)
        assert event.reason == (FailureReason.CONFLICT if is_repeated else FailureReason.REJECTED)
    assert list(sandbox.operations) == [OPERATION_ID]
