from __future__ import annotations

import asyncio
import os
import re
import sqlite3
import stat
import sys
import threading
import time
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import msgspec
import pytest
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError
from aiokeyless.worker import ApprovalWorker, Outcome, next_outcome, submit_approval
from aiokeyless.worker.broker import Claim, ExchangeResult, RefusedError, UnavailableError
from aiokeyless.worker.messages import ApprovalEvent, Message
from aiokeyless.worker.sqlite import SqliteBroker, failures, schema, store
from aiokeyless.worker.tables import row_of
from benchmarks.soak.disk import full
from worker.conformance.brokers import decide, decide_all, new_request, operation_of, submit, take_all
from worker.reading import now

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterator, Sequence

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.broker import OutcomeDelivery

GUIDE = (Path(__file__).parents[3] / "docs" / "howto" / "running-workers.md").read_text()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "keyless.db"


@pytest.fixture
async def broker(path: Path) -> AsyncGenerator[SqliteBroker]:
    async with SqliteBroker(path) as broker:
        await broker.prepare(lease=2.0, service="")
        yield broker


def execute(path: Path, statement: str, *values: object) -> list[tuple[object, ...]]:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return connection.execute(statement, values).fetchall()


def mode_of(file: Path) -> int:
    return stat.S_IMODE(file.stat().st_mode)


async def test_only_its_user_can_read_the_file(broker: SqliteBroker, path: Path) -> None:
    await submit(broker, "a")
    for file in path.parent.iterdir():
        assert mode_of(file) == 0o600, file


