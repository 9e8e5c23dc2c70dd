"""`submit` in an application's transaction, and what the database makes of the texts that it is given."""

# ruff: noqa: PT012  # a transaction has several statements

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import asyncpg
import msgspec
import pytest

from aiokeyless.errors import BrokerError, ConfigurationError, ConflictError, InvalidRequestError
from aiokeyless.worker import request_to_json, submit_approval
from aiokeyless.worker.messages import MAX_CONTEXT, REQUEST_VERSION, ApprovalRequest, context_refusal, request_name
from aiokeyless.worker.postgres import PostgresBroker
from aiokeyless.worker.postgres import broker as module
from benchmarks.cutting_proxy import CuttingProxy
from worker.conformance.brokers import new_request, operation_of, take_n
from worker.reading import EXTREME_NUMBERS, MODERATE_NUMBERS

if TYPE_CHECKING:
    from postgres_server import PostgresServer

    from .shop import Connection


async def waiting(admin: Connection) -> list[str]:
    rows = await admin.fetch(
        "SELECT r.operation_id FROM keyless.waiting w JOIN keyless.request r ON r.id = w.id ORDER BY r.id"
    )
    return [row[0] for row in rows]


async def submit_text(connection: Connection, text: str) -> bool:
    is_duplicate: bool = await connection.fetchval("SELECT keyless.submit($1)", text)
    return is_duplicate


def text_of(**fields: Any) -> str:
    return json.dumps({"version": REQUEST_VERSION, "user_id": "C0FFEE", "operation_id": "a", **fields})


# -- in a transaction


async def test_a_connection_in_no_transaction_is_refused(admin: Connection, connection: Connection) -> None:
    with pytest.raises(ConfigurationError, match=r"connection\.transaction\(\).*pass the session itself"):
        await submit_approval(connection, "C0FFEE", operation_id="a")
    assert await waiting(admin) == []


async def test_an_aborted_transaction_is_the_drivers_error(connection: Connection) -> None:
    transaction = connection.transaction()
    await transaction.start()
    with pytest.raises(asyncpg.DivisionByZeroError):
        await connection.execute("SELECT 1 / 0")
    with pytest.raises(asyncpg.InFailedSQLTransactionError):
        await submit_approval(connection, "C0FFEE", operation_id="a")
    await transaction.rollback()


async def test_a_different_request_under_a_used_operation_id_ends_its_senders_transaction(
    admin: Connection, connection: Connection
) -> None:
    async with connection.transaction():
        await submit_approval(connection, "C0FFEE", operation_id="a", operation_payload="Pay 40 EUR")
    with pytest.raises(ConflictError, match='"a" belongs to a different request: choose a new one'):
        async with connection.transaction():
            await connection.execute("INSERT INTO payment VALUES ('a')")
            await submit_approval(connection, "C0FFEE", operation_id="a", operation_payload="Pay 4000 EUR")
    assert await admin.fetchval("SELECT count(*) FROM payment") == 0
    with pytest.raises(asyncpg.UniqueViolationError):  # 23505, for any other driver
        await submit_text(connection, text_of(operation_payload="Pay 4000 EUR"))


async def test_a_sequence_that_was_not_replicated_is_named_with_the_statement_that_sets_it(
    admin: Connection, connection: Connection
) -> None:
    assert not await submit_text(connection, text_of())
    await admin.execute("ALTER TABLE keyless.request ALTER COLUMN id RESTART")
    with pytest.raises(asyncpg.ObjectNotInPrerequisiteStateError, match="logical replication") as caught:
        async with connection.transaction():
            await submit_approval(connection, "C0FFEE", operation_id="b")
    await admin.execute(str(caught.value).partition("run: ")[2])
    assert not await submit_text(connection, text_of(operation_id="b"))


async def test_two_transactions_at_once_with_the_same_request_store_one(
    admin: Connection, connection: Connection, url: str
) -> None:
    other = await asyncpg.connect(url)
    async with connection.transaction():
        await submit_approval(connection, "C0FFEE", operation_id="a")
        second = asyncio.create_task(submit_text(other, request_to_json("C0FFEE", operation_id="a")))
        await asyncio.sleep(0.1)
        assert not second.done()
    assert await second
    assert await waiting(admin) == ["a"]
    await other.close()


