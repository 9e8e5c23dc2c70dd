"""`NatsBroker`: JetStream as a broker for workers and applications."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Final, Self

import msgspec
import nats.js.errors
from nats.aio.client import Client

from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import BrokerError, ConfigurationError, InvalidRequestError
from aiokeyless.events import Inspection
from aiokeyless.models import Secret
from aiokeyless.worker.broker import (
    Broker,
    Claim,
    ExchangeResult,
    NewRequest,
    OutcomeDelivery,
    UnavailableError,
    without_frames,
)
from aiokeyless.worker.clock import BrokerClock
from aiokeyless.worker.logs import log
from aiokeyless.worker.messages import ApprovalEvent, Message, read_rest

from .claims import READ_WITHIN, NatsClaims
from .connection import check_options, connect, disconnect, find_largest_request
from .event_keys import MESSAGE_ID, SIGNATURE, TRACEPARENT, EventKeys, is_about
from .failures import NoStreamError, broker_errors, raise_lost_cancellations
from .fleet import KEYLESS, Fleet
from .inspection import inspect
from .intake import Intake, NatsMessage
from .readers import Reader
from .streams import ACK_WAIT, StreamSettings, ensure_workers, prepare

if TYPE_CHECKING:
    from nats.js import JetStreamContext
    from nats.js.api import PubAck

_ANSWER_WITHIN: Final = 5.0  # seconds
_RESTORED_WITHIN: Final = 1.0  # seconds; during an election nobody answers, and deliveries wait for it
_SUBMISSIONS: Final = 3  # attempts
#: Seconds for which a submission waits for the stream to have a leader. An election takes up to ten.
_LEADERLESS_FOR: Final = 15.0
_KEPT_AS: Final = "_aiokeyless_broker"  # a connection's attribute for its broker


class NatsBroker(Broker):
    """A broker on NATS JetStream.

    Args:
        broker: Address of a NATS server, or several, separated by commas; or a connection, which stays yours.
        fleet: The fleet of the workers. Default: that of the name ``keyless``.
        event_keys: Keys with which workers sign events and claims, so that readers and other workers believe no others.
            Default: none; then you must trust all users of the broker's account with approvals.
        settings: Settings of streams that do not exist yet. Default: those of `StreamSettings`.
        connect_options: Options of ``nats.connect``, such as credentials and TLS, but no callbacks and none for
            reconnecting. Default: none.

    Raises:
        ConfigurationError: The broker sets one of the options itself.
    """

    def __init__(
        self,
        broker: str | Client,
        *,
        fleet: Fleet = KEYLESS,
        event_keys: EventKeys | None = None,
        settings: StreamSettings | None = None,
        connect_options: Mapping[str, object] | None = None,
    ) -> None:
        self.system = "nats"
        self.forgets_claims = True
        self._fleet = fleet
        self._url = Secret(broker) if isinstance(broker, str) else None
        self._connection: Client | None = None if isinstance(broker, str) else broker
        options = (connect_options or {}).items()
        self._options = {name: Secret(value) if isinstance(value, str) else value for name, value in options}
        del broker, connect_options, options  # before anything is raised: error reporters print local variables
        check_options(self._options)
        self.destination: str = fleet.request_subject
        self._event_keys = event_keys
        self._settings = settings or StreamSettings()
        if self._connection is not None:
            self.largest_request: int = find_largest_request(self._connection)
        self._has_stored = False  # a request, so there is a stream
        self._loss: BrokerError | None = None  # why the connection will not come back
        self._clock = BrokerClock()
        self._intake: Intake | None = None  # None until a worker has prepared it
        self._claims: NatsClaims
        self._ack_wait = ACK_WAIT
        self._inspect: Callable[..., Awaitable[Inspection]] = inspect
        self._readers: dict[str, Reader] = {}

    @classmethod
    def on(cls, connection: Client) -> Self:
        """Return the broker on a connection of the application's: the same one for the same connection."""
        broker = vars(connection).get(_KEPT_AS)
        if not isinstance(broker, cls):
            broker = vars(connection)[_KEPT_AS] = cls(connection)
        return broker

    def __repr__(self) -> str:
        return f"<NatsBroker of the fleet {self._fleet.name!r}>"

    async def open(self) -> None:
        if self._url is not None:
            if self._connection is not None:
                raise ConfigurationError("the broker is open already")
            self._loss = None
            self._connection = await without_frames(self._connect(self._url))
            self.largest_request = find_largest_request(self._connection)

    async def _connect(self, url: Secret) -> Client:
        options = {
            name: value.reveal() if isinstance(value, Secret) else value for name, value in self._options.items()
        }
        return await connect(url.reveal(), options, on_loss=self._on_loss)

    async def aclose(self) -> None:
        connection = self._connection
        if connection is None:
            return
        intakes: list[Intake] = [*self._readers.values(), *([] if self._intake is None else [self._intake])]
        self._intake = None
        self._readers.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_WITHIN):  # the broker may be silent
                await asyncio.gather(*(intake.close() for intake in intakes))
        if self._url is not None:
            self._connection = None
            await disconnect(connection)

    def _on_loss(self, error: BrokerError) -> None:
        self._loss = self._loss or error

    def _open_connection(self) -> Client:
        if self._loss is not None:
            raise self._loss.with_traceback(None)
        if self._connection is None:
            raise ConfigurationError("the broker is not open: use it in 'async with NatsBroker(...) as broker'")
        if self._connection.is_closed:
            raise BrokerError("the connection to the broker was closed")
        return self._connection

    def _stream(self) -> JetStreamContext:
        return self._fleet.jetstream(self._open_connection(), _ANSWER_WITHIN)

    def _open_intake(self) -> Intake:
        self._open_connection()
        assert self._intake is not None  # noqa: S101  # a worker calls `prepare` first
        return self._intake

    # -- for applications

    async def submit(self, new: NewRequest) -> bool:
        headers = {MESSAGE_ID: new.digest}
        if new.traceparent is not None:
            headers[TRACEPARENT] = new.traceparent
        loop, failures = asyncio.get_running_loop(), 0
        give_up_at = loop.time() + _LEADERLESS_FOR
        while True:
            try:
                with broker_errors():
                    # Each attempt has the same name, so the stream stores the request once, even if an answer was lost.
                    stored = await self._stream().publish(
                        self._fleet.request_subject, new.body, stream=self._fleet.requests, headers=headers
                    )
                self._has_stored = True
                return bool(stored.duplicate)
            except NoStreamError:  # raised at once, and also while the stream has no leader
                if loop.time() >= give_up_at:
                    raise BrokerError(
                        "no stream took it; start a worker first, it makes the stream, or JetStream is off",
                        may_pass=self._has_stored,  # the stream has no leader
                    ) from None
            except UnavailableError:
                failures += 1
                if failures == _SUBMISSIONS:
                    raise
            await asyncio.sleep(error_delay(max(1, failures)))

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        connection = self._open_connection()
        if reader not in self._readers:
            self._readers[reader] = Reader(connection, self._fleet, reader, self._event_keys)
        try:
            return await self._readers[reader].next()
        except BrokerError as error:
            raise (self._loss or error) from None  # as in `prepare`

    # -- for workers

    async def prepare(self, *, lease: float, service: str) -> float:
        connection, stream = self._open_connection(), self._stream()
        if self._event_keys is None:
            advice = "set an event key, or trust all users of the account"
            log(logging.WARNING, "worker.events_unsigned", {"advice": advice})
        self._ack_wait = min(lease, ACK_WAIT)
        try:
            with raise_lost_cancellations():
                window = await prepare(stream, self._fleet, self._settings, ack_wait=self._ack_wait, service=service)
        except BrokerError:
            if self._loss is not None:  # the broker does not answer a request that it does not permit
                raise self._loss from None
            raise
        self._inspect = partial(inspect, settings=self._settings, ack_wait=self._ack_wait, service=service)
        with suppress(UnavailableError):
            await self.inspect()  # which measures the broker's clock
        self._claims = NatsClaims(self._fleet.jetstream(connection, READ_WITHIN), self._fleet, self._event_keys)
        if self._intake is None:
            loop = asyncio.get_running_loop()
            source = self._fleet.prefix, self._fleet.requests, self._fleet.consumer
            self._intake = Intake(
                connection, *source, lease=lease, now=loop.time, restore=self._restore, newest=self.request_version
            )
            await self._intake.open()
        return window

    async def _restore(self) -> None:
        stream = self._fleet.jetstream(self._open_connection(), _RESTORED_WITHIN)
        with broker_errors():
            await ensure_workers(stream, self._fleet, self._ack_wait)

    def now(self) -> datetime:
        return self._clock.now()

    async def take(self, up_to: int, within: float, *, untried: int | None = None) -> Sequence[Message]:
        return await self._open_intake().take(up_to, within, untried=untried)

    async def take_overdue(self, up_to: int, grace: float) -> Sequence[Message]:
        return await self._open_intake().take_overdue(up_to, self.now() - timedelta(seconds=grace))

    async def put_off(self, message: Message, delay: float, result: ExchangeResult) -> None:
        intake, delivery = self._open_intake(), _delivery(message)
        intake.failures.record(delivery.id, result, delivery.returns)
        if result in {ExchangeResult.ANSWERED, ExchangeResult.CREATED}:
            delay = self._stretch(delivery, delay, intake.load_shedding.factor)
        await intake.put_off(delivery, delay)

    def _stretch(self, delivery: NatsMessage, delay: float, factor: float) -> float:
        """Stretch a delay while new requests wait, but not past the deadline of its own request."""
        if factor <= 1.0 or (at := delivery.read_deadline()) is None:
            return delay
        return max(delay, min(delay * factor, (at - self.now()).total_seconds()))

    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        delivery, data = _delivery(message), msgspec.json.encode(event)
        # A request that is delivered again, such as after a crash, must not get a second outcome. The first is kept.
        try:
            _, name = delivery.read_names()
        except InvalidRequestError:
            name = delivery.place
        own_name = name
        with broker_errors():
            while (stored := await self._publish(event, data, own_name)).duplicate:
                if await self._is_genuine(stored.seq, event):
                    break
                # A forger knew the name. The next name follows from it, so that all deliveries use the same one.
                log(logging.ERROR, "outcome.forged", {"sequence": stored.seq})
                own_name = f"{name}-{stored.seq}"
        await self._open_intake().finish(delivery)
        return not stored.duplicate

    async def _publish(self, event: ApprovalEvent, data: bytes, name: str) -> PubAck:
        headers = {MESSAGE_ID: name}
        if self._event_keys is not None:
            headers[SIGNATURE] = self._event_keys.sign(data, fleet=self._fleet.name)
        if event.traceparent is not None:
            headers[TRACEPARENT] = event.traceparent
        return await self._stream().publish(
            self._fleet.outcome_subject(event.outcome), data, stream=self._fleet.outcomes, headers=headers
        )

    async def _is_genuine(self, sequence: int, event: ApprovalEvent) -> bool:
        """Return whether a worker stored it, about the same request. It counts as genuine if an operator removed it."""
        if self._event_keys is None:
            return True
        try:
            kept = await self._stream().get_msg(self._fleet.outcomes, seq=sequence)
        except nats.js.errors.NotFoundError:
            return True
        data, signature = kept.data or b"", (kept.headers or {}).get(SIGNATURE)
        return self._event_keys.verify(data, signature, fleet=self._fleet.name) and is_about(data, event)

    async def claim(self, message: Message) -> Claim:
        delivery = _delivery(message)
        claim, delivery.claim = await self._claims.claim(*delivery.read_names())
        if claim is Claim.NEW:  # nothing was created before: what did not fail, older workers gave back unread
            delivery.number = min(delivery.number, delivery.failures + 1)
        return claim

    async def has_claim(self, message: Message) -> bool:
        delivery = _delivery(message)
        if delivery.version > self.request_version:  # this worker cannot tell the name of its request
            operation_id, _ = read_rest(delivery.body)
            return operation_id is not None and not await self._claims.is_free(operation_id)
        return await self._claims.holds(*delivery.read_names())

    async def unclaim(self, message: Message) -> bool:
        delivery = _delivery(message)
        return await self._claims.unclaim(delivery.read_names()[0], delivery.claim)

    async def inspect(self) -> Inspection:
        if not self._open_connection().is_connected:
            raise UnavailableError("there is no connection to the broker")
        found = await self._inspect(self._stream(), self._fleet, self._clock)
        problem = None if self._intake is None else self._intake.problem
        return found if problem is None else msgspec.structs.replace(found, problems=(*found.problems, problem))


def _delivery(message: Message) -> NatsMessage:
    assert isinstance(message, NatsMessage)  # noqa: S101  # this broker made it
    return message
