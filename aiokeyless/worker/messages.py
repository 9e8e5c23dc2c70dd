"""The messages at a broker: the request for an approval, and the event that answers it.

Pure. An unknown field in a request may be a payload with a misspelt name, so such a request is refused. The event
returns the application's context byte for byte.
"""

from __future__ import annotations

import math
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from enum import StrEnum
from hashlib import sha256
from typing import Any, Final, TypeVar

import msgspec

from aiokeyless._validation import (
    check_auth_type,
    check_operation_id,
    check_requested_id,
    check_text,
    check_user_id,
    seconds,
)
from aiokeyless.errors import ConfigurationError, InvalidRequestError
from aiokeyless.models import Private, StartedBy
from aiokeyless.ticket import DEFAULT_LIFETIME, ApprovalTicket, payload_digest

__all__ = ["ApprovalEvent", "ApprovalRequest", "FailureReason", "Outcome"]

T = TypeVar("T")

#: The newest versions of both forms. Requests and events of each version from 1 on are read.
REQUEST_VERSION: Final = 1
EVENT_VERSION: Final = 1
MAX_CONTEXT: Final = 64 << 10  # bytes: an event must fit where its request did
#: Levels of nested lists and objects. A recursive decoder must cope with them wherever it is called.
MAX_DEPTH: Final = 64

_JSON_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_JSON_BRACKET: Final = re.compile(rb"[\[\]{}]")
_JSON_NUMBER: Final = re.compile(r"-?\d[\d.]*(?:[eE][+-]?\d+)?")
#: PostgreSQL writes out each digit of a number: 17 KiB of ``1e131000`` cost a server 1 GB, ``0e-16000`` 120 MB.
_LONGEST_NUMBER: Final = 400  # characters
_LARGE_EXPONENT: Final = re.compile(r"[eE][+-]?0*[1-9]\d{3}")
_SMALLEST_NUMBER, _TOO_LARGE = Decimal("1e-307"), Decimal("1.8e308")
_NOTHING: Final = msgspec.Raw(b"null")


class Outcome(StrEnum):
    """How a request ended."""

    APPROVED = "approved"
    """The user approved the operation."""
    EXPIRED = "expired"
    """The time was over; `ApprovalEvent.answered` says whether the outcome is known."""
    FAILED = "failed"
    """A `FailureReason` says why."""


class FailureReason(StrEnum):
    """Why a request failed. Names are stable; there may be more of them later."""

    INVALID_REQUEST = "invalid_request"
    """No JSON, an unknown field or version, an id that cannot be sent, a wait that is longer than the broker allows.
    The user was not asked."""
    CONFLICT = "conflict"
    """The operation id belongs to another request, or to an operation that no request of this fleet created."""
    ALREADY_APPROVED = "already_approved"
    """An operation of the same content was approved under this id before this request asked. That approval belongs to
    an earlier request. The user was not asked for this one, and did not approve it."""
    MISMATCH = "mismatch"
    """An answer was about another operation, or had another factor than the request requires. Or the phone started it
    with another user, payload or external user id. Treat it as refused, and investigate."""
    INCONSISTENT = "inconsistent"
    """An answer contradicted itself or had an unknown state; treat it as refused, and investigate."""
    REJECTED = "rejected"
    """The service permanently refused to create the operation (an unknown user, a malformed request). The user was not
    asked."""
    POLL_REFUSED = "poll_refused"
    """The service permanently refused the poll. The outcome is unknown; check the operation at Keyless."""
    UNREADABLE = "unreadable"
    """The service answered with JSON of another shape than documented. The outcome is unknown."""
    INTERNAL = "internal"
    """The worker itself failed, or no worker knew the request's version any more; its log says more. The outcome is
    unknown; check the operation at Keyless."""