@pytest.mark.parametrize("call", ["submit('{}')", "add_reader('ledger')"])
async def test_an_open_transaction_holds_up_no_other_for_long(
    admin: Connection, connection: Connection, url: str, call: str
) -> None:
    function = call.partition("(")[0]
    settings = await admin.fetchval("SELECT proconfig FROM pg_proc WHERE oid = $1::regproc", f"keyless.{function}")
    assert "lock_timeout=3s" in settings
    await admin.execute(f"ALTER FUNCTION keyless.{function} SET lock_timeout = '50ms'")
    statement = f"SELECT keyless.{call.format(text_of())}"
    other = await asyncpg.connect(url, server_settings={"lock_timeout": "7s"})
    async with connection.transaction():
        await connection.execute(statement)
        with pytest.raises(asyncpg.LockNotAvailableError, match="transient: repeat the transaction"):
            await other.execute(statement)
    await other.execute(statement)
    assert await other.fetchval("SHOW lock_timeout") == "7s"
    await other.close()


async def test_a_broker_repeats_a_submission_that_an_open_transaction_holds_up(
    broker: PostgresBroker, admin: Connection, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    await admin.execute("ALTER FUNCTION keyless.submit SET lock_timeout = '50ms'")
    transaction = connection.transaction()
    await transaction.start()
    await submit_approval(connection, "C0FFEE", operation_id="a")
    with pytest.raises(BrokerError, match=r"transient: repeat the transaction.* submit it again"):
        await submit_approval(broker, "C0FFEE", operation_id="a")
    monkeypatch.setattr(module, "_ATTEMPTS", 10_000)
    submitting = asyncio.create_task(submit_approval(broker, "C0FFEE", operation_id="a"))
    await asyncio.sleep(0.1)  # it is repeated already
    await transaction.rollback()
    assert not (await submitting).duplicate


async def test_in_repeatable_read_a_request_that_was_stored_meanwhile_has_the_transaction_repeated(
    admin: Connection, connection: Connection
) -> None:
    transaction = connection.transaction(isolation="repeatable_read")
    await transaction.start()
    await connection.execute("SELECT * FROM payment")
    await submit_text(admin, text_of())
    with pytest.raises(asyncpg.SerializationError):  # 40001, which applications repeat anyway
        await submit_approval(connection, "C0FFEE", operation_id="a")
    await transaction.rollback()
    assert await waiting(admin) == ["a"]


@pytest.mark.parametrize("is_committed", [False, True], ids=["before", "after"])
async def test_a_request_whose_commit_was_cut_is_submitted_again(
    admin: Connection, server: PostgresServer, database: str, is_committed: bool
) -> None:
    async with CuttingProxy(server, cut_after=is_committed) as proxy:
        connection = await asyncpg.connect(proxy.url(database))
        with pytest.raises((asyncpg.PostgresConnectionError, asyncpg.InterfaceError, OSError)):
            async with connection.transaction():
                await submit_approval(connection, "C0FFEE", operation_id="a")
                proxy.arm()
    assert await waiting(admin) == (["a"] if is_committed else [])
    assert await submit_text(admin, request_to_json("C0FFEE", operation_id="a")) is is_committed
    assert await waiting(admin) == ["a"]


async def test_a_request_that_commits_late_is_taken_all_the_same(
    broker: PostgresBroker, connection: Connection
) -> None:
    async with connection.transaction():
        await submit_approval(connection, "C0FFEE", operation_id="late")
        await broker.submit(new_request("early"))
        assert [operation_of(message) for message in await take_n(broker, 1)] == ["early"]
        assert not await broker.take(10, 0.5)
    assert [operation_of(message) for message in await take_n(broker, 1)] == ["late"]


# -- texts


async def refusal(connection: Connection, text: str) -> str:
    """Return why the server refuses a text; empty if it takes it."""
    try:
        await submit_text(connection, text)
    except (asyncpg.DataError, asyncpg.StatementTooComplexError) as error:
        return str(error)
    return ""


# Each with a part of the error. One test has them all, since each test makes a database.
NO_REQUESTS = [
    ("", "invalid input syntax"),
    ("[]", "must be a JSON object"),
    ("null", "must be a JSON object"),
    *((text_of(version=each), "version must be a whole number from 1 on") for each in (0, -1, "1", 1.0, None, [2])),
    (text_of(version=1e30).replace("1e+30", "1e0"), "version must be a whole number"),
    (text_of().replace('"version": 1, ', ""), "version must be a whole number"),
    (text_of(version=2, operation_id=7), "operation_id must be a text"),
    (text_of(version=2, operation_id="a/b"), "operation_id must not contain a slash"),
    (text_of(version=2, expires_in="PT2M"), "expires_in must be"),
    (text_of(version=2, created_at=7), "must be texts"),
    (text_of(version=2).replace("}", ', "context": ' + "[" * 65 + "]" * 65 + "}"), "at most 64 deep"),
    (text_of(version=2, operation_payload="x" * (1 << 20)), "at most 1048576 bytes"),
    (text_of(operation_paylaod="Pay"), "unknown fields: operation_paylaod"),
    (text_of(operation_id=7), "operation_id must be a text"),
    (text_of(operation_id=None), "operation_id must be a text"),
    (text_of(operation_id=""), "operation_id must be a text"),
    (text_of(operation_id="x" * 513), "operation_id must be a text"),
    (text_of(operation_id="a/b"), "operation_id must not contain a slash"),
    (text_of(operation_id="a\\b", started_by="backend"), "operation_id must not contain a slash"),
    (text_of(user_id=12), "user_id must be"),
    (text_of(user_id="G"), "user_id must be"),
    (text_of(user_id="AB\n"), "user_id must be"),
    (text_of(operation_payload=40), "must be texts"),
    (text_of(external_user_id=["a"]), "must be texts"),
    (text_of(require_auth_type=["biom"]), "require_auth_type must be"),
    (text_of(require_auth_type="face"), "require_auth_type must be biom, pin or null"),
    (text_of(started_by="web"), "started_by must be backend or phone"),
    (text_of(started_by=None), "started_by must be backend or phone"),
    (text_of(expires_in="120"), "expires_in must be"),
    (text_of(expires_in=0), "expires_in must be"),
    (text_of(expires_in=-1), "expires_in must be"),
    (text_of(expires_in=None), "expires_in must be"),
    (text_of(expires_in=float("nan")), "invalid input syntax"),
    (text_of(created_at="2027-01-31T12:00:00"), "with a zone"),
    (text_of(created_at="tomorrow"), "with a zone"),
    (text_of(created_at="infinity"), "with a zone"),
    (text_of(created_at="2027-01-31T24:00:00Z"), "with a zone"),
    (text_of(created_at="2027-01-31T23:59:60Z"), "with a zone"),
    (text_of(created_at=1800000000), "must be texts"),
    (text_of(created_at="2027-02-31T12:00:00Z"), "out of range"),
    (text_of(context="\x00"), "Unicode"),
    (text_of().replace('"a"', '"\\ud800"'), "surrogate|Unicode"),
    (text_of().replace("}", ', "context": ' + "[" * 65 + "]" * 65 + "}"), "at most 64 deep"),
    (text_of().replace("}", ', "context": ' + '{"a":' * 65 + "1" + "}" * 65 + "}"), "at most 64 deep"),
    (text_of().replace("}", ', "context": ' + "[" * 7000 + "]" * 7000 + "}"), "deep|stack depth"),
    (text_of(expires_in=120).replace("120", "1e131000"), "numbers must have"),
    (text_of(expires_in=120).replace("120", f"120.{'0' * 400}"), "numbers must have"),
    (text_of(context="x" * 65535), "context must have at most 65536 bytes"),
    (text_of(operation_payload="x" * (1 << 20)), "at most 1048576 bytes"),
]


async def test_a_text_that_is_no_request_is_an_error_for_its_sender(admin: Connection, connection: Connection) -> None:
    for text, reason in NO_REQUESTS:
        assert re.search(reason, await refusal(connection, text)), text[:100]
    assert await admin.fetchval("SELECT count(*) FROM keyless.request") == 0
    assert not await refusal(connection, text_of(operation_id="a/b", started_by="phone"))  # the app chose it


async def test_a_text_of_a_later_version_is_stored_as_it_is_for_workers_that_know_it(
    admin: Connection, broker: PostgresBroker
) -> None:
    later = {
        "version": 10**18,
        "user_id": {"name": "ann"},
        "operation_payload": ["Pay"],
        "started_by": 1,
        "urgent": True,
    }
    for text in (text_of(**later), text_of(**later, expires_in=120.0)):
        assert await submit_text(admin, text) is (text != text_of(**later))
    with pytest.raises(asyncpg.UniqueViolationError):
        await submit_text(admin, text_of(**later | {"user_id": {"name": "ANN"}}))
    await admin.execute("TRUNCATE keyless.waiting; SELECT keyless.restore()")  # as after a crash
    broker.request_version = 2**31 - 2
    assert not await broker.take_overdue(9, -1000.0)
    await admin.execute("UPDATE keyless.waiting SET version = 2^31 - 2")
    assert len(await broker.take_overdue(9, -1000.0)) == 1


@pytest.mark.parametrize("broken", [r"\u0000", r"\ud800", '" ,', r"\x"])
async def test_an_error_about_a_text_does_not_quote_it(connection: Connection, broken: str) -> None:
    with pytest.raises(asyncpg.DataError, match=r"^the request must be JSON of Unicode texts without NUL: ") as caught:
        await submit_text(connection, text_of(operation_payload="Pay 40 EUR").replace("EUR", broken))
    assert "Pay" not in str(caught.value.as_dict())


async def test_a_setting_for_the_literals_of_an_application_changes_nothing(connection: Connection) -> None:
    await connection.execute("SET standard_conforming_strings = off")
    await submit_text(
        connection, request_to_json("C0FFEE", operation_id="a", created_at=datetime.now(UTC), context='\\"e1000')
    )
    with pytest.raises(asyncpg.InvalidParameterValueError, match="with a zone"):
        await submit_text(connection, text_of(created_at="dddd-dd-ddTdd:dd:ddZ"))


async def test_the_server_refuses_the_numbers_that_the_library_refuses(connection: Connection) -> None:
    for number in (*MODERATE_NUMBERS, *EXTREME_NUMBERS):
        context = f'{{"a": [true, "e1000", {number}]}}'
        text = text_of(operation_id=number[:80]).replace("}", f', "context": {context}}}')
        reason = "^$" if context_refusal(msgspec.Raw(context.encode())) is None else "numbers must have"
        assert re.search(reason, await refusal(connection, text)), number


def in_context(item: str, size: int = MAX_CONTEXT) -> str:
    return text_of().replace("}", f', "context": [{",".join([item] * ((size - 2) // (len(item) + 1)))}]}}')


@pytest.mark.parametrize(
    "text",
    [
        *(in_context(item) for item in ("1e131000", "1e-16000", "0e-16000", "1e999", "1e300", "1", "{}", '"\\"')),
        in_context("1e131000", 1_000_000),
        text_of(created_at=7).replace("7", f"[{','.join(['1e300'] * 170_000)}]"),
        text_of(expires_in=7).replace("7", f"[{','.join(['1e300'] * 170_000)}]"),
        text_of(operation_payload="\\" * 500_000),
        text_of(version=1)[:-1] + ',"version":1' * 90_000 + "}",
        text_of(version=1)[:-1] + '"' + '\\"' * 300_000,
    ],
)
@pytest.mark.usefixtures("broker")
async def test_no_text_costs_the_server_much(url: str, text: str) -> None:
    connection = await asyncpg.connect(url)
    status = Path(f"/proc/{connection.get_server_pid()}/status")

    def most_memory() -> int:
        """Return the most megabytes that the process of the connection ever had."""
        return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) >> 10

    await submit_text(connection, text_of(operation_id="first"))
    before, began = most_memory(), time.perf_counter()
    with suppress(asyncpg.DataError, asyncpg.StatementTooComplexError):
        await submit_text(connection, text)
    assert time.perf_counter() - began < 5.0  # 0.1 s, unless the machine is busy
    assert most_memory() - before < 100
    await connection.close()


