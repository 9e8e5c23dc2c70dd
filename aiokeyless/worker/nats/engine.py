"""The worker's side of NATS JetStream: connection, streams, pulls and claims as one `Engine`."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import nats.js.errors

from aiokeyless.worker.engine import Engine, Inspection, Learned, Message, Sealed, Terms
from aiokeyless.worker.event_keys import SIGNATURE
from aiokeyless.worker.logs import log
from aiokeyless.worker.messages import MESSAGE_ID, TRACEPARENT

from . import learned
from .claims import NatsClaims, claims_signed_from, mark
from .clock import BrokerClock
from .connection import check_options, connect, disconnect
from .failures import engine_errors
from .inspection import Inspector
from .intake import Intake
from .streams import prepare, restore_consumer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from datetime import datetime

    from nats.aio.client import Client
    from nats.aio.msg import Msg
    from nats.js import JetStreamContext
    from nats.js.api import PubAck

    from aiokeyless.errors import BrokerError
    from aiokeyless.worker.engine import Claims
    from aiokeyless.worker.event_keys import EventKeys

    from .fleet import Fleet
    from .streams import StreamSettings


class NatsEngine(Engine):
    """One worker's connection to NATS.

    Args:
        url: Addresses of servers, separated by commas.
        fleet: The fleet of the worker.
        settings: Of the streams, where they do not exist yet.
        service: Base URL of the service that the worker asks.
        options: Of ``nats.connect``.
        timeout: Seconds within which the broker must answer.
        event_keys: What claims are signed with; None where they are not.

    Raises:
        ConfigurationError: An option is one that the worker sets itself.
    """

    def __init__(
        self,
        url: str,
        *,
        fleet: Fleet,
        settings: StreamSettings,
        service: str,
        options: Mapping[str, object],
        timeout: float,
        event_keys: EventKeys | None = None,
    ) -> None:
        self._url = url
        self.fleet_name: str = fleet.name
        self.system: str = "nats"
        self.destination: str = fleet.request_subject
        self._fleet = fleet
        self._settings = settings
        self._service = service
        check_options(options)
        self._options = options
        self._timeout = timeout
        self._event_keys = event_keys
        self._ack_wait = 0.0
        self._clock = BrokerClock()
        self._keeping_time: asyncio.Task[None] | None = None
        self._connection: Client
        self._stream: JetStreamContext
        self._intake: Intake

    async def connect(self, *, on_reconnect: Callable[[], None], on_loss: Callable[[BrokerError], None]) -> None:
        """See `Engine`."""

        def reconnected() -> None:
            if hasattr(self, "_intake"):
                self._intake.forget()  # the pulls went with the connection that was lost
            on_reconnect()

        self._connection = await connect(self._url, self._options, on_reconnect=reconnected, on_loss=on_loss)
        self._stream = self._fleet.jetstream(self._connection, self._timeout)

    async def prepare(self, *, ack_wait: float) -> Terms:
        """See `Engine`."""
        self._ack_wait = ack_wait
        keys = self._event_keys
        longest_wait = await prepare(
            self._stream,
            self._fleet,
            self._settings,
            ack_wait=ack_wait,
            service=self._service,
            claims_metadata=mark(keys, self._fleet),
        )
        await self._clock.measure(self._connection, self._time_subject, self._timeout)
        if keys is None:
            self.claims: Claims = NatsClaims(self._stream, self._fleet)
        else:
            signed_from = await claims_signed_from(
                self._connection, self._fleet, keys, now=self.now(), within=self._timeout
            )
            self.claims = NatsClaims(self._stream, self._fleet, keys=keys, signed_from=signed_from)
        return Terms(longest_wait, self._connection.max_payload)

    @property
    def _time_subject(self) -> str:
        return f"{self._fleet.api_prefix}.STREAM.INFO.{self._fleet.requests}"

    async def open(self, *, deliver: Callable[[Message], None], ended: Callable[[str | None], None]) -> None:
        """See `Engine`."""
        self._intake = Intake(
            self._connection,
            self._fleet,
            deliver=lambda message: deliver(NatsMessage(message, self._stream, self._fleet)),
            ended=ended,
            now=asyncio.get_running_loop().time,
        )
        await self._intake.open()
        keeping = self._clock.keep(self._connection, self._time_subject, self._timeout)
        self._keeping_time = asyncio.create_task(keeping)

    @property
    def is_connected(self) -> bool:
        """See `Engine`."""
        return self._connection.is_connected

    def now(self) -> datetime:
        """See `Engine`."""
        return self._clock.now()

    def expected(self) -> int:
        """See `Engine`."""
        return self._intake.expected()

    async def ask(self, batch: int) -> None:
        """See `Engine`."""
        with engine_errors():
            await self._intake.ask(batch)

    async def inspect(self) -> Inspection:
        """See `Engine`."""
        return await Inspector(self._connection, self._fleet, self._clock, self._timeout).inspect()

    async def read_learned(self, bucket: str) -> Learned:
        """See `Engine`."""
        return await learned.read(self._stream, bucket, self._fleet.name)

    async def write_learned(self, bucket: str, state: bytes, revision: int) -> bool:
        """See `Engine`."""
        return await learned.write(self._stream, bucket, self._fleet.name, state, revision)

    async def restore(self) -> None:
        """See `Engine`."""
        await restore_consumer(self._stream, self._fleet, ack_wait=self._ack_wait)

    async def close(self) -> None:
        """See `Engine`."""
        if not self.is_connected:
            return
        with engine_errors():
            async with asyncio.timeout(self._timeout):  # the broker may be silent
                await self._intake.close()

    async def disconnect(self) -> None:
        """See `Engine`."""
        if self._keeping_time is not None:
            self._keeping_time.cancel()
        await disconnect(self._connection)


class NatsMessage(Message):
    """One delivery by JetStream.

    Args:
        message: The delivery.
        stream: JetStream.
        fleet: The fleet of the worker.
    """

    __slots__ = ("_fleet", "_message", "_stream")

    def __init__(self, message: Msg, stream: JetStreamContext, fleet: Fleet) -> None:
        metadata = message.metadata
        self._fleet = fleet
        self._message = message
        self._stream = stream
        self.data: bytes = message.data
        headers = message.headers or {}
        self.message_id: str | None = headers.get(MESSAGE_ID)
        self.traceparent: str | None = headers.get(TRACEPARENT)
        self.stored_at: datetime = metadata.timestamp
        self.number: int = metadata.num_delivered
        self.backlog: int = metadata.num_pending
        # A stream that was made anew has the same numbers again.
        self.name: str = f"message-{metadata.stream}-{metadata.sequence.stream}-{metadata.timestamp.timestamp():.6f}"

    async def put_off(self, delay: float) -> None:
        """See `Message`."""
        with engine_errors():
            await self._message.nak(delay=delay)

    async def decide(self, event: Sealed) -> bool:
        """See `Message`."""
        name = event.name
        with engine_errors():
            while (stored := await self._publish(event, name)).duplicate:
                if event.is_genuine is None or await self._is_genuine(stored.seq, event.is_genuine):
                    break
                # A forger knew the name. This one follows from it, so that other deliveries use the same.
                log(logging.ERROR, "outcome.forged", {"sequence": stored.seq})
                name = f"{event.name}-{stored.seq}"
            await self._message.ack()
        return not stored.duplicate

    async def _publish(self, event: Sealed, name: str) -> PubAck:
        headers = {MESSAGE_ID: name}
        if event.signature is not None:
            headers[SIGNATURE] = event.signature
        if event.traceparent is not None:
            headers[TRACEPARENT] = event.traceparent
        return await self._stream.publish(
            self._fleet.outcome_subject(event.outcome), event.data, stream=self._fleet.outcomes, headers=headers
        )

    async def _is_genuine(self, sequence: int, is_genuine: Callable[[bytes, str | None], bool]) -> bool:
        """Return whether what is stored is genuine; what an operator has removed since is taken for it."""
        try:
            kept = await self._stream.get_msg(self._fleet.outcomes, seq=sequence)
        except nats.js.errors.NotFoundError:
            return True
        return is_genuine(kept.data or b"", (kept.headers or {}).get(SIGNATURE))
