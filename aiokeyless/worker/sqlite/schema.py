"""The tables, which PostgreSQL's broker has too, and the opening of the file. Times are seconds since 1970."""

from __future__ import annotations

import errno
import logging
import os
import sqlite3
import stat
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import BrokerError
from aiokeyless.worker.logs import log

from .failures import broker_errors, retry_while_busy

if TYPE_CHECKING:
    from collections.abc import Iterator

MEMORY: Final = ":memory:"
#: Version of the tables that this worker knows. It also serves a later version that allows it.
VERSION: Final = 1
#: One transaction runs each migration once, in this order, and records it.
_MIGRATIONS: Final = (
    """
    CREATE TABLE service (
        id INTEGER PRIMARY KEY CHECK (id = 1),
        base_url TEXT NOT NULL
    );
    CREATE TABLE request (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        name INTEGER NOT NULL DEFAULT (random()),
        operation_id TEXT NOT NULL UNIQUE,
        content_sha256 TEXT NOT NULL,
        body BLOB NOT NULL,
        traceparent TEXT,
        requested_at REAL NOT NULL,
        expires_at REAL NOT NULL,
        stored_at REAL NOT NULL,
        asked INTEGER,
        decided_at REAL
    );
    CREATE INDEX request_expires ON request (expires_at) WHERE decided_at IS NULL;
    CREATE TABLE waiting (
        id INTEGER PRIMARY KEY,
        name INTEGER NOT NULL,
        due_at REAL NOT NULL,
        deliveries INTEGER NOT NULL,
        failures INTEGER NOT NULL,
        answered INTEGER NOT NULL,
        version INTEGER NOT NULL
    );
    CREATE INDEX waiting_due ON waiting (due_at);
    CREATE INDEX waiting_newer ON waiting (due_at) WHERE version <> 1;
    CREATE INDEX waiting_in_order ON waiting (
        failures, (CASE WHEN answered THEN 0 WHEN deliveries THEN 1 ELSE 2 END), due_at
    );
    CREATE TABLE outcome (
        id INTEGER PRIMARY KEY,
        outcome TEXT NOT NULL,
        body BLOB NOT NULL,
        decided_at REAL NOT NULL
    );
    CREATE TABLE reader (
        name TEXT PRIMARY KEY,
        owner TEXT NOT NULL,
        ready INTEGER NOT NULL
    );
    CREATE TABLE unread (
        reader TEXT NOT NULL,
        id INTEGER NOT NULL,
        due_at REAL NOT NULL,
        failures INTEGER NOT NULL,
        PRIMARY KEY (reader, id)
    ) WITHOUT ROWID;
    CREATE INDEX unread_due ON unread (reader, due_at);
    CREATE INDEX unread_outcome ON unread (id);
    """,
)
_REMOTE: Final = frozenset(
    {"9p", "afs", "ceph", "cifs", "fuse.sshfs", "lustre", "ncpfs", "nfs", "nfs4", "smb3", "smbfs"}
)
#: Errors of the system that may pass by themselves: a full disk, a disk that fails, too many open files.
_PASSING: Final = frozenset({errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOSPC})
_MOUNTS: Final = Path("/proc/self/mounts")
_LARGEST_LOG: Final = 16 << 20  # bytes that the log keeps after a long read of another program has made it grow


def connect(path: str, *, now: float) -> sqlite3.Connection:
    """Open the file. If there is none, make it, with its tables."""
    if path != MEMORY:
        _create(path)
        _check_owner(path)
    with broker_errors(path):
        # An absolute path is no URI, which some builds of SQLite read; the file that is opened is the one checked.
        place = path if path == MEMORY else os.path.abspath(path)  # noqa: PTH100  # keeps links
        connection = sqlite3.connect(place, timeout=0.0, isolation_level=None, check_same_thread=False)
        with ExitStack() as unprepared:
            unprepared.callback(connection.close)
            retry_while_busy(lambda: _prepare(connection, path, now))
            if path != MEMORY:
                _close_to_others(path)
            unprepared.pop_all()
    return connection


