"""``aiokeyless wait``: waits for an operation, which another process may have created."""

from __future__ import annotations

import asyncio
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
from cyclopts import Parameter

from aiokeyless._version import __version__
from aiokeyless.client import DefaultTimeout, IfMissing  # cyclopts reads the signature of a command
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ConfigurationError,
    InconsistentOperationError,
    KeylessError,
    OperationMismatchError,
)
from aiokeyless.ticket import DEFAULT_LIFETIME, ApprovalTicket

from .app import (
    AuthType,
    CommandError,
    InterruptedCommandError,
    JsonFlag,
    OptionalOperationId,
    Timeout,
    app,
    new_client,
)
from .error_messages import describe, describe_method, format_count, quote, quote_operation_id
from .render import Display, Progress, display_for, follow, new_console, print_fact, print_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cyclopts import Token

    from aiokeyless.models import Authentication, Operation
    from aiokeyless.reports import ApprovalUpdate

_TICKET_LIMIT: Final = 1 << 20
_STDIN: Final = "-"
_HOW_TO_CREATE: Final = "to create one: aiokeyless create USER_ID --json > FILE"

#: The names of outcomes in ``--json``, by error, the more specific ones first. Any other error is an "error".
_OUTCOMES: Final = (
    (ApprovalUnknownError, "unknown"),
    (ApprovalTimeoutError, "timed_out"),
    (OperationMismatchError, "mismatch"),
    (InconsistentOperationError, "inconsistent"),
)


if TYPE_CHECKING:
    _Path = Path
else:
    _Path = type(Path())  # before Python 3.12, Path itself has no subclasses


class File(_Path):
    """The value of ``--ticket FILE``: a path, which shells complete. The help shows the name of this class."""

    ticket: ApprovalTicket


