"""Deliveries pulled from JetStream, and kept here for a moment, until a worker or a reader takes them.

nats-py's own ``fetch`` waits for a full batch, and so returns the first message a second late. This module sends a pull
as a plain message to the consumer, and receives each delivery by a subscription when it arrives. There is one pull at a
time: several are no faster. A pull is lost with its connection, so after a reconnect there is another one.

A leader that dies takes deliveries and put-offs with it, even those that it confirmed. The next one makes each of these
deliveries again after the ack wait, which is short for that reason. Slow deliveries are extended.

JetStream repeats deliveries before it delivers new requests, and knows nothing of failures. So while Keyless fails,
this module pulls more than there is room for, and chooses the best. Requests that always fail do not hold up the
others. Those of a later version, which the worker gives back, are beside the others, and hold up none either.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import math
import re
from collections import OrderedDict
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from nats.aio.msg import Msg  # msgspec reads the annotations

from aiokeyless._rules.backoff import error_delay
from aiokeyless._rules.order import Standing
from aiokeyless.errors import ConfigurationError, InvalidRequestError
from aiokeyless.worker.broker import ExchangeResult, UnavailableError
from aiokeyless.worker.logs import RateLimitedLog
from aiokeyless.worker.messages import Message, decode_request, read_times, read_version, request_name

from .event_keys import TRACEPARENT
from .failures import broker_errors
from .load_shedding import LoadShedding
from .streams import ACK_WAIT, is_delivery

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from datetime import datetime

    from nats.aio.client import Client
    from nats.aio.subscription import Subscription

#: Seconds for which one pull waits for deliveries.
EXPIRES: Final = 1.0
_LATE: Final = 2.0  # seconds after which the end of a pull is no longer expected: it may be lost
_NOTICED_WITHIN: Final = 0.25  # seconds after which a take notices that the connection was made again
_SIZE: Final = "Nats-Msg-Size"  # the header of a delivery whose body the broker left out
_EXPIRED: Final = "408"  # the pull has expired as requested
_CHOICE: Final = 512  # deliveries to choose from, beside those that are here
_HELD_FOR: Final = 1.5  # seconds for which a delivery waits here to be taken
_BETTER_WITHIN: Final = 0.1  # seconds to wait for a better one than a failed request
_REMEMBERED: Final = 10_000  # recently polled requests
_UNKNOWN: Final = (0, Standing.UNTRIED, 0)
_MANY: Final = 15  # failures after which the backoff no longer grows
_NEGLIGIBLE: Final = 1.0  # seconds for which an untaken delivery without failures is put off
_LARGEST: Final = 4096  # deliveries of one pull, unless the broker allows fewer, and to choose from in all
_NO_REASON: Final = "the consumer has no leader, or is gone"  # if the broker names none
_TOO_LARGE: Final = re.compile(r"Exceeded MaxRequestBatch of ([1-9]\d{0,5})")
_REFUSALS: Final = 5  # of pulls in a row that are a problem
_LONGEST_DELAY: Final = 2  # failures whose delay is the longest between two pulls: an election lasts only seconds


class NatsMessage(Message, kw_only=True, eq=False):
    """One delivery by JetStream."""

    id: int  # its number in the stream
    raw: Msg
    arrived_at: float
    standing: Standing  # what this worker knows of the request
    version: int  # of the request
    claim: int = 0  # the number of its claim; 0 if it made none

    @property
    def rank(self) -> tuple[int, Standing, float]:
        """Its place in the order of `aiokeyless._rules.order`: the lowest goes first."""
        return self.failures, self.standing, self.arrived_at if self.standing is Standing.ANSWERED else -self.id

    @property
    def returns(self) -> int:
        """How many deliveries `number` leaves out: workers that did not know the version gave them back."""
        return self.raw.metadata.num_delivered - self.number

    @property
    def place(self) -> str:
        """A name that no other message of a stream has, even if the stream was deleted and made again."""
        return f"message-{self.raw.metadata.stream}-{self.id}-{self.stored_at.timestamp():.6f}"

    def read_names(self) -> tuple[str, str]:
        """Return the operation id and the name of its request, or raise an `InvalidRequestError`."""
        request = decode_request(self.body)
        return request.operation_id, request_name(request)

    def read_deadline(self) -> datetime | None:
        """Return when the time of its request is over; None if it is not a request."""
        try:
            request = decode_request(self.body)
            return read_times(request.created_at, request.expires_in, self.stored_at)[0]
        except (InvalidRequestError, ConfigurationError):
            return None


class Failures:
    """The failures in a row, standing and returns of recently polled requests, by their numbers in the stream."""

    def __init__(self) -> None:
        self._counts: OrderedDict[int, tuple[int, Standing, int]] = OrderedDict()

    def of(self, sequence: int) -> tuple[int, Standing, int]:
        """Return the failures, the standing and the returns of a request. An unknown one counts as never tried."""
        return self._counts.get(sequence, _UNKNOWN)

    def record(self, sequence: int, result: ExchangeResult, returns: int = 0) -> None:
        """Record how an exchange ended."""
        if result is ExchangeResult.NONE:
            return
        failures, standing, _ = self.of(sequence)
        standing = min(standing, Standing.ANSWERED if result is ExchangeResult.ANSWERED else Standing.CREATED)
        self._counts[sequence] = failures + 1 if result is ExchangeResult.FAILED else 0, standing, returns
        self._counts.move_to_end(sequence)
        if len(self._counts) > _REMEMBERED:
            self._counts.popitem(last=False)

    def forget(self, sequence: int) -> None:
        """Forget a request that is decided."""
        self._counts.pop(sequence, None)


class Intake:
    """The deliveries of one consumer to all who share a connection.

    After a refused pull it calls `restore`, which makes or checks the consumer. It extends each delivery that was
    taken, until that is settled or was here for `lease` seconds. `newest` is the version of requests that its worker
    knows.
    """

    def __init__(
        self,
        connection: Client,
        prefix: str,
        stream: str,
        consumer: str,
        *,
        lease: float,
        now: Callable[[], float],
        restore: Callable[[], Awaitable[None]],
        newest: float = math.inf,
    ) -> None:
        self._connection = connection
        self._source = stream, consumer
        self._lease = lease
        self._subject = f"{prefix}.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._now = now
        self._restore = restore
        self._newest = newest
        self._inbox = connection.new_inbox()
        self._subscription: Subscription | None = None
        self._extending: asyncio.Task[None] | None = None  # as long as something is taken
        self._pulls = itertools.count()
        self._reply = ""  # the subject to which the broker reports the end of the last pull
        self._left = 0  # deliveries of the pull that have not arrived
        self._pulled_at = now()
        self._reconnects = 0  # of the connection, when it was sent
        self._wanted = 0  # deliveries, by all takes that wait
        self._largest = _LARGEST
        self._refusals = 0  # of pulls, in a row
        self._refusal = ""  # why the broker refused the last one
        self._pulls_from = now()  # after a refusal, no pull before this time
        self._arrived: list[NatsMessage] = []  # the oldest first
        self._newer: list[NatsMessage] = []  # of a later version
        self._passed = 0  # of these, since the last pull
        self._taken: set[NatsMessage] = set()  # and not settled
        self._pending = 0  # new requests at the broker, as the last delivery said
        self._moved = asyncio.Event()
        self._foreign = RateLimitedLog(logging.WARNING, "broker.foreign_message")
        self._refused = RateLimitedLog(logging.WARNING, "broker.refused")
        self._unsettled = RateLimitedLog(logging.WARNING, "broker.unsettled")
        self.failures: Failures = Failures()
        self.load_shedding: LoadShedding = LoadShedding(now)

    async def open(self) -> None:
        """Subscribe to deliveries."""
        self._subscription = await self._connection.subscribe(f"{self._inbox}.*", cb=self._on_message)

    async def take(self, up_to: int, within: float, *, untried: int | None) -> list[NatsMessage]:
        """See `Broker.take`."""
        until, wanted = self._now() + within, up_to
        if untried is not None:  # beyond those that are here: a better one may come behind any number of them
            wanted = max(up_to, min(len(self._arrived) + _CHOICE, _LARGEST))
        self._wanted += wanted
        try:
            while True:
                self._moved.clear()
                if self._subscription is None:
                    raise UnavailableError("the broker was closed")
                if self._connection.is_connected:
                    await self._pull(self._wanted)
                    await self._hand_back_stripped()
                    await self._hand_back_old()
                left = until - self._now()
                if taken := [*self._choose(up_to, untried, is_last=left <= 0), *self._take(self._newer[:up_to])]:
                    return taken
                if left <= 0:
                    self._check_connection()
                    return []
                if len(self._arrived) >= _CHOICE:
                    await self._hand_back_worse()
                with suppress(TimeoutError):
                    async with asyncio.timeout(min(left, _BETTER_WITHIN if self._arrived else _NOTICED_WITHIN)):
                        await self._moved.wait()
        finally:
            self._wanted -= wanted

    async def take_overdue(self, up_to: int, before: datetime) -> list[NatsMessage]:
        """Take requests whose deadline was at or before a moment; others stay here for a while."""
        self._check_connection()
        await self._pull(_CHOICE)
        await self._hand_back_stripped()
        deadlines = [(message, message.read_deadline()) for message in self._arrived]
        taken = self._take([message for message, at in deadlines if at is not None and at <= before][:up_to])
        await self._hand_back_old()
        return [*taken, *self._take(self._newer[:up_to])]

    async def put_off(self, message: NatsMessage, delay: float) -> None:
        """Put a delivery off."""
        self._taken.discard(message)
        with broker_errors():
            await message.raw.nak(delay)

    async def finish(self, message: NatsMessage) -> None:
        """Acknowledge a delivery, which never comes again."""
        self._taken.discard(message)
        self.failures.forget(message.id)
        with broker_errors():
            await message.raw.ack()

    async def _extend(self) -> None:
        """Tell the broker, again and again, which deliveries are under way."""
        while self._taken:
            await asyncio.sleep(ACK_WAIT / 3)
            latest = self._now() - (self._lease - ACK_WAIT)
            self._taken = {message for message in self._taken if message.arrived_at > latest}
            for message in [*self._taken]:
                if message in self._taken:  # otherwise it was put off meanwhile, and this would end that
                    with suppress(UnavailableError), broker_errors():
                        await message.raw.in_progress()

    async def close(self) -> None:
        """Wait for the pull to end, which takes `EXPIRES` at most, and give back the untaken deliveries.

        A subscription that ends at once would lose deliveries in transit. The broker does not notice its end, and
        repeats them only after the ack wait.
        """
        subscription, self._subscription = self._subscription, None
        if subscription is None:
            return
        if self._extending is not None:
            self._extending.cancel()
        if not self._connection.is_connected:
            return
        while self._is_expecting():
            self._moved.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(EXPIRES):
                    await self._moved.wait()
        with suppress(UnavailableError), broker_errors():
            await self._hand_back([*self._arrived, *self._newer], lambda _: 0.0)
            await subscription.drain()  # type: ignore[no-untyped-call]  # nats-py has no types here

    @property
    def problem(self) -> str | None:
        """Why nothing is delivered: the broker has refused several pulls in a row."""
        return f"the broker refuses each pull: {self._refusal}" if self._refusals >= _REFUSALS else None

    def _check_connection(self) -> None:
        if not self._connection.is_connected:
            raise UnavailableError("there is no connection to the broker")

    def _is_expecting(self) -> bool:
        """Return whether deliveries of the pull, or its end, have not arrived. A lost leader reports no end."""
        is_lost = self._reconnects != self._connection.stats["reconnects"]
        return self._left > 0 and not is_lost and self._now() <= self._pulled_at + EXPIRES + _LATE

    async def _pull(self, wanted: int) -> None:
        """Pull the missing deliveries, unless a pull is under way."""
        now, missing = self._now(), wanted - len(self._arrived)
        if missing <= 0 or self._is_expecting() or now < self._pulls_from:
            return
        # Requests of a later version take no room.
        batch = min(missing + min(self._passed, wanted), self._largest)
        self._passed = 0
        self._left, self._pulled_at, self._reconnects = batch, now, self._connection.stats["reconnects"]
        self._reply = f"{self._inbox}.{next(self._pulls)}"
        pull = {"batch": batch, "expires": int(EXPIRES * 1e9)}
        with broker_errors():
            await self._connection.publish(self._subject, json.dumps(pull).encode(), reply=self._reply)
        if self._refusals:  # in an election it takes a second, in which deliveries may come
            try:
                await self._restore()
            except UnavailableError as error:
                self._unsettled.log({"error": str(error)})

    def _choose(self, up_to: int, untried: int | None, *, is_last: bool) -> list[NatsMessage]:
        taken = self._arrived[:up_to]
        if untried is not None:
            ordered = sorted(self._arrived, key=lambda message: message.rank)
            first = [message for message in ordered if message.is_untried][:untried]
            taken = [*first, *(message for message in ordered if message not in first)][:up_to]
            if not is_last and taken and self._may_get_better(taken[0], untried):
                return []
        for message in taken:
            pending = message.raw.metadata.num_pending
            self.load_shedding.on_delivery(redelivered=not message.is_untried, backlog=pending)
        return self._take(taken)

    def _take(self, messages: list[NatsMessage]) -> list[NatsMessage]:
        self._taken.update(messages)
        self._arrived = [message for message in self._arrived if message not in self._taken]
        self._newer = [message for message in self._newer if message not in self._taken]
        if self._taken and (self._extending is None or self._extending.done()):
            self._extending = asyncio.create_task(self._extend())
        return messages

    def _may_get_better(self, best: NatsMessage, untried: int) -> bool:
        """Return whether better ones may come in a moment."""
        if untried and self._pending:
            return not best.is_untried
        return best.failures > 0 and self._now() < self._pulled_at + _BETTER_WITHIN

    async def _hand_back_old(self) -> None:
        """Put off untaken deliveries. Another worker may have room, and other requests wait behind them."""
        before = self._now() - _HELD_FOR
        old = [message for message in (*self._arrived, *self._newer) if message.arrived_at < before]
        await self._hand_back(old, lambda message: error_delay(message.failures) if message.failures else _NEGLIGIBLE)

    async def _hand_back_worse(self) -> None:
        """Put off the worse half for long, since the broker delivers new requests only after all of these."""
        worse = sorted(self._arrived, key=lambda message: message.rank)[_CHOICE // 2 :]
        await self._hand_back(worse, lambda _: error_delay(_MANY))

    async def _hand_back_stripped(self) -> None:
        """Put off deliveries that came without their bodies, since an operator changed the consumer."""
        stripped = [message for message in self._arrived if not message.body and _SIZE in (message.raw.headers or {})]
        await self._hand_back(stripped, lambda message: error_delay(min(message.number, _MANY)))
        if stripped:
            await self._restore()

    async def _hand_back(self, messages: list[NatsMessage], choose_delay: Callable[[NatsMessage], float]) -> None:
        self._take(messages)
        for message in messages:
            await self.put_off(message, choose_delay(message))

    async def _on_message(self, raw: Msg) -> None:
        if raw.reply and not is_delivery(raw.reply, *self._source):
            # Another user published it to this inbox; the stream did not deliver it.
            self._foreign.log({"stream": self._source[0]})
            return
        self._moved.set()
        if raw.reply:
            self._refusals = 0
            self._left = max(0, self._left - 1)
            metadata = raw.metadata
            self._pending = metadata.num_pending
            failures, standing, returns = self.failures.of(metadata.sequence.stream)
            message = NatsMessage(
                id=metadata.sequence.stream,
                body=raw.data,
                stored_at=metadata.timestamp,
                number=metadata.num_delivered - returns,
                is_untried=standing is Standing.UNTRIED,
                failures=failures,
                traceparent=(raw.headers or {}).get(TRACEPARENT),
                raw=raw,
                arrived_at=self._now(),
                standing=standing,
                version=read_version(raw.data),
            )
            is_newer = message.version > self._newest
            self._passed += is_newer
            (self._newer if is_newer else self._arrived).append(message)
            return
        if raw.subject == self._reply:
            self._on_end(raw)

    def _on_end(self, raw: Msg) -> None:
        """Note the end of the pull, and why the broker refused it, if it did."""
        headers, self._left = raw.headers or {}, 0
        status, description = headers.get("Status", ""), headers.get("Description", "")
        if status == _EXPIRED:
            self._refusals = 0
            return
        # nats-py may find a description although there is none.
        has_reason = bool(description) and description.isprintable()
        self._refusal = f"{status} {description if has_reason else _NO_REASON}".strip()
        if (limit := _TOO_LARGE.fullmatch(description)) is not None:
            self._largest = int(limit[1])
        self._refusals += 1
        self._pulls_from = self._now() + error_delay(min(self._refusals, _LONGEST_DELAY))
        self._refused.log({"reason": self._refusal})
