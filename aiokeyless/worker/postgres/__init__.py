"""The broker in PostgreSQL (extra ``postgres``): a request commits with the order, an outcome with the payment.

`PostgresBroker` is for workers, and for applications without a database connection of their own. `PostgresConnection`
is for applications with a connection of their own, in their own transactions.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .broker import PostgresBroker
    from .connection import PostgresConnection

__all__ = ["PostgresBroker", "PostgresConnection"]

SCHEMES: Final = ("postgresql", "postgres")
DRIVERS: Final = ("asyncpg", "psycopg", "psycopg2", "sqlalchemy", "django")
HINT: Final = 'install the extra "postgres"'
_SCHEMA: Final = "schema="

_MODULES: Final = {"PostgresBroker": "broker", "PostgresConnection": "connection"}


def from_url(url: str) -> PostgresBroker:
    """Return the broker of a database, in the schema that ``?schema=`` names; by default ``keyless``."""
    from .broker import PostgresBroker  # noqa: PLC0415  # it needs asyncpg

    address, _, query = url.partition("?")
    options = query.split("&")
    schemas = [option.removeprefix(_SCHEMA) for option in options if option.startswith(_SCHEMA)]
    others = "&".join(option for option in options if not option.startswith(_SCHEMA))
    return PostgresBroker(f"{address}?{others}" if others else address, *schemas[-1:])


def from_connection(connection: Any) -> PostgresConnection:
    """Return the application's side of the schema ``keyless``, on a connection of its own."""
    from .connection import PostgresConnection  # noqa: PLC0415  # only where one is used

    return PostgresConnection(connection)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    except ModuleNotFoundError as missing:  # PyPI has other packages of such names
        raise ModuleNotFoundError(f"{__name__} needs {missing.name}: {HINT}", name=missing.name) from missing
