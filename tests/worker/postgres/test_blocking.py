"""`aiokeyless.sync` on connections of psycopg: what `test_families` does not have for all."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg.rows import dict_row
from waiting import until

from aiokeyless import sync
from aiokeyless.errors import ConfigurationError

from .shop import decide_all, operations, payments, unread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from postgres_server import PostgresServer

    from aiokeyless.worker import ApprovalEvent
    from aiokeyless.worker.postgres import PostgresBroker

    from .shop import Connection

    Psycopg = psycopg.Connection[Any]


@pytest.fixture(params=[False, True], ids=["", "autocommit"])
def psycopg_url(request: pytest.FixtureRequest, admin: Connection, url: str) -> tuple[str, bool]:  # noqa: ARG001  # which has made the tables
    return url, request.param


@contextlib.contextmanager
def connected(psycopg_url: tuple[str, bool]) -> Iterator[Psycopg]:
    url, autocommit = psycopg_url
    with contextlib.closing(psycopg.connect(url, autocommit=autocommit, row_factory=dict_row)) as connection:
        yield connection


def pay(connection: Psycopg, event: ApprovalEvent) -> None:
    connection.execute("INSERT INTO payment VALUES (%s)", [event.operation_id])


async def handle(psycopg_url: tuple[str, bool], body: Callable[[Psycopg, ApprovalEvent], object]) -> None:
    """Handle one outcome in a thread; afterwards its connection is in no transaction."""

    def program() -> None:
        with connected(psycopg_url) as connection:
            try:
                with sync.next_outcome(connection, "shop") as event:
                    body(connection, event)
            finally:
                assert connection.closed or connection.info.transaction_status == 0

    await asyncio.to_thread(program)


async def test_a_new_reader_gets_all_outcomes(broker: PostgresBroker, admin: Connection, url: str) -> None:
    await decide_all(broker, "a")

    def program() -> str | None:
        with connected((url, True)) as connection, sync.next_outcome(connection, "ledger") as event:
            return event.operation_id

    reading = asyncio.create_task(asyncio.to_thread(program))

    async def is_added() -> bool:
        return bool(await admin.fetchval("SELECT count(*) FROM keyless.reader WHERE name = 'ledger'"))

    await until(is_added)
    await admin.execute("SELECT keyless.welcome_readers()")
    assert await reading == "a"


async def test_an_interruption_while_it_waits_leaves_no_transaction_behind(
    psycopg_url: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("time.sleep", interrupt)  # between two polls for an outcome
    with pytest.raises(KeyboardInterrupt):
        await handle(psycopg_url, pay)


async def test_an_interruption_of_a_statement_leaves_no_transaction_behind(
    psycopg_url: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("aiokeyless.worker.postgres.adapters.psycopg.in_schema", interrupt)
    with pytest.raises(KeyboardInterrupt):
        await handle(psycopg_url, pay)


async def test_a_connection_is_refused_in_a_thread_that_runs_an_event_loop(psycopg_url: tuple[str, bool]) -> None:
    with connected(psycopg_url) as connection, pytest.raises(ConfigurationError, match="runs an event loop"):
        sync.submit_approval(connection, "C0FFEE", operation_id="a")


# -- Django


@pytest.mark.slow
async def test_djangos_atomic_submits_and_an_outcome_is_handled_in_a_transaction_of_django(
    broker: PostgresBroker, admin: Connection, server: PostgresServer, database: str
) -> None:
    program = Path(__file__).with_name("django_program.py")
    await decide_all(broker, "a", "b")
    process = await asyncio.create_subprocess_exec(sys.executable, program, server.folder, database)
    assert await process.wait() == 0
    assert await operations(admin) == {"a", "b", "committed"}
    (settled,) = await payments(admin) - {"committed"}  # outcomes come in any order
    assert await unread(admin) == {({"a", "b"} - {settled}).pop(): 1}
