"""The words of the command line: which are understood, and what is answered when something goes wrong.

Everything that ends a command early becomes one line on stderr and an exit code here, in words for a terminal: the
library's own messages speak to programs.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import sys
from enum import IntEnum
from typing import TYPE_CHECKING, Annotated, Final

from cyclopts import App, CycloptsError, Parameter

from aiokeyless import protocol
from aiokeyless._version import __version__
from aiokeyless.client import KeylessClient
from aiokeyless.errors import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    BadRequestError,
    ConfigurationError,
    ConflictError,
    KeylessError,
    NotFoundError,
    RateLimitError,
    StatusError,
    TransportError,
)

from .screen import counted, safe

if TYPE_CHECKING:
    from collections.abc import Sequence


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    ERROR = 1
    USAGE = 2
    TIMED_OUT = 3
    INTERRUPTED = 130


class CommandError(Exception):
    """What a command cannot do, and what to do about it: the line as it is shown."""


app = App(
    name="aiokeyless",
    version=f"aiokeyless {__version__}",
    help="Ask a Keyless user to approve something on their phone, and wait for it.",
    help_format="plaintext",
    help_epilogue="""\
Example, with no key and no network:
  aiokeyless demo

The key is read from KEYLESS_API_KEY; where to, from KEYLESS_REGION or
KEYLESS_BASE_URL. A service to try all of it on, with a phone in your browser:
  aiokeyless sandbox

Exit codes: 0 approved or done, 1 error, 2 usage, 3 timed out, 130 interrupted.""",
    # What goes wrong is for `run` to say, in one line.
    print_error=False,
    exit_on_error=False,
    suppress_keyboard_interrupt=False,
    result_action="return_value",
)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run a command; what goes wrong is one line on stderr.

    Args:
        arguments: The words after ``aiokeyless``. Default: those of this process.

    Returns:
        The exit code, see `Exit`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a payload may hold what the terminal's encoding has not
    try:
        # --help and --version return nothing
        return app(sys.argv[1:] if arguments is None else arguments) or Exit.DONE
    except CycloptsError as error:
        command = " ".join(("aiokeyless", *(error.command_chain or ()), "--help"))
        message = str(error)
        return _complain(f"{message}{'' if message.endswith(('.', '?')) else '.'} See {command}.", Exit.USAGE)
    except ApprovalTimeoutError as error:
        return _complain(in_words(error), Exit.TIMED_OUT)
    except KeylessError as error:
        return _complain(in_words(error), Exit.ERROR)
    except (CommandError, OSError) as error:
        return _complain(str(error), Exit.ERROR)
    except KeyboardInterrupt:
        return _complain("interrupted", Exit.INTERRUPTED)


def _complain(message: str, code: Exit) -> Exit:
    sys.stderr.write(f"aiokeyless: {safe(message)}\n")
    return code


# -- what is understood


def _check_user_id(_type: object, user_id: str) -> None:
    protocol.check_user_id(user_id)


def _check_operation_id(_type: object, operation_id: str | None) -> None:
    if operation_id is not None:
        protocol.check_operation_id(operation_id)


def _check_seconds(_type: object, seconds: float | None) -> None:
    if seconds is not None and not seconds > 0:  # NaN is not
        raise ValueError("Must be more than 0 seconds.")


UserId = Annotated[str, Parameter(name="USER_ID", validator=_check_user_id)]
OperationId = Annotated[str, Parameter(name="OPERATION_ID", validator=_check_operation_id)]
OptionalOperationId = Annotated[str | None, Parameter(validator=_check_operation_id)]
Seconds = Annotated[float, Parameter(validator=_check_seconds)]
OptionalSeconds = Annotated[float | None, Parameter(validator=_check_seconds)]
AsJson = Annotated[bool, Parameter(name="--json", negative="", show_default=False)]


def new_client(*, max_attempts: int = 3) -> KeylessClient:
    """Make the client that the environment asks for, for the caller to close.

    Args:
        max_attempts: Attempts of one call.

    Raises:
        CommandError: The environment has no key, or holds what the client does not take.
    """
    if not os.environ.get("KEYLESS_API_KEY", "").strip():
        raise CommandError(
            "no API key: export KEYLESS_API_KEY=... with the key of your tenant (to try it with none: "
            "aiokeyless sandbox)"
        )
    try:
        return KeylessClient(max_attempts=max_attempts)
    except ConfigurationError as error:
        # The client speaks of its arguments; here they are variables.
        message = re.sub(r"\b(api_key|base_url|region)\b", lambda name: f"KEYLESS_{name[0].upper()}", str(error))
        raise CommandError(message.replace("pass ", "set ")) from None


# -- what is answered

#: Of the library's advice, that which names a method, an attribute or an argument of it.
_ADVICE: Final[dict[type[KeylessError], str]] = {
    BadRequestError: "the service finds it malformed",
    NotFoundError: "no such operation or user; check the id (one that the phone will make: wait --if-missing wait)",
    ConflictError: "the operation id is taken; use another, or leave --operation-id out to have one made",
    RateLimitError: "too many requests; try again later",
}


def in_words(error: KeylessError) -> str:
    """Return what an error says and what to do about it, in words of the command line."""
    match error:
        case ApprovalTimeoutError():
            return _timeout_in_words(error)
        case StatusError() if advice := _ADVICE.get(type(error)):
            detail = f" ({error.detail})" if error.detail and isinstance(error, BadRequestError) else ""
            return f"{error.method} {error.path} answered {error.status}: {advice}{detail}"
        case TransportError() if base_url := os.environ.get("KEYLESS_BASE_URL"):
            return f"{error}; KEYLESS_BASE_URL is {base_url}: is that right, and does it run?"
    return str(error)


def _timeout_in_words(error: ApprovalTimeoutError) -> str:
    spent = f"{error.elapsed:.1f} s and {counted(error.polls, 'poll')}"
    look = f"look again: aiokeyless get {shlex.quote(error.operation_id)}"
    if isinstance(error, ApprovalUnknownError):
        reason = "" if error.last_error is None else f" (last failure: {error.last_error})"
        unknown = "the last look got no answer: approved or not, nobody knows"
        return f"time is up after {spent}, and {unknown}; {look}{reason}"
    seen = "missing" if error.last_operation is None else "pending"
    return f"still {seen} after {spent}; a timeout is not a denial, it can be approved yet; {look}"
