"""The broker for one machine: a SQLite file that workers and applications share; nothing to install, no server."""

from __future__ import annotations

from typing import Final, NoReturn

from aiokeyless.errors import ConfigurationError

from .broker import SqliteBroker

__all__ = ["SqliteBroker"]

SCHEMES: Final = ("sqlite",)
DRIVERS: Final = ("sqlite3",)
HINT: Final = "it is a part of Python, which some distributions pack separately"


def from_url(url: str) -> SqliteBroker:
    """Return the broker of ``sqlite:FILE`` or ``sqlite::memory:``."""
    path = url.partition(":")[2]
    if path.startswith("//"):
        raise ConfigurationError(
            "broker must be sqlite:FILE, such as sqlite:keyless.db or sqlite:/var/lib/keyless.db, without //",
            argument="broker",
        )
    return SqliteBroker(path)


def from_connection(_connection: object) -> NoReturn:
    """Refuse a connection: the file is the broker's own."""
    raise ConfigurationError(
        "broker must be a SqliteBroker, and not a connection of your own: in a file that it shared with the broker, "
        "your transactions would fail whenever a worker writes",
        argument="broker",
    )
