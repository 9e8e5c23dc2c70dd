"""The versions of the schema: numbered files. A transaction applies each once, and records it."""

from __future__ import annotations

import importlib.resources
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import asyncpg

from aiokeyless.errors import BrokerError
from aiokeyless.worker.postgres.names import in_schema, quote

if TYPE_CHECKING:
    from aiokeyless.worker.postgres.adapters.asyncpg import Connection

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
        "count_unread",
        "list_unread",
        "restore",
        "serve",
        "welcome_readers",
        "clean",
    ),
}


async def prepare(connection: Connection, schema: str) -> None:
    """Make, migrate or check the schema, in a connection's transaction."""
    # No name is looked up where others may create.
    await connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    await connection.execute(f"SET LOCAL lock_timeout = '{_LOCK_WITHIN}'")
    if await connection.fetchval("SELECT getdatabaseencoding()") != "UTF8":
        raise BrokerError("the database must have the encoding UTF8, since requests are texts of any language")
    owner, is_trusted = await _owner(connection, schema)
    if owner and not is_trusted and await _has_power(connection):
        raise await _refusal(connection, schema, owner)
    version, oldest_worker = await _versions(connection, schema)
    if oldest_worker > VERSION:
        raise BrokerError(
            f"the schema {schema!r} was upgraded by a later version of this library: upgrade this one, too"
        )
    if version == VERSION:
        return
    if owner and not is_trusted:
        raise BrokerError(
            f"the schema {schema!r} is of version {version} of {VERSION}, and belongs to {owner}: run "
            "aiokeyless worker --prepare as it"
        )
    try:
        await _migrate(connection, schema)
    except asyncpg.InsufficientPrivilegeError as error:
        raise BrokerError(
            f"the schema {schema!r} is of version {version} of {VERSION}, and this login may not change that "
            f"({error}): run aiokeyless worker --prepare as its owner, or as a user that may create it"
        ) from None


async def _owner(connection: Connection, schema: str) -> tuple[str, bool]:
    """Return the owner of the schema, and whether this user trusts it; an empty name if there is no schema.

    A user trusts itself. It also trusts the role that `_create` makes, if nobody can log in as that role, and if this
    user or a superuser made this user a member.
    """
    found: Any = await connection.fetchrow(
        """
        SELECT o.rolname::text, o.rolname = current_user OR (
            o.rolname = $1 || '_owner' AND NOT o.rolcanlogin AND EXISTS ( -- pg_has_role is true for each superuser
                SELECT FROM pg_auth_members m JOIN pg_roles r ON r.oid = m.member JOIN pg_roles g ON g.oid = m.grantor
                WHERE m.roleid = o.oid AND r.rolname = current_user AND (g.oid = r.oid OR g.rolsuper)
            )
        )
        FROM pg_namespace n JOIN pg_roles o ON o.oid = n.nspowner WHERE n.nspname = $1
        """,
        schema,
    )
    return ("", False) if found is None else tuple(found)


async def _has_power(connection: Connection) -> bool:
    """Return whether a function that this login calls could make its owner a superuser, or give it roles."""
    return bool(
        await connection.fetchval(
            "SELECT EXISTS (SELECT FROM pg_roles r"
            " WHERE (r.rolsuper OR r.rolcreaterole) AND pg_has_role(session_user, r.oid, 'MEMBER'))"
        )
    )


async def _refusal(connection: Connection, schema: str, owner: str) -> BrokerError:
    user = await connection.fetchval("SELECT current_user::text")
    return BrokerError(
        f"the schema {schema!r} belongs to {owner}, and not to {user}: a superuser, or a login that may make roles, "
        f"must own the schema, or be a member of the role {schema}_owner, by its own grant or a superuser's, that owns "
        "it and cannot log in; prepare it as its owner, or choose another schema"
    )


