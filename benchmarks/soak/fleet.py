"""A shop on PostgreSQL: it asks in the transaction of the order, and readers pay in the transaction of the outcome.

Workers and readers are processes of their own. Payments have no key that would hide one that is made twice.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import asyncpg
import msgspec

from aiokeyless import KeylessClient, KeylessError, wait_adaptive
from aiokeyless.worker import ApprovalEvent, ApprovalWorker, BrokerError, next_outcome, submit_approval
from aiokeyless.worker.postgres.adapters.asyncpg import ERRORS
from benchmarks.programs import meanwhile
from benchmarks.server import API_KEY

from .growth import Sample
from .journal import Writer
from .verdicts import WORKER, Ending, Outcome

if TYPE_CHECKING:
    import random
    from pathlib import Path
    from typing import Any, NoReturn, Self

    from aiokeyless.worker import Broker

USER: Final = "C0FFEE"
READER: Final = "shop"
TABLES: Final = f"""
    CREATE TABLE orders (id text PRIMARY KEY);
    CREATE TABLE payment (order_id text);
    CREATE TABLE told (event bytea, at double precision);
    SELECT keyless.add_reader('{READER}');
"""
_ERRORS: Final = (BrokerError, *ERRORS)
AGAIN: Final = 0.2  # seconds until a program that lost its connection makes another one
_POLL_COST: Final = 0.3  # seconds of lateness that a poll is worth: other programs need the machine, too
_SAMPLES_EVERY: Final = 5.0  # seconds


def work(url: str, base_url: str, request_timeout: float, samples: Path) -> None:
    """Run a worker that writes a `Sample` now and then; it ends if the database or the service is away at its start."""

    async def run() -> None:
        async with meanwhile(_sample(samples)):
            await keep_asking(url, base_url, request_timeout)

    with suppress(KeylessError):
        asyncio.run(run())


async def keep_asking(broker: str | Broker, base_url: str, request_timeout: float) -> None:
    """Run a worker until SIGTERM."""
    async with KeylessClient(API_KEY, base_url=base_url, request_timeout=request_timeout) as client:
        await ApprovalWorker(client, broker, schedule=wait_adaptive(poll_cost=_POLL_COST)).run()


async def _sample(samples: Path) -> NoReturn:
    with Writer(samples) as writer:
        while True:
            writer.write(Sample.take())
            await asyncio.sleep(_SAMPLES_EVERY)


def read(url: str) -> None:
    """Note each outcome, and pay if it is an approval, in the outcome's transaction."""

    async def keep_reading() -> NoReturn:
        while True:
            with suppress(*_ERRORS):
                connection = await asyncpg.connect(url)
                try:
                    while True:
                        async with next_outcome(connection, READER) as event:
                            await _note(connection, event)
                finally:
                    connection.terminate()
            await asyncio.sleep(AGAIN)

    asyncio.run(keep_reading())


async def _note(connection: asyncpg.Connection[Any], event: ApprovalEvent) -> None:
    await connection.execute("INSERT INTO told VALUES ($1, $2)", msgspec.json.encode(event), time.monotonic())
    if event.outcome == "approved":
        await connection.execute("INSERT INTO payment VALUES ($1)", event.operation_id)


class Shop:
    """Places orders, until it closes; some are rolled back."""

    def __init__(self, source: random.Random, expires_in: float, rate: float) -> None:
        self.committed: dict[str, float] = {}  # when each was placed, by the machine's monotonic clock
        self.rolled_back: set[str] = set()
        self.closes_at = math.inf
        self._source = source
        self._expires_in = expires_in
        self._rate = rate
        self._count = 0

    async def sell(self, url: str, share: float) -> None:
        """Place this share of the orders until the shop closes, over one connection after the other."""
        connection: asyncpg.Connection[Any] | None = None
        while time.monotonic() < self.closes_at:
            await asyncio.sleep(self._source.expovariate(share * self._rate))
            self._count += 1
            order_id, started, rolls_back = f"order-{self._count}", time.monotonic(), self._source.random() < 0.1
            while True:
                try:
                    if connection is None or connection.is_closed():
                        connection = await asyncpg.connect(url)
                    await self._place(connection, order_id, rolls_back=rolls_back)
                    break
                except _ERRORS:
                    if connection is not None:
                        connection.terminate()  # it may lead to a server that has turned read-only
                    await asyncio.sleep(AGAIN)
            if rolls_back:
                self.rolled_back.add(order_id)
            else:
                self.committed[order_id] = started
        if connection is not None:
            connection.terminate()

    async def _place(self, connection: asyncpg.Connection[Any], order_id: str, *, rolls_back: bool) -> None:
        with suppress(_RolledBackError):
            async with connection.transaction():
                await connection.execute("INSERT INTO orders VALUES ($1) ON CONFLICT DO NOTHING", order_id)
                await submit_approval(
                    connection,
                    USER,
                    operation_id=order_id,
                    operation_payload=payload_of(order_id),
                    expires_in=self._expires_in,
                )
                if rolls_back:
                    raise _RolledBackError


class _RolledBackError(Exception):
    """The shop changed its mind."""


def payload_of(order_id: str) -> str:
    """Return what the user is asked."""
    return f"Approve the payment of {order_id}"


class Told(NamedTuple):
    """An outcome that the shop was told, and when, by the machine's monotonic clock."""

    event: ApprovalEvent
    at: float

    @classmethod
    def of_row(cls, event: str, at: str) -> Self:
        """Return a row of the table `told`, as psql prints it."""
        return cls(msgspec.json.decode(bytes.fromhex(event.removeprefix("\\x")), type=ApprovalEvent), float(at))

    @property
    def order_id(self) -> str:
        """The order, whose id is that of the operation."""
        return self.event.operation_id or ""

    def as_outcome(self, started: float, expires_in: float) -> Outcome:
        """Return it for `Verdicts`, of an order that was placed at that time."""
        event, payload = self.event, payload_of(self.order_id)
        is_same = hashlib.sha256(payload.encode()).hexdigest() == event.payload_sha256
        return Outcome(
            self.order_id,
            WORKER,
            self._ending(),
            started,
            self.at,
            deadline=started + expires_in,
            approved=(self.order_id, event.user_id or "", payload if is_same else ""),
            detail=f"{event.reason or ''} {event.detail or ''}".strip(),
        )

    def _ending(self) -> Ending:
        match self.event.outcome, self.event.reason:
            case "approved", _:
                return Ending.APPROVED
            case "failed", "mismatch":
                return Ending.MISMATCHED
            case "failed", _:
                return Ending.FAILED
        if self.event.asked is False:
            return Ending.NOT_CREATED
        return Ending.TIMED_OUT if self.event.answered else Ending.UNKNOWN
