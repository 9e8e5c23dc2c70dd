"""An application's own connection of any family of drivers, found by its type's name: no driver is imported for it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from .driver import Driver

_SCOPED: Final = {"sqlalchemy.scoped_session", "sqlalchemy.async_scoped_session"}
#: The module of this package for a type, by its top-level module and its name.
_FAMILIES: Final = {
    "asyncpg.Connection": "asyncpg",
    "asyncpg.PoolConnectionProxy": "asyncpg",
    "django.BaseDatabaseWrapper": "django",
    "django.ConnectionProxy": "django",
    "psycopg.AsyncConnection": "psycopg",
    "psycopg.Connection": "psycopg",
    "psycopg2.connection": "psycopg2",
    "sqlalchemy.AsyncConnection": "sqlalchemy",
    "sqlalchemy.AsyncSession": "sqlalchemy",
    "sqlalchemy.Connection": "sqlalchemy",
    "sqlalchemy.Session": "sqlalchemy",
}


def adapter_for(target: Any, schema: str) -> Driver | None:
    """Return the adapter of a connection or a session; None for anything else."""
    names = [f"{base.__module__.partition('.')[0]}.{base.__name__}" for base in type(target).__mro__]
    if not _SCOPED.isdisjoint(names):
        return adapter_for(target(), schema)
    for family in (_FAMILIES[name] for name in names if name in _FAMILIES):
        adapter: Driver = importlib.import_module(f".{family}", __name__).Adapter(target, schema)
        return adapter
    return None
