"""For the applications on both sides of a worker: submit requests for approvals, and read their outcomes."""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from aiokeyless._rules.backoff import error_delay
from aiokeyless._validation import MAX_IDENTIFIER, check_operation_id, check_text, check_user_id, finite_seconds
from aiokeyless.errors import BrokerError, ConfigurationError

from .logs import Seldom, log
from .messages import (
    MESSAGE_ID,
    REQUEST_SUBJECT,
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
from .streams import OUTCOMES, REQUESTS, is_delivery

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import PubAck

_PUBLISH_WITHIN: Final = 5.0  # seconds
_READ_FOR: Final = 5.0  # seconds for which one pull waits
_DURABLE: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ATTEMPTS: Final = 6  # of 5 s each, to find the application's place in the stream
_ACK_WAIT: Final = 30.0  # seconds that an application may take for one event before it gets it again
_UPGRADED_IN: Final = 60.0  # seconds until an event of a later version is delivered again


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
    connection: Client,
    user_id: str,
    *,
    operation_id: str | None = None,
    operation_payload: str | None = None,
    external_user_id: str | None = None,
    expires_in: float = 120.0,
    context: object = None,
    message_id: str | None = None,
    created_at: datetime | None = None,
) -> Submission:
    """Ask for an approval; when this returns, the request is stored and a worker will process it.

    The same request submitted twice is one. It is the same if all arguments but `created_at` are equal. A different
    one under a used operation id is stored too, and ends as ``failed`` with `FailureReason.CONFLICT`.

    Args:
        connection: A connection to the broker.
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
            have the same deadline. It counts as now where it is in the future. Default: now.

    Returns:
        The operation's id, and whether exactly this request was stored already.

    Raises:
        ConfigurationError: An argument is wrong; nothing was published.
        BrokerError: The broker did not store it, as far as is known. It is safe to submit it again under the
            `operation_id` that the message names.
    """
    message_id, operation_id = _names(message_id, operation_id)
    request = ApprovalRequest(
        version=VERSION,
        user_id=check_user_id(user_id),
        operation_id=operation_id,
        operation_payload=check_text(operation_payload, "operation_payload"),
        external_user_id=check_text(external_user_id, "external_user_id"),
        expires_in=finite_seconds(expires_in, "expires_in"),
        created_at=_aware(created_at),
        context=_encoded(context),
    )
    stored = await _publish(connection, request, operation_id)
    return Submission(operation_id=operation_id, message_id=message_id, duplicate=bool(stored.duplicate))


async def _publish(connection: Client, request: ApprovalRequest, operation_id: str) -> PubAck:
    encoded = msgspec.json.encode(request)
    if len(encoded) > (most := connection.max_payload - ROOM_FOR_EVENT):
        raise ConfigurationError(f"the request has {len(encoded)} bytes, more than {most}: shorten operation_payload")
    name = request_name(
        operation_id=operation_id,
        user_id=request.user_id,
        operation_payload=request.operation_payload,
        external_user_id=request.external_user_id,
        expires_in=request.expires_in,
        context=request.context,
    )
    stream = connection.jetstream(timeout=_PUBLISH_WITHIN)
    try:
        return await stream.publish(REQUEST_SUBJECT, encoded, stream=REQUESTS, headers={MESSAGE_ID: name})
    except nats.js.errors.NoStreamResponseError:
        raise BrokerError(
            "the request for an approval was not stored: no stream took it; start a worker first, it makes the stream"
        ) from None
    except nats.errors.Error as error:
        raise BrokerError(
            f"the request for an approval was not stored, as far as is known ({_reason(error)}); submit it again under "
            f"the same operation_id, {operation_id!r}"
        ) from None


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
    if created_at is None:
        return datetime.now(UTC)
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


def _reason(error: nats.errors.Error) -> str:
    return getattr(error, "description", None) or str(error) or type(error).__name__


