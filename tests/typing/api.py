"""Never run: it is type-checked only, so that the public signatures stay what callers rely on."""

from __future__ import annotations

from datetime import datetime
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
    Authentications,
    ClientStatistics,
    DefaultTimeout,
    Device,
    ExternalUser,
    IfExists,
    IfMissing,
    KeylessClient,
    KeylessError,
    NotApproved,
    OnCreated,
    OnPoll,
    Operation,
    PendingOperation,
    Region,
    Secret,
    SignatureError,
    SignatureReason,
    StartedBy,
    User,
    WaitTimeout,
    sync,
    wait_adaptive,
)
from aiokeyless.sandbox import Sandbox
from aiokeyless.signatures import SignedTransaction, TransactionVerifier
from aiokeyless.worker import ApprovalEvent, Submission


async def calls(client: KeylessClient) -> None:
    assert_type(await client.get_pending_operations("C0FFEE"), list[PendingOperation])
    attempts = await client.get_authentications(user_id="C0FFEE", operation_id="op")
    assert_type(attempts, Authentications)
    assert_type(attempts.truncated, bool)
    assert_type(attempts[0], Authentication)
    assert_type(attempts[0].reason, str | None)
    operation = await client.get_operation("op")
    assert_type(operation, Operation)
    assert_type(operation.is_approved, bool)
    assert_type(operation.created_at, datetime | None)
    assert_type(operation.api_key, Secret | None)
    ticket = await client.create_operation("C0FFEE", operation_payload="Pay", expires_in=60)
    assert_type(ticket, ApprovalTicket)
    assert_type(ApprovalTicket.from_json(ticket.to_json()), ApprovalTicket)
    assert_type(client.statistics, ClientStatistics)
    assert_type(client.statistics.circuit, str)


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


async def users(client: KeylessClient) -> None:
    link = await client.create_external_user("C0FFEE", "ann")
    assert_type(link, ExternalUser)
    assert_type(link.sdk_customer_id, int | None)
    assert_type(await client.update_external_user("C0FFEE", "ann"), ExternalUser)
    assert_type(await client.find_users("ann"), list[User])
    assert_type(await client.get_user("ann"), User)
    devices = await client.get_devices("C0FFEE")
    assert_type(devices, list[Device])
    await client.delete_device("C0FFEE", devices[0].public_signing_key)
    await client.delete_external_user("ann")
    await client.delete_user("C0FFEE")


async def signatures(client: KeylessClient, token: str) -> None:
    verifier = TransactionVerifier(client, tenant="acme", max_age=60, leeway=0, issuer="keyless", audience=None)
    try:
        signed = await verifier.verify(token, user_id="C0FFEE", transaction_data="Pay", external_user_id="ann")
    except SignatureError as error:
        assert_type(error.reason, SignatureReason)
        return
    assert_type(signed, SignedTransaction)
    assert_type(signed.issued_at, datetime)
    assert_type(signed.signed_sha256, str)


async def waits(client: KeylessClient, ticket: ApprovalTicket) -> None:
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


async def sandboxes() -> None:
    async with Sandbox(auto_approve=lambda operation: 1.0 if operation.operation_payload else None) as sandbox:
        assert_type(sandbox.client(), KeylessClient)
        assert_type(sandbox.operations["op"], Operation)
        assert_type(sandbox.enroll("C0FFEE", external_user_id="ann"), Device)
        assert_type(sandbox.sign("op", tampered=True, claims={"exp": 0}), str)
        assert_type(sandbox.rotate_keys(retire=True), str)


KeylessClient("key", region=Region.EU, schedule=wait_adaptive(poll_cost=1))
KeylessClient("key", region="us", schedule=wait_fixed(2))
AsyncRetrying(wait=wait_adaptive())
