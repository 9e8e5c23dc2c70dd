"""What the suite needs of a broker's storage, and the requests and outcomes that it stores there."""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import UTC, datetime
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

import msgspec
import pytest
from nats_server import NatsServer
from postgres_server import shared_server
from waiting import PATIENCE, until

from aiokeyless.worker.broker import NewRequest
from aiokeyless.worker.messages import (
    EVENT_VERSION,
    REQUEST_VERSION,
    ApprovalEvent,
    ApprovalRequest,
    Outcome,
    read_event,
    request_name,
)
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable
    from pathlib import Path

    from aiokeyless.worker.broker import Broker, OutcomeDelivery
    from aiokeyless.worker.messages import Message

    Opened = Callable[..., Awaitable[Broker]]  # opens a broker as one more process would, with a lease

#: Seconds of a lease: longer than a test takes on a busy machine. Over 200 s a broker takes it for a clock set back.
LEASE: Final = 150.0
#: The same, of a delivery that is to be repeated.
SHORT_LEASE: Final = 0.1
#: Seconds for which only a worker that knows a later version takes a request of it, in place of one.
HEAD_START: Final = 0.05


class Storage(AbstractAsyncContextManager["Storage"]):
    """Where a broker stores what the objects of several processes share. Cases choose storages by these facts alone.

    Args:
        folder: A folder of the test's own.
    """

    #: How tests name it; the name begins with that of the broker's folder.
    name: ClassVar[str]
    #: Whether what is stored outlives its process.
    lasts = True
    #: Whether there is a row for each request, for as long as its operation id is used. Then failures are counted for
    #: ever and set the order, a different request under the id is refused, and so is a claim after the decision.
    has_rows = True
    #: Whether the answer to a claim tells the time, so that a pause that the machine does not know of is noticed.
    claims_tell_time = False
    #: Whether its clock is the loop's, which moves.
    moves_clock = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Seconds by which a machine may be late, and those within which what must not come would come: on a moved
        # clock, after each lease and pause; on another, after several of the `PAUSES` of the conftest.
        self.slack, self.quiet = (0.0, 1000.0) if self.moves_clock else (PATIENCE, 0.1)

    async def __aexit__(self, *_error: object) -> None:
        """Nothing is left."""

    @abstractmethod
    def broker(self) -> AbstractAsyncContextManager[Broker]:
        """Return a broker as one more process has it, which is opened by entering it."""


class Memory(Storage):
    name = "sqlite in memory"
    lasts = False
    moves_clock = True

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
    name = "sqlite in a file"

    def broker(self) -> SqliteBroker:
        return SqliteBroker(self.folder / "keyless.db")


class Nats(Storage):
    name = "nats"
    has_rows = False

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


@cache
def _template() -> str:
    """Return a database that is prepared, and whose function `take` has the short head start."""
    database = shared_server().prepared_database()
    one, short = (f"moment - interval '{seconds:g} s'" for seconds in (1, HEAD_START))
    shared_server().execute(
        f"""
        DO $do$
        DECLARE
            definition constant text := pg_get_functiondef('keyless.take'::regproc);
            changed constant text := replace(definition, $${one}$$, $${short}$$);
        BEGIN
            ASSERT changed <> definition;
            EXECUTE changed;
        END
        $do$
        """,
        database,
    )
    return database


class Postgres(Storage):
    name = "postgres"
    claims_tell_time = True

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        server = shared_server()
        self._url = server.url(server.new_database(_template()))

    def broker(self) -> PostgresBroker:
        return PostgresBroker(self._url)


#: What stores requests and outcomes, opened anew for each test. A fourth broker joins by one entry.
STORAGES: Final[tuple[type[Storage], ...]] = (Memory, File, Nats, Postgres)


def those(
    *, which: Callable[[type[Storage]], bool] = lambda _: True, slow: Callable[[type[Storage]], bool] = lambda _: False
) -> pytest.MarkDecorator:
    """Run a case on the storages of a fact only, and in the second tier on those where it is slow."""
    marks = ((pytest.mark.looptime, lambda each: each.moves_clock), (pytest.mark.slow, slow))
    chosen = [
        pytest.param(each, id=each.name, marks=[mark for mark, is_marked in marks if is_marked(each)])
        for each in STORAGES
        if which(each)
    ]
    return pytest.mark.parametrize("storage", chosen, indirect=True)


def new_request(operation_id: str, traceparent: str | None = None, **fields: Any) -> NewRequest:
    request = ApprovalRequest(version=REQUEST_VERSION, user_id="C0FFEE", operation_id=operation_id, **fields)
    return NewRequest(request, msgspec.json.encode(request), request_name(request), traceparent)


def operation_of(message: Message) -> str:
    return msgspec.json.decode(message.body, type=ApprovalRequest).operation_id


def outcome_of(message: Message, outcome: Outcome = Outcome.APPROVED) -> ApprovalEvent:
    return ApprovalEvent(
        version=EVENT_VERSION,
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
        taken += (found := await broker.take(up_to - len(taken), left))
        await asyncio.sleep(0.0 if found else 0.05)  # a take that does not wait must not hold up the clock
    return taken


async def take_n(broker: Broker, count: int) -> list[Message]:
    """Take so many, however long a busy machine takes."""
    return await take_all(broker, PATIENCE, up_to=count)


async def take_only(broker: Broker, count: int, quiet: float) -> list[Message]:
    """Take so many, and see that no other comes."""
    taken = await take_n(broker, count)
    assert not await take_all(broker, min(quiet, LEASE / 2))
    return taken


async def is_waiting(broker: Broker, count: int) -> None:
    """Wait until so many requests wait; some brokers count a moment later."""

    async def is_counted() -> bool:
        return (await broker.inspect()).waiting == count

    await until(is_counted)


def operation_decided(outcome: OutcomeDelivery) -> str | None:
    return read_event(outcome.data).operation_id


async def decide(broker: Broker, message: Message, outcome: Outcome = Outcome.APPROVED) -> bool:
    return await broker.decide(message, outcome_of(message, outcome))


async def decide_all(broker: Broker, *operation_ids: str) -> None:
    """Submit requests, and decide them."""
    await submit(broker, *operation_ids)
    for message in await take_n(broker, len(operation_ids)):
        assert await decide(broker, message)


async def none_comes(broker: Broker, reader: str, within: float) -> bool:
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(within):
            await broker.next_outcome(reader)
    return True


async def read(broker: Broker, reader: str, count: int) -> set[str | None]:
    """Read and handle so many outcomes, however long a busy machine takes; return their operation ids."""
    seen = set()
    for _ in range(count):
        outcome = await broker.next_outcome(reader)
        seen.add(operation_decided(outcome))
        await outcome.mark_handled()
    return seen
