"""For the applications on both sides of a worker: ask for an approval, and read how requests ended."""

from __future__ import annotations

import asyncio
import re
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from aiokeyless import protocol
from aiokeyless.errors import ConfigurationError
from aiokeyless.health import error_delay
from aiokeyless.models import finite_seconds

from .messages import (
    MAX_CONTEXT,
    MESSAGE_ID,
    REQUEST_SUBJECT,
    ROOM_FOR_EVENT,
    VERSION,
    ApprovalEvent,
    ApprovalRequest,
    BrokerError,
    derived_operation_id,
    operation_name,
    read_event,
)
from .streams import OUTCOMES, REQUESTS

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

_PUBLISH_WITHIN: Final = 5.0  # seconds
_READ_FOR: Final = 5.0  # seconds for which one pull waits
_DURABLE: Final = re.compile(r"[A-Za-z0-9_-]{1,128}")
_ATTEMPTS: Final = 6  # of 5 s each, to find the application's place in the stream
_ACK_WAIT: Final = 30.0  # seconds that an application may take for one event before it gets it again


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
) -> str:
    """Ask for an approval; when this returns, the request is stored and a worker will see to it.

    Args:
        connection: A connection to the broker.
        user_id: The user, in hex of either case.
        operation_id: The operation's id, unique in the tenant. One id is one approval, for good: ask again with
            another. Default: derived from `message_id`.
        operation_payload: What the user is asked to approve. Default: nothing.
        external_user_id: Your own id of the user. Default: none.
        expires_in: Seconds until waiting ends. Default: 120.
        context: Anything that msgspec writes as JSON, up to 64 KiB; the event hands it back.
        message_id: Your name of this request, up to 512 characters of printable ASCII. One name is one approval, for
            good, as one operation id is; within the stream's duplicate window it is one event too. Default: the
            operation's id, or else a new UUID.

    Returns:
        The operation's id.

    Raises:
        ConfigurationError: An argument is wrong; nothing was published.
        BrokerError: The broker did not store it, as far as is known. It is safe to submit it again with the same
            `message_id` or `operation_id`.
    """
    message_id = _message_id(message_id, operation_id)
    request = ApprovalRequest(
        version=VERSION,
        user_id=protocol.check_user_id(user_id),
        operation_id=operation_id,
        operation_payload=protocol.check_text(operation_payload, "operation_payload"),
        external_user_id=protocol.check_text(external_user_id, "external_user_id"),
        expires_in=finite_seconds(expires_in, "expires_in"),
        created_at=datetime.now(UTC),
        context=_encoded(context),
    )
    encoded = msgspec.json.encode(request)
    if len(encoded) > (most := connection.max_payload - ROOM_FOR_EVENT):
        raise ConfigurationError(f"the request has {len(encoded)} bytes, more than {most}: shorten operation_payload")
    stream = connection.jetstream(timeout=_PUBLISH_WITHIN)
    try:
        await stream.publish(REQUEST_SUBJECT, encoded, stream=REQUESTS, headers={MESSAGE_ID: message_id})
    except nats.js.errors.NoStreamResponseError:
        raise BrokerError(
            "the request for an approval was not stored: no stream took it; start a worker first, it makes the stream"
        ) from None
    except nats.errors.Error as error:
        raise BrokerError(
            f"the request for an approval was not stored, as far as is known ({_reason(error)}); submit it again under "
            f"the same message_id or operation_id"
        ) from None
    return operation_id or derived_operation_id(message_id)


def _message_id(message_id: str | None, operation_id: str | None) -> str:
    if operation_id is not None:
        protocol.check_operation_id(operation_id)
    if message_id is None:
        return str(uuid.uuid4()) if operation_id is None else operation_name(operation_id)
    protocol.check_text(message_id, "message_id")
    # As a header carries it: else the worker would derive another operation id from it than is returned here.
    printable = message_id.isascii() and message_id.isprintable() and message_id == message_id.strip()
    if not printable or not 0 < len(message_id) <= protocol.MAX_IDENTIFIER:
        raise ConfigurationError(
            f"message_id must be 1 to {protocol.MAX_IDENTIFIER} characters of printable ASCII, with no blanks around it"
        )
    return message_id


def _encoded(context: object) -> msgspec.Raw:
    try:
        encoded = msgspec.Raw(msgspec.json.encode(context))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"context cannot be written as JSON: {error}") from None
    if len(encoded) > MAX_CONTEXT:
        raise ConfigurationError(f"context is {len(encoded)} bytes of JSON; at most {MAX_CONTEXT} are handed on")
    return encoded


def _reason(error: nats.errors.Error) -> str:
    return getattr(error, "description", None) or str(error) or type(error).__name__


async def approval_outcomes(connection: Client, durable: str) -> AsyncGenerator[ApprovalEvent]:
    """Iterate over how requests ended, each event until it was dealt with.

    An event is acknowledged when the next one is asked for. One whose handling raised, or took over 30 s, comes again,
    to this application or to another process of it: handle an event so that twice does no harm.

    Args:
        connection: A connection to the broker.
        durable: Name of the reading application: its place in the stream is remembered under it, and processes that
            share it share the events. Letters, digits, ``-`` and ``_``.

    Yields:
        Events, from the oldest that this application has not dealt with, without end.

    Raises:
        ConfigurationError: The name is none.
        BrokerError: There is no stream yet, since no worker ever ran; or the broker refuses, the connection was closed,
            or the application's place in the stream deleted. A broker that is away for a while is waited for.
    """
    if not _DURABLE.fullmatch(durable):
        raise ConfigurationError(f"durable must be 1 to 128 letters, digits, '-' and '_', not {durable!r:.80}")
    try:
        subscription = await _subscribed(connection.jetstream(), durable)
        try:
            while True:
                # One at a time: a batch would make the last of it wait for an application that is slow with the first.
                message = await _next_message(subscription)
                if message is not None:
                    yield _event(message)
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
        # Nobody answers for the consumer: it has no leader just now, or it was deleted.
        await asyncio.sleep(error_delay(1))
        with suppress(nats.errors.TimeoutError, nats.js.errors.ServiceUnavailableError):
            await subscription.consumer_info()
        return None


def _event(message: Msg) -> ApprovalEvent:
    try:
        return read_event(message.data)
    except msgspec.DecodeError as error:
        number = message.metadata.sequence.stream
        raise BrokerError(f"message {number} of stream {OUTCOMES} is no event of a worker: {error}") from None
