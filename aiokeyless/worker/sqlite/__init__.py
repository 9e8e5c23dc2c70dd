"""The broker for one machine: a SQLite file that workers and applications share; nothing to install, no server."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NoReturn

from aiokeyless.errors import ConfigurationError

if TYPE_CHECKING:
    from .broker import SqliteBroker

__all__ = ["SqliteBroker"]

SCHEMES: Final = ("sqlite",)
DRIVERS: Final = ("sqlite3",)
HINT: Final = "it is a part of Python, which some distributions pack separately"


def from_url(url: str) -> SqliteBroker:
    """Return the broker of ``sqlite:FILE`` or ``sqlite::memory:``."""
    from .broker import SqliteBroker  # noqa: PLC0415  # it needs sqlite3

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


def __getattr__(name: str) -> object:
    if name != "SqliteBroker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .broker import SqliteBroker  # noqa: PLC0415  # as above

    return SqliteBroker
