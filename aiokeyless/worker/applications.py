"""For the applications on both sides of a worker: they submit requests for approvals, and read their outcomes."""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Final

import msgspec

from aiokeyless._tracing import current_traceparent
from aiokeyless._validation import (
    check_auth_type,
    check_choice,
    check_requested_id,
    check_text,
    check_user_id,
    finite_seconds,
)
from aiokeyless.errors import BrokerError, ConfigurationError, ConflictError, KeylessError
from aiokeyless.models import Secret, StartedBy
from aiokeyless.ticket import DEFAULT_LIFETIME

from .broker import ApplicationSide, NewRequest, OutcomeDelivery, UnavailableError, public_errors
from .brokers import broker_for, hide_url
from .logs import log
from .messages import (
    REQUEST_VERSION,
    ApprovalEvent,
    ApprovalRequest,
    NewerVersionError,
    context_refusal,
    read_event,
    request_name,
)

_READER: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_UPGRADED_IN: Final = 60.0  # seconds until an event of a later version is delivered again


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is stored.

    Attributes:
        operation_id: The operation's id. If the answer to a submission was lost, submit again under it.
        duplicate: Whether the broker had exactly this request already, and stored nothing.
    """

    operation_id: str
    duplicate: bool


def request_to_json(
    user_id: str,
    *,
    operation_id: str,
    operation_payload: str | None = None,
    external_user_id: str | None = None,
    expires_in: float = DEFAULT_LIFETIME,
    created_at: datetime | None = None,
    context: object = None,
    require_auth_type: str | None = None,
    started_by: StartedBy = "backend",
) -> str:
    """Return a request for an approval as JSON, for a broker that takes it by other means than `submit_approval`.

    The arguments are those of `submit_approval`.

    Raises:
        ConfigurationError: An argument is wrong.
    """
    request = ApprovalRequest(
        version=REQUEST_VERSION,
        user_id=check_user_id(user_id),
        operation_id=check_requested_id(operation_id, started_by),
        operation_payload=check_text(operation_payload, "operation_payload"),
        external_user_id=check_text(external_user_id, "external_user_id"),
        expires_in=finite_seconds(expires_in, "expires_in"),
        created_at=None if created_at is None else _check_aware(created_at),
        context=_encode(context),
        require_auth_type=check_auth_type(require_auth_type),
        started_by=check_choice(started_by, StartedBy, "started_by"),
    )
    return msgspec.json.encode(request).decode()


async def submit_approval(
    broker: object,
    user_id: str,
    *,
    operation_id: str,
    operation_payload: str | None = None,
    external_user_id: str | None = None,
    expires_in: float = DEFAULT_LIFETIME,
    created_at: datetime | None = None,
    context: object = None,
    require_auth_type: str | None = None,
    started_by: StartedBy = "backend",
) -> Submission:
    """Ask for an approval; when this returns, the request is stored and a worker will process it.

    The caller's position in its trace, if OpenTelemetry is loaded, travels beside the request and comes back in the
    event.

    A request that is submitted twice counts once. Two requests are the same if all arguments but `created_at` are
    equal. The broker refuses a different request under a used operation id. If it cannot tell, that request ends as
    ``failed`` with `FailureReason.CONFLICT`.

    Args:
        broker: A broker, or a driver's connection that a broker can use. With a connection, the request is stored if
            and only if its transaction commits.
        user_id: The user, in hex of either case.
        operation_id: The operation's id, unique in the tenant, without slashes and backslashes. An id is for one
            approval only: to ask again, use a new one. Store it with what the approval is for, before you ask.
        operation_payload: What the user is asked to approve. Default: nothing.
        external_user_id: Your own id of the user. Default: none.
        expires_in: Seconds from `created_at` until waiting ends. Default: 120.
        created_at: When you asked, with a zone. Give it if your own trigger may fire twice: then both submissions have
            the same deadline. It counts as now if it is in the future. Default: now, by the broker's clock.
        context: Anything that msgspec writes as JSON, up to 64 KiB and 64 lists or objects deep; the event
            returns it.
        require_auth_type: The factor that an approval must have: ``"biom"`` for a face, or ``"pin"``. Any other,
            or none, is ``failed`` with `FailureReason.MISMATCH`. Default: any.
        started_by: ``"phone"`` if your app starts the operation: give it the id, the payload and the external user id,
            which it sends. The worker creates nothing, calls no `on_created`, and waits until the user has
            authenticated. Default: ``"backend"``, so the worker creates the operation.

    Returns:
        The operation's id, and whether exactly this request was stored already.

    Raises:
        ConfigurationError: An argument is wrong; nothing was stored.
        ConflictError: The operation id belongs to a different request; nothing was stored. The client raises it too if
            a different operation has the id.
        InvalidRequestError: PostgreSQL cannot store the request, such as one with a NUL; nothing was stored.
        BrokerError: The broker did not confirm that it stored the request. It is safe to submit it again under the
            error's `operation_id`.
    """
    broker = hide_url(broker)
    text = request_to_json(
        user_id,
        operation_id=operation_id,
        operation_payload=operation_payload,
        external_user_id=external_user_id,
        expires_in=expires_in,
        created_at=created_at,
        context=context,
        require_auth_type=require_auth_type,
        started_by=started_by,
    ).encode()
    request = msgspec.json.decode(text, type=ApprovalRequest)
    side = _open_side(broker)
    if len(text) > side.largest_request:
        raise ConfigurationError(
            f"the request has {len(text)} bytes, more than {side.largest_request}: shorten operation_payload"
        )
    try:
        duplicate = await side.submit(NewRequest(request, text, request_name(request), current_traceparent()))
    except ConflictError as error:
        error.operation_id = operation_id
        raise
    except (UnavailableError, BrokerError) as error:
        unknown = BrokerError(
            f"the request for an approval was not stored, as far as is known ({error}); submit it again under the same "
            f"operation_id, {operation_id!r}",
            may_pass=isinstance(error, UnavailableError) or error.is_transient,
        )
        unknown.operation_id = operation_id
        raise unknown from None
    return Submission(operation_id=operation_id, duplicate=duplicate)


def _open_side(broker: object) -> ApplicationSide:
    if isinstance(broker, Secret):  # a URL would be opened and closed for each call
        raise ConfigurationError(
            "broker must be an open broker or a connection, not a URL; open it once, and pass that: async with "
            f"{type(broker_for(broker)).__name__}(...) as broker",
            argument="broker",
        )
    return broker_for(broker)


def _check_aware(created_at: object) -> datetime:
    if not isinstance(created_at, datetime) or created_at.utcoffset() is None:
        raise ConfigurationError("created_at must be an aware datetime, such as datetime.now(UTC)")
    try:
        return created_at.astimezone(UTC)
    except OverflowError:  # the first or the last day of the calendar, and another year in UTC
        raise ConfigurationError("created_at must be in the years 1 to 9999, UTC") from None


def _encode(context: object) -> msgspec.Raw:
    try:
        encoded = msgspec.Raw(msgspec.json.encode(context))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"context cannot be written as JSON: {error}") from None
    if (reason := context_refusal(encoded)) is not None:
        raise ConfigurationError(reason)
    return encoded


@asynccontextmanager
async def next_outcome(broker: object, reader: str) -> AsyncGenerator[ApprovalEvent]:
    """Wait for the next outcome that this reader has not handled.

    The outcome is handled if the body ends without an exception, also by ``break`` or ``return``. An exception puts the
    outcome off for 1 s, 2 s, ... and at most 5 minutes, and is raised to the caller. If the process is killed, or the
    body takes more than half a minute, the outcome is delivered again, so a second delivery must do no harm.

    Args:
        broker: A broker, or a driver's connection that a broker can use. A connection must be in no transaction: the
            outcome begins one, and what the body does on that connection is committed with the outcome, exactly once.
        reader: Name of the reading application. The broker stores under it what the application has handled; its
            processes share the outcomes. A new name gets all stored outcomes. Letters, digits, ``-`` and ``_``.

    Yields:
        The event.

    Raises:
        ConfigurationError: The name is not valid.
        BrokerError: Outcomes cannot be read; or, after the body, it is not known whether the outcome counts as handled.

    Example:
        >>> while True:
        ...     async with next_outcome(broker, "shop") as event:
        ...         await handle(event)
    """
    broker = hide_url(broker)
    if not _READER.fullmatch(reader):
        raise ConfigurationError(f"reader must be 1 to 128 letters, digits, '-' and '_', not {reader!r:.80}")
    side = _open_side(broker)
    with public_errors("outcomes cannot be read: "):
        outcome, event = await _next_event(side, reader)
    try:
        yield event
    except BaseException:  # after a cancellation, too, the outcome must come again
        try:
            await outcome.put_off()
        except (UnavailableError, KeylessError) as error:  # it comes again anyway; the body's error is raised
            log(logging.WARNING, "outcome.not_put_off", {"place": outcome.place, "error": str(error)})
        raise
    with public_errors("the outcome may be delivered again: "):
        await outcome.mark_handled()


async def _next_event(side: ApplicationSide, reader: str) -> tuple[OutcomeDelivery, ApprovalEvent]:
    """Return the next readable outcome. An unreadable one must not be delivered forever."""
    while True:
        outcome = await side.next_outcome(reader)
        try:
            return outcome, read_event(outcome.data)
        except NewerVersionError as error:
            log(logging.ERROR, "outcome.newer", {"place": outcome.place, "error": str(error)})
            await outcome.put_off(_UPGRADED_IN)
        except msgspec.DecodeError as error:
            log(logging.ERROR, "outcome.unreadable", {"place": outcome.place, "error": str(error)})
            await outcome.mark_handled()