class ApprovalRequest(
    Private, msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True
):
    """A request for an approval, as JSON at the broker.

    Attributes:
        version: Version of this form, 1.
        user_id: The user, in hex of either case.
        operation_id: The operation's id, unique in the tenant. An id is for one approval only: to ask again, use a new
            one.
        operation_payload: What the user is asked to approve. Default: nothing.
        external_user_id: Your own id of the user. Default: none.
        expires_in: Seconds from `created_at` until waiting ends. Default: 120.
        created_at: When the application asked, with a zone. Default: when the broker stored the request. A later time
            counts as that.
        context: Any JSON of yours, up to 64 KiB, which the event returns unchanged. Its numbers have at most 400
            characters, and are 0 or of a magnitude from 1e-307 to 1.8e308. Default: null.
        require_auth_type: The factor that an approval must have: ``"biom"`` for a face, or ``"pin"``. Default: any.
        started_by: ``"phone"`` if your app starts the operation with its id: the worker then creates nothing. Default:
            ``"backend"``.
    """

    version: int
    user_id: str
    operation_id: str
    operation_payload: str | None = None
    external_user_id: str | None = None
    expires_in: float = DEFAULT_LIFETIME
    created_at: datetime | None = None
    context: msgspec.Raw = _NOTHING
    require_auth_type: str | None = None
    started_by: StartedBy = "backend"


