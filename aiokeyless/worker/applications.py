"""For the applications on both sides of a worker: submit requests for approvals, and read their outcomes."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from contextlib import aclosing
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless._rules.backoff import error_delay
from aiokeyless._tracing import current_traceparent
from aiokeyless._validation import MAX_IDENTIFIER, check_operation_id, check_text, check_user_id, finite_seconds
from aiokeyless.errors import BrokerError, ConfigurationError

from .engine import Broker, EngineError, NoPlaceError
from .logs import Seldom, log
from .messages import (
    ROOM_FOR_EVENT,
    VERSION,
    ApprovalEvent,
    ApprovalRequest,
    NewerEventError,
    derived_operation_id,
    read_event,
    refused_context,
    request_name,
)
from .nats.broker import NatsBroker
from .nats.fleet import KEYLESS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client

    from .engine import OutcomeMessage
    from .event_keys import EventKeys
    from .nats.fleet import Fleet

_SUBMISSIONS: Final = 3  # attempts
_DURABLE: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_UPGRADED_IN: Final = 60.0  # seconds until an event of a later version is delivered again
_UNSIGNED_FOR: Final = 60.0  # seconds until an event without a valid signature is delivered again, for the first time
#: Deliveries of such an event that are put off, each for twice as long as the one before: a wrong key can be set right
#: for four hours. Without an end, many of them would keep a reader from genuine events.
_UNSIGNED_DELIVERIES: Final = 8


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A request that is stored.

    Attributes:
        operation_id: The operation's id. Where the answer to a submission was lost, submit again under it.
        message_id: Your name of the request, or the one that was made since you gave none; None where you gave
            `operation_id` alone.
        duplicate: Whether the stream had exactly this request already, and stored nothing.
    """

    operation_id: str
    message_id: str | None
    duplicate: bool


async def submit_approval(
    connection: Client | Broker,
    user_id: str,
    *,
    operation_id: str | None = None,
    operation_payload: str | None = None,
    external_user_id: str | None = None,
    expires_in: float = 120.0,
    context: object = None,
    message_id: str | None = None,
    created_at: datetime | None = None,
    fleet: Fleet = KEYLESS,
) -> Submission:
    """Ask for an approval; when this returns, the request is stored and a worker will process it.

    The caller's position in its trace, where OpenTelemetry is loaded, travels as the header ``traceparent`` and comes
    back in the event.

    The same request submitted twice is one. It is the same if all arguments but `created_at` are equal. A different
    one under a used operation id is stored too, and ends as ``failed`` with `FailureReason.CONFLICT`.

    Args:
        connection: A connection to NATS; or a `MemoryBroker`, for tests.
        user_id: The user, in hex of either case.
        operation_id: The operation's id, unique in the tenant. One id is one approval, for good: ask again with
            another. Default: derived from `message_id`.
        operation_payload: What the user is asked to approve. Default: nothing.
        external_user_id: Your own id of the user. Default: none.
        expires_in: Seconds from `created_at` until waiting ends. Default: 120.
        context: Anything that msgspec writes as JSON, up to 64 KiB and 64 lists or objects deep; the event hands it
            back.
        message_id: Your name of this request, up to 512 characters of printable ASCII, from which its operation id is
            derived where you give none; otherwise it has no effect. Default: a new UUID.
        created_at: When you asked, with a zone. Give it where your own trigger may fire twice: then both submissions
            have the same deadline. It counts as now where it is in the future. Default: now, by the broker's clock.
        fleet: Of the workers that are to process it. Default: that of the name ``keyless``.

    Returns:
        The operation's id, and whether exactly this request was stored already.

    Raises:
        ConfigurationError: An argument is wrong; nothing was published.
        BrokerError: The broker did not store it in three attempts, as far as is known; or for two seconds it had no
            stream to store it in (15, where it is a cluster, which may be electing a leader). It is safe to submit it
            again under the error's `operation_id`.
    """
    message_id, operation_id = _names(message_id, operation_id)
    request = ApprovalRequest(
        version=VERSION,
        user_id=check_user_id(user_id),
        operation_id=operation_id,
        operation_payload=check_text(operation_payload, "operation_payload"),
        external_user_id=check_text(external_user_id, "external_user_id"),
        expires_in=finite_seconds(expires_in, "expires_in"),
        created_at=None if created_at is None else _aware(created_at),
        context=_encoded(context),
    )
    duplicate = await _submit(_broker(connection, fleet), request, operation_id)
    return Submission(operation_id=operation_id, message_id=message_id, duplicate=duplicate)


def _broker(connection: Client | Broker, fleet: Fleet) -> Broker:
    return connection if isinstance(connection, Broker) else NatsBroker(connection, fleet)


async def _submit(broker: Broker, request: ApprovalRequest, operation_id: str) -> bool:
    encoded = msgspec.json.encode(request)
    if len(encoded) > (most := broker.largest_message - ROOM_FOR_EVENT):
        raise ConfigurationError(f"the request has {len(encoded)} bytes, more than {most}: shorten operation_payload")
    name = request_name(
        operation_id=operation_id,
        user_id=request.user_id,
        operation_payload=request.operation_payload,
        external_user_id=request.external_user_id,
        expires_in=request.expires_in,
        context=request.context,
    )
    traceparent = current_traceparent()
    attempt = 0
    while True:
        attempt += 1
        try:
            # Under one name, so that the broker stores it once although the answer to an attempt was lost.
            return await broker.submit(encoded, name, traceparent)
        except EngineError as error:
            if attempt == _SUBMISSIONS or isinstance(error, NoPlaceError):
                unknown = BrokerError(
                    f"the request for an approval was not stored, as far as is known ({error}); submit it again under "
                    f"the same operation_id, {operation_id!r}"
                )
                unknown.operation_id = operation_id
                raise unknown from None
        await asyncio.sleep(error_delay(attempt))


