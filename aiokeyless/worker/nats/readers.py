"""One reader's outcomes, pulled by a consumer of its name, and the check that a worker wrote them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
import nats.errors
import nats.js.errors
from nats.js.api import AckPolicy, ConsumerConfig

from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import OutcomeDelivery, outcome_pause
from aiokeyless.worker.logs import RateLimitedLog, log
from aiokeyless.worker.messages import NewerVersionError, read_event

from .event_keys import SIGNATURE
from .failures import broker_errors
from .fleet import KEYLESS, Fleet
from .streams import UNLIMITED, is_delivery

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext

    from .event_keys import EventKeys

#: Seconds for an answer about the reader's place in the stream; during an election nobody answers.
_ANSWER_WITHIN: Final = 1.0
_READ_FOR: Final = 5.0  # seconds for which one pull waits
_ATTEMPTS: Final = 30  # of 1 s each, to find the application's place in the stream
_ACK_WAIT: Final = 30.0  # seconds that an application may take for one event before it gets it again
#: Seconds until an event without a valid signature is delivered again, the first time.
_UNSIGNED_FOR: Final = 60.0
#: Deliveries of such an event that are put off, each for twice as long as the one before. That leaves four hours to
#: correct a wrong key. Without a limit, many such events would keep a reader from genuine ones.
_UNSIGNED_DELIVERIES: Final = 8


class NatsOutcome(OutcomeDelivery):
    """One delivery of an outcome by JetStream."""

    __slots__ = ("_message",)

    def __init__(self, message: Msg) -> None:
        self._message = message
        self.data: bytes = message.data
        self.place: str = str(message.metadata.sequence.stream)

    async def mark_handled(self) -> None:
        with broker_errors():
            await self._message.ack()

    async def put_off(self, delay: float | None = None) -> None:
        with broker_errors():
            await self._message.nak(
                delay=outcome_pause(self._message.metadata.num_delivered) if delay is None else delay
            )


class Reader:
    """One reading application's place in the stream of outcomes. Without event keys it believes every event."""

    def __init__(self, connection: Client, fleet: Fleet, name: str, event_keys: EventKeys | None) -> None:
        self._stream = fleet.jetstream(connection, _ANSWER_WITHIN)
        self._fleet = fleet
        self._name = name
        self._event_keys = event_keys
        self._subscription: JetStreamContext.PullSubscription | None = None
        self._foreign = RateLimitedLog(logging.WARNING, "broker.foreign_message")
        self._unsigned = RateLimitedLog(logging.ERROR, "outcome.unsigned")
        self._dropped = RateLimitedLog(logging.ERROR, "outcome.dropped")

    async def next(self) -> NatsOutcome:
        """See `ApplicationSide.next_outcome`."""
        with broker_errors():
            if self._subscription is None:
                self._subscription = await self._subscribe()
        while True:
            with broker_errors():
                # One at a time: in a batch, the last would wait for an application that is slow with the first.
                message = await self._next_message(self._subscription)
                if message is None:
                    continue
                if not is_outcome(message.reply, self._name, fleet=self._fleet):
                    self._foreign.log({"stream": self._fleet.outcomes, "durable": self._name})
                elif await self._is_believed(message):
                    return NatsOutcome(message)

    async def _next_message(self, subscription: JetStreamContext.PullSubscription) -> Msg | None:
        """Return the next message; None if there was none for a while."""
        with suppress(nats.errors.TimeoutError):
            try:
                return (await subscription.fetch(1, timeout=_READ_FOR))[0]
            except nats.js.errors.APIError:  # the consumer has no leader just now, or it was deleted
                await asyncio.sleep(error_delay(1))
                with suppress(nats.js.errors.ServiceUnavailableError):
                    await _ensure_place(self._stream, self._fleet, self._name)
        return None

    async def close(self) -> None:
        """End the subscription."""
        if self._subscription is not None:
            with suppress(nats.errors.Error):  # a closed connection has no subscription to end
                await self._subscription.unsubscribe()

    async def _is_believed(self, message: Msg) -> bool:
        """Return whether a worker wrote an event, as far as that can be checked. If not, settle the event."""
        # A message that is no event is dropped, signed or not. A user with the permission to submit only can have the
        # broker store its acknowledgement here, by a reply subject, any number of times.
        facts: dict[str, object] = {"sequence": message.metadata.sequence.stream}
        if (reason := self._unreadable_reason(message)) is not None:
            log(logging.ERROR, "outcome.unreadable", {**facts, "error": reason})
            await message.term()
            return False
        signature = (message.headers or {}).get(SIGNATURE)
        if self._event_keys is None or self._event_keys.verify(message.data, signature, fleet=self._fleet.name):
            return True
        deliveries = message.metadata.num_delivered
        if deliveries <= _UNSIGNED_DELIVERIES:
            self._unsigned.log(facts)
            await message.nak(delay=_UNSIGNED_FOR * 2 ** (deliveries - 1))
        else:
            self._dropped.log(facts)
            await message.term()
        return False

    def _unreadable_reason(self, message: Msg) -> str | None:
        try:
            event = read_event(message.data)
        except NewerVersionError:
            return None
        except msgspec.DecodeError as error:
            return str(error)
        # A broker's permissions are for kinds of outcomes. One for a kind must not allow another kind.
        is_right = message.subject == self._fleet.outcome_subject(event.outcome)
        return None if is_right else f"{event.outcome} under {message.subject}"

    async def _subscribe(self) -> JetStreamContext.PullSubscription:
        for _ in range(_ATTEMPTS):
            try:
                await _ensure_place(self._stream, self._fleet, self._name)
                return await self._stream.pull_subscribe_bind(self._name, self._fleet.outcomes)
            except nats.js.errors.NotFoundError:
                raise BrokerError(
                    "outcomes cannot be read: there is no stream; start a worker first, it makes it"
                ) from None
            except nats.errors.TimeoutError:  # without permission, or without a leader
                continue
        raise BrokerError(
            "outcomes cannot be read: the broker does not answer; is it there, and may this user publish to "
            f"{self._fleet.prefix}.CONSUMER.INFO.{self._fleet.outcomes}.{self._name} and subscribe to its inbox?"
        )


