"""A workflow that moves money only after its owner has approved on the phone."""

import re
from dataclasses import dataclass
from datetime import timedelta

from temporalio import workflow

with workflow.unsafe.imports_passed_through():  # they do I/O, in activities alone
    from activities import Approvals, Bank, Outcome, Request

TASK_QUEUE = "approvals"
PAYEE = re.compile(r"[A-Za-z][A-Za-z .'-]{0,39}")  # a phone shows each of these letters
HEARTBEAT_TIMEOUT = timedelta(seconds=60)  # so long a dead worker is not noticed; also more than a create may take


@dataclass(frozen=True)
class Order:
    """What the workflow is started with; a real one has `user_id` from the user's enrolment."""

    user_id: str
    amount: str
    payee: str
    expires_in: float = 120.0


@workflow.defn
class Transfer:
    """Ask, wait, transfer."""

    @workflow.run
    async def run(self, order: Order) -> str:
        """Return what became of the order."""
        if not PAYEE.fullmatch(order.payee):
            return "Not asked: the payee's name must be of plain letters."
        request = Request(
            operation_id=str(workflow.uuid4()),  # the same in a replay, and of no other run
            user_id=order.user_id,
            payload=f"Transfer {order.amount} to {order.payee}",
            expires_in=order.expires_in,
        )
        outcome = await workflow.execute_activity_method(
            Approvals.wait_for_approval,
            request,
            start_to_close_timeout=timedelta(seconds=order.expires_in) + 2 * HEARTBEAT_TIMEOUT,
            heartbeat_timeout=HEARTBEAT_TIMEOUT,
        )
        if outcome != Outcome.APPROVED:
            return "Not approved in time. Nothing is transferred, also if it is approved later."
        await workflow.execute_activity_method(Bank.transfer, request, start_to_close_timeout=timedelta(seconds=30))
        return "Approved and transferred."