def _names(message_id: str | None, operation_id: str | None) -> tuple[str | None, str]:
    """Check or make the name of a request and the id of its operation."""
    if message_id is None:
        if operation_id is not None:
            return None, check_operation_id(operation_id)
        message_id = str(uuid.uuid4())
    check_text(message_id, "message_id")
    # As a header carries it: publishers in other languages name their requests so, and mean the same operation by it.
    printable = message_id.isascii() and message_id.isprintable() and message_id == message_id.strip()
    if not printable or not 0 < len(message_id) <= MAX_IDENTIFIER:
        raise ConfigurationError(
            f"message_id must be 1 to {MAX_IDENTIFIER} characters of printable ASCII, with no blanks around it"
        )
    if operation_id is None:
        return message_id, derived_operation_id(message_id)
    return message_id, check_operation_id(operation_id)


def _aware(created_at: object) -> datetime:
    if not isinstance(created_at, datetime) or created_at.utcoffset() is None:
        raise ConfigurationError("created_at must be an aware datetime, such as datetime.now(UTC)")
    try:
        return created_at.astimezone(UTC)
    except OverflowError:  # the first or the last day of the calendar, and another year in UTC
        raise ConfigurationError("created_at must be in the years 1 to 9999, UTC") from None


def _encoded(context: object) -> msgspec.Raw:
    try:
        encoded = msgspec.Raw(msgspec.json.encode(context))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"context cannot be written as JSON: {error}") from None
    if (reason := refused_context(encoded)) is not None:
        raise ConfigurationError(reason)
    return encoded


async def approval_outcomes(
    connection: Client | Broker, durable: str, *, fleet: Fleet = KEYLESS, event_keys: EventKeys | None = None
) -> AsyncGenerator[ApprovalEvent]:
    """Iterate over the outcomes of requests, each event until it was handled.

    An event is acknowledged when the next one is asked for. One whose handling raised, or took over 30 s, is delivered
    again, to this application or to another process of it: handle an event so that twice does no harm.

    Only what the stream of outcomes delivered to `durable` is believed; what others send to the inbox is ignored and
    logged. A message that is not an event is logged and never delivered again; an event of a later version is logged
    and delivered again a minute later, for a reader that has been upgraded.

    Args:
        connection: A connection to NATS; or a `MemoryBroker`, for tests.
        durable: Name of the reading application: its place in the stream is remembered under it, and processes that
            share it share the events. Letters, digits, ``-`` and ``_``.
        fleet: Of the workers that decided. Default: that of the name ``keyless``.
        event_keys: Keys that the workers sign events with. An event that none of them signed is logged, and delivered
            again 1, 2, 4, ... minutes later, for the case that the keys are wrong; after four hours it is dropped.
            Default: none, and then any user who may use JetStream in the account of the streams can forge an approval.

    Yields:
        Events, from the oldest that this application has not handled, without end.

    Raises:
        ConfigurationError: The name is not valid.
        BrokerError: There is no stream yet, since no worker ever ran; or the broker refuses, the connection was closed,
            or the application's place in the stream deleted. A broker that is away for a while is waited for.
    """
    if not _DURABLE.fullmatch(durable):
        raise ConfigurationError(f"durable must be 1 to 128 letters, digits, '-' and '_', not {durable!r:.80}")
    broker = _broker(connection, fleet)
    unsigned, dropped = Seldom(logging.ERROR, "outcome.unsigned"), Seldom(logging.ERROR, "outcome.dropped")
    try:
        # One at a time: a batch would make the last of it wait for an application that is slow with the first.
        async with aclosing(broker.outcomes(durable)) as messages:
            async for message in messages:
                # What no key could make an event goes for good, signed or not: a user who may do no more than ask can
                # have the broker store its acknowledgement here, by a reply subject, and as often as it likes.
                if (event := await _event(message)) is None:
                    continue
                facts: dict[str, object] = {"sequence": message.sequence}
                if event_keys and not event_keys.are_of(message.data, message.signature, fleet=broker.fleet_name):
                    if message.number <= _UNSIGNED_DELIVERIES:
                        unsigned.log(facts)
                        await message.put_off(_UNSIGNED_FOR * 2 ** (message.number - 1))
                    else:
                        dropped.log(facts)
                        await message.discard()
                elif isinstance(event, NewerEventError):
                    log(logging.ERROR, "outcome.newer", {**facts, "error": str(event)})
                    await message.put_off(_UPGRADED_IN)
                else:
                    yield event
                    await message.done()
    except EngineError as error:
        raise BrokerError(f"outcomes cannot be read: {error}") from None


async def _event(message: OutcomeMessage) -> ApprovalEvent | NewerEventError | None:
    """Read an event; one that cannot be read must not be delivered again and again."""
    try:
        event = read_event(message.data)
    except NewerEventError as error:
        return error.with_traceback(None)
    except msgspec.DecodeError as error:
        reason = str(error)
    else:
        # A broker's permissions are for kinds of outcomes: that for one must not do for another.
        if message.kind == event.outcome:
            return event
        reason = f"{event.outcome} under {message.kind}"
    log(logging.ERROR, "outcome.unreadable", {"sequence": message.sequence, "error": reason})
    await message.discard()
    return None
