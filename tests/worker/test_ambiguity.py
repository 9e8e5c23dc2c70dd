"""The table of failed creates against a worker: what may have taken effect is waited for, whatever a replica says."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from ambiguity_cases import ANSWERED, OPERATION_ID, USER_ID, AmbiguityCase
from tenacity import wait_fixed

from aiokeyless.worker import ApprovalWorker, Outcome, submit_approval

from .reading import read

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.sqlite import SqliteBroker

pytestmark = pytest.mark.looptime


@pytest.mark.parametrize("case", ANSWERED, ids=str)
async def test_what_may_have_been_created_is_waited_for_although_a_replica_does_not_have_it_yet(
    case: AmbiguityCase,
    client: KeylessClient,
    sandbox: Sandbox,
    memory: SqliteBroker,
) -> None:
    broker = memory
    async with ApprovalWorker(client, broker, schedule=wait_fixed(1.0)):
        case.fail(sandbox)
        sandbox.fail_next(404, times=2, method="GET")  # before the create there is nothing; then the replica lags
        await submit_approval(broker, USER_ID, operation_id=OPERATION_ID)
        while OPERATION_ID not in sandbox.operations:  # noqa: ASYNC110  # the sandbox has no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(10)
        sandbox.approve(OPERATION_ID)
        [event] = await read(broker)
    assert event.outcome is (Outcome.APPROVED if case.may_have_taken_effect else Outcome.FAILED), event.detail
    assert list(sandbox.operations) == [OPERATION_ID]
