"""What the suite needs of a broker's storage, and the requests and outcomes that it stores there."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import msgspec
import pytest
from nats_server import NatsServer
from postgres_server import shared_server
from waiting import PATIENCE, until

from aiokeyless.worker.broker import NewRequest
from aiokeyless.worker.messages import VERSION, ApprovalEvent, ApprovalRequest, Outcome, request_name
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable
    from pathlib import Path

    from aiokeyless.worker.broker import Broker
    from aiokeyless.worker.messages import Message

#: Seconds of a lease: longer than a test takes on a busy machine. Over 200 s a broker takes it for a clock set back.
LEASE: Final = 150.0
#: The same, of a delivery that is to be repeated.
SHORT_LEASE: Final = 1.0


class Opened(Protocol):
    """Opens a broker as one more process would."""

    def __call__(self, lease: float = LEASE) -> Awaitable[Broker]: ...


class Storage(AbstractAsyncContextManager["Storage"]):
    """Where a broker stores what the objects of several processes share.

    Args:
        folder: A folder of the test's own.
    """

    #: Whether it counts the failures of each request, and orders probes by them.
    orders_probes = True
    #: Seconds by which a busy machine may be late; none on a clock that moves.
    slack = 30.0
    #: Whether a different request under a used operation id is refused when it is submitted.
    refuses_conflicts = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    async def __aexit__(self, *_error: object) -> None:
        """Nothing is left."""

    @abstractmethod
    def broker(self) -> AbstractAsyncContextManager[Broker]:
        """Return a broker as one more process has it, which is opened by entering it."""


class Memory(Storage):
    slack = 0.0

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._broker = SqliteBroker(":memory:")

    async def __aenter__(self) -> Self:
        await self._broker.open()
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self._broker.aclose()

    @asynccontextmanager
    async def broker(self) -> AsyncGenerator[Broker]:
        yield self._broker  # all workers and applications share the object


class File(Storage):
    def broker(self) -> SqliteBroker:
        return SqliteBroker(self.folder / "keyless.db")


class Nats(Storage):
    orders_probes = False
    refuses_conflicts = False

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server = NatsServer(folder)

    async def __aenter__(self) -> Self:
        await self._server.start()
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._server.stop()

    def broker(self) -> NatsBroker:
        return NatsBroker(self._server.url)


class Postgres(Storage):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        server = shared_server()
        self._url = server.url(server.prepared_database())

    def broker(self) -> PostgresBroker:
        return PostgresBroker(self._url)


# An id begins with the name of the broker's folder.
MEMORY = pytest.param(Memory, id="sqlite in memory", marks=pytest.mark.looptime)
FILE = pytest.param(File, id="sqlite in a file")
NATS = pytest.param(Nats, id="nats")
POSTGRES = pytest.param(Postgres, id="postgres")
#: What stores requests and outcomes, opened anew for each test.
BROKERS = [MEMORY, FILE, NATS, POSTGRES]


def new_request(operation_id: str, traceparent: str | None = None, **fields: Any) -> NewRequest:
    request = ApprovalRequest(version=VERSION, user_id="C0FFEE", operation_id=operation_id, **fields)
    return NewRequest(request, msgspec.json.encode(request), request_name(request), traceparent)


def operation_of(message: Message) -> str:
    return msgspec.json.decode(message.body, type=ApprovalRequest).operation_id


def outcome_of(message: Message, outcome: Outcome = Outcome.APPROVED) -> ApprovalEvent:
    return ApprovalEvent(
        version=VERSION,
        outcome=outcome,
        operation_id=operation_of(message),
        requested_at=message.stored_at,
        decided_at=datetime.now(UTC),
        deliveries=message.number,
    )


async def submit(broker: Broker, *operation_ids: str) -> None:
    for operation_id in operation_ids:
        assert not await broker.submit(new_request(operation_id))


async def take_all(broker: Broker, within: float = 0.3, *, up_to: int = 100) -> list[Message]:
    """Take what is due, and what becomes due within so many seconds."""
    loop = asyncio.get_running_loop()
    until = loop.time() + within
    taken: list[Message] = []
    while (left := until - loop.time()) > 0 and len(taken) < up_to:
        taken += await broker.take(up_to - len(taken), left)
    return taken


async def take_n(broker: Broker, count: int) -> list[Message]:
    """Take so many, however long a busy machine takes."""
    return await take_all(broker, PATIENCE, up_to=count)


async def is_waiting(broker: Broker, count: int) -> None:
    """Wait until so many requests wait; some brokers count a moment later."""

    async def is_counted() -> bool:
        return (await broker.inspect()).waiting == count

    await until(is_counted)


async def decide(broker: Broker, message: Message, outcome: Outcome = Outcome.APPROVED) -> bool:
    return await broker.decide(message, outcome_of(message, outcome))