async def test_a_file_that_others_could_read_is_closed_to_them_and_logged(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with SqliteBroker(path) as kept_open:
        await submit(kept_open, "a")
        for file in path.parent.iterdir():
            file.chmod(0o644)
        (link := path.with_name("link.db")).symlink_to(path.name)
        async with SqliteBroker(link):
            pass
        assert {mode_of(file) for file in path.parent.iterdir()} == {0o600}
    lines = [record.getMessage() for record in caplog.records if "mode_changed" in record.getMessage()]
    assert [re.findall(r'"(.*?)"', line) for line in lines] == [
        [f"{path}{ending}", "600", "644"] for ending in ("", "-wal", "-shm")
    ]


async def test_a_file_of_another_user_is_refused_with_both_ids(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteBroker(path):
        pass
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert f"belongs to the user {mine}, and this process runs as the user 4711:" in await opening_fails(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
@pytest.mark.parametrize("named", ["keyless.db", "link.db"])
@pytest.mark.parametrize("ending", ["-wal", "-shm", "-journal"])
async def test_what_another_user_planted_beside_the_file_is_refused(path: Path, ending: str, named: str) -> None:
    async with SqliteBroker(path):
        pass
    path.with_name("link.db").symlink_to(path.name)
    planted = path.with_name(f"{path.name}{ending}")
    planted.write_bytes(b"")
    os.chown(planted, 4711, 4711)
    with pytest.raises(BrokerError, match=f"{planted} belongs to the user 4711"):
        async with SqliteBroker(path.with_name(named)):
            pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of others")
async def test_a_link_that_another_user_planted_beside_the_file_is_refused(path: Path) -> None:
    async with SqliteBroker(path):
        pass
    planted = path.with_name(f"{path.name}-journal")
    planted.symlink_to(path.name)  # to a file of this user, in which the other one chose what stands
    os.chown(planted, 4711, 4711, follow_symlinks=False)
    assert f"{planted} belongs to the user 4711" in await opening_fails(path)


async def test_a_file_that_cannot_be_closed_to_others_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")  # as on a file system that has no modes

    path.write_bytes(b"")
    path.chmod(0o644)
    monkeypatch.setattr(Path, "chmod", fail)
    assert "mode cannot be set to 600: Operation not permitted" in await opening_fails(path)


async def test_windows_has_no_owners_and_no_modes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "geteuid")
    path.write_bytes(b"")
    path.chmod(0o644)
    async with SqliteBroker(path):
        pass
    assert mode_of(path) == 0o644


async def test_a_second_broker_of_a_process_ends_no_lock_of_the_first(path: Path) -> None:
    program = "import sqlite3, sys; sqlite3.connect(sys.argv[1], timeout=0).execute('PRAGMA journal_mode = DELETE')"
    async with SqliteBroker(path):
        async with SqliteBroker(path):
            pass
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, path, stderr=asyncio.subprocess.PIPE
        )
        _, errors = await process.communicate()
    assert b"database is locked" in errors


async def test_a_promise_waits_for_the_disk_and_pacing_does_not(broker: SqliteBroker) -> None:
    async def waits(call: Awaitable[object]) -> bool:
        await call
        found: tuple[int] = await broker._run(lambda: broker._store._one("PRAGMA synchronous"))
        return found == (2,)  # FULL, and not NORMAL

    def put_off() -> Awaitable[None]:
        return broker.put_off(message, 9.0, ExchangeResult.NONE)

    assert await waits(submit(broker, "a"))
    (message,) = await broker.take(1, PATIENCE)
    for call, promises in (
        (put_off(), False),
        (broker.claim(message), True),
        (put_off(), False),
        (broker.unclaim(message), True),
        (put_off(), False),
        (decide(broker, message), True),
    ):
        assert await waits(call) is promises, call
    assert not await waits(broker.next_outcome("ledger"))
    outcome = await broker.next_outcome("shop")
    assert not await waits(outcome.put_off())
    assert await waits(asyncio.gather(outcome.mark_handled(), put_off()))  # in one transaction


async def test_the_log_shrinks_after_a_long_read_of_another_program(path: Path, broker: SqliteBroker) -> None:
    log = path.with_name("keyless.db-wal")
    large = msgspec.structs.replace(new_request("a"), body=b"x" * 500_000)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM request").fetchall()
        for number in range(50):
            await broker.submit(msgspec.structs.replace(large, request=new_request(f"a-{number}").request))
        assert log.stat().st_size > 24 << 20
        reader.execute("COMMIT")
    await submit(broker, "b", "c")
    assert log.stat().st_size <= 16 << 20


@pytest.mark.looptime
async def test_a_reader_gets_outcomes_of_a_broker_that_is_opened_again() -> None:
    broker = SqliteBroker(":memory:")  # nothing in it survives its end, not even the readers
    for _ in range(2):
        async with broker:
            await broker.prepare(lease=2.0, service="")
            reading = asyncio.create_task(broker.next_outcome("shop"))
            await decide_all(broker, "a")
            async with asyncio.timeout(10):
                await (await reading).mark_handled()


async def test_a_reader_that_is_deleted_in_use_gets_all_outcomes_again(broker: SqliteBroker, path: Path) -> None:
    _, outcome = await read_and_taken(broker, "a", "b")
    await outcome.mark_handled()
    for table, column in (("reader", "name"), ("unread", "reader")):
        execute(path, f"DELETE FROM {table} WHERE {column} = 'shop'")  # noqa: S608
    async with asyncio.timeout(10):
        again = await broker.next_outcome("shop")
    assert again.data == outcome.data


# -- files that are not fit


async def opening_fails(path: Path) -> str:
    before = set(threading.enumerate())
    with pytest.raises(BrokerError) as caught:
        async with SqliteBroker(path):
            pass
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    await until(lambda: not {each for each in threading.enumerate() if "aiokeyless-sqlite" in each.name} - before)
    return str(caught.value)


async def test_a_file_of_a_later_version_is_refused(path: Path) -> None:
    async with SqliteBroker(path):
        pass
    execute(path, "INSERT INTO migration VALUES (2, 1, 0)")
    async with SqliteBroker(path):  # which still allows this one
        pass
    execute(path, "INSERT INTO migration VALUES (3, 2, 0)")
    assert "upgrade" in await opening_fails(path)


async def test_another_applications_database_is_refused_and_keeps_its_mode(path: Path) -> None:
    execute(path, "CREATE TABLE orders (id INTEGER)")
    path.chmod(0o644)
    assert "another application's database" in await opening_fails(path)
    assert execute(path, "SELECT name FROM sqlite_master") == [("orders",)]
    assert mode_of(path) == 0o644


async def test_a_file_that_is_no_database_is_refused_and_not_changed(path: Path) -> None:
    path.write_bytes(b"dear diary\n" * 100)
    assert "no SQLite database" in await opening_fails(path)
    assert path.read_bytes() == b"dear diary\n" * 100


async def test_a_damaged_file_is_refused(path: Path) -> None:
    async with SqliteBroker(path):
        pass
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 3996 + path.read_bytes()[4096:])
    assert "damaged" in await opening_fails(path)


