"""The messages on the broker: the request for an approval, the event that answers it, and their subjects.

Pure. A request is read as strictly as a form that moves money: an unknown field may be a payload whose name was
misspelt, so it is refused. What an application passes along as context comes back byte for byte.
"""

from __future__ import annotations

import re
import uuid
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from hashlib import sha256
from typing import Final, TypeVar

import msgspec

from aiokeyless._validation import check_operation_id, check_text, check_user_id, seconds
from aiokeyless.errors import ConfigurationError, InvalidRequestError
from aiokeyless.ticket import ApprovalTicket, payload_digest

__all__ = ["ApprovalEvent", "ApprovalRequest", "FailureReason", "Outcome"]

T = TypeVar("T")

MESSAGE_ID: Final = "Nats-Msg-Id"  # the header by which a stream knows a message that it has already
TRACEPARENT: Final = "traceparent"  # the header of W3C Trace Context, of requests and events
VERSION: Final = 1
ROOM_FOR_EVENT: Final = 8 << 10  # bytes by which an event, with its headers, may be larger than its request
MAX_CONTEXT: Final = 64 << 10  # bytes: an event must fit into a message that the broker takes, 1 MiB by default
MAX_DEPTH: Final = 64  # lists and objects in each other: a decoder that recurses must bear it wherever it is called
_JSON_STRING: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_JSON_BRACKET: Final = re.compile(rb"[\[\]{}]")
_NOTHING: Final = msgspec.Raw(b"null")
#: Operation ids of requests that name none are UUIDs (version 5) in this namespace.
_NAMESPACE: Final = uuid.UUID("5f0c9a52-7a0e-5c55-9d53-3c1b8a4f2f6e")


class Outcome(StrEnum):
    """How a request ended; the last word of the subject of its event."""

    APPROVED = "approved"
    EXPIRED = "expired"
    FAILED = "failed"


class FailureReason(StrEnum):
    """Why a request failed. Names are stable; there may be more of them later."""

    INVALID_REQUEST = "invalid_request"
    """No JSON, an unknown field or version, an id that cannot be sent, no id at all, a wait that is longer than the
    fleet allows. Nobody was asked."""
    CONFLICT = "conflict"
    """The operation id belongs to another request, or to an operation that no request of this fleet created."""
    ALREADY_APPROVED = "already_approved"
    """An operation of the same content was approved under this id before this request asked. That approval belongs to
    an earlier request; nobody was asked, and nobody approved this one."""
    MISMATCH = "mismatch"
    """An answer was about something else than what was asked for; treat it as refused, and investigate."""
    INCONSISTENT = "inconsistent"
    """An answer contradicted itself or had an unknown state; treat it as refused, and investigate."""
    REJECTED = "rejected"
    """The service refused for good to create the operation (an unknown user, a malformed request). Nobody was asked."""
    POLL_REFUSED = "poll_refused"
    """The service refused the poll for good. The outcome is unknown; check it with ``get_operation``."""
    UNREADABLE = "unreadable"
    """The service answered with JSON of another shape than documented. The outcome is unknown."""
    INTERNAL = "internal"
    """The worker itself failed; its log says more. The outcome is unknown; check it with ``get_operation``."""


class ApprovalRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """A request for an approval: the JSON that is published to ``keyless.approvals.request``.

    Attributes:
        version: Version of this form, 1.
        user_id: The user, in hex of either case.
        operation_id: The operation's id, unique in the tenant. One id is one approval, for good. Default: derived from
            the message's ``Nats-Msg-Id``, which then is one approval for good in the same way. Within its duplicate
            window the broker drops a second message under a used ``Nats-Msg-Id`` silently, whatever is in it: use a
            digest of the whole content, as `submit_approval` does, and name the operation here.
        operation_payload: What the user is asked to approve. Default: nothing.
        external_user_id: Your own id of the user. Default: none.
        expires_in: Seconds from `created_at` until waiting ends. Default: 120.
        created_at: When the application asked, with a zone. Default, and at the latest: when the stream stored it.
        context: Any JSON of yours, up to 64 KiB, which the event hands back untouched. Default: null.
    """

    version: int
    user_id: str
    operation_id: str | None = None
    operation_payload: str | None = None
    external_user_id: str | None = None
    expires_in: float = 120.0
    created_at: datetime | None = None
    context: msgspec.Raw = _NOTHING

    def __repr__(self) -> str:  # neither a payload nor an application's context belongs in a log
        return f"<ApprovalRequest of user {self.user_id!r}, operation {self.operation_id!r}>"


class ApprovalEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How a request ended: the JSON published to ``keyless.approvals.approved``, ``.expired`` or ``.failed``.

    Attributes:
        version: Version of this form, 1.
        outcome: See `Outcome`.
        operation_id: The operation; None only where the request was too broken to have one.
        user_id: The user, in upper-case hex, or None likewise.
        external_user_id: Your own id of the user, or None.
        payload_sha256: SHA-256 of the payload's UTF-8, in hex; of nothing where the request had none. Compare it, and
            `user_id`, with what you asked: an operation id alone does not say what was approved. None as above.
        auth_type: Approved: how the user approved, see `aiokeyless.AuthType`; or None.
        answered: Expired: whether the final poll was answered: still pending, or never there. False: the outcome is
            unknown; check it with ``get_operation`` before you repeat anything.
        asked: Expired: whether the user was asked, or may have been. False: nobody was, so nobody was there to approve.
            None where a worker of an earlier version decided.
        reason: Failed: see `FailureReason`.
        detail: Failed: what happened, in words.
        requested_at: From when on `expires_in` counted.
        decided_at: When the outcome was known, by the broker's clock, as far as the worker knows it.
        deliveries: How often the broker delivered the request: about the number of polls.
        context: What the request carried along, as JSON.
        traceparent: Where in a trace the request was submitted (W3C Trace Context), by its header of that name; or
            None. The event's message has the header too, for instrumentations.
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

    def __repr__(self) -> str:
        return f"<ApprovalEvent {self.outcome} of operation {self.operation_id!r}>"


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One delivery of a request by the broker: what is asked for, and what the broker's metadata tell about it.

    Attributes:
        ticket: The operation, its user, its payload's hash, from when and until when it is waited for.
        payload: What the user is asked to approve.
        number: Number of this delivery, from 1.
        name: See `request_name`: the ``Nats-Msg-Id`` of every outcome of this request, so that the stream keeps one.
        context: What to hand back.
    """

    ticket: ApprovalTicket
    payload: str | None
    number: int
    name: str
    context: msgspec.Raw

    def __repr__(self) -> str:  # as above
        return f"<Delivery {self.number} of operation {self.ticket.operation_id!r}>"


def read_request(
    data: bytes,
    *,
    message_id: str | None,
    stored_at: datetime,
    number: int,
    longest: float,
    largest: float,
) -> Delivery:
    """Read a delivered message.

    Args:
        data: The message.
        message_id: Its ``Nats-Msg-Id``, if it has one.
        stored_at: When the stream stored it.
        number: Number of this delivery.
        longest: Seconds that `expires_in` may be at most.
        largest: Bytes that the message may have at most, so that its event fits into one too.

    Raises:
        InvalidRequestError: It is not a request; a `TooLongError` where only `expires_in` is wrong.
    """
    if len(data) > largest:
        raise InvalidRequestError(f"the message has {len(data)} bytes; at most {largest:g} leave room for its event")
    try:
        request = _decode(data)
        user_id = check_user_id(request.user_id)
        operation_id = _operation_id(request, message_id)
        expires_at, created_at = _times(request, stored_at, longest)
        external_user_id = check_text(request.external_user_id, "external_user_id")
        payload = check_text(request.operation_payload, "operation_payload")
    except ConfigurationError as error:
        raise InvalidRequestError(str(error)) from None
    if (reason := refused_context(request.context)) is not None:
        raise InvalidRequestError(reason)
    ticket = ApprovalTicket(
        operation_id=operation_id,
        user_id=user_id,
        external_user_id=external_user_id,
        payload_sha256=payload_digest(payload),
        created_at=created_at,
        expires_at=expires_at,
    )
    name = request_name(
        operation_id=operation_id,
        user_id=user_id,
        operation_payload=payload,
        external_user_id=external_user_id,
        expires_in=request.expires_in,
        context=request.context,
    )
    delivery = Delivery(ticket=ticket, payload=payload, number=number, name=name, context=request.context)
    if request.expires_in > longest:
        reason = f"expires_in is {request.expires_in:g} s; the stream's duplicate window allows {longest:g} s"
        raise TooLongError(reason, delivery)
    return delivery


class _Version(msgspec.Struct):
    version: int


class _Context(msgspec.Struct):
    context: msgspec.Raw = _NOTHING


def _decode(data: bytes) -> ApprovalRequest:
    try:
        data.decode()  # a context, which is not decoded, could hold bytes that are not text
        version = msgspec.json.decode(data, type=_Version).version
        if version > VERSION:
            raise NewerRequestError(f"version {version} of the request is not known here, only {VERSION}: upgrade")
        if version != VERSION:
            raise InvalidRequestError(f"version {version} of the request is not known here, only {VERSION}")
        return msgspec.json.decode(data, type=ApprovalRequest)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise InvalidRequestError(f"the message is no request for an approval: {str(error)[:200]}") from None


def _operation_id(request: ApprovalRequest, message_id: str | None) -> str:
    if request.operation_id is not None:
        return check_operation_id(request.operation_id)
    if not message_id:
        # Each delivery would make an operation of its own, or would need a made-up name that may not be unique.
        raise InvalidRequestError(f"the request has neither an operation_id nor the header {MESSAGE_ID}")
    check_text(message_id, MESSAGE_ID)
    if "\N{REPLACEMENT CHARACTER}" in message_id:
        # What stands for bytes that are no UTF-8: two names that differ in those would be one operation.
        raise InvalidRequestError(f"the header {MESSAGE_ID} is not UTF-8")
    return derived_operation_id(message_id)


def derived_operation_id(message_id: str) -> str:
    """Return the id of the operation of a request that names none: the same for the same ``Nats-Msg-Id``."""
    return str(uuid.uuid5(_NAMESPACE, message_id))


def _times(request: ApprovalRequest, stored_at: datetime, longest: float) -> tuple[datetime, datetime]:
    """Return when waiting ends, and since when it counts."""
    created_at = stored_at
    if request.created_at is not None:
        if request.created_at.utcoffset() is None:
            raise InvalidRequestError("created_at has no zone")
        # A request is not made after it was stored: a clock that is ahead must not prolong a wait.
        created_at = min(request.created_at, stored_at)
    expires_in = seconds(request.expires_in, "expires_in")
    try:
        created_at = created_at.astimezone(UTC)
        return created_at + timedelta(seconds=min(expires_in, longest)), created_at
    except OverflowError:  # the first day of the calendar, and another year in UTC
        raise InvalidRequestError("created_at must be in the years 1 to 9999, UTC") from None


def read_event(data: bytes) -> ApprovalEvent:
    """Read a message of a worker's.

    Raises:
        msgspec.DecodeError: It is no event of a known form: `NewerEventError` where it is of a later version.
    """
    try:
        data.decode()  # a context, which is not decoded, could hold bytes that are not text
        version = msgspec.json.decode(data, type=_Version).version
        if version > VERSION:
            raise NewerEventError(f"version {version} of the event is not known here, only {VERSION}: upgrade")
        if version != VERSION:
            raise msgspec.DecodeError(f"version {version} of the event is not known here, only {VERSION}")
        event = msgspec.json.decode(data, type=ApprovalEvent)
    except (UnicodeError, RecursionError) as error:
        raise msgspec.DecodeError(f"the message is no event: {str(error)[:200]}") from None
    if (reason := refused_context(event.context)) is not None:
        raise msgspec.DecodeError(reason)
    return event


def is_about(data: bytes, event: ApprovalEvent) -> bool:
    """Return whether a worker's message, perhaps of a later version, is about the request that an event is about."""
    try:
        other = read_event(data)
    except NewerEventError:
        return True
    except msgspec.DecodeError:
        return False
    return _subject(other) == _subject(event)


