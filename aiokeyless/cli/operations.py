"""``aiokeyless create``, ``get``, ``pending`` and ``attempts``: the commands on operations that do not wait."""

from __future__ import annotations

import json
import sys
import uuid
from typing import TYPE_CHECKING

import msgspec

from aiokeyless._waits.explanation import merge_attempts
from aiokeyless.client import IfExists  # noqa: TC001  # cyclopts reads the signature of a command
from aiokeyless.models import Operation, OperationState
from aiokeyless.ticket import DEFAULT_LIFETIME

from .app import (
    AsJson,
    AuthType,
    CommandError,
    JsonFlag,
    OperationId,
    OptionalOperationId,
    Seconds,
    UserId,
    app,
    explain_interruption,
    open_client,
)
from .error_messages import describe_method, quote_operation_id, wait_command
from .render import new_console, print_command, print_fact, print_json, print_list, print_object, print_table

if TYPE_CHECKING:
    from aiokeyless.client import KeylessClient
    from aiokeyless.models import Authentication


@app.command(
    help_epilogue="""\
Example:
  aiokeyless create C0FFEE --payload "Pay 40 to Alice"

Example, with the ticket, which binds the wait to user, payload and factor:
  aiokeyless create C0FFEE --payload "Pay 40 to Alice" \\
    --require-auth-type biom --json > ticket.json
  aiokeyless wait --ticket ticket.json

Example, which can be repeated:
  aiokeyless create C0FFEE --operation-id txn-1 --if-exists resume"""
)
async def create(
    user_id: UserId,
    /,
    *,
    operation_id: OptionalOperationId = None,
    payload: str | None = None,
    external_user_id: str | None = None,
    expires_in: Seconds = DEFAULT_LIFETIME,
    if_exists: IfExists = "raise",
    require_auth_type: AuthType | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Create an operation for a user to approve.

    Args:
        operation_id: The operation's id, unique in the tenant; a new UUID if left out.
        payload: What the user is asked to approve.
        external_user_id: Your own id of the user.
        expires_in: Seconds after which a wait for the ticket ends. The user can still approve later.
        if_exists: If this operation exists already and is pending, fail (raise), or take it (resume).
        require_auth_type: The factor that an approval must have for a wait for the ticket: biom for a face, or pin.
        as_json: Print the ticket, for wait --ticket, and nothing else.
    """
    # The client would generate one as well, but not name it if it is interrupted.
    operation_id = operation_id or str(uuid.uuid4())
    check = f"operation {operation_id} may exist; to check: aiokeyless get {quote_operation_id(operation_id)}"
    async with open_client(as_json=as_json) as client:
        with explain_interruption(check):
            ticket = await client.create_operation(
                user_id,
                operation_id=operation_id,
                operation_payload=payload,
                external_user_id=external_user_id,
                expires_in=expires_in,
                if_exists=if_exists,
                require_auth_type=require_auth_type,
            )
    console = new_console()
    if as_json:
        print_json(console, json.loads(ticket.to_json()))
        return
    print_fact(console, "Pending" if ticket.reconciled else "Created", ticket.operation_id, "bold")
    print_fact(console, "User", ticket.user_id)
    console.print()
    console.print("Wait for it, and for no other user or payload:")
    console.print()
    print_command(console, wait_command(ticket))
    if sys.stderr.isatty():
        sys.stderr.write("Next, your application notifies the phone.\n")


@app.command(help_epilogue="Example:\n  aiokeyless get txn-1\n  aiokeyless get txn-1 --json")
async def get(operation_id: OperationId, /, *, as_json: AsJson = False) -> None:
    """Show an operation as it is now."""
    async with open_client(as_json=as_json) as client:
        operation = await _get(client, operation_id)
    facts = {
        "Operation": operation.operation_id,
        "State": _describe_state(operation),
        "Payload": operation.operation_payload,
        "User": operation.user_id,
        "External": operation.external_user_id,
        "Created": None if operation.timestamp is None else str(operation.timestamp),
    }
    result = {**operation.to_dict(), "is_approved": operation.is_approved}
    print_object(result, facts, bold="State", as_json=as_json)


async def _get(client: KeylessClient, operation_id: str) -> Operation:
    operation = await client.get_operation(operation_id)
    if operation.operation_id != operation_id:
        raise CommandError(
            f"the answer is about another operation, {operation.operation_id[:80]}; do not trust it, and check the "
            "proxies between you and Keyless"
        )
    return operation


def _describe_state(operation: Operation) -> str:
    if operation.is_approved:
        return f"approved{describe_method(operation.auth_type)}"
    if operation.state == OperationState.PENDING:
        return "pending"
    return f"{operation.state}, with result {operation.result}: contradictory or unknown; do not trust it"


@app.command(help_epilogue="Example:\n  aiokeyless pending C0FFEE\n  aiokeyless pending C0FFEE --json")
async def pending(user_id: UserId, /, *, as_json: AsJson = False) -> None:
    """List the operations that wait for a user's approval.

    An operation that is not in the list is not necessarily approved.
    """
    async with open_client(as_json=as_json) as client:
        operations = await client.get_pending_operations(user_id)
    result = {"user_id": user_id.upper(), "pending": [msgspec.structs.asdict(o) for o in operations]}
    rows = [
        {
            "Operation": operation.operation_id,
            "Payload": operation.operation_payload,
            "External user": operation.external_user_id,
            "By": operation.auth_type,
        }
        for operation in operations
    ]
    print_list(result, rows, f"No pending operations for {user_id.upper()}.", as_json=as_json)


@app.command(help_epilogue="Example:\n  aiokeyless attempts txn-1\n  aiokeyless attempts txn-1 --json")
async def attempts(operation_id: OperationId, /, *, as_json: AsJson = False) -> None:
    """Show how the user tried to approve an operation in the last ten minutes.

    An attempt is never an approval: only the operation's state is.
    """
    async with open_client(as_json=as_json) as client:
        # Telemetry needs the operation's user.
        operation = await _get(client, operation_id)
        answered = await client.get_authentications(user_id=operation.user_id, operation_id=operation_id)
    made = merge_attempts((), answered.attempts, operation_id)
    console = new_console()
    if as_json:
        print_json(
            console,
            {
                "operation_id": operation_id,
                "user_id": operation.user_id,
                "is_approved": operation.is_approved,
                "attempts": [attempt.to_dict() for attempt in made],
                "truncated": answered.truncated,
            },
        )
        return
    print_fact(console, "Operation", operation_id)
    print_fact(console, "State", _describe_state(operation), "bold")
    console.print()
    if made:
        print_table(console, [_to_row(attempt) for attempt in made])
    else:
        console.print("No attempts under this operation's id in the last ten minutes.")
    if answered.truncated:
        console.print("There are more, which the service does not show.")


def _to_row(attempt: Authentication) -> dict[str, str | None]:
    code = attempt.error_code or 0
    why = f"{attempt.reason} ({code})" if attempt.reason else f"error {code}"
    return {
        "Time": (attempt.created_at or "unknown").partition(".")[0],
        "Result": attempt.result,
        "Why": why if code else None,
        "By": attempt.auth_type,
        "Device": attempt.device_id,
    }
