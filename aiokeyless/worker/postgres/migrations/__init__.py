"""The versions of the schema: numbered files. A transaction applies each once, and records it."""

from __future__ import annotations

import importlib.resources
import zlib
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from aiokeyless.errors import BrokerError
from aiokeyless.worker.postgres.names import in_schema, quote

if TYPE_CHECKING:
    from aiokeyless.worker.postgres.connection import Connection

#: Version of the schema that this worker knows. It also serves a later version that allows it.
VERSION: Final = 1
#: The oldest worker that may go on after each version is applied.
_OLDEST_WORKER: Final = {1: 1}
#: The time for which a migration waits for locks, while it blocks the transactions behind it.
_LOCK_WITHIN: Final = "5s"
#: The functions that each role may execute.
_ROLES: Final = {
    "asker": ("submit",),
    "reader": ("add_reader", "remove_reader", "next_outcome", "put_off_outcome"),
    "worker": (
        "take",
        "take_overdue",
        "put_off",
        "claim",
        "unclaim",
        "were_asked",
        "decide",
        "inspect",
        "restore",
        "welcome_readers",
        "clean",
    ),
}


async def prepare(connection: Connection, schema: str) -> None:
    """Make, migrate or check the schema, in a connection's transaction.

    Raises:
        BrokerError: The schema is older than this worker needs, and this login may not change it. Or a later version of
            the schema does not allow this worker.
    """
    await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WITHIN}'")
    version, oldest_worker = await _versions(connection, schema)
    if oldest_worker > VERSION:
        raise BrokerError(
            f"the schema {schema!r} was upgraded by a later version of this library: upgrade this one, too"
        )
    if version < VERSION:
        try:
            await _migrate(connection, schema)
        except asyncpg.InsufficientPrivilegeError as error:
            raise BrokerError(
                f"the schema {schema!r} is of version {version} of {VERSION}, and this login may not change that "
                f"({error}): run aiokeyless worker --prepare as its owner, or as a user that may create it"
            ) from None


async def _versions(connection: Connection, schema: str) -> tuple[int, int]:
    """Return the version of the schema, 0 if there is none, and that of the oldest worker that it allows."""
    if await connection.fetchval("SELECT to_regclass($1)", f"{quote(schema)}.migration") is None:
        return 0, 0
    ((version, oldest_worker),) = await connection.fetch(
        in_schema(schema, "SELECT coalesce(max(version), 0), coalesce(max(oldest_worker), 0) FROM {}.migration")
    )
    return version, oldest_worker


async def _migrate(connection: Connection, schema: str) -> None:
    lock = lock_number(schema)
    await connection.execute(f"SELECT pg_advisory_xact_lock({lock}, 1)")
    owner = await _owner(connection, schema)
    await connection.execute(f"SET LOCAL ROLE {owner}")
    name = quote(schema)
    await connection.execute(
        f"CREATE TABLE IF NOT EXISTS {name}.migration (version integer PRIMARY KEY, oldest_worker integer NOT NULL, "
        "applied_at timestamptz NOT NULL DEFAULT now())"
    )
    version, _ = await _versions(connection, schema)  # another worker may have been faster
    for number in range(version + 1, VERSION + 1):
        script = importlib.resources.files(__name__).joinpath(f"{number:04}.sql").read_text(encoding="utf-8")
        await connection.execute(script.replace("{schema}", name).replace("{lock}", str(lock)))
        await connection.execute(
            in_schema(schema, "INSERT INTO {}.migration (version, oldest_worker) VALUES ($1, $2)"),
            number,
            _OLDEST_WORKER[number],
        )
    await _grant(connection, schema)


def lock_number(schema: str) -> int:
    """Return the first number of the schema's advisory locks; the second is 1 for migrations, 2 for new readers."""
    return zlib.crc32(f"aiokeyless {schema}".encode()) - (1 << 31)


async def _owner(connection: Connection, schema: str) -> str:
    """Return the owner of the schema, quote for SQL. Make the schema, owner and roles, if missing and permitted."""
    found: Any = await connection.fetchval(
        "SELECT quote_ident(pg_get_userbyid(nspowner)) FROM pg_namespace WHERE nspname = $1", schema
    )
    if found is not None:
        return str(found)
    if await connection.fetchval("SELECT getdatabaseencoding()") != "UTF8":
        raise BrokerError("the database must have the encoding UTF8, since requests are texts of any language")
    may_make_roles = await connection.fetchval(
        "SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user"
    )
    owner = await connection.fetchval("SELECT quote_ident(current_user)")
    if may_make_roles:
        for role in ("owner", *_ROLES):
            if not await _exists(connection, f"{schema}_{role}"):
                await connection.execute(f"CREATE ROLE {quote(f'{schema}_{role}')} NOLOGIN")
        owner = quote(f"{schema}_owner")
        await connection.execute(f"GRANT {owner} TO CURRENT_USER")
    await connection.execute(f"CREATE SCHEMA {quote(schema)} AUTHORIZATION {owner}")
    return str(owner)


async def _exists(connection: Connection, role: str) -> bool:
    return await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", role) is not None


async def _grant(connection: Connection, schema: str) -> None:
    """Let each existing role execute its functions, and revoke them from all others."""
    name = quote(schema)
    await connection.execute(f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {name} FROM PUBLIC")
    for role, functions in _ROLES.items():
        if await _exists(connection, f"{schema}_{role}"):
            granted = quote(f"{schema}_{role}")
            await connection.execute(f"GRANT USAGE ON SCHEMA {name} TO {granted}")
            await connection.execute(f"GRANT SELECT ON {name}.migration TO {granted}")
            for function in functions:
                await connection.execute(f"GRANT EXECUTE ON FUNCTION {name}.{function} TO {granted}")
