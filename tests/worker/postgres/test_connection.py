"""`next_outcome` on a connection of asyncpg: what `test_families` does not have for all."""

# ruff: noqa: PT012  # a body has several statements

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import anyio
import asyncpg
import psycopg
import pytest
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError, ConfigurationError
from aiokeyless.worker import next_outcome
from aiokeyless.worker.broker import UnavailableError
from aiokeyless.worker.postgres import PostgresBroker, PostgresConnection
from aiokeyless.worker.postgres.adapters import adapter_for
from aiokeyless.worker.postgres.adapters import driver as module
from worker.conformance.brokers import LEASE

from .shop import RefusalError, decide_all, pay, payments, unread

if TYPE_CHECKING:
    from postgres_server import PostgresServer

    from .shop import Connection


# -- bodies that end well


async def test_it_is_read_committed_whatever_is_the_default(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    await connection.execute("SET default_transaction_isolation = 'repeatable read'")
    await decide_all(broker, "a")
    async with next_outcome(connection, "shop"):
        await admin.execute("INSERT INTO payment VALUES ('meanwhile')")
        assert await connection.fetchval("SELECT count(*) FROM payment") == 1


async def test_an_application_may_have_codecs_of_its_own(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    for name in ("json", "jsonb"):
        await connection.set_type_codec(name, encoder=json.dumps, decoder=json.loads, schema="pg_catalog")
    await connection.set_type_codec(
        "timestamptz", encoder=str, decoder=lambda _: 1 / 0, schema="pg_catalog", format="text"
    )
    await decide_all(broker, "a")
    async with next_outcome(connection, "shop") as event:
        assert event.operation_id == "a"
        await pay(connection, event)
    assert await payments(admin) == {"a"}


async def test_a_schema_of_another_name_is_read_by_naming_it(url: str, connection: Connection) -> None:
    async with PostgresBroker(url, schema="approvals") as broker:
        await broker.prepare(lease=LEASE, service="")
        side = PostgresConnection(connection, schema="approvals")
        assert repr(side) == "<PostgresConnection, schema 'approvals'>"
        assert (broker.system, broker.destination) == ("postgresql", "approvals")
        await decide_all(broker, "a")
        async with next_outcome(side, "shop") as event:
            assert event.operation_id == "a"


# -- bodies that end badly


async def test_a_scope_that_cancels_each_await_leaves_no_transaction_behind(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    await decide_all(broker, "a")
    with anyio.CancelScope() as scope:
        async with next_outcome(connection, "shop") as event:
            await pay(connection, event)
            scope.cancel()
            await asyncio.sleep(60)
    assert await payments(admin) == set()
    assert await unread(admin) == {"a": 1}
    assert not connection.is_in_transaction()


async def test_a_body_that_begins_a_transaction_of_its_own_loses_it(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    await decide_all(broker, "a")
    with pytest.raises(ConfigurationError, match="must not end its transaction"):
        async with next_outcome(connection, "shop") as event:
            await connection.execute("ROLLBACK")
            await connection.execute("BEGIN")
            await pay(connection, event)
    assert await payments(admin) == set()
    assert await unread(admin) == {"a": 1}
    assert not connection.is_in_transaction()


# -- connections that end


@pytest.mark.parametrize("is_closed", [False, True], ids=["lost", "closed by the body"])
async def test_the_bodys_own_exception_counts_also_if_the_connection_is_gone(
    broker: PostgresBroker,
    admin: Connection,
    connection: Connection,
    caplog: pytest.LogCaptureFixture,
    *,
    is_closed: bool,
) -> None:
    await decide_all(broker, "a")
    with pytest.raises(RefusalError):
        async with next_outcome(connection, "shop") as event:
            await pay(connection, event)
            if is_closed:
                await connection.close()
            else:
                await admin.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
            raise RefusalError
    assert "outcome.not_put_off" in caplog.text
    assert await payments(admin) == set()
    assert await unread(admin) == {"a": 0}


async def test_a_cancellation_is_one_even_if_the_server_answers_nothing(
    server: PostgresServer,
    broker: PostgresBroker,
    admin: Connection,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.Driver, "ends_within", 0.2)
    async with admin.transaction():
        await admin.execute("LOCK TABLE keyless.unread")
        reading = [asyncio.create_task(side.next_outcome("shop")) for side in (broker, PostgresConnection(connection))]

        async def are_locked_out() -> bool:
            await admin.execute("SELECT pg_stat_clear_snapshot()")
            locked_out = (
                "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'next_outcome'"
            )
            return bool(await admin.fetchval(locked_out) == len(reading))

        await until(are_locked_out)
        with server.paused():
            for task in reading:
                task.cancel()
            async with asyncio.timeout(PATIENCE):
                await asyncio.wait(reading)
    assert all(task.cancelled() for task in reading)


async def test_a_backend_that_is_killed_while_it_waits_is_an_error(admin: Connection, connection: Connection) -> None:
    waiting = asyncio.create_task(PostgresConnection(connection).next_outcome("shop"))
    await asyncio.sleep(0.1)
    await admin.execute("SELECT pg_terminate_backend($1)", connection.get_server_pid())
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(BrokerError, match="cannot be read"):
        async with next_outcome(connection, "shop"):
            pass


# -- who has it


async def test_an_outcome_in_hand_is_in_no_other_hand_and_comes_again_at_once_if_its_process_dies(
    broker: PostgresBroker, admin: Connection, connection: Connection, url: str
) -> None:
    await decide_all(broker, "a")
    other = await asyncpg.connect(url)
    dying = await PostgresConnection(other).next_outcome("shop")
    reading = asyncio.create_task(PostgresConnection(connection).next_outcome("shop"))
    await asyncio.sleep(0.2)
    assert not reading.done()
    other.terminate()
    outcome = await asyncio.wait_for(reading, PATIENCE)
    assert outcome.data == dying.data
    await outcome.mark_handled()
    assert await unread(admin) == {}


async def test_a_connection_in_a_transaction_is_refused(connection: Connection) -> None:
    async with connection.transaction():
        with pytest.raises(ConfigurationError, match=r"keyless\.next_outcome"):
            async with next_outcome(connection, "shop"):
                pass
        assert await connection.fetchval("SELECT 1") == 1


async def test_while_it_waits_the_connection_is_in_no_transaction(
    admin: Connection, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "READS_EVERY", 2 * PATIENCE)
    waiting = asyncio.create_task(PostgresConnection(connection).next_outcome("shop"))

    async def is_idle_after_its_poll() -> bool:
        state = "SELECT state = 'idle' AND query LIKE 'ROLLBACK%' FROM pg_stat_activity WHERE pid = $1"
        return bool(await admin.fetchval(state, connection.get_server_pid()))

    await until(is_idle_after_its_poll)
    waiting.cancel()
    await asyncio.wait({waiting})


@pytest.mark.parametrize("target", [asyncpg.Record, asyncpg.create_pool, object()])
async def test_what_is_no_connection_is_refused(target: object) -> None:
    with pytest.raises(ConfigurationError, match=r"connection of asyncpg.* PostgresBroker\(pool\)"):
        PostgresConnection(target() if target is asyncpg.create_pool else target)


async def test_a_connection_that_is_closed_or_not_open_yet_is_not_cut(url: str) -> None:
    connection = await psycopg.AsyncConnection.connect(url)
    connecting = AsyncSession(create_async_engine(url.replace("postgresql:", "postgresql+psycopg:")))
    await connection.close()
    for target in (connection, connecting):
        driver = adapter_for(target, "keyless")
        assert driver is not None
        assert driver.is_lost()
        driver._cut()
