from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from tenacity import wait_fixed
from waiting import until

from aiokeyless.worker import ApprovalRequest, ApprovalWorker, submit_approval

from ..reading import read  # noqa: TID252

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

    from .brokers import Storage


async def test_the_phone_is_told_once_by_the_delivery_that_first_knows_that_the_operation_is_there(
    storage: Storage, client: KeylessClient, sandbox: Sandbox
) -> None:
    told: list[ApprovalRequest] = []
    async with storage.broker() as broker:
        worker = ApprovalWorker(client, broker, schedule=wait_fixed(0.2), on_created=told.append)
        async with worker:
            sandbox.drop_next(stored=True, method="POST")
            sandbox.fail_next(404, method="GET")  # the poll before the create
            sandbox.fail_next(method="GET")  # the check whether the create took effect
            await submit_approval(broker, "C0FFEE", operation_id="txn-1", operation_payload="Pay 40")
            await until(lambda: bool(told))
            assert "txn-1" in sandbox.operations
            polls = worker.statistics.polls
            await until(lambda: worker.statistics.polls >= polls + 3)
            sandbox.approve("txn-1")
            await read(broker)
            await asyncio.sleep(0)
    assert [(request.operation_id, request.operation_payload) for request in told] == [("txn-1", "Pay 40")]