def _create(path: str) -> None:
    """Make the file for this user alone, if there is none; SQLite gives its log and its index the same mode."""
    if (remote := _remote_file_system(path)) is not None:
        raise BrokerError(
            f"{path} is on a file system of another machine ({remote}), where SQLite loses data: use a file on this "
            "machine's own disk"
        )
    try:
        if not Path(path).is_file():  # to close one here would end the locks of the other brokers of this process
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        may_pass = error.errno in _PASSING
        raise BrokerError(f"{path} cannot be opened for writing: {error.strerror}", may_pass=may_pass) from None


def _list_files(path: str) -> list[tuple[Path, os.stat_result]]:
    """Return the file and what SQLite reads beside it; none on Windows, whose owners and modes are others."""
    found: list[tuple[Path, os.stat_result]] = []
    real = os.path.realpath(path)  # as for SQLite: of a link, the others are beside the file that it names
    # SQLite writes what it finds in a journal into the file, also in WAL mode.
    for ending in ("", "-wal", "-shm", "-journal") if hasattr(os, "geteuid") else ():
        file = Path(f"{real}{ending}")
        with suppress(FileNotFoundError):  # the last process that closes the file removes the others
            found.append((file, file.lstat()))
    return found


def _check_owner(path: str) -> None:
    """Refuse what another user made, and so could write approvals into."""
    for file, found in _list_files(path):
        if found.st_uid != os.geteuid():
            raise BrokerError(
                f"{file} belongs to the user {found.st_uid}, and this process runs as the user {os.geteuid()}: run all "
                "processes that use the file as one user, or name another file"
            )


def _close_to_others(path: str) -> None:
    """Set the mode to 600 if others could use the file."""
    for file, found in _list_files(path):
        if found.st_mode & 0o077:
            try:
                file.chmod(found.st_mode & 0o600)
            except OSError as error:
                raise BrokerError(
                    f"{file} is open to other users, and its mode cannot be set to 600: {error.strerror}"
                ) from None
            facts = {"file": str(file), "mode": "600", "before": f"{stat.S_IMODE(found.st_mode):o}"}
            log(logging.WARNING, "broker.mode_changed", facts)


def _remote_file_system(path: str) -> str | None:
    """Return the type of the file system, if it is known to be another machine's."""
    try:
        mounts = [line.split()[1:3] for line in _MOUNTS.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError:  # not Linux
        return None
    folder = Path(path).resolve().parent
    places = [(len(place), kind) for place, kind in mounts if folder.is_relative_to(place.replace("\\040", " "))]
    kind = max(places, default=(0, ""))[1]
    return kind if kind in _REMOTE else None


def _prepare(connection: sqlite3.Connection, path: str, now: float) -> None:
    if path != MEMORY and (mode := connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]) != "wal":
        raise BrokerError(
            f"{path} cannot be shared by several processes here: its journal mode stays {mode!r}, not wal"
        )
    connection.execute(f"PRAGMA journal_size_limit = {_LARGEST_LOG}")
    connection.execute("BEGIN IMMEDIATE")
    with committing(connection):
        _migrate(connection, path, now)


@contextmanager
def committing(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit the transaction that has begun, or roll it back if the body raises anything."""
    try:
        yield
        connection.execute("COMMIT")
    finally:
        # Not after a COMMIT; and a full disk ends the transaction by itself.
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _migrate(connection: sqlite3.Connection, path: str, now: float) -> None:
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if "migration" not in tables:
        if tables:
            raise BrokerError(
                f"{path} is another application's database: the broker's file is its own, name another one"
            )
        connection.execute(
            "CREATE TABLE migration (version INTEGER PRIMARY KEY, oldest_worker INTEGER NOT NULL, "
            "applied_at REAL NOT NULL)"
        )
    with closing(connection.execute("SELECT max(version), max(oldest_worker) FROM migration")) as found:
        version, oldest_worker = found.fetchone()
    if oldest_worker is not None and oldest_worker > VERSION:
        raise BrokerError(f"{path} was upgraded by a later version of this library: upgrade this one, too")
    for number in range((version or 0) + 1, VERSION + 1):
        for statement in _MIGRATIONS[number - 1].split(";"):
            connection.execute(statement)
        connection.execute("INSERT INTO migration VALUES (?, ?, ?)", (number, 1, now))