async def _versions(connection: Connection, schema: str) -> tuple[int, int]:
    """Return the version of the schema, 0 if there is none, and that of the oldest worker that it allows."""
    is_table = await connection.fetchval(
        "SELECT c.relkind = 'r' AND c.relowner = n.nspowner FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = $1 AND c.relname = 'migration'",
        schema,
    )
    if is_table is None:
        return 0, 0
    if not is_table:
        owner, _ = await _owner(connection, schema)
        raise BrokerError(
            f"{schema}.migration is no ordinary table of {owner}, who owns the schema: choose another one"
        )
    ((version, oldest_worker),) = await connection.fetch(
        in_schema(schema, "SELECT coalesce(max(version), 0), coalesce(max(oldest_worker), 0) FROM {}.migration")
    )
    return version, oldest_worker


async def _migrate(connection: Connection, schema: str) -> None:
    name = quote(schema)
    owner, is_trusted = await _owner(connection, schema)
    if not owner:
        await _create(connection, schema)
        owner, is_trusted = await _owner(connection, schema)  # another may have been faster
    if not is_trusted:
        raise await _refusal(connection, schema, owner)
    await connection.execute(f"SET LOCAL ROLE {await connection.fetchval('SELECT quote_ident($1)', owner)}")
    await _make_once(
        connection,
        f"CREATE TABLE {name}.migration (version integer PRIMARY KEY, oldest_worker integer NOT NULL, "
        "applied_at timestamptz NOT NULL DEFAULT now())",
    )
    await connection.execute(f"LOCK TABLE {name}.migration IN EXCLUSIVE MODE")  # no reader's right suffices
    version, _ = await _versions(connection, schema)  # another may have been faster
    for number in range(version + 1, VERSION + 1):
        script = importlib.resources.files(__name__).joinpath(f"{number:04}.sql").read_text(encoding="utf-8")
        await connection.execute(script.replace("{schema}", name))
        await connection.execute(
            in_schema(schema, "INSERT INTO {}.migration (version, oldest_worker) VALUES ($1, $2)"),
            number,
            _OLDEST_WORKER[number],
        )
    await _grant(connection, schema)


async def _create(connection: Connection, schema: str) -> None:
    """Make the schema and, if permitted, its owner and the roles."""
    owner = "CURRENT_USER"
    if await connection.fetchval("SELECT rolcreaterole OR rolsuper FROM pg_roles WHERE rolname = current_user"):
        owner = quote(f"{schema}_owner")
        # Whoever made one of these roles may be a member of it: so all are made here, or this user is a member already.
        if await _make_once(connection, f"CREATE ROLE {owner} NOLOGIN"):
            await connection.execute(f"GRANT {owner} TO CURRENT_USER")
            for role in _ROLES:
                await connection.execute(f"CREATE ROLE {quote(f'{schema}_{role}')} NOLOGIN")
    await _make_once(connection, f"CREATE SCHEMA {quote(schema)} AUTHORIZATION {owner}")


async def _make_once(connection: Connection, statement: str) -> bool:
    """Make something, unless another made it before, or does so at the same moment, perhaps in another database."""
    with suppress(
        asyncpg.DuplicateObjectError,
        asyncpg.DuplicateSchemaError,
        asyncpg.DuplicateTableError,
        asyncpg.UniqueViolationError,
    ):
        async with connection.transaction():
            await connection.execute(statement)
            return True
    return False


async def _grant(connection: Connection, schema: str) -> None:
    """Let each existing role execute its functions, and revoke them from all others."""
    name = quote(schema)
    await connection.execute(f"REVOKE ALL ON ALL FUNCTIONS IN SCHEMA {name} FROM PUBLIC")
    for role, functions in _ROLES.items():
        if await connection.fetchval("SELECT 1 FROM pg_roles WHERE rolname = $1", f"{schema}_{role}"):
            granted = quote(f"{schema}_{role}")
            await connection.execute(f"GRANT USAGE ON SCHEMA {name} TO {granted}")
            await connection.execute(f"GRANT SELECT ON {name}.migration TO {granted}")
            for function in functions:
                await connection.execute(f"GRANT EXECUTE ON FUNCTION {name}.{function} TO {granted}")
