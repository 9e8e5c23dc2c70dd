"""A database of each test's own, with the broker's schema and a shop's table of payments in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from postgres_server import PostgresServer, shared_server

from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres import broker as module
from aiokeyless.worker.postgres.adapters import driver
from worker.conformance.brokers import LEASE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outcomes and new readers are looked for often: their first outcome takes a second otherwise."""
    monkeypatch.setattr(driver, "READS_EVERY", 0.02)
    monkeypatch.setattr(module, "_WELCOMES_EVERY", 0.05)


@pytest.fixture
def server() -> PostgresServer:
    return shared_server()


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    """A server that a test may kill, and whose roles are its own."""
    server = PostgresServer()
    yield server
    server.close()


@pytest.fixture
def database(request: pytest.FixtureRequest, server: PostgresServer) -> str:
    return server.prepared_database() if "broker" in request.fixturenames else server.new_database()


@pytest.fixture
def url(server: PostgresServer, database: str) -> str:
    return server.url(database)


@pytest.fixture
async def broker(url: str) -> AsyncGenerator[PostgresBroker]:
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        yield broker


@pytest.fixture
async def admin(
    broker: PostgresBroker,  # noqa: ARG001  # which has made the schema
    url: str,
) -> AsyncGenerator[asyncpg.Connection[Any]]:
    """A connection that sees and changes everything."""
    connection = await asyncpg.connect(url)
    await connection.execute(
        """
        CREATE TABLE payment (operation_id text PRIMARY KEY);
        SELECT keyless.add_reader('shop');
        SELECT keyless.welcome_readers();
        """
    )
    yield connection
    await connection.close()


@pytest.fixture
async def connection(
    admin: asyncpg.Connection[Any],  # noqa: ARG001  # which has made the table
    url: str,
) -> AsyncGenerator[asyncpg.Connection[Any]]:
    """The application's own."""
    connection = await asyncpg.connect(url)
    yield connection
    await connection.close()