async def test_a_broker_raises_it_as_an_invalid_request(broker: PostgresBroker) -> None:
    with pytest.raises(InvalidRequestError, match="Unicode"):
        await submit_approval(broker, "C0FFEE", operation_id="a", context="\x00")


@pytest.mark.parametrize("depth", [1, 64])
async def test_a_context_comes_back_byte_for_byte(broker: PostgresBroker, admin: Connection, depth: int) -> None:
    context = "[" * depth + ' {"b" :1.50,"a": "\\u00e9\\\\u0000"} ' + "]" * depth if depth < 64 else "[" * 64 + "]" * 64
    text = text_of().replace("}", f', "context": {context}' + "}")
    assert not await submit_text(admin, text)
    (message,) = await take_n(broker, 1)
    assert message.body.decode() == text


ABSENT = object()
#: The values of each field, similar ones side by side, and the ways to write each. An optional field begins with its
#: default. The keys of a context have one order: the library compares its bytes, and the server compares its content.
VALUES: dict[str, list[list[Any]]] = {
    "version": [[REQUEST_VERSION]],
    "user_id": [["C0FFEE", "c0ffee", "C0ffee"], ["C0FFEF", "c0ffef"]],
    "operation_id": [["a"], ["A"]],
    "operation_payload": [[""], [" "], ["Pay 40"], ["pay 40"]],
    "external_user_id": [[""], ["alice"], ["ALICE"]],
    "expires_in": [[120], [30, 30.0], [30.5], [12]],
    "created_at": [["2026-01-31T12:00:00Z", "2026-01-31T12:00:00+05:30"]],
    "context": [[], [""], [[None]], [{}], [{"a": None}], [{"a": {}}], [{"a": {"b": None}}]],
    "require_auth_type": [[], ["biom"], ["pin"]],
    "started_by": [[], ["phone"]],
}


