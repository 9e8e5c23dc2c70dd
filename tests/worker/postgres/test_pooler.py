"""Behind pgbouncer in transaction mode: each transaction may come to another connection of the server's."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import asyncpg
import pytest
from waiting import until

from aiokeyless.worker import next_outcome, submit_approval
from aiokeyless.worker.postgres import PostgresBroker
from worker.conformance.brokers import LEASE, decide, operation_of

from .shop import decide_all, pay, payments, unread

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from postgres_server import PostgresServer

    from .shop import Connection

PROGRAM = shutil.which("pgbouncer", path="/usr/sbin:/usr/bin:/usr/local/bin")
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="pgbouncer is not installed")


@asynccontextmanager
async def pooler(server: PostgresServer, database: str, prepared: int) -> AsyncIterator[str]:
    """Start a pooler with two connections to the server; yield the URL of a database behind it."""
    assert PROGRAM is not None
    folder = server.new_folder("pooler")
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"""
        [databases]
        * = host={server.folder} user=postgres
        [pgbouncer]
        unix_socket_dir = {folder}
        listen_port = 6432
        auth_type = trust
        auth_file = {folder}/users
        pool_mode = transaction
        default_pool_size = 2
        max_prepared_statements = {prepared}
        server_round_robin = 1
        """.replace("        ", "")
    )
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(  # noqa: ASYNC220  # it returns at once
            [PROGRAM, folder / "pgbouncer.ini"], stderr=log, **server.identity()
        )
    try:
        # That its socket is there is not enough: between bind and listen, it refuses to connect.
        await until(lambda: accepts(folder / ".s.PGSQL.6432"))
        yield f"postgresql://postgres@/{database}?host={folder}&port=6432"
    finally:
        process.kill()
        process.wait()
        sys.stderr.write((folder / "log").read_text())  # pytest shows it if the test fails


def accepts(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(path)) == 0


async def test_workers_and_applications_need_no_setting_for_a_pooler_that_knows_no_prepared_statements(
    admin: Connection, server: PostgresServer, database: str
) -> None:
    expected = {f"payment-{number}" for number in range(30)}
    decided: set[str] = set()
    async with pooler(server, database, 0) as url, PostgresBroker(url) as first, PostgresBroker(url) as second:
        for broker in (first, second):
            await broker.prepare(lease=LEASE, service="")
        await asyncio.gather(*(submit_approval(first, "C0FFEE", operation_id=name) for name in expected))

        async def work(broker: PostgresBroker) -> None:
            while len(decided) < len(expected):
                for message in await broker.take(len(expected), 0.3):
                    await broker.claim(message)
                    assert await broker.has_claim(message)
                    assert await decide(broker, message)
                    decided.add(operation_of(message))

        await asyncio.gather(work(first), work(second))
        for _ in expected:
            await (await second.next_outcome("shop")).mark_handled()
    assert await admin.fetchval("SELECT count(*) FROM keyless.outcome") == len(expected)
    assert await unread(admin) == {}


@pytest.mark.parametrize(("prepared", "cache"), [(0, 0), (100, 100)], ids=["knows none", "knows them"])
async def test_an_application_turns_off_its_prepared_statements_behind_a_pooler_that_knows_none(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, database: str, *, prepared: int, cache: int
) -> None:
    await decide_all(broker, "a")
    async with pooler(server, database, prepared) as url:
        connection = await asyncpg.connect(url, statement_cache_size=cache)  # 100 is its default
        async with connection.transaction():
            await submit_approval(connection, "C0FFEE", operation_id="b")
        async with next_outcome(connection, "shop") as event:
            await pay(connection, event)
        await connection.close()
    assert await payments(admin) == {"a"}