def is_outcome(reply: str, durable: str, *, fleet: Fleet = KEYLESS) -> bool:
    """Return whether a message is an event that the stream of outcomes delivered, for readers with their own client.

    `next_outcome` does this itself. Any user with the permission can publish to an inbox, and neither the subject nor
    the content of a message shows its origin. Do not acknowledge a message that is not an event of the stream. Even
    one that is may come from another user: `EventKeys.verify` says whether a worker signed it.

    Args:
        reply: The message's reply subject.
        durable: Name of the reading application's consumer.
        fleet: The fleet whose outcomes they are. Default: that of the name ``keyless``.
    """
    return is_delivery(reply, fleet.outcomes, durable)


async def _ensure_place(stream: JetStreamContext, fleet: Fleet, durable: str) -> None:
    """Make the reader's consumer, or change it if its settings are wrong.

    If an operator made the consumer, the reader needs no permission to make one. That matters, because the maker of a
    consumer chooses where it delivers. So applications in an account of their own have no such permission.
    """
    with suppress(nats.js.errors.NotFoundError):  # of the consumer; or of the stream, which is reported below
        found = (await stream.consumer_info(fleet.outcomes, durable)).config
        if found is not None and found.max_ack_pending == UNLIMITED and found.ack_policy == AckPolicy.EXPLICIT:
            return
    place = ConsumerConfig(
        durable_name=durable,
        ack_policy=AckPolicy.EXPLICIT,
        ack_wait=_ACK_WAIT,
        max_ack_pending=UNLIMITED,  # events that are put off must not hold up later ones
    )
    try:
        await stream.add_consumer(fleet.outcomes, place)
    except nats.js.errors.ServiceUnavailableError:  # this account does not import the API
        raise BrokerError(
            f"outcomes cannot be read: the consumer {durable} of {fleet.outcomes} is missing or has other settings, "
            "and this account may not make it; have an operator make it"
        ) from None
