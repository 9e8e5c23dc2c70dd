"""The command line's messages: what went wrong and what to do, in terms of options and variables.

The library's own messages name its arguments and methods. Here the type and the attributes of an error choose the
message. If an argument is wrong, it is the library's, with the name of the option.
"""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Final

from aiokeyless._http.protocol import ADDRESSES
from aiokeyless._rules.ambiguity import may_have_taken_effect
from aiokeyless._rules.approval import Rejection, evaluate
from aiokeyless._waits.explanation import describe_failures
from aiokeyless.errors import (
    AlreadyApprovedError,
    ApprovalError,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    BadRequestError,
    CachedAnswerError,
    ConfigurationError,
    ConflictStatusError,
    DecodeError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    RateLimitError,
    RequestTimeoutError,
    StatusError,
    TransportError,
)
from aiokeyless.models import Operation, Region

if TYPE_CHECKING:
    from aiokeyless.ticket import ApprovalTicket

#: Replaces advice of the library that names a method, an attribute or an argument.
_ADVICE: Final[dict[type[KeylessError], str]] = {
    BadRequestError: "the service rejects the request as malformed",
    NotFoundError: "no such operation; check the id (one that the phone will create: wait --if-missing wait)",
    ConflictStatusError: "the operation id is taken; use a new one or, if you tried this before, --if-exists resume",
    RateLimitError: "too many requests; try again later",
}


def describe(error: KeylessError) -> str:
    """Return one line that says what went wrong and what to do about it."""
    match error:
        case ApprovalTimeoutError():
            message = _describe_timeout(error)
        case ApprovalError(last_operation=Operation() as answer):
            message = _describe_rejection(error, answer)
        case ConfigurationError(argument=str(argument)):
            message = _describe_option(error, argument)
        case AlreadyApprovedError():
            message = (
                "the operation is approved already, maybe for an earlier request; pay only if your record shows that "
                f"it was asked, and neither paid nor ended, and if this accepts it: {wait_command(error.ticket)}"
            )
        case StatusError() if advice := _choose_advice(error):
            message = f"{error.method} {error.path} answered {error.status}: {advice}"
        case DecodeError() if not isinstance(error, NotJsonError):
            message = (
                f"{error.method} {error.path} answered {error.status} with JSON that the API does not document; "
                "check KEYLESS_BASE_URL, or upgrade aiokeyless"
            )
        case RequestTimeoutError():
            message = f"{error.method} {error.path} got no answer in time; {_suggest_address()}"
        case TransportError() if not isinstance(error, CachedAnswerError):
            message = f"{error}; {_suggest_address()}"
        case _:
            message = str(error)
    return f"{message}{_suggest_check(error)}"


def _describe_option(error: ConfigurationError, argument: str) -> str:
    """Return the message about an argument, in the name of its option; any other message as it is."""
    option = "payload" if argument == "operation_payload" else argument.replace("_", "-")
    rest = str(error).removeprefix(f"{argument} ")
    return str(error) if rest == str(error) else f"--{option} {rest}"


def _suggest_check(error: KeylessError) -> str:
    """Return how to check whether a failed create took effect; "" if it certainly did not, or for other errors."""
    if (
        isinstance(error, TransportError | DecodeError | StatusError)
        and error.operation_id is not None
        and may_have_taken_effect(error)
    ):
        return (
            f"; the operation may exist nevertheless, to check: aiokeyless get {quote_operation_id(error.operation_id)}"
        )
    return ""


def _choose_advice(error: StatusError) -> str | None:
    """Return the command line's advice; None if the library's is right."""
    if type(error) is StatusError and not error.is_transient:
        if error.status == 409:
            return "a proxy may have sent the create twice"
        what = "a redirect, which is not followed" if error.status // 100 == 3 else "not documented by the API"
        return f"{what}; check KEYLESS_BASE_URL"
    if error.advice != type(error).advice:  # one that fits this request, and names no method
        return None
    advice = _ADVICE.get(type(error))
    if isinstance(error, BadRequestError) and error.detail:
        return f"{advice} ({error.detail})"
    return advice


def _suggest_address() -> str:
    """Return what to check if the service did not answer, with the address that `new_client` uses."""
    if base_url := os.environ.get("KEYLESS_BASE_URL"):
        return f"check that KEYLESS_BASE_URL ({base_url}) is right and that the service runs"
    region = Region(os.environ.get("KEYLESS_REGION") or Region.EU)
    return f"check the network to {ADDRESSES[region]} (KEYLESS_REGION is {region})"


def _describe_timeout(error: ApprovalTimeoutError) -> str:
    spent = f"{error.elapsed:.1f} s and {format_count(error.polls, 'poll')}"
    check = f"check it: aiokeyless get {quote_operation_id(error.operation_id)}"
    if isinstance(error, ApprovalUnknownError):
        reason = "" if error.last_error is None else f" (last failure: {describe(error.last_error)})"
        return f"time is up after {spent}, and the outcome is unknown; {check}{reason}"
    state = "missing" if error.last_operation is None else "pending"
    words = describe_failures(error.attempts)
    failed = f"{words}; " if words else ""
    return f"still {state} after {spent}; {failed}a timeout is not a denial: it can still be approved; {check}"


def _describe_rejection(error: ApprovalError, answer: Operation) -> str:
    verdict = evaluate(answer, error.operation_id, error.ticket)
    reason = f": {verdict.describe(answer, error.ticket)}" if isinstance(verdict, Rejection) else ""
    return (
        f"the answer for operation {error.operation_id} was rejected{reason}; do not act on it, and check the proxies "
        f"between you and Keyless; to see the answer: aiokeyless get {quote_operation_id(error.operation_id)}"
    )


def wait_command(ticket: ApprovalTicket) -> str:
    """Return the command to copy that waits for a ticket."""
    return f"printf %s {quote(ticket.to_json())} | aiokeyless wait --ticket -"


def quote_operation_id(operation_id: str) -> str:
    """Return an operation id as the last argument of a command to copy, even if it begins with a hyphen."""
    return f"{'-- ' if operation_id.startswith('-') else ''}{quote(operation_id)}"


def quote(text: str) -> str:
    r"""Return a text as one word of a shell command that shows all its characters.

    A character that is not printable becomes the octal escapes of its UTF-8 in ``$'...'``, which bash, ksh and zsh
    read in any locale: ``$'Pay \342\200\256'``.
    """
    if text.isprintable():
        return shlex.quote(text)
    escaped = "".join(
        f"\\{c}" if c in "\\'" else c if c.isprintable() else "".join(f"\\{byte:03o}" for byte in c.encode())
        for c in text
    )
    return f"$'{escaped}'"


def format_count(number: int, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def describe_method(auth_type: str | None) -> str:
    """Return how a user approved, worded to follow "approved"."""
    return {None: "", "biom": " by face", "pin": " by PIN"}.get(auth_type, f" by {auth_type}")
