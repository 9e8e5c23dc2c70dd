from __future__ import annotations

import asyncio
import importlib.resources
import math
import re
from contextlib import suppress
from datetime import timedelta
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import asyncpg
import msgspec
import pytest
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError, ConfigurationError
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, tables
from aiokeyless.worker.broker import ExchangeResult, RefusedError, UnavailableError
from aiokeyless.worker.messages import Outcome
from aiokeyless.worker.postgres import PostgresBroker, floors, migrations
from aiokeyless.worker.postgres import broker as module
from worker.conformance.brokers import LEASE, decide, new_request, operation_of, outcome_of, submit, take_all, take_n

from .shop import decide_all, unread

if TYPE_CHECKING:
    from pathlib import Path

    from asyncpg.pool import PoolConnectionProxy
    from postgres_server import PostgresServer

    from .shop import Connection


async def fill(admin: Connection, count: int, due_in: str = "0 s") -> None:
    """Store many requests, which are due in a time."""
    await admin.execute(
        f"""
        WITH stored AS (
            INSERT INTO keyless.request
                (operation_id, content_sha256, body, requested_at, expires_at, stored_at)
            SELECT 'filler-' || n || clock_timestamp(), '', '{{}}', now(), now() + interval '1 h', now()
            FROM generate_series(1, {count}) n RETURNING id, name
        )
        INSERT INTO keyless.waiting SELECT id, name, clock_timestamp() + interval '{due_in}', 1, 0, true, 1 FROM stored
        """  # noqa: S608  # numbers of this test's own
    )


# -- what it is made of


async def test_a_url_of_sqlalchemy_opens_the_database_that_it_names(url: str) -> None:
    async with PostgresBroker(url.replace("postgresql:", "postgresql+psycopg2:")) as broker:
        await broker.prepare(lease=LEASE, service="")


@pytest.mark.parametrize(
    "schema", ["", "Keyless", "pg_mine", "key-less", 'a"b', "x" * 51, "public", "information_schema", None]
)
def test_a_schema_whose_name_needs_quotes_or_that_others_fill_is_refused(schema: Any) -> None:
    with pytest.raises(ConfigurationError, match="schema must be"):
        PostgresBroker("postgresql://localhost/shop", schema=schema)


def test_what_is_neither_a_url_nor_a_pool_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="URL or an asyncpg pool, not int"):
        PostgresBroker(5432)  # type: ignore[arg-type]  # under test


async def test_a_database_that_is_not_there_is_named(server: PostgresServer) -> None:
    with pytest.raises(BrokerError, match=r'^database "nowhere" does not exist$'):
        await PostgresBroker(server.url("nowhere")).open()
    with pytest.raises(BrokerError, match=r"cannot be reached: .*(Connect|Multiple exceptions)"):
        await PostgresBroker("postgresql://localhost:1/shop").open()
    with pytest.raises(ConfigurationError, match="URL of a database"):
        await PostgresBroker("postgresql://localhost:port/shop").open()


def url_of_a_login_with_a_password(server: PostgresServer) -> str:
    server.execute("CREATE ROLE app LOGIN PASSWORD 'right'")
    hba = server.execute("SHOW hba_file")[0][0]
    server.execute(f"COPY (VALUES ('local all app scram-sha-256'), ('local all all trust')) TO '{hba}'")
    server.execute("SELECT pg_reload_conf()")
    return server.url("postgres", "app")


@pytest.mark.slow
async def test_a_password_is_in_no_error_and_no_repr(own_server: PostgresServer) -> None:
    broker = PostgresBroker(url_of_a_login_with_a_password(own_server).replace("app@", "app:hunter2@"))
    with pytest.raises(BrokerError, match="password authentication failed") as caught:
        await broker.open()
    assert "hunter2" not in f"{broker!r} {broker.destination} {caught.value}"


@pytest.mark.slow
async def test_each_connection_reads_the_file_of_passwords(own_server: PostgresServer, tmp_path: Path) -> None:
    file = tmp_path / "passwords"
    file.touch(0o600)
    file.write_text("*:*:*:app:right")
    async with PostgresBroker(f"{url_of_a_login_with_a_password(own_server)}&passfile={file}") as broker:
        own_server.execute("ALTER ROLE app PASSWORD 'new'")
        file.write_text("*:*:*:app:new")
        await broker._fetch("SELECT 1")
        own_server.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'app'")
        with suppress(UnavailableError):  # unless it was noticed before
            await broker._fetch("SELECT 1")
        await broker._fetch("SELECT 1")


async def test_a_server_without_tls_is_sent_nothing_if_the_url_asks_for_a_verified_certificate(
    certificate: tuple[Path, Path],
) -> None:
    sent: list[bytes] = []

    async def offer_no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(8)  # the question whether it has TLS
        writer.write(b"N")
        sent.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(offer_no_tls, "127.0.0.1", 0) as server:
        address = f"postgresql://approvals:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}/shop"
        with pytest.raises(BrokerError, match="SSL"):
            await PostgresBroker(f"{address}?sslmode=verify-full&sslrootcert={certificate[0]}").open()
        await until(lambda: bool(sent))
    assert set(sent) == {b""}


@pytest.mark.parametrize(
    ("facts", "warns"),
    [
        pytest.param({"peername": ("192.0.2.1", 5432)}, True, id="another machine"),
        pytest.param({"peername": ("2001:db8::1", 5432, 0, 0)}, True, id="another machine, IPv6"),
        pytest.param({"peername": ("192.0.2.1", 5432), "ssl_object": object()}, False, id="another machine, TLS"),
        pytest.param({"peername": ("127.0.0.1", 5432)}, False, id="this machine"),
        pytest.param({"peername": ("::1", 5432, 0, 0)}, False, id="this machine, IPv6"),
        pytest.param({"peername": "/run/postgresql/.s.PGSQL.5432"}, False, id="a socket in a folder"),
    ],
)
async def test_a_connection_to_another_machine_without_tls_is_logged_once(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, facts: dict[str, Any], warns: bool
) -> None:
    warn, connection = module._warn_of_plaintext, SimpleNamespace(_transport=asyncio.BaseTransport(facts))
    monkeypatch.setattr(module, "_warn_of_plaintext", lambda _: warn(connection))
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
    assert caplog.text.count("broker.plaintext") == warns
    assert (str(facts["peername"][0]) in caplog.text) == warns


