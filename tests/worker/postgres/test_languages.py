"""The functions by other drivers than asyncpg: what any language does, with SQL and JSON alone."""

# ruff: noqa: PT012  # a transaction has several statements

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from aiokeyless.errors import ConfigurationError
from aiokeyless.worker import approval_request, submit_approval

from .shop import RefusalError, decide_all, operations, unread

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from postgres_server import PostgresServer
    from sqlalchemy.ext.asyncio import AsyncEngine

    from aiokeyless.worker.postgres import PostgresBroker

    from .shop import Connection

SUBMIT = "SELECT keyless.submit(%s)"
NEXT = "SELECT operation_id, outcome, event FROM keyless.next_outcome('shop')"


def request(operation_id: str) -> str:
    return approval_request("C0FFEE", operation_id=operation_id, operation_payload="Pay 40 EUR", context={"order": 7})


# -- psycopg


async def test_psycopg_with_autocommit_stores_at_once(broker: PostgresBroker, admin: Connection, url: str) -> None:
    await decide_all(broker, "c")
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        await connection.execute(SUBMIT, [request("a")])
        assert await operations(admin) == {"a", "c"}
        with pytest.raises(RefusalError):
            async with connection.transaction():
                row = await (await connection.execute(NEXT)).fetchone()
                assert row is not None
                assert row[:2] == ("c", "approved")
                assert json.loads(row[2])["operation_id"] == "c"
                raise RefusalError
        assert await unread(admin) == {"c": 0}
        assert await (await connection.execute(NEXT)).fetchone()  # handled, whatever becomes of it
        assert await unread(admin) == {}


async def test_a_reader_adds_itself_once_and_puts_off_what_it_could_not_handle(
    broker: PostgresBroker, admin: Connection, url: str
) -> None:
    async with await psycopg.AsyncConnection.connect(url, autocommit=True) as connection:
        with pytest.raises(psycopg.errors.UndefinedObject, match="no reader") as caught:
            await connection.execute("SELECT * FROM keyless.next_outcome('ledger')")
        assert "add_reader" in str(caught.value.diag.message_hint)
        for _ in range(2):
            await connection.execute("SELECT keyless.add_reader('ledger')")
        await decide_all(broker, "a")
        row = await (await connection.execute("SELECT id, name FROM keyless.request")).fetchone()
        assert row is not None
        id_, name = row
        await connection.execute("SELECT keyless.put_off_outcome('ledger', %s, %s)", [id_, name ^ 1])  # another's
        assert await unread(admin, "ledger") == {"a": 0}
        await connection.execute("SELECT keyless.put_off_outcome('ledger', %s, %s)", row)
        assert await unread(admin, "ledger") == {"a": 1}
        for name in ("", "two words", "x" * 129):
            with pytest.raises(psycopg.errors.InvalidParameterValue):
                await connection.execute("SELECT keyless.add_reader(%s)", [name])


# -- SQLAlchemy


@pytest.fixture
async def engine(server: PostgresServer, database: str) -> AsyncGenerator[AsyncEngine]:
    engine = create_async_engine(f"postgresql+asyncpg://postgres@/{database}?host={server.folder}")
    yield engine
    await engine.dispose()


async def test_the_driver_connection_of_a_session_is_in_no_transaction_before_its_first_statement(
    admin: Connection, engine: AsyncEngine
) -> None:
    async with AsyncSession(engine) as session, session.begin():
        driver = (await (await session.connection()).get_raw_connection()).driver_connection
        with pytest.raises(ConfigurationError, match="pass the session itself"):
            await submit_approval(driver, "C0FFEE", operation_id="a")
        await session.execute(text("SELECT 1"))
        await submit_approval(driver, "C0FFEE", operation_id="a")
        assert await operations(admin) == set()
    assert await operations(admin) == {"a"}
