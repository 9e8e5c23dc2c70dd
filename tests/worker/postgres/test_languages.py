"""The functions by other drivers than asyncpg: what any language does, with SQL and JSON alone."""

# ruff: noqa: PT012  # a transaction has several statements

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import psycopg
import pytest

from aiokeyless.worker import request_to_json

from .shop import RefusalError, decide_all, operations, unread

if TYPE_CHECKING:
    from aiokeyless.worker.postgres import PostgresBroker

    from .shop import Connection

SUBMIT = "SELECT keyless.submit(%s)"
NEXT = "SELECT operation_id, outcome, event FROM keyless.next_outcome('shop')"


def request(operation_id: str) -> str:
    return request_to_json("C0FFEE", operation_id=operation_id, operation_payload="Pay 40 EUR", context={"order": 7})


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