async def test_a_folder_that_is_missing_or_a_file_without_permission_is_named(tmp_path: Path) -> None:
    assert "No such file" in await opening_fails(tmp_path / "missing" / "keyless.db")
    assert "directory" in await opening_fails(tmp_path)


async def test_a_read_only_folder_is_named(path: Path) -> None:
    async with SqliteBroker(path):
        pass
    with (
        closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection,
        pytest.raises(BrokerError, match="cannot be written"),
        failures.broker_errors(str(path)),
    ):
        connection.execute("CREATE TABLE a (b)")


async def test_a_file_of_another_machine_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = path.parent / "mounts"
    mounts.write_bytes(
        b"overlay / overlay rw 0 0\n/dev/sr0 /\xff iso9660 ro 0 0\n" + f"nas {path.parent} nfs4 rw 0 0\n".encode()
    )
    monkeypatch.setattr(schema, "_MOUNTS", mounts)
    assert "nfs4" in await opening_fails(path)
    assert path not in path.parent.iterdir()
    monkeypatch.setattr(schema, "_MOUNTS", path.parent / "missing")  # as where the machine does not tell
    async with SqliteBroker(path):
        pass


async def test_a_name_is_no_uri_even_if_sqlite_reads_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its owner and its mode would be those of another file."""
    monkeypatch.chdir(tmp_path)
    async with SqliteBroker("file:a.db"):
        assert set(tmp_path.iterdir()) == {tmp_path / f"file:a.db{ending}" for ending in ("", "-wal", "-shm")}


def test_a_file_that_cannot_be_shared_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "MEMORY", "another name")
    with (
        closing(sqlite3.connect(":memory:", isolation_level=None)) as connection,
        pytest.raises(BrokerError, match="journal mode stays 'memory'"),
    ):
        schema._prepare(connection, ":memory:", 0.0)


def test_a_disk_that_is_full_when_the_file_is_made_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run_full(connection: sqlite3.Connection, *_: object) -> None:
        connection.execute("ROLLBACK")  # as SQLite does by itself
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL
        raise error

    monkeypatch.setattr(schema, "_migrate", run_full)
    with pytest.raises(RefusedError, match="the disk is full"):
        schema.connect(str(path), now=0.0)


# -- what goes wrong later


async def test_a_full_disk_refuses_and_is_got_over(broker: SqliteBroker) -> None:
    await submit(broker, "a")
    (message,) = await broker.take(1, 5.0)
    connection = broker._store._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    await broker._run(lambda: connection.execute(f"PRAGMA max_page_count = {pages}"))
    large = [new_request(f"payment-{number}", context=msgspec.json.encode("x" * 1000)) for number in range(300)]
    refusals = await asyncio.gather(*(broker.submit(new) for new in large), return_exceptions=True)
    assert {str(refusal) for refusal in refusals} == {f"{broker.destination}: the disk is full"}
    await broker._run(lambda: connection.execute("PRAGMA max_page_count = 100000"))
    assert await decide(broker, message)


@pytest.mark.slow
async def test_a_worker_on_a_full_disk_is_not_ready_and_goes_on_when_there_is_room(
    disk: Path, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with SqliteBroker(disk / "keyless.db") as broker, ApprovalWorker(client, broker) as worker:
        await submit_approval(broker, "C0FFEE", operation_id="txn-1")
        await until(lambda: "txn-1" in sandbox.operations)
        with full(disk):
            sandbox.approve("txn-1")
            with pytest.raises(BrokerError, match="the disk is full"):
                await submit_approval(broker, "C0FFEE", operation_id="txn-2", context="x" * 10_000)
            await until(lambda: "the disk is full" in "".join(worker.statistics.problems))
        async with next_outcome(broker, "shop") as event:
            assert event.outcome is Outcome.APPROVED
        await until(lambda: worker.statistics.is_ready)


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a file as another process does that writes."""
    with closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        yield
        other.execute("COMMIT")


