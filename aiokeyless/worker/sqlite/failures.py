"""Errors of sqlite3, translated to those that workers and applications know, and retries while the file is busy."""

from __future__ import annotations

import random
import sqlite3
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final, TypeVar

from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

T = TypeVar("T")

_BUSY_FOR: Final = 10.0  # seconds for which other processes may hold the file
_PAUSE: Final = (0.0005, 0.003)  # seconds, at random; SQLite's own pauses grow to 100 ms, so others overtake
_PRIMARY: Final = 0xFF  # of an extended error code
#: Errors that may pass by themselves.
_PASSING: Final = frozenset({sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_NOMEM})
_ADVICE: Final = {
    sqlite3.SQLITE_CANTOPEN: "it cannot be opened: the folder must be there, and this user must be able to write to it",
    sqlite3.SQLITE_CORRUPT: "it is damaged: restore it from a backup, or move it away, which loses what waits in it",
    sqlite3.SQLITE_NOTADB: "it is no SQLite database: name another file",
    sqlite3.SQLITE_PERM: "this user may not use it",
    sqlite3.SQLITE_READONLY: "it cannot be written: this user must be able to write to the file and its folder",
}


def _error_code(error: sqlite3.Error) -> int:
    """Return the primary error code; 0 for an error of the module itself, such as for a closed connection."""
    return getattr(error, "sqlite_errorcode", 0) & _PRIMARY


@contextmanager
def broker_errors(path: str) -> Iterator[None]:
    """Raise sqlite3's errors as the broker's."""
    try:
        yield
    except sqlite3.Error as error:
        code = _error_code(error)
        if code == sqlite3.SQLITE_FULL:
            raise RefusedError(f"{path}: the disk is full") from None
        if code in _PASSING:
            raise UnavailableError(f"{path}: {error}") from None
        raise BrokerError(f"{path}: {_ADVICE.get(code, error)}") from None


def retry_while_busy(do: Callable[[], T]) -> T:
    """Do something with the file, and retry while another process holds it."""
    give_up_at = time.monotonic() + _BUSY_FOR
    while True:
        try:
            return do()
        except sqlite3.OperationalError as error:
            if _error_code(error) != sqlite3.SQLITE_BUSY or time.monotonic() >= give_up_at:
                raise
        time.sleep(random.uniform(*_PAUSE))  # noqa: S311  # nothing secret