def _subject(event: ApprovalEvent) -> tuple[object, ...]:
    return event.operation_id, event.user_id, event.external_user_id, event.payload_sha256, bytes(event.context)


class NewerEventError(msgspec.DecodeError):
    """An event is of a later version: a newer reader understands it."""


class TooLongError(InvalidRequestError):
    """A request is to be waited for longer than the broker remembers it. All else about it is in order.

    Workers with another grace may think otherwise, so its outcome is as that of any other request: under its name, and
    with its ids.

    Attributes:
        delivery: The request.
    """

    def __init__(self, reason: str, delivery: Delivery) -> None:
        super().__init__(reason)
        self.delivery: Delivery = delivery


class NewerRequestError(InvalidRequestError):
    """A request is of a later version: a newer worker understands it."""


def read_context(data: bytes) -> msgspec.Raw:
    """Return the context of a message that is not a request, as far as it can be read."""
    try:
        data.decode()
        context = msgspec.json.decode(data, type=_Context).context
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return _NOTHING
    return context if refused_context(context) is None else _NOTHING


def refused_context(context: msgspec.Raw) -> str | None:
    """Return why a context, valid JSON, is not handed on; None where it is."""
    if len(context) > MAX_CONTEXT:
        return f"context is {len(context)} bytes of JSON; at most {MAX_CONTEXT} are handed on"
    depth = 0
    for bracket in _JSON_BRACKET.findall(_JSON_STRING.sub(b"", bytes(context))):
        depth += 1 if bracket in b"[{" else -1
        if depth > MAX_DEPTH:
            return f"context is nested more than {MAX_DEPTH} deep"
    return None


def request_name(
    *,
    operation_id: str,
    user_id: str,
    operation_payload: str | None,
    external_user_id: str | None,
    expires_in: float,
    context: msgspec.Raw,
) -> str:
    """Return the name of a request: a digest of all that is in it, but of when it was made.

    The request is published under it as ``Nats-Msg-Id``, so that the same request is stored once and another one
    always is. So is its outcome, whatever it is: an operation that was pending at its deadline may be approved when a
    crash has the request delivered again, and the stream must then keep the first event and drop the second.
    """
    # An absent text and an empty one are the same.
    content = (operation_id, user_id, operation_payload or "", external_user_id or "", float(expires_in))
    return f"request-{sha256(msgspec.json.encode(content) + bytes(context)).hexdigest()}"