async def test_outcomes_in_hand_leave_connections_for_what_their_bodies_do(url: str) -> None:
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool, PostgresBroker(pool) as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, *(f"payment-{number}" for number in range(4)))

        async def handle() -> None:
            outcome = await broker.next_outcome("shop")
            await submit(broker, f"next-{outcome.place}")
            await outcome.mark_handled()

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(handle() for _ in range(4)))


async def test_long_chores_leave_a_connection_for_calls(url: str, admin: Connection) -> None:
    await admin.execute("SELECT pg_advisory_lock(1)")
    async with asyncpg.create_pool(url, min_size=1, max_size=4) as pool, PostgresBroker(pool) as broker:
        chores = [asyncio.create_task(broker._tidy("SELECT pg_advisory_xact_lock(1)")) for _ in range(2)]
        await until(lambda: pool.get_idle_size() == 0)
        async with asyncio.timeout(PATIENCE):
            await broker.inspect()
        await admin.execute("SELECT pg_advisory_unlock(1)")
        await asyncio.gather(*chores)


async def test_a_burst_of_requests_waits_for_connections_as_long_as_it_takes(
    broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pool gives a connection within a time or not at all, so no more calls ask it than it has connections."""
    acquire, release = asyncpg.Pool.acquire, asyncpg.Pool.release
    inside = most = 0

    async def counted(pool: asyncpg.Pool[Any], *, timeout: float | None = None) -> object:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        return await acquire(pool, timeout=timeout)

    async def released(pool: asyncpg.Pool[Any], connection: PoolConnectionProxy[Any]) -> None:
        nonlocal inside
        inside -= 1
        await release(pool, connection)

    monkeypatch.setattr(asyncpg.Pool, "acquire", counted)
    monkeypatch.setattr(asyncpg.Pool, "release", released)
    await asyncio.gather(*(broker.submit(new_request(f"payment-{number}")) for number in range(200)))
    assert 1 < most <= module._CONNECTIONS


async def test_a_connection_that_cannot_be_handed_back_hides_no_result_and_no_cancellation(
    broker: PostgresBroker, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """asyncpg may fail to reset a connection that was cancelled in a COMMIT. So a chore went on, and closing hung."""
    release = asyncpg.Pool.release

    async def fail(pool: asyncpg.Pool[Any], connection: PoolConnectionProxy[Any]) -> None:
        await release(pool, connection)
        raise asyncpg.InternalClientError("cannot switch to state 15; another operation (2) is in progress")

    monkeypatch.setattr(asyncpg.Pool, "release", fail)
    await decide_all(broker, "a")
    await (await broker.next_outcome("shop")).mark_handled()
    chore = asyncio.create_task(broker._tidy("SELECT pg_sleep(600)"))

    async def is_running() -> bool:
        return bool(await admin.fetch("SELECT FROM pg_stat_activity WHERE query = 'SELECT pg_sleep(600)'"))

    await until(is_running)
    chore.cancel()
    await asyncio.wait({chore})
    assert chore.cancelled()


async def test_a_connection_is_closed_before_a_network_forgets_it(
    url: str, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IDLE_FOR", 0.2)  # of 30 seconds
    async with PostgresBroker(url) as broker:
        named = "SELECT pid FROM pg_stat_activity WHERE pid = pg_backend_pid() AND application_name = 'aiokeyless'"
        ((pid,),) = await broker._fetch(named)

        async def is_gone() -> bool:
            return not await admin.fetch("SELECT FROM pg_stat_activity WHERE pid = $1", pid)

        await until(is_gone)


# -- versions


async def test_a_worker_goes_on_while_a_later_version_allows_it(url: str, admin: Connection) -> None:
    await admin.execute("INSERT INTO keyless.migration VALUES ($1, $2)", migrations.VERSION + 1, migrations.VERSION)
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, "a")
    await admin.execute("INSERT INTO keyless.migration VALUES ($1, $1)", migrations.VERSION + 2)
    async with PostgresBroker(url) as broker:
        with pytest.raises(BrokerError, match="upgrade this one"):
            await broker.prepare(lease=LEASE, service="")


async def test_workers_are_upgraded_one_after_the_other(
    broker: PostgresBroker, url: str, admin: Connection, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    later = migrations.VERSION + 1
    (tmp_path / f"{later:04}.sql").write_text(
        "CREATE FUNCTION {schema}.more() RETURNS integer LANGUAGE sql AS 'SELECT 1'"
    )
    with monkeypatch.context() as patched:  # the next version of this library
        patched.setattr(migrations, "VERSION", later)
        patched.setattr(migrations, "_OLDEST_WORKER", {later: migrations.VERSION - 1})
        patched.setattr(importlib.resources, "files", lambda _package: tmp_path)
        async with PostgresBroker(url) as upgraded:
            await upgraded.prepare(lease=LEASE, service="")
            await decide_all(upgraded, "a")
    await decide_all(broker, "b")  # by an old worker that has run all the time
    async with PostgresBroker(url) as old:  # and by one that is started again
        await old.prepare(lease=LEASE, service="")
        await decide_all(old, "c")
    assert await unread(admin) == {"a": 0, "b": 0, "c": 0}
    assert await admin.fetchval("SELECT max(version) FROM keyless.migration") == later


async def test_a_migration_that_others_hold_up_stops_nobody_for_long(
    url: str, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrations, "_LOCK_WITHIN", "50ms")
    await admin.execute("DELETE FROM keyless.migration")
    async with admin.transaction(), PostgresBroker(url) as broker:
        await admin.execute("LOCK TABLE keyless.migration IN ROW EXCLUSIVE MODE")
        with pytest.raises(BrokerError, match=r"cannot be prepared: .*lock timeout"):
            await broker.prepare(lease=LEASE, service="")


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
@pytest.mark.parametrize("made", ["SELECT", "CREATE SCHEMA keyless"])
async def test_a_database_of_another_encoding_is_refused(server: PostgresServer, encoding: str, made: str) -> None:
    server.execute("DROP DATABASE IF EXISTS other")
    server.execute(f"CREATE DATABASE other ENCODING '{encoding}' TEMPLATE template0")
    server.execute(made, "other")
    async with PostgresBroker(server.url("other")) as broker:
        with pytest.raises(BrokerError, match="UTF8"):
            await broker.prepare(lease=LEASE, service="")


# -- plans


async def explained(admin: Connection, statement: str) -> list[str]:
    """Return the plans of what a function executes, as they were executed."""
    await admin.execute(
        "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0; SET auto_explain.log_nested_statements = on;"
        "SET auto_explain.log_analyze = on; SET auto_explain.log_buffers = on; SET client_min_messages = log"
    )
    plans: list[str] = []

    def on_log(_connection: object, message: object) -> None:
        plans.append(str(message))

    admin.add_log_listener(on_log)
    for _ in range(7):  # the first five plans are for the values that they are given
        plans.clear()
        await admin.fetch(statement)
        await asyncio.sleep(0)
    admin.remove_log_listener(on_log)
    await admin.execute("SET auto_explain.log_min_duration = -1; SET client_min_messages = notice")
    return plans


@pytest.mark.parametrize("is_analyzed", [False, True])
async def test_a_take_seeks_what_is_due_in_an_index(admin: Connection, is_analyzed: bool) -> None:
    await fill(admin, 20_000, "1 h")
    await fill(admin, 100)
    if is_analyzed:
        await admin.execute("ANALYZE")
    plans = await explained(admin, "SELECT * FROM keyless.take(5, 100, 0, NULL, 1)")
    takes = await explained(admin, "SELECT * FROM keyless.take(5, 100, 0, 2, 1)")
    newer, due, later, *searches = (plan for plan in (*plans, *takes) if "ORDER BY w.due_at" in plan)
    for search in (newer, due, later):
        assert re.search(r"Index Cond: \(\(due_at <= .*\) AND \(due_at >= ", search)
    assert "using waiting_newer " in newer  # which has no rows, as a rule
    assert len(searches) > 1
    for search in searches:
        assert re.search(r"Index Cond: \(\(failures = .*\) AND \(CASE .* END = .*\) AND \(due_at <= ", search)
    for plan in (*plans, *takes):
        assert "Seq Scan" not in plan
        assert "Sort Key: w.due_at" not in plan


async def test_a_take_does_not_get_slower_while_a_transaction_elsewhere_is_long(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    await fill(admin, 2000)
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute("SELECT * FROM payment")
        for _ in range(5):
            await admin.execute("UPDATE keyless.waiting SET due_at = clock_timestamp()")
        floor = await admin.fetchval("SELECT extract(epoch FROM min(due_at))::float FROM keyless.waiting")

        async def pages(floor: object) -> int:
            plans = await explained(admin, f"SELECT * FROM keyless.take(1, 100, {floor}, NULL, 1)")  # noqa: S608  # a number
            searches = [plan for plan in plans if "ORDER BY w.due_at" in plan]
            assert len(searches) == 2
            return sum(int(re.findall(r"Buffers: shared hit=(\d+)", plan)[0]) for plan in searches)

        assert await pages(floor) < await pages("NULL") / 3
    await submit(broker, "a")


async def test_a_reader_does_not_get_slower_while_a_transaction_elsewhere_is_long(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    await decide_all(broker, "a", "b")
    await admin.execute("ALTER TABLE keyless.unread SET (autovacuum_enabled = off)")
    async with connection.transaction(isolation="repeatable_read"):
        await connection.execute("SELECT * FROM payment")
        await admin.execute(
            """
            INSERT INTO keyless.unread (reader, id, due_at)
            SELECT 'shop', -n, clock_timestamp() - n * interval '1 s' FROM generate_series(1, 20000) n;
            DELETE FROM keyless.unread WHERE id < 0
            """
        )
        row: Any = await admin.fetchrow("SELECT * FROM keyless.next_outcome('shop')")

        async def pages(floor: object) -> int:
            plans = await explained(admin, f"SELECT * FROM keyless.next_outcome('shop', {floor})")  # noqa: S608  # a number
            (plan,) = [plan for plan in plans if "LIMIT 100" in plan and "min(c.due_at)" in plan]
            assert "Index Cond" in plan
            found = re.search(r"Buffers: shared hit=(\d+)", plan)
            assert found is not None
            return int(found[1])

        assert await pages(row["oldest"] - 1.0) < await pages("NULL") / 3


async def test_an_idle_worker_asks_the_database_ten_times_a_second_at_most(
    broker: PostgresBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "_fetch", asked := Mock(wraps=broker._fetch))
    assert not await broker.take(1, 0.3)
    assert asked.call_count <= 4


async def test_an_outcome_that_commits_late_is_read_all_the_same(
    broker: PostgresBroker, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floors, "_COMMITS_WITHIN", 0.0)
    monkeypatch.setattr(floors, "_SEARCHES_ALL_EVERY", 0.1)
    async with connection.transaction():
        await connection.execute("SELECT keyless.submit($1)", new_request("late").body.decode())
        (row,) = await connection.fetch("SELECT * FROM keyless.take(1, 100, NULL, NULL, 1)")
        event = msgspec.json.encode(outcome_of(tables.message_of(row))).decode()
        await connection.execute("SELECT keyless.decide($1, $2, '{approved}', $3)", [row["id"]], [row["name"]], [event])
        await decide_all(broker, *(f"payment-{number}" for number in range(20)))
        for _ in range(20):
            await (await broker.next_outcome("shop")).mark_handled()
        due_at = await connection.fetchval("SELECT extract(epoch FROM due_at)::float FROM keyless.unread")
        assert broker._floors["keyless", "shop"]._floor > due_at
    async with asyncio.timeout(PATIENCE):
        outcome = await broker.next_outcome("shop")
    assert b'"late"' in outcome.data
    await outcome.mark_handled()


PROMISES = "claim('{1}', '{1}', '{1}')", "unclaim(1, 1, 1)", "decide('{}', '{}', '{}', '{}')"
PACING = "take(1, 1, NULL, NULL, 1)", "take_overdue(1, 1, 1, 1)", "put_off('{1}', '{1}', '{1}', '{1}', '{1}')"


@pytest.mark.parametrize("setting", ["on", "off"])
async def test_a_promise_waits_for_the_disk_and_pacing_does_not_whatever_the_database_says(
    admin: Connection, setting: str
) -> None:
    await admin.execute(f"SET synchronous_commit = {setting}")
    for statement in (*PROMISES, *PACING, "restore()"):
        async with admin.transaction():
            await admin.execute(f"SELECT keyless.{statement}")
            waits = await admin.fetchval("SHOW synchronous_commit")
            assert waits == ("on" if statement in PROMISES else "off"), statement


# -- transactions that meet


@pytest.mark.parametrize("seconds", [2.0, pytest.param(600.0, marks=pytest.mark.benchmarks)])
async def test_put_offs_and_decisions_of_the_same_requests_never_wait_for_each_other(
    broker: PostgresBroker, url: str, admin: Connection, database: str, seconds: float
) -> None:
    async with PostgresBroker(url) as other:
        await other.prepare(lease=LEASE, service="")
        loop = asyncio.get_running_loop()
        until, number = loop.time() + seconds, 0
        while loop.time() < until:
            number += 1
            await submit(broker, *(f"payment-{number}-{place}" for place in range(20)))
            messages = await take_n(broker, 20)
            backwards = messages[::-1]
            await asyncio.gather(
                *(broker.put_off(message, 0.0, ExchangeResult.ANSWERED) for message in messages),
                *(other.decide(message, outcome_of(message)) for message in backwards),
                *(broker.claim(message) for message in messages),
                *(other.claim(message) for message in backwards),
                *(broker.decide(message, outcome_of(message, Outcome.EXPIRED)) for message in messages),
            )
    assert await admin.fetchval("SELECT deadlocks FROM pg_stat_database WHERE datname = $1", database) == 0
    assert await admin.fetchval("SELECT count(*) FROM keyless.outcome") == number * 20
    assert await admin.fetchval("SELECT count(*) FROM keyless.waiting") == 0


async def test_a_transaction_that_met_another_one_is_repeated(
    broker: PostgresBroker, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await admin.execute(
        """
        CREATE SEQUENCE attempts;
        CREATE OR REPLACE FUNCTION keyless.restore() RETURNS void LANGUAGE plpgsql AS $$
        BEGIN
            IF nextval('public.attempts') < 4 THEN
                RAISE 'deadlock detected' USING ERRCODE = 'deadlock_detected';
            END IF;
        END $$
        """
    )
    await broker.prepare(lease=LEASE, service="")
    assert await admin.fetchval("SELECT last_value FROM attempts") == 4
    await admin.execute("SELECT setval('attempts', 1)")
    monkeypatch.setattr(module, "_ATTEMPTS", 2)
    with pytest.raises(BrokerError, match="deadlock"):
        await broker.prepare(lease=LEASE, service="")


async def test_a_new_reader_misses_nothing_and_stops_nobody_while_outcomes_are_stored(
    broker: PostgresBroker, admin: Connection
) -> None:
    expected = {f"payment-{number}" for number in range(200)}
    await submit(broker, *sorted(expected))
    messages = await take_n(broker, 200)
    readers = [f"reader-{number}" for number in range(5)]

    async def decide_them() -> None:
        for message in messages:
            assert await decide(broker, message)  # an error if it is held up for so long that the broker gives up

    async def read(reader: str, delay: float) -> list[str]:
        await asyncio.sleep(delay)
        seen: list[str] = []
        while len(seen) < len(expected):
            outcome = await broker.next_outcome(reader)
            seen.append(outcome.place)
            await outcome.mark_handled()
        return seen

    deciding = asyncio.create_task(decide_them())
    for seen in await asyncio.gather(*(read(reader, 0.05 * place) for place, reader in enumerate(readers))):
        assert len(set(seen)) == len(expected)
    await deciding
    for reader in readers:
        assert await unread(admin, reader) == {}


async def test_outcomes_come_while_a_stranger_holds_all_locks_that_are_anybodys(
    server: PostgresServer, database: str, url: str
) -> None:
    """A superuser keeps the brokers' functions from advisory locks; then it is of no use to hold those."""
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        server.execute(
            """
            DO $$
            DECLARE
                lock regprocedure;
            BEGIN
                FOR lock IN SELECT oid FROM pg_proc WHERE proname LIKE 'pg%advisory%' LOOP
                    EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', lock);
                END LOOP;
            END $$
            """,
            database,
        )
        await decide_all(broker, "a")
        async with asyncio.timeout(PATIENCE):
            await (await broker.next_outcome("shop")).mark_handled()


@pytest.mark.slow
async def test_outcomes_that_are_not_stored_are_a_problem_that_says_why(
    broker: PostgresBroker, admin: Connection, url: str
) -> None:
    async with Sandbox(auto_approve=0.1) as sandbox, sandbox.client() as client, ApprovalWorker(client, url) as worker:
        async with admin.transaction():
            await admin.execute("LOCK TABLE keyless.outcome")
            await submit(broker, "a")
            problem = "the broker does not store outcomes or claims: no answer within 10 s"
            await until(lambda: problem in worker.statistics.problems)
        async with asyncio.timeout(PATIENCE):
            await (await broker.next_outcome("shop")).mark_handled()
        await until(lambda: worker.statistics.is_ready)


async def test_open_transactions_hold_up_no_outcome(broker: PostgresBroker, connection: Connection, url: str) -> None:
    other = await asyncpg.connect(url)
    await decide_all(broker, "in hand")
    async with connection.transaction(), other.transaction():
        await connection.execute("SELECT keyless.add_reader('ledger')")
        await connection.execute("SELECT keyless.submit($1)", new_request("uncommitted").body.decode())
        await connection.execute("SELECT keyless.welcome_readers()")  # a worker that copies many outcomes
        assert await other.fetchval("SELECT operation_id FROM keyless.next_outcome('shop')") == "in hand"
        async with asyncio.timeout(PATIENCE):
            await decide_all(broker, "a")
            await (await broker.next_outcome("shop")).mark_handled()
    await other.close()


async def give_up_soon(admin: Connection) -> None:
    """Let the housekeeping wait a tenth of a second for a lock, and not a whole one."""
    await admin.execute("ALTER FUNCTION keyless.welcome_readers() SET lock_timeout = '0.1s'")


async def test_a_decision_that_hangs_stops_no_outcome_while_there_is_a_new_reader(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    async with connection.transaction():
        await connection.execute("SELECT keyless.decide('{}', '{}', '{}', '{}')")  # of a worker without a network
        await admin.execute("SELECT keyless.add_reader('ledger')")
        await give_up_soon(admin)
        with pytest.raises(asyncpg.LockNotAvailableError):
            await admin.execute("SELECT keyless.welcome_readers()")
        await decide_all(broker, "a")
    async with asyncio.timeout(PATIENCE):
        assert (await broker.next_outcome("ledger")).place


async def test_a_process_of_the_server_does_not_wait_for_a_lock_long_after_its_client_gave_up(
    admin: Connection,
) -> None:
    rows = await admin.fetch(
        "SELECT proname, substring(proconfig::text FROM 'lock_timeout=([0-9]+)s')::integer FROM pg_proc"
        " WHERE pronamespace = 'keyless'::regnamespace"
        " AND (has_function_privilege('keyless_worker', oid, 'EXECUTE') OR proname = 'next_outcome')"
    )
    assert len(rows) == len(migrations._ROLES["worker"]) + 1
    for name, seconds in rows:
        assert seconds == (1 if name == "welcome_readers" else 1.5 * module._ANSWER_WITHIN), name


@pytest.mark.parametrize("statement", [*PROMISES, *PACING])
async def test_the_server_ends_a_transaction_whose_worker_lost_its_network(admin: Connection, statement: str) -> None:
    async with admin.transaction():
        await admin.execute(f"SELECT keyless.{statement}")
        assert await admin.fetchval("SHOW idle_in_transaction_session_timeout") == "30s"
    assert await admin.fetchval("SHOW idle_in_transaction_session_timeout") == "0"


async def test_a_workers_transactions_are_read_committed_whatever_is_the_default(
    server: PostgresServer, database: str, url: str
) -> None:
    """Else a decision that waited for `welcome_readers` would not see the new reader, which would miss the outcome."""
    server.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = 'repeatable read'")
    async with PostgresBroker(url) as broker:
        ((isolation,),) = await broker._fetch("SHOW transaction_isolation")
        assert isolation == "read committed"


# -- failures


@pytest.mark.slow
async def test_after_a_crash_everything_that_was_undecided_waits_again(
    own_server: PostgresServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "_RESTORES_EVERY", 1)
    url = own_server.url(own_server.new_database())
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, "decided")
        await submit(broker, "asked", "new")
        (asked,) = [message for message in await take_n(broker, 2) if operation_of(message) == "asked"]
        await broker.claim(asked)
        own_server.execute("CHECKPOINT")
        own_server.kill()
        with pytest.raises(UnavailableError):
            await broker.take(1, 1.0)
        own_server.start()
        numbers: dict[str, int] = {}
        async with asyncio.timeout(PATIENCE):
            while len(numbers) < 2:  # the broker makes them again by itself
                try:
                    for message in await broker.take(2, 1.0):
                        numbers[operation_of(message)] = message.number
                except UnavailableError:
                    await asyncio.sleep(0.1)
        assert numbers == {"asked": asked.number + 1, "new": 1}
    assert [record for record in caplog.records if record.name.startswith("asyncpg")] == []  # whose pool has tracebacks


async def test_a_server_that_does_not_answer_costs_a_connection_and_not_the_worker(
    broker: PostgresBroker, admin: Connection
) -> None:
    await submit(broker, "a")
    async with admin.transaction():
        await admin.execute("LOCK TABLE keyless.waiting")
        with pytest.raises(RefusedError, match=r"no answer within 0\.1 s"):
            await broker._in_transaction(
                lambda each: each.fetch("SELECT * FROM keyless.take(1, 1, NULL, NULL, 1)"), 0.1
            )
    assert len(await take_n(broker, 1)) == 1


async def test_a_database_that_gives_no_connection_is_away_and_refuses_nothing(
    server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with asyncpg.create_pool(url, min_size=0) as pool, PostgresBroker(pool) as broker:
        monkeypatch.setattr(module, "_ANSWER_WITHIN", 0.1)
        with server.paused():
            with pytest.raises(UnavailableError, match=r"^no connection to the database within 0\.1 s$") as caught:
                await broker.inspect()
            with pytest.raises(BrokerError, match=r"^the database cannot be reached: no connection to the database"):
                await PostgresBroker(url).open()
    assert not isinstance(caught.value, RefusedError)


async def test_a_call_waits_for_its_turn_if_the_server_has_too_many_connections(
    server: PostgresServer, database: str, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ACQUIRES_AGAIN", 0.01)
    await admin.execute(f"CREATE ROLE {database}_w LOGIN CONNECTION LIMIT 1; GRANT keyless_worker TO {database}_w")
    broker = PostgresBroker(server.url(database, f"{database}_w"))
    taken = await asyncpg.connect(server.url(database, f"{database}_w"))
    with monkeypatch.context() as patched:
        patched.setattr(module, "_ANSWER_WITHIN", 0.5)
        with pytest.raises(BrokerError, match=r"no connection to the database within 0\.5 s: too many connections"):
            await broker.open()
    opening = asyncio.create_task(broker.open())
    await asyncio.sleep(0.1)
    await taken.close()
    async with asyncio.timeout(PATIENCE):
        await opening
        await asyncio.gather(*(broker.inspect() for _ in range(5)))
        await broker.aclose()


async def test_an_error_says_why_the_server_ended_a_connection(broker: PostgresBroker, admin: Connection) -> None:
    async with admin.transaction():
        await admin.execute("LOCK TABLE keyless.waiting")
        inspecting = asyncio.create_task(broker.inspect())
        waits = "FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ~ 'inspect'"

        async def is_ended() -> bool:
            await admin.execute("SELECT pg_stat_clear_snapshot()")
            return bool(await admin.fetch(f"SELECT pg_terminate_backend(pid) {waits}"))

        await until(is_ended)
        with pytest.raises(UnavailableError, match="terminating connection due to administrator command"):
            await inspecting


@pytest.mark.parametrize(
    ("code", "error"),
    [("53100", "RefusedError"), ("53300", "UnavailableError"), ("25006", "UnavailableError"), ("42501", "BrokerError")],
)
async def test_an_error_says_whether_it_may_pass(
    broker: PostgresBroker, admin: Connection, code: str, error: str
) -> None:
    await admin.execute(
        "CREATE OR REPLACE FUNCTION keyless.decide(ids bigint[], names bigint[], outcomes text[], bodies text[])"
        " RETURNS TABLE (id bigint, name bigint) LANGUAGE plpgsql"
        f" AS $$ BEGIN RAISE 'no' USING ERRCODE = '{code}', DETAIL = 'a value'; END $$"
    )
    await submit(broker, "a")
    (message,) = await take_n(broker, 1)
    with pytest.raises((UnavailableError, BrokerError), match=r"^no(;|$)") as caught:
        await decide(broker, message)
    assert type(caught.value).__name__ == error


@pytest.mark.parametrize("is_reading", [False, True])
async def test_after_a_failover_no_connection_leads_to_the_old_server_for_long(
    admin: Connection, database: str, url: str, *, is_reading: bool
) -> None:
    """The old server is one whose sessions are read-only; new ones are not."""
    await admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    async with PostgresBroker(url) as broker:
        await admin.execute(f"ALTER DATABASE {database} RESET default_transaction_read_only")
        for expires_from in (math.inf, broker._expires_from):  # the first as if all had been replaced just now
            broker._expires_from = expires_from
            with pytest.raises(UnavailableError, match="read-only"):
                await (broker.next_outcome("shop") if is_reading else submit(broker, "a"))
        await submit(broker, "a")
        assert 0 < broker._expires_from - asyncio.get_running_loop().time() <= 5


async def test_the_connections_of_an_applications_pool_stay_as_they_are(
    admin: Connection, database: str, url: str
) -> None:
    await admin.execute(f"ALTER DATABASE {database} SET default_transaction_read_only = on")
    async with asyncpg.create_pool(url, min_size=1, max_size=1) as pool:
        pids = [await pool.fetchval("SELECT pg_backend_pid()")]
        async with PostgresBroker(pool) as broker:
            with pytest.raises(UnavailableError, match="read-only"):
                await submit(broker, "a")
        pids.append(await pool.fetchval("SELECT pg_backend_pid()"))
    assert pids[0] == pids[1]


async def test_closing_waits_until_what_was_taken_is_handed_back(url: str, admin: Connection) -> None:
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        await submit(broker, "a")
        async with admin.transaction():
            await admin.execute("LOCK TABLE keyless.waiting IN SHARE MODE")
            taking = asyncio.create_task(broker.take(1, PATIENCE))

            async def is_locked_out() -> bool:
                return bool(await admin.fetchval("SELECT count(*) FROM pg_locks WHERE NOT granted"))

            await until(is_locked_out)
            taking.cancel()
            closing = asyncio.create_task(broker.aclose())
            await asyncio.sleep(0.2)
            assert not closing.done()
        await closing
    assert await admin.fetchval("SELECT deliveries FROM keyless.waiting") == 0


@pytest.mark.parametrize("is_owner", [True, False], ids=["a pool of its own", "the application's pool"])
async def test_closing_cuts_what_is_asked_of_a_database_that_answers_nothing(
    server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch, is_owner: bool
) -> None:
    monkeypatch.setattr(module, "_CLOSES_WITHIN", 0.1)
    monkeypatch.setattr(module, "_ENDS_WITHIN", 0.1)
    monkeypatch.setattr(module, "_ANSWER_WITHIN", 2 * PATIENCE)
    monkeypatch.setattr(module, "_WELCOMES_EVERY", 0.01)
    before = asyncio.all_tasks()
    pool = await asyncpg.create_pool(url, min_size=0, max_size=10)
    broker = PostgresBroker(url if is_owner else pool)
    await broker.open()
    await broker.prepare(lease=LEASE, service="")
    with server.paused():
        # Connections are made for some of them; others wait for one.
        asked = [asyncio.create_task(broker.inspect()) for _ in range(20)]
        taking = asyncio.create_task(broker.take(1, PATIENCE))
        await asyncio.sleep(0.05)
        taking.cancel()
        async with asyncio.timeout(PATIENCE):
            await broker.aclose()
            errors = await asyncio.gather(*asked, return_exceptions=True)
            await until(lambda: asyncio.all_tasks() <= {*before, asyncio.current_task()})
        pool.terminate()
    assert taking.cancelled()
    assert {isinstance(error, UnavailableError) for error in errors} == {True}


async def test_a_pool_whose_setup_hangs_delays_no_call_and_no_closing(
    server: PostgresServer, url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """If it is cancelled, asyncpg closes the connection, and waits for the server."""

    async def setup(connection: PoolConnectionProxy[Any]) -> None:
        await connection.execute("SELECT 1")

    pool = await asyncpg.create_pool(url, min_size=4, max_size=4, setup=setup)
    broker = PostgresBroker(pool)
    await broker.open()
    await broker.prepare(lease=LEASE, service="")
    await submit(broker, "a")
    (message,) = await take_n(broker, 1)
    monkeypatch.setattr(module, "_ANSWER_WITHIN", 0.1)
    monkeypatch.setattr(module, "_CLOSES_WITHIN", 0.1)
    monkeypatch.setattr(module, "_ENDS_WITHIN", 0.1)
    with server.paused():
        putting_off = asyncio.create_task(broker.put_off(message, 1, ExchangeResult.NONE))
        await asyncio.sleep(0.15)
        async with asyncio.timeout(PATIENCE):
            await broker.aclose()
        with pytest.raises(UnavailableError, match="no connection to the database within"):
            await putting_off
        pool.terminate()
    assert "Exception in callback" not in caplog.text


async def test_of_two_decisions_in_one_turn_the_first_is_stored(broker: PostgresBroker, admin: Connection) -> None:
    await submit(broker, "a")
    (message,) = await take_n(broker, 1)
    stored = await asyncio.gather(
        *(decide(broker, message, outcome) for outcome in (Outcome.EXPIRED, Outcome.APPROVED))
    )
    assert stored == [True, False]
    assert await admin.fetchval("SELECT outcome FROM keyless.outcome") == "expired"


# -- the clock


async def test_a_clock_that_is_set_back_holds_up_nothing_for_longer_than_200_seconds(
    broker: PostgresBroker, admin: Connection
) -> None:
    await decide_all(broker, "decided")
    await submit(broker, "a", "b")
    messages = await take_n(broker, 2)
    await broker.put_off(messages[0], 1e9, ExchangeResult.ANSWERED)
    await broker.put_off(messages[1], 150.0, ExchangeResult.ANSWERED)
    await (await broker.next_outcome("shop")).put_off(150.0)
    due_in = await admin.fetchval(
        "SELECT max(extract(epoch FROM due_at - clock_timestamp()))::float FROM keyless.waiting"
    )
    assert 190 < due_in <= 200
    unread_from = await admin.fetchval("SELECT due_at FROM keyless.unread")
    assert timedelta(seconds=100) < unread_from - broker.now() <= timedelta(seconds=150)
    assert not await take_all(broker, 0.3)
    # An hour back is as if everything were due an hour later.
    await admin.execute("UPDATE keyless.waiting SET due_at = due_at + interval '1 h'")
    await admin.execute("UPDATE keyless.unread SET due_at = due_at + interval '1 h'")
    assert len(await take_n(broker, 2)) == 2
    await (await asyncio.wait_for(broker.next_outcome("shop"), PATIENCE)).mark_handled()


async def test_the_time_is_the_databases(broker: PostgresBroker, admin: Connection) -> None:
    assert abs(broker.now() - await admin.fetchval("SELECT clock_timestamp()")) < timedelta(seconds=1)
    inspection = await broker.inspect()
    assert abs(inspection.clock_ahead) < 1
    assert isinstance(inspection.clock_ahead, float)


async def test_an_inspection_reads_so_many_rows_of_a_dead_reader_and_no_more(
    broker: PostgresBroker, admin: Connection, url: str
) -> None:
    await admin.execute("SELECT keyless.add_reader('dead')")
    await fill(admin, 20_000)
    await admin.execute(
        "INSERT INTO keyless.outcome SELECT id, 'approved', '{}', now() FROM keyless.request;"
        "INSERT INTO keyless.unread SELECT 'dead', id, now() FROM keyless.outcome;"
        "UPDATE keyless.outcome SET decided_at = now() - interval '1 h'"
        " WHERE id = (SELECT min(id) + 7 FROM keyless.outcome)"
    )
    told = await broker.inspect()
    assert told.unread["dead"] == 10_000
    assert 3599 < told.oldest_unread_age["dead"] < 3600 + PATIENCE
    for call in ("count_unread(50)", "list_unread(50, 10)"):
        counted = await asyncpg.connect(url)  # one whose counts are of this call alone
        async with counted.transaction():
            await counted.fetch(f"SELECT * FROM keyless.{call}")  # noqa: S608  # calls of this test's own
            rows = await counted.fetch(
                "SELECT relname, seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables WHERE schemaname = 'keyless'"
                " AND relname IN ('request', 'outcome', 'unread')"
            )
        await counted.close()
        assert len(rows) == 3
        for table, scans, fetched in rows:
            assert scans == 0, (call, table)
            assert fetched <= 50, (call, table)


# -- cleaning


async def grow_older(admin: Connection, days: int) -> None:
    for table in ("request", "outcome"):
        await admin.execute(f"UPDATE keyless.{table} SET decided_at = decided_at - interval '{days} days'")  # noqa: S608


async def clean(admin: Connection) -> None:
    after = 0
    while after is not None:
        after = await admin.fetchval("SELECT keyless.clean($1)", after)


async def counts(admin: Connection) -> dict[str, int]:
    return {
        table: await admin.fetchval(f"SELECT count(*) FROM keyless.{table}")  # noqa: S608
        for table in ("request", "outcome", "unread")
    }


async def test_a_body_goes_after_a_week_and_an_outcome_too_if_each_reader_has_handled_it(
    broker: PostgresBroker, admin: Connection
) -> None:
    await decide_all(broker, "handled", "unread")
    await submit(broker, "undecided")
    await admin.execute(
        "DELETE FROM keyless.unread WHERE id = (SELECT id FROM keyless.request WHERE operation_id = 'handled')"
    )
    await grow_older(admin, 6)
    await clean(admin)
    assert await counts(admin) == {"request": 3, "outcome": 2, "unread": 1}
    await grow_older(admin, 2)
    await clean(admin)
    assert await counts(admin) == {"request": 3, "outcome": 1, "unread": 1}
    bodies = await admin.fetch("SELECT operation_id FROM keyless.request WHERE body <> ''")
    assert [row[0] for row in bodies] == ["undecided"]
    assert await broker.submit(new_request("handled"))  # which is known all the same
    await grow_older(admin, 393)
    await clean(admin)
    assert await counts(admin) == {"request": 1, "outcome": 0, "unread": 0}


async def test_what_grows_old_while_workers_run_is_removed(
    url: str, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CLEANS_EVERY", 0.05)
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        await decide_all(broker, "a")
        await grow_older(admin, 401)

        async def is_removed() -> bool:
            return await counts(admin) == {"request": 0, "outcome": 0, "unread": 0}

        await until(is_removed)


async def test_cleaning_goes_page_by_page_and_ends(
    broker: PostgresBroker, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await admin.execute(
        """
        INSERT INTO keyless.request
            (operation_id, content_sha256, body, requested_at, expires_at, stored_at, decided_at)
        SELECT n, '', '{}', now(), now(), now(), now() FROM generate_series(1, 2500) n;
        INSERT INTO keyless.outcome SELECT id, 'approved', '{}', decided_at FROM keyless.request
        """
    )
    await decide_all(broker, "young")
    await admin.execute("UPDATE keyless.request SET decided_at = decided_at - interval '401 days' WHERE body = '{}'")
    await admin.execute("UPDATE keyless.outcome SET decided_at = decided_at - interval '401 days' WHERE body = '{}'")
    monkeypatch.setattr(broker, "_clean_page", clean_page := Mock(wraps=broker._clean_page))
    await broker._clean()
    assert clean_page.call_count > 2
    assert (await counts(admin))["outcome"] == 1
    assert (await counts(admin))["request"] == 1


async def test_a_reader_that_is_removed_holds_up_no_cleaning(broker: PostgresBroker, admin: Connection) -> None:
    await decide_all(broker, "a")
    await admin.execute(
        "DELETE FROM keyless.reader WHERE name = 'shop'; DELETE FROM keyless.unread WHERE reader = 'shop'"
    )
    await grow_older(admin, 8)
    await clean(admin)
    assert (await counts(admin))["outcome"] == 0


async def test_what_a_new_reader_gets_is_not_removed_meanwhile(
    broker: PostgresBroker, admin: Connection, connection: Connection
) -> None:
    """If it were, 100 numbers of outcomes that are no more would hide all later ones from the reader."""
    await decide_all(broker, "a")
    await admin.execute("DELETE FROM keyless.unread")
    await grow_older(admin, 8)
    async with connection.transaction():
        await connection.execute("SELECT keyless.add_reader('early')")
        await connection.execute("SELECT keyless.welcome_readers()")
        await connection.execute("SELECT keyless.add_reader('late')")
    await clean(admin)  # as 'late' is not ready
    assert await unread(admin, "early") == {"a": 0}
    assert (await counts(admin))["outcome"] == 1
    await admin.execute("DELETE FROM keyless.unread; UPDATE keyless.reader SET ready = true")
    async with connection.transaction():
        await clean(connection)
        await admin.execute("SELECT keyless.add_reader('later')")
        await give_up_soon(admin)
        with pytest.raises(asyncpg.LockNotAvailableError):  # it waits for what is being cleaned
            await admin.execute("SELECT keyless.welcome_readers()")
    await admin.execute("SELECT keyless.welcome_readers()")
    assert await counts(admin) == {"request": 1, "outcome": 0, "unread": 0}


async def test_a_reader_that_is_added_again_gets_nothing_that_is_no_more(
    broker: PostgresBroker, admin: Connection
) -> None:
    await admin.execute(
        # As by decisions that saw the reader, and were committed after it was removed.
        "INSERT INTO keyless.unread SELECT 'ledger', 1000 + n, now() FROM generate_series(1, 100) n;"
        "SELECT keyless.add_reader('ledger')"
    )
    await decide_all(broker, "a")
    async with asyncio.timeout(PATIENCE):
        assert (await broker.next_outcome("ledger")).place == "request-1"


async def test_a_reader_with_much_to_copy_holds_up_no_other(admin: Connection) -> None:
    async with admin.transaction():  # out of sight of the housekeeping
        await admin.execute("SELECT keyless.add_reader('one'), keyless.add_reader('two')")
        for ready in (2, 3):
            await admin.execute("SELECT keyless.welcome_readers()")
            assert await admin.fetchval("SELECT count(*) FROM keyless.reader WHERE ready") == ready


# -- housekeeping


async def test_a_chore_that_fails_stops_no_other_and_is_a_problem_until_it_succeeds(
    url: str, admin: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_RESTORES_EVERY", 0.05)
    monkeypatch.setattr(tables, "_FAILS_FOR", 0.0)  # a minute is tried with SQLite, whose clock moves
    await admin.execute("ALTER FUNCTION keyless.welcome_readers() RENAME TO away")
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")
        await submit(broker, "a")
        await admin.execute("TRUNCATE keyless.waiting")  # as a crash does
        assert [operation_of(message) for message in await take_n(broker, 1)] == ["a"]
        (problem,) = (await broker.inspect()).problems
        assert re.fullmatch(
            "making new readers ready has failed for [0-9]+ s: the schema 'keyless' is missing.*", problem
        )
        await admin.execute("ALTER FUNCTION keyless.away() RENAME TO welcome_readers")

        async def is_well() -> bool:
            return not (await broker.inspect()).problems

        await until(is_well)


async def test_an_inspection_that_may_not_count_outcomes_for_so_long_tells_the_rest(
    broker: PostgresBroker, admin: Connection
) -> None:
    await submit(broker, "a")
    await admin.execute(
        "CREATE OR REPLACE FUNCTION keyless.count_unread(most integer)"
        " RETURNS TABLE (reader text, unread bigint, oldest_age double precision) LANGUAGE plpgsql"
        " AS $$ BEGIN RAISE 'canceling statement due to statement timeout' USING ERRCODE = 'query_canceled'; END $$"
    )
    told = await broker.inspect()
    assert (told.waiting, told.unread) == (1, {})
    assert told.problems == ("unread outcomes cannot be counted: canceling statement due to statement timeout",)


async def test_no_limit_of_the_database_stops_a_chore(
    server: PostgresServer, database: str, url: str, admin: Connection
) -> None:
    await admin.execute("CREATE TABLE done (chore text)")
    for chore, result in ("restore()", "void"), ("welcome_readers()", "void"), ("clean(after bigint)", "bigint"):
        await admin.execute(
            f"""
            CREATE OR REPLACE FUNCTION keyless.{chore} RETURNS {result} LANGUAGE sql AS $$
                INSERT INTO public.done SELECT '{chore}' FROM pg_sleep(0.3); SELECT NULL::{result}
            $$
            """  # noqa: S608  # names of this test's own
        )
    limits = ["statement_timeout", *["transaction_timeout"] * (admin.get_server_version() >= (17,))]
    for limit in limits:
        server.execute(f"ALTER DATABASE {database} SET {limit} = '0.25s'")
    async with PostgresBroker(url) as broker:
        await broker.prepare(lease=LEASE, service="")  # which restores, too

        async def are_done() -> bool:
            return bool(await admin.fetchval("SELECT count(DISTINCT chore) = 3 FROM done"))

        await until(are_done)
        with pytest.raises(UnavailableError, match="timeout"):
            await broker._fetch("SELECT pg_sleep(1)")


async def test_the_server_ends_a_chore_whose_worker_lost_its_network(broker: PostgresBroker) -> None:
    ((limit,),) = await broker._tidy("SHOW idle_in_transaction_session_timeout")
    assert limit == "30s"
