"""One reader's outcomes, pulled by a consumer of its name, and the check that a worker wrote them."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Final

import msgspec
import nats.errors

from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import OutcomeDelivery, UnavailableError, outcome_pause
from aiokeyless.worker.logs import RateLimitedLog, log
from aiokeyless.worker.messages import NewerVersionError, read_event

from .event_keys import SIGNATURE
from .failures import broker_errors
from .fleet import KEYLESS, Fleet
from .intake import Intake, NatsMessage
from .streams import ensure_reader, is_delivery

if TYPE_CHECKING:
    from nats.aio.client import Client

    from .event_keys import EventKeys

#: Seconds for an answer about the reader's consumer; during an election nobody answers.
_ANSWER_WITHIN: Final = 1.0
_READ_FOR: Final = 5.0  # seconds of one take
_ATTEMPTS: Final = 30  # of 1 s each, to find the reader's consumer
_CHECKED_EVERY: Final = 30.0  # seconds
_NEVER: Final = float("-inf")
_LEASE: Final = 30.0  # seconds that an application may take for one event before it gets it again
#: Seconds until an event without a valid signature is delivered again, the first time.
_UNSIGNED_FOR: Final = 60.0
#: Deliveries of such an event that are put off, each for twice as long as the one before. That leaves four hours to
#: correct a wrong key. Without a limit, many such events would keep a reader from genuine ones.
_UNSIGNED_DELIVERIES: Final = 8


class NatsOutcome(OutcomeDelivery):
    """One delivery of an outcome by JetStream."""

    __slots__ = ("_intake", "_message")

    def __init__(self, message: NatsMessage, intake: Intake) -> None:
        self._message = message
        self._intake = intake
        self.data: bytes = message.body
        self.place: str = str(message.id)

    async def mark_handled(self) -> None:
        await self._intake.finish(self._message)

    async def put_off(self, delay: float | None = None) -> None:
        await self._intake.put_off(self._message, outcome_pause(self._message.number) if delay is None else delay)


class Reader(Intake):
    """One reading application's place in the stream of outcomes. Without event keys it believes every event."""

    def __init__(self, connection: Client, fleet: Fleet, name: str, event_keys: EventKeys | None) -> None:
        source, now = (fleet.prefix, fleet.outcomes, name), asyncio.get_running_loop().time
        super().__init__(connection, *source, lease=_LEASE, now=now, restore=self._ensure_consumer)
        self._stream = fleet.jetstream(connection, _ANSWER_WITHIN)
        self._fleet = fleet
        self._name = name
        self._event_keys = event_keys
        self._checking = asyncio.Lock()
        self._check_at = _NEVER  # when its consumer is checked again
        self._unsigned = RateLimitedLog(logging.ERROR, "outcome.unsigned")
        self._dropped = RateLimitedLog(logging.ERROR, "outcome.dropped")

    async def next(self) -> NatsOutcome:
        """See `ApplicationSide.next_outcome`."""
        while True:
            await self._check()
            try:
                # One at a time: in a batch, the last would wait for an application that is slow with the first.
                taken = await self.take(1, _READ_FOR, untried=None)
            except UnavailableError:
                if self._subscription is None or self._connection.is_connected or self._connection.is_closed:
                    raise
                continue
            for message in taken:
                if await self._is_believed(message):
                    return NatsOutcome(message, self)

    async def _check(self) -> None:
        """Subscribe at first. Correct the consumer then, and again and again, since an operator may change it."""
        async with self._checking:  # many tasks may read under one name
            if self._now() < self._check_at:
                return
            if self._check_at == _NEVER:
                await self._find_consumer()
                await self.open()
            else:
                with suppress(UnavailableError):
                    await self._ensure_consumer()
            self._check_at = self._now() + _CHECKED_EVERY

    async def _ensure_consumer(self) -> None:
        with broker_errors():
            await ensure_reader(self._stream, self._fleet, self._name)

    async def _find_consumer(self) -> None:
        for _ in range(_ATTEMPTS):
            with broker_errors(), suppress(nats.errors.TimeoutError):  # without permission, or without a leader
                return await ensure_reader(self._stream, self._fleet, self._name)
        raise BrokerError(
            "outcomes cannot be read: the broker does not answer; is it there, and may this user publish to "
            f"{self._fleet.prefix}.CONSUMER.INFO.{self._fleet.outcomes}.{self._name} and subscribe to its inbox?",
            may_pass=True,
        )

    async def _is_believed(self, message: NatsMessage) -> bool:
        """Return whether a worker wrote an event, as far as that can be checked. If not, settle the event."""
        facts: dict[str, object] = {"sequence": message.id}
        try:
            event = read_event(message.body)
            # A broker's permissions are for kinds of outcomes. One for a kind must not allow another kind.
            if message.raw.subject != self._fleet.outcome_subject(event.outcome):
                error = f"{event.outcome} under {message.raw.subject}"
                log(logging.ERROR, "outcome.unreadable", {**facts, "error": error})
                await self.finish(message)
                return False
        except NewerVersionError:
            pass
        except msgspec.DecodeError:
            # `next_outcome` drops what is no event, signed or not. A user with the permission to submit only can have
            # the broker store its acknowledgement here, by a reply subject, any number of times.
            return True
        signature = (message.raw.headers or {}).get(SIGNATURE)
        if self._event_keys is None or self._event_keys.verify(message.body, signature, fleet=self._fleet.name):
            return True
        if message.number <= _UNSIGNED_DELIVERIES:
            self._unsigned.log(facts)
            await self.put_off(message, _UNSIGNED_FOR * 2 ** (message.number - 1))
        else:
            self._dropped.log(facts)
            await self.finish(message)
        return False


def is_outcome(reply: str, durable: str, *, fleet: Fleet = KEYLESS) -> bool:
    """Return whether a message is an event that the stream of outcomes delivered, for readers with their own client.

    `next_outcome` does this itself. Anybody may publish to an inbox. Do not acknowledge a message that is no event of
    the stream. Even one that is may come from another user: `EventKeys.verify` says whether a worker signed it.

    Args:
        reply: The message's reply subject.
        durable: Name of the reading application's consumer.
        fleet: The fleet whose outcomes they are. Default: that of the name ``keyless``.
    """
    return is_delivery(reply, fleet.outcomes, durable)