async def approval_outcomes(connection: Client, durable: str) -> AsyncGenerator[ApprovalEvent]:
    """Iterate over the outcomes of requests, each event until it was handled.

    An event is acknowledged when the next one is asked for. One whose handling raised, or took over 30 s, is delivered
    again, to this application or to another process of it: handle an event so that twice does no harm.

    Only what the stream of outcomes delivered to `durable` is believed; what others send to the inbox is ignored and
    logged. A message that is not an event is logged and never delivered again; an event of a later version is logged
    and delivered again a minute later, for a reader that has been upgraded.

    Args:
        connection: A connection to the broker.
        durable: Name of the reading application: its place in the stream is remembered under it, and processes that
            share it share the events. Letters, digits, ``-`` and ``_``.

    Yields:
        Events, from the oldest that this application has not handled, without end.

    Raises:
        ConfigurationError: The name is not valid.
        BrokerError: There is no stream yet, since no worker ever ran; or the broker refuses, the connection was closed,
            or the application's place in the stream deleted. A broker that is away for a while is waited for.
    """
    if not _DURABLE.fullmatch(durable):
        raise ConfigurationError(f"durable must be 1 to 128 letters, digits, '-' and '_', not {durable!r:.80}")
    try:
        foreign = Seldom(logging.WARNING, "broker.foreign_message")
        subscription = await _subscribed(connection.jetstream(), durable)
        try:
            while True:
                # One at a time: a batch would make the last of it wait for an application that is slow with the first.
                message = await _next_message(subscription)
                if message is None:
                    continue
                if not is_outcome(message.reply, durable):
                    foreign.log({"stream": OUTCOMES, "durable": durable})
                    continue
                event = await _event(message)
                if event is not None:
                    yield event
                    await message.ack()
        finally:
            with suppress(nats.errors.Error):  # where the connection is closed, there is nothing to end
                await subscription.unsubscribe()
    except nats.errors.Error as error:
        raise BrokerError(f"outcomes cannot be read: {_reason(error)}") from None


async def _subscribed(stream: JetStreamContext, durable: str) -> JetStreamContext.PullSubscription:
    place = ConsumerConfig(durable_name=durable, ack_policy=AckPolicy.EXPLICIT, ack_wait=_ACK_WAIT)
    silences = 0
    while True:
        try:
            await stream.add_consumer(OUTCOMES, place)
            return await stream.pull_subscribe_bind(durable, OUTCOMES)
        except nats.js.errors.NotFoundError:
            raise BrokerError(
                "outcomes cannot be read: there is no stream; start a worker first, it makes it"
            ) from None
        except nats.errors.TimeoutError:  # a cluster that has lost a server says nothing until it has a new leader
            silences += 1
            if silences == _ATTEMPTS:
                raise


async def _next_message(subscription: JetStreamContext.PullSubscription) -> Msg | None:
    """Return the next message; None where there was none for a while."""
    try:
        return (await subscription.fetch(1, timeout=_READ_FOR))[0]
    except nats.errors.TimeoutError:
        return None
    except nats.js.errors.APIError:
        # The consumer has no leader just now, or it was deleted.
        await asyncio.sleep(error_delay(1))
        with suppress(nats.errors.TimeoutError, nats.js.errors.ServiceUnavailableError):
            await subscription.consumer_info()
        return None


async def _event(message: Msg) -> ApprovalEvent | None:
    """Read an event; one that cannot be read must not be delivered again and again."""
    facts: dict[str, object] = {"stream": OUTCOMES, "sequence": message.metadata.sequence.stream}
    try:
        event = read_event(message.data)
    except NewerEventError as error:
        log(logging.ERROR, "outcome.newer", {**facts, "error": str(error)})
        await message.nak(delay=_UPGRADED_IN)
    except msgspec.DecodeError as error:
        log(logging.ERROR, "outcome.unreadable", {**facts, "error": str(error)})
        await message.term()
    else:
        if message.subject == event.outcome.subject:
            return event
        # A broker's permissions are for subjects: that for one outcome must not do for another.
        log(logging.ERROR, "outcome.unreadable", {**facts, "error": f"{event.outcome} under {message.subject}"})
        await message.term()
    return None


def is_outcome(reply: str, durable: str) -> bool:
    """Return whether a message is an event that the stream of outcomes delivered, for readers with their own client.

    `approval_outcomes` does this itself. An inbox takes messages from any user who may publish to it, and
    neither their subject nor their content shows their origin. Do not acknowledge a message that is not one.

    Args:
        reply: The message's reply subject.
        durable: Name of the reading application's consumer.
    """
    return is_delivery(reply, OUTCOMES, durable)
