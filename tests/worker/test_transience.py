"""Whether a broker's error may pass by itself, as an application meets it that opens the broker and asks."""

from __future__ import annotations

import errno
import os
import sqlite3
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, Any, Final, NoReturn

import pytest
from nats_server import REQUESTS, NatsServer, jetstream, prepare
from ports import own_port
from postgres_server import shared_server

from aiokeyless import BrokerError, ConfigurationError, KeylessError
from aiokeyless.worker import Broker, submit_approval
from aiokeyless.worker.nats import NatsBroker
from aiokeyless.worker.nats import broker as nats_broker
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres import broker as postgres_broker
from aiokeyless.worker.sqlite import SqliteBroker, failures, schema
from benchmarks.cutting_proxy import CuttingProxy

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

#: On top of what the server has, for users who may nothing.
USERS: Final = "authorization { users = [ { user: app, password: p, permissions: { publish: { deny: '>' } } } ] }"


async def ask(broker: Broker, **options: Any) -> None:
    await submit_approval(broker, "C0FFEE", operation_id="txn-1", **options)


async def open_and_ask(broker: Broker) -> None:
    async with broker:
        await ask(broker)


class Sqlite:
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.path, self.patch = folder / "keyless.db", patch
        patch.setattr(failures, "_BUSY_FOR", 0.05)

    async def away(self) -> None:
        async with SqliteBroker(self.path) as broker:
            self.patch.setattr(broker._store, "submit", _fail(sqlite3.SQLITE_IOERR))
            await ask(broker)

    async def locked(self) -> None:
        async with SqliteBroker(self.path) as broker:
            with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await ask(broker)

    async def late(self) -> None:
        """It is the same when a worker of another program reads for long."""
        async with SqliteBroker(self.path) as broker:
            self.patch.setattr(broker._store, "submit", _fail(sqlite3.SQLITE_LOCKED))
            await ask(broker)

    async def full(self) -> None:
        async with SqliteBroker(self.path) as broker:
            connection = broker._store._connection
            pages = await broker._run(lambda: connection.execute("PRAGMA page_count").fetchone()[0])
            await broker._run(lambda: connection.execute(f"PRAGMA max_page_count = {pages}"))
            await ask(broker, context="x" * 60_000)

    async def while_opening(self) -> None:
        async with SqliteBroker(self.path):
            pass
        with closing(sqlite3.connect(self.path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            await open_and_ask(SqliteBroker(self.path))

    async def full_while_opening(self) -> None:
        def refuse(*_: object) -> NoReturn:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        self.patch.setattr(os, "open", refuse)
        await open_and_ask(SqliteBroker(self.path))

    async def no_schema(self) -> None:
        with closing(sqlite3.connect(self.path)) as other:
            other.execute("CREATE TABLE mine (id INTEGER)")
        await open_and_ask(SqliteBroker(self.path))

    async def no_rights(self) -> None:
        async with SqliteBroker(self.path) as broker:
            self.patch.setattr(broker._store, "submit", _fail(sqlite3.SQLITE_READONLY))
            await ask(broker)

    async def no_database(self) -> None:
        await open_and_ask(SqliteBroker(self.path / "nowhere" / "keyless.db"))

    async def wrong_url(self) -> None:
        self.patch.setattr(schema, "_remote_file_system", lambda _path: "nfs4")
        await open_and_ask(SqliteBroker(self.path))


def _fail(code: int) -> Callable[..., NoReturn]:
    def fail(*_: object) -> NoReturn:
        error = sqlite3.OperationalError("it fails")
        error.sqlite_errorcode = code
        raise error

    return fail


class Postgres:
    def __init__(self, _folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.server, self.patch = shared_server(), patch

    async def with_function(self, body: str) -> None:
        """Ask a database whose function does something else."""
        database = self.server.prepared_database()
        arguments = "request text, traceparent text DEFAULT NULL"
        body = (
            f"CREATE OR REPLACE FUNCTION keyless.submit({arguments}) RETURNS boolean LANGUAGE plpgsql AS $$ {body} $$"
        )
        self.server.execute(body, database)
        await open_and_ask(PostgresBroker(self.server.url(database)))

    async def away(self) -> None:
        async with AsyncExitStack() as way:
            proxy = await way.enter_async_context(CuttingProxy(self.server))
            async with PostgresBroker(proxy.url(self.server.prepared_database())) as broker:
                await way.aclose()
                await ask(broker)

    async def locked(self) -> None:
        await self.with_function("BEGIN RAISE 'it is locked' USING ERRCODE = 'lock_not_available'; END")

    async def late(self) -> None:
        await self.with_function("BEGIN RAISE 'it takes too long' USING ERRCODE = 'query_canceled'; END")

    async def full(self) -> None:
        await self.with_function("BEGIN RAISE 'it is full' USING ERRCODE = 'disk_full'; END")

    async def while_opening(self) -> None:
        await open_and_ask(PostgresBroker(f"postgresql://127.0.0.1:{own_port()}/shop"))

    async def full_while_opening(self) -> None:
        self.patch.setattr(postgres_broker, "_ANSWER_WITHIN", 0.1)
        database = self.server.new_database()
        self.server.execute(f"CREATE ROLE {database} LOGIN CONNECTION LIMIT 0")
        await open_and_ask(PostgresBroker(self.server.url(database, database)))

    async def no_schema(self) -> None:
        await open_and_ask(PostgresBroker(self.server.url(self.server.new_database())))

    async def no_rights(self) -> None:
        database = self.server.prepared_database()
        self.server.execute(f"CREATE ROLE {database} LOGIN")
        await open_and_ask(PostgresBroker(self.server.url(database, database)))

    async def no_database(self) -> None:
        await open_and_ask(PostgresBroker(self.server.url("nowhere")))

    async def wrong_url(self) -> None:
        await open_and_ask(PostgresBroker("postgresql://localhost:port/shop"))


class Nats:
    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.patch = patch
        patch.setattr(nats_broker, "_LEADERLESS_FOR", 0.0)
        patch.setattr(nats_broker, "error_delay", lambda _failures: 0.01)

    def give_up_soon(self) -> None:
        """Wait for an answer for a short time only, where there is none. Others are late on a busy machine."""
        self.patch.setattr(nats_broker, "_ANSWER_WITHIN", 0.05)

    async def on(self, change: Callable[[NatsServer, NatsBroker], Awaitable[object]], configuration: str = "") -> None:
        """Ask a server that has streams, after a change."""
        async with NatsServer(self.folder, configuration=configuration) as server, NatsBroker(server.url) as broker:
            await prepare(jetstream(broker._open_connection()), ack_wait=6.0)
            await change(server, broker)
            try:
                await ask(broker)
            finally:
                server.resume()

    async def away(self) -> None:
        async with NatsServer(self.folder) as server, NatsBroker(server.url) as broker:
            await prepare(jetstream(broker._open_connection()), ack_wait=6.0)
            server.kill()
            self.give_up_soon()
            try:
                await ask(broker)
            finally:
                await server.start()

    async def locked(self) -> None:
        """The stream is there, and has no leader: nobody takes what is published."""

        async def ask_and_lose_the_leader(_server: NatsServer, broker: NatsBroker) -> None:
            await ask(broker)
            await jetstream(broker._open_connection()).delete_stream(REQUESTS)

        await self.on(ask_and_lose_the_leader)

    async def late(self) -> None:
        async def pause(server: NatsServer, _broker: NatsBroker) -> None:
            server.pause()
            self.give_up_soon()

        await self.on(pause)

    async def full(self) -> None:
        async def fill(_server: NatsServer, broker: NatsBroker) -> None:
            stream = jetstream(broker._open_connection())
            config = (await stream.stream_info(REQUESTS)).config.evolve(max_bytes=1, discard="new")
            await stream.update_stream(config)

        await self.on(fill)

    async def while_opening(self) -> None:
        await open_and_ask(NatsBroker(f"nats://127.0.0.1:{own_port()}"))

    async def full_while_opening(self) -> None:
        async with NatsServer(self.folder, configuration="max_connections: 1") as server, NatsBroker(server.url):
            await open_and_ask(NatsBroker(server.url))

    async def no_schema(self) -> None:
        async with NatsServer(self.folder) as server:
            await open_and_ask(NatsBroker(server.url))

    async def no_rights(self) -> None:
        self.patch.setattr(nats_broker, "_SUBMISSIONS", 1000)  # the server says why some time, and does not answer
        self.give_up_soon()
        async with NatsServer(self.folder, configuration=USERS) as server:
            await open_and_ask(NatsBroker(server.url.replace("//", "//app:p@")))

    async def no_database(self) -> None:
        async with NatsServer(self.folder, jetstream=False) as server:
            await open_and_ask(NatsBroker(server.url))

    async def wrong_url(self) -> None:
        await open_and_ask(NatsBroker("nats://127.0.0.1:port"))


@pytest.mark.parametrize(
    ("case", "may_pass"),
    [
        *((name, True) for name in ("away", "locked", "late", "full", "while_opening", "full_while_opening")),
        *((name, False) for name in ("no_schema", "no_rights", "no_database", "wrong_url")),
    ],
)
@pytest.mark.parametrize("storage", [Sqlite, Postgres, Nats])
async def test_an_error_says_whether_it_may_pass_by_itself(
    storage: Callable[[Path, pytest.MonkeyPatch], object],
    case: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    may_pass: bool,
) -> None:
    with monkeypatch.context() as patch, pytest.raises(KeylessError) as caught:
        await getattr(storage(tmp_path, patch), case)()
    assert isinstance(caught.value, BrokerError | ConfigurationError)
    assert caught.value.is_transient is may_pass
