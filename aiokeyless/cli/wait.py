"""``aiokeyless wait``: waits for an operation, which another process may have created."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path  # noqa: TC003  # cyclopts reads the annotations
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import Parameter

from aiokeyless._version import __version__
from aiokeyless.client import IfMissing  # noqa: TC001  # cyclopts reads the signature of a command
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ConfigurationError,
    InconsistentOperationError,
    KeylessError,
    OperationMismatchError,
)
from aiokeyless.ticket import DEFAULT_LIFETIME, ApprovalTicket, DefaultTimeout

from .app import (
    AuthType,
    CommandError,
    InterruptedCommandError,
    JsonFlag,
    OptionalOperationId,
    Timeout,
    app,
    new_client,
    reading,
)
from .error_messages import describe, describe_method, format_count
from .render import Display, display_for, follow, new_console, print_fact, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiokeyless.models import Authentication, Operation
    from aiokeyless.reports import ApprovalUpdate

#: The names of outcomes in ``--json``, by error, the more specific ones first. Any other error is an "error".
_OUTCOMES: Final = (
    (ApprovalUnknownError, "unknown"),
    (ApprovalTimeoutError, "timed_out"),
    (OperationMismatchError, "mismatch"),
    (InconsistentOperationError, "inconsistent"),
)


def _check_target(
    operation_id: str | None = None,
    *,
    ticket: Path | None = None,
    require_auth_type: str | None = None,
    **_others: object,
) -> None:
    if (operation_id is None) == (ticket is None):
        raise ValueError("Name what to wait for: either OPERATION_ID or --ticket FILE.")
    if require_auth_type is not None and ticket is None:
        raise ValueError("--require-auth-type needs --ticket FILE: with OPERATION_ID, nothing is compared.")


@app.command(
    validator=_check_target,
    usage="Usage: aiokeyless wait [OPTIONS] OPERATION_ID\n       aiokeyless wait [OPTIONS] --ticket FILE",
    help_epilogue="""\
Example:
  aiokeyless wait txn-1 --timeout 60

Example, with the ticket, so that user, payload and factor are also checked:
  aiokeyless create C0FFEE --payload "Pay 40 to Alice" \\
    --require-auth-type biom --json > ticket.json
  aiokeyless wait --ticket ticket.json

Example, for an operation that the phone will create:
  aiokeyless wait txn-2 --if-missing wait

While the operation is pending, failed attempts under its id are shown. They
decide nothing.

Ctrl-C ends the wait, not the operation: the same command resumes it.

Exit codes: 0 approved, 1 error, 2 usage, 3 timed out, 4 timed out and the
outcome is unknown, 130 interrupted.""",
)
async def wait(
    operation_id: OptionalOperationId = None,
    /,
    *,
    # A leading hyphen is allowed for "-", which is stdin.
    ticket: Annotated[Path | None, Parameter(allow_leading_hyphen=True)] = None,
    timeout: Timeout = None,  # noqa: ASYNC109  # the client's own
    if_missing: IfMissing = "raise",
    require_auth_type: AuthType | None = None,
    as_json: JsonFlag = False,
) -> None:
    """Wait until an operation is approved.

    Args:
        operation_id: The operation.
        ticket: Instead of an id, a file with the ticket of create --json; - is stdin.
        timeout: Seconds, or inf for no limit; if left out: the ticket's remaining time, or 120 for an id.
        if_missing: If there is no such operation, fail (raise), or wait until the phone creates it (wait).
        require_auth_type: The factor that the approval must have: biom for a face, or pin; if left out: the ticket's.
        as_json: Print a line of JSON for each poll and each attempt of the user, and one for the outcome.
    """
    target = operation_id if ticket is None else _read_ticket(ticket)
    assert target is not None  # noqa: S101  # see _check_target
    if isinstance(target, ApprovalTicket) and require_auth_type is not None:
        target = msgspec.structs.replace(target, require_auth_type=require_auth_type)
    budget = timeout or (DEFAULT_LIFETIME if isinstance(target, str) else target.remaining())
    console = new_console()
    async with new_client() as client:
        display = _JsonLines(console) if as_json else display_for(console, budget)
        display.begin(_list_facts(target, budget))
        try:
            operation, elapsed = await follow(
                client,
                target,
                display,
                timeout=DefaultTimeout.FROM_TARGET if timeout is None else timeout,
                if_missing=if_missing,
            )
        except KeylessError as error:
            if as_json:
                print_json(console, _compose_outcome(display, _name_outcome(error), error=error))
            raise
        # Ctrl-C raises this in a coroutine.
        except asyncio.CancelledError:
            if as_json:
                print_json(console, _compose_outcome(display, "interrupted"))
            raise InterruptedCommandError("to resume, run the same command again") from None
    if as_json:
        print_json(console, _compose_outcome(display, "approved", operation=operation))
        return
    how = describe_method(operation.auth_type).strip()
    spent = f"after {elapsed:.1f} s and {format_count(display.polls, 'poll')}"
    print_fact(console, "Approved", f"{how}, {spent}" if how else spent, "bold green")
    print_fact(console, "User", operation.user_id)


def _read_ticket(path: Path) -> ApprovalTicket:
    """Read the ticket of a file, or that of stdin.

    Raises:
        CommandError: The file cannot be read, or is not a ticket.
    """
    try:
        with reading():
            return ApprovalTicket.from_json(sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes())
    except OSError as error:
        wrong = f"cannot be read ({error.strerror})"
    except ConfigurationError:
        wrong = f"is not a ticket that aiokeyless {__version__} can read"
    raise CommandError(f"--ticket: {path} {wrong}; to create one: aiokeyless create USER_ID --json > FILE")


def _list_facts(target: str | ApprovalTicket, budget: float) -> dict[str, str]:
    facts = {"Time": "no limit" if math.isinf(budget) else f"{budget:.0f} s at most"}
    if isinstance(target, str):
        return {"Operation": target, **facts}
    return {"Operation": target.operation_id, "User": target.user_id, **facts}


class _JsonLines(Display):
    """A line of JSON for each poll and each attempt to authenticate."""

    def begin(self, facts: Mapping[str, str]) -> None:
        """Print nothing."""

    def show_attempt(self, attempt: Authentication) -> None:
        """Print an attempt to authenticate, failed or not."""
        print_json(self._console, {"event": "attempt", "elapsed": round(self.elapsed, 3), **attempt.to_dict()})

    def show_poll(self, update: ApprovalUpdate) -> None:
        """Print the result of a poll, without the operation: the outcome has that."""
        line = {
            "event": "poll",
            "poll": update.polls,
            "elapsed": round(self.elapsed, 3),
            "state": None if update.operation is None else update.operation.state,
            "error": _describe_error(update.error),
            "next_poll_in": None if update.next_poll_in is None else round(update.next_poll_in, 3),
        }
        print_json(self._console, line)


def _compose_outcome(
    display: Display, outcome: str, *, operation: Operation | None = None, error: KeylessError | None = None
) -> dict[str, object]:
    return {
        "event": "outcome",
        "outcome": outcome,
        "polls": display.polls,
        "elapsed": round(display.elapsed, 3),
        "operation": None if operation is None else operation.to_dict(),
        "error": _describe_error(error),
    }


def _name_outcome(error: KeylessError) -> str:
    return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "error")


def _describe_error(error: KeylessError | None) -> dict[str, str] | None:
    return None if error is None else {"type": type(error).__name__, "message": describe(error)}