def ways(field: msgspec.structs.FieldInfo) -> list[list[Any]]:
    """Return the values of a field as above. An optional one may be absent, or have the struct's default."""
    first, *others = VALUES[field.name]
    return [first if field.required else [*first, ABSENT, json.loads(msgspec.json.encode(field.default))], *others]


WAYS = {field.name: ways(field) for field in msgspec.structs.fields(ApprovalRequest)}


def write(meant: dict[str, int], number: int, random: Random) -> str:
    """Write a request with the values that are meant, each in one of its ways."""
    fields = {name: random.choice(WAYS[name][value]) for name, value in meant.items()}
    fields["operation_id"] += str(number)
    return json.dumps({name: value for name, value in fields.items() if value is not ABSENT})


async def test_of_500_random_pairs_the_server_takes_those_for_one_that_the_library_does(connection: Connection) -> None:
    random = Random(54)  # noqa: S311  # of cases, not of secrets
    for number in range(500):
        meant = {name: random.randrange(len(values)) for name, values in WAYS.items()}
        changed = random.choice([*WAYS])
        other = meant | {changed: (meant[changed] + random.randint(-1, 1)) % len(WAYS[changed])}
        texts = [write(each, number, random) for each in (meant, other)]
        first, second = (request_name(msgspec.json.decode(text, type=ApprovalRequest)) for text in texts)
        assert not await submit_text(connection, texts[0])
        try:
            is_one = await submit_text(connection, texts[1])
        except asyncpg.UniqueViolationError:
            is_one = False
        assert is_one is (first == second) is (meant == other), texts