class ApprovalEvent(Private, msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request ended, as JSON at the broker.

    Attributes:
        version: Version of this form, 1.
        outcome: See `Outcome`.
        operation_id: The operation's id. None only if the request was too broken to have one.
        user_id: The user, in upper-case hex. None if the request could not be read.
        external_user_id: Your own id of the user, or None.
        payload_sha256: ``hashlib.sha256(payload.encode()).hexdigest()``; of an empty text if the request had none.
            Compare it and `user_id` with your request, because an operation id alone does not say what the user
            approved. None in the same case.
        auth_type: If approved, how the user approved, in at most 500 characters, or None; see `aiokeyless.AuthType`.
        answered: If expired, whether the final poll was answered: the operation was pending, or did not exist. If
            False, the outcome is unknown; check the operation at Keyless before you repeat anything.
        asked: If expired, whether the user was asked, or may have been. If False, the user had nothing to approve.
            Always True if the phone starts the operation.
        reason: If failed, why; see `FailureReason`.
        detail: If failed, what happened, in words. If the final poll was not answered, the last failure.
        requested_at: When `expires_in` began to count.
        decided_at: When the outcome was known, by the broker's clock as the worker last measured it.
        deliveries: How often the broker delivered the request: about the number of polls.
        context: The request's context, as JSON that is not decoded: `read_context` decodes it.
        traceparent: The position in a trace at which the request was submitted (W3C Trace Context); or None.
    """

    version: int
    outcome: Outcome
    operation_id: str | None = None
    user_id: str | None = None
    external_user_id: str | None = None
    payload_sha256: str | None = None
    auth_type: str | None = None
    answered: bool | None = None
    asked: bool | None = None
    reason: str | None = None
    detail: str | None = None
    requested_at: datetime
    decided_at: datetime
    deliveries: int
    context: msgspec.Raw = _NOTHING
    traceparent: str | None = None

    def read_context(self, type: type[T]) -> T:  # noqa: A002  # as msgspec calls it
        """Return the context, decoded.

        Args:
            type: What it should be decoded as, as for ``msgspec.json.decode``; `dict`, for plain data.

        Raises:
            msgspec.ValidationError: It is not of that type.
        """
        return msgspec.json.decode(self.context, type=type)


class Message(Private, msgspec.Struct, kw_only=True, eq=False):
    """One delivery of a request to a worker. A broker adds fields by which it recognizes the request."""

    body: bytes  # the request as JSON
    stored_at: datetime  # by the broker's clock
    number: int  # of this delivery, from 1
    is_untried: bool  # whether no exchange was tried for this request, as far as the broker knows
    failures: int = 0  # exchanges for this request that failed in a row, as far as the broker knows
    traceparent: str | None = None  # as it was submitted

    @property
    def has_only_failed(self) -> bool:
        """Whether there were deliveries before, and all of them failed, as far as the broker knows."""
        return 0 < self.number - 1 <= self.failures


class Delivery(Private, msgspec.Struct, frozen=True, kw_only=True):
    """One delivery of a request: what the request asks for, and the broker's message.

    Attributes:
        ticket: The operation, its user, its payload's hash, and when its wait began and ends.
        refusal: Why this worker does not accept the request: its wait is longer than the broker remembers it for. As
            workers with another grace may accept it, its outcome is stored like any other. None if it is accepted.
    """

    message: Message
    request: ApprovalRequest
    ticket: ApprovalTicket
    refusal: str | None = None

    @property
    def is_started_by_phone(self) -> bool:
        """Whether the app starts the operation, so that the worker creates none."""
        return self.ticket.started_by == "phone"


def read_request(message: Message, *, longest_wait: float, largest_request: int) -> Delivery:
    """Read a delivered message.

    Raises:
        InvalidRequestError: It is not a request.
    """
    data = message.body
    if len(data) > largest_request:
        raise InvalidRequestError(f"the request has {len(data)} bytes, more than {largest_request}")
    try:
        request = decode_request(data)
        user_id = check_user_id(request.user_id)
        operation_id = check_requested_id(request.operation_id, request.started_by)
        expires_at, created_at = read_times(request.created_at, request.expires_in, message.stored_at, longest_wait)
        external_user_id = check_text(request.external_user_id, "external_user_id")
        payload = check_text(request.operation_payload, "operation_payload")
        require_auth_type = check_auth_type(request.require_auth_type)
    except ConfigurationError as error:
        raise InvalidRequestError(str(error)) from None
    if (reason := context_refusal(request.context)) is not None:
        raise InvalidRequestError(reason)
    ticket = ApprovalTicket(
        operation_id=operation_id,
        user_id=user_id,
        external_user_id=external_user_id,
        payload_sha256=payload_digest(payload),
        created_at=created_at,
        expires_at=expires_at,
        require_auth_type=require_auth_type,
        started_by=request.started_by,
    )
    refusal = None
    if request.expires_in > longest_wait:
        refusal = f"expires_in is {request.expires_in:g} s; this broker allows {longest_wait:g} s"
    return Delivery(message=message, request=request, ticket=ticket, refusal=refusal)


class _Version(Private, msgspec.Struct):
    version: int


class RequestHead(_Version):
    """What a request has in each version, and is checked in each."""

    operation_id: str
    created_at: datetime | None = None
    context: msgspec.Raw = _NOTHING
    started_by: Any = "backend"


class _Rest(Private, msgspec.Struct):
    operation_id: Any = None
    context: msgspec.Raw = _NOTHING


def _decode(data: bytes, kind: type[T]) -> T:
    """Decode a message, or a part of it.

    Raises:
        msgspec.DecodeError: It is not of that kind.
    """
    try:
        data.decode()  # a context, which is not decoded, could hold bytes that are not text
        return msgspec.json.decode(data, type=kind)
    except (UnicodeError, RecursionError) as error:
        raise msgspec.DecodeError(str(error)) from None


def _decode_version(data: bytes, kind: type[T], newest: int) -> T:
    """Decode a message of a version from 1 to the newest that is known.

    Raises:
        msgspec.DecodeError: It is not of that kind. If it is of a later version, a `NewerVersionError`.
    """
    version = _decode(data, _Version).version
    if version > newest:
        raise NewerVersionError(f"version {version} is not known here, only up to {newest}: upgrade")
    if version < 1:
        raise msgspec.DecodeError(f"version {version} is not known here, only from 1 to {newest}")
    return _decode(data, kind)


def decode_request(data: bytes) -> ApprovalRequest:
    """Decode a request, and check nothing in it: for that, see `read_request`.

    Raises:
        InvalidRequestError: It is not a request.
    """
    try:
        return _decode_version(data, ApprovalRequest, REQUEST_VERSION)
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the message is no request for an approval: {str(error)[:200]}") from None


def read_version(data: bytes) -> int:
    """Return the version of a request; 0 if that cannot be read."""
    try:
        return _decode(data, _Version).version
    except msgspec.DecodeError:
        return 0


def read_newer(message: Message, *, largest_request: int) -> RequestHead | None:
    """Return what this worker can read of a request of a later version; None if it is no such request."""
    if len(message.body) > largest_request or read_version(message.body) <= REQUEST_VERSION:
        return None
    try:
        head = _decode(message.body, RequestHead)
        check_requested_id(head.operation_id, head.started_by)
        read_times(head.created_at, DEFAULT_LIFETIME, message.stored_at)  # `expires_in` may have another form
    except (msgspec.DecodeError, ConfigurationError, InvalidRequestError):
        return None
    return head if context_refusal(head.context) is None else None


def read_times(
    created_at: datetime | None, expires_in: float, stored_at: datetime, longest: float = math.inf
) -> tuple[datetime, datetime]:
    """Return when waiting for a request ends, and when it began.

    Raises:
        ConfigurationError: `expires_in` is not a number of seconds above 0.
        InvalidRequestError: `created_at` has no zone, or one of the times is in no calendar.
    """
    if created_at is not None and created_at.utcoffset() is None:
        raise InvalidRequestError("created_at has no zone")
    # No request is made after it was stored. A clock that is ahead must not prolong a wait.
    began_at = min(created_at or stored_at, stored_at)
    wait = min(seconds(expires_in, "expires_in"), longest)
    try:
        began_at = began_at.astimezone(UTC)
        return began_at + timedelta(seconds=wait), began_at
    except OverflowError:  # the first day of the calendar, and another year in UTC
        raise InvalidRequestError("created_at must be in the years 1 to 9999, UTC") from None


def read_event(data: bytes | str) -> ApprovalEvent:
    """Read an event that you have by other means than `next_outcome`, such as SQL.

    Args:
        data: The event, as JSON: its bytes or its text.

    Returns:
        The event, checked.

    Raises:
        msgspec.DecodeError: It is not an event of a known form, or of a later version than this library knows.
    """
    encoded = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    event = _decode_version(encoded, ApprovalEvent, EVENT_VERSION)
    if (reason := context_refusal(event.context)) is not None:
        raise msgspec.DecodeError(reason)
    return event


class NewerVersionError(msgspec.DecodeError):
    """A message is of a later version: a newer program understands it."""


def read_rest(data: bytes) -> tuple[str | None, msgspec.Raw]:
    """Return the operation id and the context of a message that is not a request, as far as they can be read."""
    try:
        rest = _decode(data, _Rest)
    except msgspec.DecodeError:
        return None, _NOTHING
    operation_id = None
    with suppress(ConfigurationError):
        operation_id = check_operation_id(rest.operation_id)
    return operation_id, rest.context if context_refusal(rest.context) is None else _NOTHING


def context_refusal(context: msgspec.Raw) -> str | None:
    """Return why a context, which is valid JSON, is refused; None if it is accepted."""
    if len(context) > MAX_CONTEXT:
        return f"context is {len(context)} bytes of JSON; at most {MAX_CONTEXT} are handed on"
    depth, without_strings = 0, _JSON_STRING.sub(b"", bytes(context))
    for bracket in _JSON_BRACKET.findall(without_strings):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return f"context is nested more than {MAX_DEPTH} deep"
    if not all(map(_is_moderate, _JSON_NUMBER.findall(without_strings.decode()))):
        return (
            f"numbers in context must have at most {_LONGEST_NUMBER} characters, and be 0 or of a magnitude from "
            "1e-307 to 1.8e308"
        )
    return None


def _is_moderate(number: str) -> bool:
    """Return whether a JSON number is neither long nor extreme: the rule of PostgreSQL's `submit`, too."""
    if len(number) > _LONGEST_NUMBER or _LARGE_EXPONENT.search(number):
        return False
    return not (value := abs(Decimal(number))) or _SMALLEST_NUMBER <= value < _TOO_LARGE


#: The fields of which a request's name is made, beside the bytes of its context; and their defaults.
_NAMED: Final = {
    field.name: field.default
    for field in msgspec.structs.fields(ApprovalRequest)
    if field.name not in {"version", "created_at", "context"}
}


def request_name(request: ApprovalRequest) -> str:
    """Return the name of a request: a digest of all its content except `version` and `created_at`."""
    content = msgspec.structs.asdict(request)
    content |= {"user_id": request.user_id.upper(), "expires_in": float(request.expires_in)}
    # A field at its default is left out, so a new field changes no name. An absent text and an empty one are the same.
    named = {field: content[field] for field, default in _NAMED.items() if content[field] not in (default, "")}
    return f"request-{sha256(msgspec.json.encode(named) + bytes(request.context)).hexdigest()}"
