"""The application's side of NATS JetStream: requests are published, outcomes are pulled."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import BrokerError
from aiokeyless.worker.engine import Broker, NoPlaceError, OutcomeMessage
from aiokeyless.worker.event_keys import SIGNATURE
from aiokeyless.worker.logs import Seldom
from aiokeyless.worker.messages import MESSAGE_ID, TRACEPARENT

from .failures import engine_errors
from .fleet import KEYLESS, Fleet
from .streams import is_delivery

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

_PUBLISH_WITHIN: Final = 5.0  # seconds
#: Seconds for which a submission waits for the stream to have a leader. An election takes up to ten.
_LEADERLESS_FOR: Final = 15.0
#: Seconds likewise, where no other server is known that it could elect: it may be linked to others as a leaf node.
_ALONE_FOR: Final = 2.0
_ANSWER_WITHIN: Final = 5.0  # seconds, for a request about the reader's place in the stream
_READ_FOR: Final = 5.0  # seconds for which one pull waits
_ATTEMPTS: Final = 6  # of 5 s each, to find the application's place in the stream
_UNLIMITED: Final = -1
_ACK_WAIT: Final = 30.0  # seconds that an application may take for one event before it gets it again


class NatsBroker(Broker):
    """An application's connection to NATS.

    Args:
        connection: The connection, which stays the application's.
        fleet: The fleet.
    """

    def __init__(self, connection: Client, fleet: Fleet) -> None:
        self.fleet_name: str = fleet.name
        self._connection = connection
        self._fleet = fleet

    @property
    def largest_message(self) -> int:
        """See `Broker`."""
        return self._connection.max_payload

    async def submit(self, request: bytes, name: str, traceparent: str | None = None) -> bool:
        """See `Broker`."""
        headers = {MESSAGE_ID: name} if traceparent is None else {MESSAGE_ID: name, TRACEPARENT: traceparent}
        stream = self._fleet.jetstream(self._connection, _PUBLISH_WITHIN)
        loop = asyncio.get_running_loop()
        give_up_at = loop.time() + (_LEADERLESS_FOR if len(self._connection.servers) > 1 else _ALONE_FOR)
        with engine_errors():
            while True:
                try:
                    stored = await stream.publish(
                        self._fleet.request_subject, request, stream=self._fleet.requests, headers=headers
                    )
                except nats.js.errors.NoStreamResponseError:
                    # Said at once, and also of a stream that has no leader for the time of an election.
                    if loop.time() >= give_up_at:
                        raise NoPlaceError("no stream took it; start a worker first, it makes the stream") from None
                else:
                    return bool(stored.duplicate)
                await asyncio.sleep(error_delay(1))

    async def outcomes(self, reader: str) -> AsyncGenerator[OutcomeMessage]:
        """See `Broker`."""
        foreign = Seldom(logging.WARNING, "broker.foreign_message")
        with engine_errors():
            subscription = await self._subscription(reader)
            try:
                while True:
                    message = await _next_message(subscription)
                    if message is None:
                        continue
                    if is_outcome(message.reply, reader, fleet=self._fleet):
                        yield NatsOutcomeMessage(message, self._fleet)
                    else:
                        foreign.log({"stream": self._fleet.outcomes, "durable": reader})
            finally:
                with suppress(nats.errors.Error):  # where the connection is closed, there is nothing to end
                    await subscription.unsubscribe()

    async def _subscription(self, reader: str) -> JetStreamContext.PullSubscription:
        try:
            return await _subscribed(self._fleet.jetstream(self._connection, _ANSWER_WITHIN), self._fleet, reader)
        except nats.errors.TimeoutError:  # a broker says nothing to who may not ask
            raise BrokerError(
                "outcomes cannot be read: the broker does not answer; is it there, and may this user publish to "
                f"{self._fleet.api_prefix}.CONSUMER.INFO.{self._fleet.outcomes}.{reader} and subscribe to its inbox?"
            ) from None


class NatsOutcomeMessage(OutcomeMessage):
    """One delivery by JetStream.

    Args:
        message: The delivery.
        fleet: The fleet.
    """

    __slots__ = ("_message",)

    def __init__(self, message: Msg, fleet: Fleet) -> None:
        self._message = message
        self.data: bytes = message.data
        self.kind: str = fleet.kind_of(message.subject)
        self.sequence: int = message.metadata.sequence.stream
        self.number: int = message.metadata.num_delivered
        self.signature: str | None = (message.headers or {}).get(SIGNATURE)

    async def done(self) -> None:
        """See `OutcomeMessage`."""
        with engine_errors():
            await self._message.ack()

    async def discard(self) -> None:
        """See `OutcomeMessage`."""
        with engine_errors():
            await self._message.term()

    async def put_off(self, delay: float) -> None:
        """See `OutcomeMessage`."""
        with engine_errors():
            await self._message.nak(delay=delay)


def is_outcome(reply: str, durable: str, *, fleet: Fleet = KEYLESS) -> bool:
    """Return whether a message is an event that the stream of outcomes delivered, for readers with their own client.

    `approval_outcomes` does this itself. An inbox takes messages from any user who may publish to it, and
    neither their subject nor their content shows their origin. Do not acknowledge a message that is not one. It
    may still be what another user had the stream publish: `EventKeys.are_of` tells what a worker signed.

    Args:
        reply: The message's reply subject.
        durable: Name of the reading application's consumer.
        fleet: The fleet whose outcomes they are. Default: that of the name ``keyless``.
    """
    return is_delivery(reply, fleet.outcomes, durable)


async def _subscribed(stream: JetStreamContext, fleet: Fleet, durable: str) -> JetStreamContext.PullSubscription:
    silences = 0
    while True:
        try:
            await _ensure_place(stream, fleet, durable)
            return await stream.pull_subscribe_bind(durable, fleet.outcomes)
        except nats.js.errors.NotFoundError:
            raise BrokerError(
                "outcomes cannot be read: there is no stream; start a worker first, it makes it"
            ) from None
        except nats.errors.TimeoutError:  # a cluster that has lost a server says nothing until it has a new leader
            silences += 1
            if silences == _ATTEMPTS:
                raise


async def _ensure_place(stream: JetStreamContext, fleet: Fleet, durable: str) -> None:
    """Make the reader's consumer, or change it, where it is not as it must be.

    A reader whose consumer an operator made needs no permission to make one. That is worth having: who may make a
    consumer chooses where it delivers. So applications in an account of their own cannot.
    """
    with suppress(nats.js.errors.NotFoundError):  # of the consumer; or of the stream, which is found out below
        found = (await stream.consumer_info(fleet.outcomes, durable)).config
        if found is not None and found.max_ack_pending == _UNLIMITED and found.ack_policy == AckPolicy.EXPLICIT:
            return
    place = ConsumerConfig(
        durable_name=durable,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=_ACK_WAIT,
        max_ack_pending=_UNLIMITED,  # what this reader puts off must not keep it from what comes after
    )
    try:
        await stream.add_consumer(fleet.outcomes, place)
    except nats.js.errors.ServiceUnavailableError:  # nobody listens: this account does not import it
        raise BrokerError(
            f"outcomes cannot be read: the consumer {durable} of {fleet.outcomes} is missing or has other settings, "
            "and this account may not make it; have an operator make it"
        ) from None


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