async def test_a_file_that_another_process_holds_is_waited_for(broker: SqliteBroker, path: Path) -> None:
    with held(path):
        submitting = asyncio.create_task(submit(broker, "a"))
        await asyncio.sleep(0.2)
        assert not submitting.done()
    await submitting


async def test_a_file_that_is_held_for_long_is_unavailable(
    broker: SqliteBroker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(broker, "a")
    (message,) = await broker.take(1, 5.0)
    await decide(broker, message)
    outcome = await broker.next_outcome("shop")
    monkeypatch.setattr(failures, "_BUSY_FOR", 0.05)
    with held(path):
        with pytest.raises(UnavailableError, match="locked"):
            await broker.put_off(message, 1.0, ExchangeResult.NONE)
        with pytest.raises(UnavailableError, match="locked"):
            await submit(broker, "b")
        with pytest.raises(UnavailableError, match="locked"):
            await outcome.mark_handled()
        with pytest.raises(BrokerError, match="locked"):  # when a worker starts
            await broker.prepare(lease=30.0, service="https://keyless.test")
    await outcome.mark_handled()


async def test_opening_a_file_that_is_held_for_long_is_an_error(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with SqliteBroker(path):
        pass
    monkeypatch.setattr(failures, "_BUSY_FOR", 0.05)
    with held(path):
        assert "locked" in await opening_fails(path)


@pytest.mark.parametrize("ending", ["", "-wal"])
async def test_a_file_that_was_removed_ends_the_worker_and_takes_no_request(
    broker: SqliteBroker, path: Path, ending: str
) -> None:
    await submit(broker, "a")
    [message] = await take_all(broker)
    file = path.with_name(f"{path.name}{ending}")
    file.rename(path.with_name("moved"))
    for _ in ("removed", "replaced"):
        for call in (broker.inspect, lambda: submit(broker, "b"), lambda: broker.claim(message)):
            with pytest.raises(BrokerError, match=r"-wal, was removed or replaced.* start them again$"):
                await call()
        file.write_bytes(b"")
    path.with_name("moved").replace(file)
    assert (await broker.inspect()).waiting == 1  # nothing of a call that raised was stored
    assert await broker.claim(message) is Claim.NEW


async def test_the_log_is_found_through_a_link_from_another_folder(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "a.db").symlink_to(path)
    monkeypatch.chdir(tmp_path / "link")
    async with SqliteBroker("a.db") as broker:
        monkeypatch.chdir("/")
        async with SqliteBroker(path) as other:  # whose close leaves the log
            await submit(other, "a")
        await submit(broker, "b")
        assert (await broker.inspect()).waiting == 2


async def test_the_backup_of_the_guide_has_what_a_broker_in_use_holds(
    broker: SqliteBroker, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await submit(broker, "decided", "waits")
    for message in await take_all(broker):
        if operation_of(message) == "decided":
            assert await decide(broker, message)
        else:
            await broker.put_off(message, 0.0, ExchangeResult.ANSWERED)
    monkeypatch.chdir(path.parent)
    [(statement, copy)] = re.findall(r"^umask 077 && sqlite3 keyless.db \"(VACUUM INTO '(.*)')\"$", GUIDE, re.MULTILINE)
    execute(path, statement)
    async with SqliteBroker(copy) as restored:
        await restored.prepare(lease=2.0, service="")
        assert [operation_of(message) for message in await take_all(restored)] == ["waits"]
        assert b'"decided"' in (await restored.next_outcome("shop")).data


async def test_a_delivery_from_before_a_restore_changes_no_other_request(broker: SqliteBroker, path: Path) -> None:
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(path.with_name("backup.db"))) as backup:
        live.backup(backup)
        lost, unread = await read_and_taken(broker, "a", "b")
        backup.backup(live)  # under the running worker
        other, others_unread = await read_and_taken(broker, "c", "d")
    assert row_of(lost).id == row_of(other).id
    assert unread.place == others_unread.place
    assert not await broker.has_claim(lost)
    assert await broker.claim(lost) is Claim.ANOTHERS
    assert await broker.claim(other) is Claim.NEW
    assert not await broker.unclaim(lost)
    assert await broker.has_claim(other)
    await broker.put_off(lost, 0.0, ExchangeResult.FAILED)
    assert not await take_all(broker)
    assert not await decide(broker, lost)
    await unread.put_off(0.0)
    await unread.mark_handled()
    assert execute(path, "SELECT count(*) FROM unread WHERE due_at > ?", datetime.now(UTC).timestamp()) == [(1,)]
    assert await decide(broker, other)


async def read_and_taken(broker: SqliteBroker, decided: str, waiting: str) -> tuple[Message, OutcomeDelivery]:
    """Return a delivery of a request, and one of another's outcome."""
    await decide_all(broker, decided)
    await submit(broker, waiting)
    (message,) = await take_all(broker)
    return message, await broker.next_outcome("shop")


def test_what_is_wrong_for_good_is_not_tried_again() -> None:
    with (
        closing(sqlite3.connect(":memory:")) as connection,
        pytest.raises(BrokerError, match="no such table"),
        failures.broker_errors("keyless.db"),
    ):
        connection.execute("SELECT * FROM missing")
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_FSYNC
    with pytest.raises(UnavailableError, match="disk I/O"), failures.broker_errors("keyless.db"):
        raise error
    assert issubclass(RefusedError, UnavailableError)


# -- clocks and housekeeping


@pytest.mark.looptime
async def test_nothing_is_put_off_for_longer_than_200_s(memory: SqliteBroker) -> None:
    await memory.prepare(lease=2.0, service="")
    await submit(memory, "a")
    (message,) = await memory.take(1, 1.0)
    await memory.put_off(message, 3600.0, ExchangeResult.ANSWERED)
    assert not await memory.take(1, 199.0)
    assert await memory.take(1, 2.0)


@pytest.mark.looptime
async def test_a_take_waits_for_the_head_start_of_newer_workers_and_seeks_later_versions_in_an_index(
    memory: SqliteBroker,
) -> None:
    new, began, statements = new_request("a"), now(), list[str]()
    await memory.submit(msgspec.structs.replace(new, request=msgspec.structs.replace(new.request, version=2)))
    file = memory._store._connection
    file.set_trace_callback(statements.append)
    assert [operation_of(message) for message in await memory.take(1, 3.0)] == ["a"]
    file.set_trace_callback(None)
    assert now() - began == pytest.approx(1.0, abs=0.01)
    assert statements.count("BEGIN IMMEDIATE") == 1  # and none before that second
    searches = [statement for statement in statements if re.search("version (<> 1 AND|> )", statement)]
    assert searches
    for search in searches:
        assert "waiting_newer" in str(file.execute(f"EXPLAIN QUERY PLAN {search}").fetchall()), search


@pytest.mark.looptime
async def test_housekeeping_repeats_no_outcome_early(memory: SqliteBroker) -> None:
    await memory.prepare(lease=2.0, service="")
    await decide_all(memory, "a")
    await (await memory.next_outcome("shop")).put_off(100.0)
    began = now()
    await memory.next_outcome("shop")
    assert now() - began == pytest.approx(100.0, abs=1.0)


@pytest.mark.looptime
async def test_a_clock_set_back_delays_nothing_for_long(memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    await memory.prepare(lease=2.0, service="")
    await submit(memory, "a", "b")
    messages = await take_all(memory, 0.1)
    await decide(memory, messages[0])
    outcome = await memory.next_outcome("shop")
    await outcome.put_off()
    await memory.put_off(messages[1], 20.0, ExchangeResult.ANSWERED)
    clock = memory._clock
    monkeypatch.setattr(memory, "_clock", lambda: clock() - timedelta(days=2))
    began = now()
    assert [operation_of(message) for message in await memory.take(1, 300.0)] == [operation_of(messages[1])]
    again = await memory.next_outcome("shop")
    assert again.data == outcome.data
    assert now() - began < 200


def rows(broker: SqliteBroker, statement: str) -> int:
    found: int = broker._store._one(statement)[0]
    return found


@pytest.mark.looptime
async def test_what_nobody_needs_any_more_is_removed_in_time(
    memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await memory.prepare(lease=2.0, service="")
    clock = memory._clock
    await submit(memory, "read", "unread", "waiting")
    by_operation = {operation_of(message): message for message in await take_all(memory, 0.1)}
    await decide(memory, by_operation["read"])
    await (await memory.next_outcome("shop")).mark_handled()
    await decide(memory, by_operation["unread"])
    await memory.put_off(by_operation["waiting"], 1.0, ExchangeResult.ANSWERED)
    monkeypatch.setattr(memory, "_clock", lambda: clock() + timedelta(days=8))
    await asyncio.sleep(3700)
    assert rows(memory, "SELECT count(*) FROM request WHERE body = x''") == 2
    assert rows(memory, "SELECT count(*) FROM outcome") == 1
    outcome = await memory.next_outcome("shop")
    assert msgspec.json.decode(outcome.data, type=ApprovalEvent).operation_id == "unread"
    assert await memory.submit(new_request("read"))  # which is known for longer
    monkeypatch.setattr(memory, "_clock", lambda: clock() + timedelta(days=409))
    await asyncio.sleep(3700)
    assert rows(memory, "SELECT count(*) FROM request") == 1
    assert rows(memory, "SELECT count(*) FROM outcome") + rows(memory, "SELECT count(*) FROM unread") == 0
    assert not await memory.submit(new_request("read"))


def refuse_repairs(monkeypatch: pytest.MonkeyPatch, error: Exception | None = None) -> list[None]:
    """Let housekeeping fail from now on; the list gets an entry each time."""
    turns: list[None] = []

    def refuse(*_arguments: object) -> None:
        turns.append(None)
        raise error or sqlite3.DatabaseError("out of order")

    monkeypatch.setattr(store.Store, "repair", refuse)
    return turns


@pytest.mark.looptime
@pytest.mark.parametrize("error", [sqlite3.DatabaseError("out of order"), LookupError("a bug")])
async def test_housekeeping_that_fails_again_and_again_is_logged_once_a_minute(
    memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, error: Exception
) -> None:
    await memory.prepare(lease=2.0, service="")
    turns = refuse_repairs(monkeypatch, error)
    await asyncio.sleep(100)  # of the loop's clock; the log's own stands still
    assert len(turns) >= 9
    [line] = [message for message in caplog.messages if message.startswith("broker.not_cleaned")]
    assert re.fullmatch(r'broker.not_cleaned chore="correcting due times" error="\w+Error: .+" count=1', line)


@pytest.mark.looptime
async def test_no_housekeeping_for_a_minute_is_a_problem(memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    await memory.prepare(lease=2.0, service="")
    await asyncio.sleep(15)
    with monkeypatch.context() as patched:
        refuse_repairs(patched)
        await asyncio.sleep(60)
        assert (await memory.inspect()).problems == ()
        await asyncio.sleep(15)
        (problem,) = (await memory.inspect()).problems
        assert re.fullmatch("correcting due times has failed for (6|7)[0-9] s: .*out of order.*", problem)
    await asyncio.sleep(10)
    assert (await memory.inspect()).problems == ()


@pytest.mark.looptime
async def test_housekeeping_that_fails_fails_nothing_else_of_its_turn(
    memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store.Store, "clean", Mock(side_effect=sqlite3.DatabaseError("damaged")))
    await memory.prepare(lease=2.0, service="")
    await submit(memory, "a")
    await asyncio.sleep(75)
    assert (await memory.inspect()).problems == ("removing old rows has failed for 75 s: :memory:: damaged",)


async def test_deliveries_that_come_back_to_a_cancelled_take_are_handed_back_when_it_is_closed(path: Path) -> None:
    async with SqliteBroker(path) as broker:
        await broker.prepare(lease=60.0, service="")
        await submit(broker, "a")
        broker._take_from = 0.0
        is_taken, is_cancelled = asyncio.Event(), asyncio.Event()
        take = broker._take_or_give_back

        async def hold(taking: Coroutine[Any, Any, Sequence[Message]]) -> Sequence[Message]:
            messages = await taking
            is_taken.set()
            await is_cancelled.wait()
            return messages

        broker._take_or_give_back = lambda taking: take(hold(taking))  # type: ignore[method-assign]  # to hold it
        taking = asyncio.create_task(broker.take(1, 5.0))
        await is_taken.wait()
        taking.cancel()
        is_cancelled.set()
    async with SqliteBroker(path) as broker:
        await broker.prepare(lease=60.0, service="")
        (message,) = await broker.take(1, 0.0)
        assert message.number == 1


async def test_a_take_that_another_worker_wins_waits_on(broker: SqliteBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    await submit(broker, "a")
    lost: list[Message] = []
    taken = broker._take_or_give_back

    async def beaten(call: Coroutine[Any, Any, Sequence[Message]]) -> Sequence[Message]:
        if not lost:
            lost.extend(await taken(call))
            return []
        return await taken(call)

    monkeypatch.setattr(broker, "_take_or_give_back", beaten)
    assert not await broker.take(1, 0.2)
    assert lost


async def test_an_outcome_that_others_took_is_waited_for(broker: SqliteBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    await decide_all(broker, "a")
    take_unread, taken_first = store.Store.take_unread, [None]
    monkeypatch.setattr(
        store.Store, "take_unread", lambda *call: taken_first.pop() if taken_first else take_unread(*call)
    )
    outcome = await broker.next_outcome("shop")
    await outcome.mark_handled()
    assert not taken_first


async def test_an_inspection_reads_so_many_rows_of_a_dead_reader_and_no_more(path: Path) -> None:
    async with SqliteBroker(path) as broker:
        with closing(sqlite3.connect(path)) as file, file:
            numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 20000)"
            file.execute("INSERT INTO reader VALUES ('dead', '', 1)")
            file.execute(f"{numbers} INSERT INTO outcome SELECT i, 'approved', x'', 2e9 FROM n")  # noqa: S608
            file.execute("INSERT INTO unread SELECT 'dead', id, 0, 0 FROM outcome")
            file.execute("UPDATE outcome SET decided_at = ? WHERE id = 7", (time.time() - 3600,))
        told = await broker.inspect()
        assert told.unread == {"dead": 10_000}
        assert 3599 < told.oldest_unread_age["dead"] < 3600 + PATIENCE
        with closing(sqlite3.connect(path)) as file:
            statement = store._UNREAD.format("count(*), min(o.decided_at)", "")
            plan = [row[-1] for row in file.execute(f"EXPLAIN QUERY PLAN {statement}", ("dead", 50))]
        assert [step for step in plan if "SCAN" in step and step not in {"SCAN u", "SCAN SUBQUERY u"}] == []
        assert any("unread USING" in step for step in plan), plan
