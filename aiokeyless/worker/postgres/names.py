"""The broker's names in a database, and the settings that all its readers share."""

from __future__ import annotations

import re
from typing import Final

from aiokeyless.errors import ConfigurationError

#: The default schema.
SCHEMA: Final = "keyless"
READS_EVERY: Final = 0.25  # seconds between two polls for an outcome
_SIMPLE_NAME: Final = re.compile(r"[a-z_][a-z0-9_]{0,49}")  # and a role's ending: PostgreSQL allows 63 bytes
_NOT_ITS_OWN: Final = ("public", "information_schema")  # others may create there


def check_schema(schema: object) -> str:
    """Return the name of a schema, unless it needs quotes, is too long, or is one that others use."""
    if (
        not isinstance(schema, str)
        or not _SIMPLE_NAME.fullmatch(schema)
        or schema.startswith("pg_")
        or schema in _NOT_ITS_OWN
    ):
        raise ConfigurationError(
            "schema must be one of its own, of 1 to 50 small letters, digits and '_', and not begin with pg_, not "
            f"{schema!r:.80}",
            argument="schema",
        )
    return schema


def quote(name: str) -> str:
    """Return a schema or a role with quotes for SQL, since it may be a keyword."""
    return f'"{name}"'


def in_schema(schema: str, statement: str) -> str:
    """Return a statement with a schema in place of its ``{}``."""
    return statement.format(quote(schema))