def _read_ticket(_type: object, tokens: Sequence[Token]) -> File:
    """Read the ticket from the file that an argument names.

    This runs while the arguments are parsed, before the event loop starts: in a running loop, Ctrl-C would not
    interrupt reading from a terminal.

    Raises:
        CommandError: The file cannot be read, or is not a ticket.
    """
    name = tokens[0].value
    try:
        if name == _STDIN:
            content = sys.stdin.buffer.read(_TICKET_LIMIT)
        else:
            with Path(name).open("rb") as opened:
                content = opened.read(_TICKET_LIMIT)
    # A null byte in the name is a ValueError.
    except (OSError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
        raise CommandError(f"cannot read the ticket {name} ({reason}); {_HOW_TO_CREATE}") from None
    try:
        file = File(name)
        file.ticket = ApprovalTicket.from_json(content)
    except ConfigurationError:
        raise CommandError(
            f"{'stdin' if name == _STDIN else name} is not a ticket that aiokeyless {__version__} can read; "
            f"{_HOW_TO_CREATE}"
        ) from None
    return file


def _check_target(
    operation_id: str | None = None,
    *,
    ticket: File | None = None,
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

Ctrl-C ends the wait, not the operation, and prints how to resume.

Exit codes: 0 approved, 1 error, 2 usage, 3 timed out, 4 timed out and the
outcome is unknown, 130 interrupted.""",
)
async def wait(
    operation_id: OptionalOperationId = None,
    /,
    *,
    # A leading hyphen is allowed for "-", which is stdin.
    ticket: Annotated[
        File | None, Parameter(converter=_read_ticket, accepts_keys=False, n_tokens=1, allow_leading_hyphen=True)
    ] = None,
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
    target = operation_id if ticket is None else ticket.ticket
    assert target is not None  # noqa: S101  # see _check_target
    if isinstance(target, ApprovalTicket) and require_auth_type is not None:
        target = msgspec.structs.replace(target, require_auth_type=require_auth_type)
    budget = timeout or (DEFAULT_LIFETIME if isinstance(target, str) else target.remaining())
    console = new_console()
    async with new_client() as client:
        progress = Progress(budget)
        display = _JsonLines(console) if as_json else display_for(console)
        display.begin(_list_facts(target, budget))
        try:
            operation, elapsed = await follow(
                client,
                target,
                progress,
                display,
                timeout=DefaultTimeout.FROM_TARGET if timeout is None else timeout,
                if_missing=if_missing,
            )
        except KeylessError as error:
            if as_json:
                print_json(console, _compose_outcome(progress, _name_outcome(error), error=error))
            raise
        # Ctrl-C raises this in a coroutine.
        except asyncio.CancelledError:
            if as_json:
                print_json(console, _compose_outcome(progress, "interrupted"))
            options = _format_options(
                timeout=timeout, if_missing=if_missing, require_auth_type=require_auth_type, as_json=as_json
            )
            raise InterruptedCommandError(_explain_resuming(operation_id or ticket, options)) from None
    if as_json:
        print_json(console, _compose_outcome(progress, "approved", operation=operation))
        return
    how = describe_method(operation.auth_type).strip()
    spent = f"after {elapsed:.1f} s and {format_count(progress.polls, 'poll')}"
    print_fact(console, "Approved", f"{how}, {spent}" if how else spent, "bold green")
    print_fact(console, "User", operation.user_id)


def _format_options(
    *, timeout: float | None, if_missing: IfMissing, require_auth_type: str | None, as_json: bool
) -> str:
    """Return the options to repeat for the same wait."""
    return (
        ("" if timeout is None else f" --timeout {timeout:g}")
        + ("" if if_missing == "raise" else f" --if-missing {if_missing}")
        + ("" if require_auth_type is None else f" --require-auth-type={require_auth_type}")
        + (" --json" if as_json else "")
    )


def _explain_resuming(target: str | File | None, options: str) -> str:
    if isinstance(target, File):
        where = " with the same ticket on stdin" if str(target) == _STDIN else ""
        return f"to resume{where}: aiokeyless wait{options} --ticket={quote(str(target))}"
    assert target is not None  # noqa: S101  # see _check_target
    return f"to resume: aiokeyless wait{options} {quote_operation_id(target)}"


def _list_facts(target: str | ApprovalTicket, budget: float) -> dict[str, str]:
    facts = {"Time": "no limit" if math.isinf(budget) else f"{budget:.0f} s at most"}
    if isinstance(target, str):
        return {"Operation": target, **facts}
    return {"Operation": target.operation_id, "User": target.user_id, **facts}


class _JsonLines(Display):
    """A line of JSON for each poll and each attempt to authenticate."""

    def begin(self, facts: Mapping[str, str]) -> None:
        """Print nothing."""

    def attempt(self, progress: Progress, attempt: Authentication) -> None:
        """Print an attempt to authenticate, failed or not."""
        print_json(self._console, {"event": "attempt", "elapsed": round(progress.elapsed, 3), **attempt.to_dict()})

    def poll(self, progress: Progress, update: ApprovalUpdate) -> None:
        """Print the result of a poll, without the operation: the outcome has that."""
        line = {
            "event": "poll",
            "poll": update.polls,
            "elapsed": round(progress.elapsed, 3),
            "state": None if update.operation is None else update.operation.state,
            "error": _describe_error(update.error),
            "next_poll_in": None if update.next_poll_in is None else round(update.next_poll_in, 3),
        }
        print_json(self._console, line)


def _compose_outcome(
    progress: Progress, outcome: str, *, operation: Operation | None = None, error: KeylessError | None = None
) -> dict[str, object]:
    return {
        "event": "outcome",
        "outcome": outcome,
        "polls": progress.polls,
        "elapsed": round(progress.elapsed, 3),
        "operation": None if operation is None else operation.to_dict(),
        "error": _describe_error(error),
    }


def _name_outcome(error: KeylessError) -> str:
    return next((name for kind, name in _OUTCOMES if isinstance(error, kind)), "error")


def _describe_error(error: KeylessError | None) -> dict[str, str] | None:
    return None if error is None else {"type": type(error).__name__, "message": describe(error)}