async def test_times_do_not_depend_on_the_settings_of_a_session(admin: Connection, connection: Connection) -> None:
    await connection.execute(
        "SET timezone = 'Asia/Kathmandu'; SET datestyle = 'SQL, DMY'; SET intervalstyle = 'sql_standard'"
    )
    created_at = datetime.now(UTC) - timedelta(seconds=10)
    await submit_text(connection, request_to_json("C0FFEE", operation_id="a", created_at=created_at, expires_in=90.5))
    row: Any = await admin.fetchrow("SELECT requested_at, expires_at FROM keyless.request")
    assert row["requested_at"] == created_at
    assert row["expires_at"] == created_at + timedelta(seconds=90.5)


async def test_a_time_in_the_future_counts_as_now_and_a_wait_ends_after_400_days(connection: Connection) -> None:
    created_at = datetime.now(UTC) + timedelta(days=1)
    await submit_text(connection, request_to_json("C0FFEE", operation_id="a", created_at=created_at, expires_in=1e9))
    row: Any = await connection.fetchrow("SELECT * FROM keyless.request")
    assert row["requested_at"] == row["stored_at"] < created_at
    assert row["expires_at"] == row["stored_at"] + timedelta(days=400)


async def test_the_ids_of_a_request_are_compared_byte_by_byte(connection: Connection) -> None:
    for operation_id in ("\u00e9", "e\u0301", "E\u0301", "a", "A", "a "):
        assert not await submit_text(connection, text_of(operation_id=operation_id))
