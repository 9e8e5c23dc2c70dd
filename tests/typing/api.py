"""Never run: it is type-checked only, so that the public signatures stay what callers rely on."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import assert_never, assert_type

from tenacity import AsyncRetrying, wait_chain, wait_fixed

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalOutcome,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUpdate,
    Approved,
    Authentication,
    DefaultTimeout,
    IfExists,
    IfMissing,
    KeylessClient,
    KeylessError,
    NotApproved,
    OnCreated,
    OnPoll,
    Operation,
    Region,
    StartedBy,
    WaitTimeout,
    sync,
    wait_adaptive,
)
from aiokeyless.shutdown import close_on_signals
from aiokeyless.worker import ApprovalEvent, Submission


def without_an_event_loop(client: sync.KeylessClient) -> None:
    assert_type(client.get_operation("op"), Operation)
    assert_type(client.create_operation("C0FFEE", operation_payload="Pay", expires_in=60), ApprovalTicket)
    assert_type(client.hold_for_approval("op", seconds=25), Operation | None)
    assert_type(client.wait_for_approval("op", timeout=5, on_poll=print), Operation)
    assert_type(client.request_approval("C0FFEE", on_created=print, on_poll=print), Operation)
    assert_type(client.delete_user("C0FFEE"), None)
    assert_type(sync.KeylessClient.get_operation(client, "op"), Operation)
    assert_type(sync.submit_approval("sqlite:keyless.db", "C0FFEE", operation_id="op"), Submission)
    with sync.next_outcome("sqlite:keyless.db", reader="shop") as event:
        assert_type(event, ApprovalEvent)
    client.get_operation(5)  # type: ignore[arg-type]
    client.get_operation("op", 5)  # type: ignore[call-arg]
    client.hold_for_approval("op")  # type: ignore[call-arg]
    client.wait_for_approval("op", timout=5)  # type: ignore[call-arg]
    sync.submit_approval("sqlite:keyless.db", "C0FFEE", "op")  # type: ignore[call-arg]
    for update in client.watch_approval("op"):
        assert_type(update, ApprovalUpdate)
    for outcome in client.wait_for_approvals(["op"], timeout=None):
        assert_type(outcome, ApprovalOutcome)


async def waits(client: KeylessClient, ticket: ApprovalTicket) -> None:
    async with close_on_signals(client, AsyncExitStack()):
        pass

    async def async_on_poll(update: ApprovalUpdate) -> None:
        assert_type(update.operation, Operation | None)
        assert_type(update.error, KeylessError | None)

    assert_type(await client.wait_for_approval(ticket), Operation)
    assert_type(await client.wait_for_approval("op", timeout=None, on_poll=async_on_poll), Operation)
    assert_type(
        await client.wait_for_approval("op", timeout=DefaultTimeout.FROM_TARGET, on_poll=print, if_missing="wait"),
        Operation,
    )
    assert_type(await client.request_approval("C0FFEE", schedule=wait_fixed(2), on_poll=print), Operation)
    async for update in client.watch_approval(ticket, schedule=wait_fixed(2) + wait_fixed(1)):
        assert_type(update, ApprovalUpdate)
    async for outcome in client.wait_for_approvals(["op", ticket], schedule=wait_chain(wait_fixed(1))):
        assert_type(outcome, ApprovalOutcome)
        if outcome.error is None:
            assert_type(outcome, Approved)
            assert_type(outcome.operation, Operation)
        else:
            assert_type(outcome, NotApproved)
            assert_type(outcome.error, KeylessError)
        if outcome.operation is not None:
            assert_type(outcome, Approved)
        match outcome:
            case Approved(operation=operation):
                assert_type(operation, Operation)
            case NotApproved(error=error):
                assert_type(error, KeylessError)
            case _:
                assert_never(outcome)
    updates = client.watch_approval("op")
    assert_type(await anext(updates), ApprovalUpdate)
    await updates.aclose()


async def ask(
    client: KeylessClient,
    timeout: WaitTimeout = DefaultTimeout.FROM_TARGET,
    *,
    on_created: OnCreated | None = None,
    on_poll: OnPoll | None = None,
) -> Operation:
    """Pass the arguments of a wait on, typed by exported names alone."""
    if_exists: IfExists = "resume"
    if_missing: IfMissing = "wait"
    started_by: StartedBy = "phone"
    await client.request_approval("C0FFEE", started_by=started_by, on_created=on_created, on_poll=on_poll)
    ticket = await client.create_operation("C0FFEE", if_exists=if_exists)
    return await client.wait_for_approval(ticket, timeout=timeout, if_missing=if_missing, on_poll=on_poll)


async def hold(client: KeylessClient, ticket: ApprovalTicket) -> None:
    assert_type(await client.hold_for_approval(ticket, seconds=25, if_missing="wait"), Operation | None)
    assert_type(await client.hold_for_approval(ticket, seconds=25, explain=True), Operation | None)
    async for update in client.watch_approval(ticket, explain=True):
        assert_type(update.attempts, tuple[Authentication, ...])


async def errors(client: KeylessClient) -> None:
    try:
        await client.wait_for_approval("op")
    except ApprovalTimeoutError as error:
        assert_type(error.is_transient, bool)
        assert_type(error.last_operation, Operation | None)
        assert_type(error.ticket, ApprovalTicket | None)
        assert_type(error.elapsed, float)
    try:
        await client.create_operation("C0FFEE", operation_id="op")
    except AlreadyApprovedError as found:
        assert_type(await client.wait_for_approval(found.ticket), Operation)


KeylessClient("key", region=Region.EU, schedule=wait_adaptive(poll_cost=1))
KeylessClient("key", region="us", schedule=wait_fixed(2))
AsyncRetrying(wait=wait_adaptive())
