"""The statements that read and change the file. All of them run in one thread.

`execute` runs the calls of one turn of the event loop in one transaction. A change of many rows is one statement,
because another thread may hold Python's lock between two.
"""

from __future__ import annotations

import json
import os
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from aiokeyless._rules.order import Standing
from aiokeyless.errors import BrokerError
from aiokeyless.events import Inspection
from aiokeyless.models import Private
from aiokeyless.worker.broker import (
    LONGEST_PAUSE,
    MOST_UNREAD,
    Claim,
    ExchangeResult,
    NewRequest,
    UnreadOutcome,
    outcome_pause,
)
from aiokeyless.worker.tables import LONGEST_WAIT, Row, TableMessage, message_of

from .failures import broker_errors, retry_while_busy
from .schema import MEMORY, committing, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Most seconds for which a request is put off. A clock that was set back delays no request for longer.
MOST_PUT_OFF: Final = 200.0
_BODIES_KEPT: Final = 7 * 24 * 3600.0  # seconds after the decision
_CLEANED: Final = 1000  # rows in one transaction
#: Statements that remove a row, or a part of it, and after how many seconds since the decision.
_CLEANING: Final = (
    ("UPDATE request SET body = x'' WHERE id > ? AND id <= ? AND decided_at < ? AND body <> x''", _BODIES_KEPT),
    (
        """
        DELETE FROM outcome WHERE id > ? AND id <= ? AND decided_at < ?
        AND NOT EXISTS (SELECT 1 FROM unread WHERE unread.id = outcome.id)
        """,
        _BODIES_KEPT,
    ),
    (
        "DELETE FROM unread WHERE id > ? AND id <= ? AND id IN (SELECT id FROM outcome WHERE decided_at < ?)",
        LONGEST_WAIT,
    ),
    ("DELETE FROM outcome WHERE id > ? AND id <= ? AND decided_at < ?", LONGEST_WAIT),
    ("DELETE FROM request WHERE id > ? AND id <= ? AND decided_at < ?", LONGEST_WAIT),
)
#: Failures are counted up to this, on PostgreSQL too. Beyond it the backoff no longer grows, and the order of requests
#: needs few numbers.
_MOST_FAILURES: Final = 15
#: The requests of one number of failures and one `Standing`, by the index.
_RANKED: Final = (
    "SELECT id FROM waiting WHERE failures = ? AND (CASE WHEN answered THEN 0 WHEN deliveries THEN 1 ELSE 2 END) = ?"
    " AND due_at <= ? AND version <= ? ORDER BY due_at{} LIMIT ?"
)
_DUE: Final = "SELECT id FROM waiting WHERE due_at <= ? AND version <= ? ORDER BY due_at LIMIT ?"
#: By an index of their own: there are none as a rule, and no other index could tell without a scan of all that are due.
_NEWER: Final = "SELECT id FROM waiting WHERE version <> 1 AND due_at <= ? AND version > ? ORDER BY due_at LIMIT ?"
#: Requests of a later version of one take, at most, and seconds in which only workers that know it take one: the others
#: give it back, which must cost little.
_MOST_NEWER: Final = 10
_HEAD_START: Final = 1.0
#: The outcomes of a reader that an inspection looks at: the first ones by the index, nearly in order of the decisions.
_UNREAD: Final = (
    "SELECT {} FROM (SELECT id, failures FROM unread WHERE reader = ? ORDER BY id LIMIT ?) u"
    " JOIN outcome o ON o.id = u.id {}"
)
_HANDED_ON: Final = 30.0  # seconds after which an unhandled outcome is delivered again


class PutOff(NamedTuple):
    """A call that puts a request off: `Store.execute` takes many of them as one statement."""

    row: Row
    number: int
    delay: float
    result: ExchangeResult


class Unread(Private, msgspec.Struct, frozen=True):
    """An outcome that is delivered to a reader."""

    reader: str
    row: Row
    failures: int  # its deliveries, this one included
    data: bytes


class StoreCall(NamedTuple):
    """A call to execute in a transaction."""

    do: Callable[[Store], object]
    lasting: bool = False  # whether it must survive a power cut; times of polls need not


class Store:
    """The file. Its times are seconds since 1970."""

    def __init__(self, path: str, now: Callable[[], float], version: int) -> None:
        self._path = path
        self._now = now
        self._version = version  # the newest of requests that the workers know
        self._connection = connect(path, now=now())
        # The file, of which a link may change, and its log, which is beside the file that the link names.
        log_file = f"{os.path.realpath(path)}-wal"
        self._files = () if path == MEMORY else (os.path.abspath(path), log_file)  # noqa: PTH100  # keeps links
        self._inodes = _find_inodes(self._files)
        self._synchronous = ""

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def execute(self, calls: Sequence[StoreCall | PutOff]) -> list[Any]:
        """Execute calls in one transaction; return the result of each. If it raises, none of them was done."""
        with broker_errors(self._path):
            is_lasting = any(isinstance(call, StoreCall) and call.lasting for call in calls)
            self._set_synchronous("FULL" if is_lasting else "NORMAL")
            retry_while_busy(lambda: self._connection.execute("BEGIN IMMEDIATE"))
            with committing(self._connection):
                self._put_off([call for call in calls if isinstance(call, PutOff)])
                results = [call.do(self) if isinstance(call, StoreCall) else None for call in calls]
                if is_lasting:
                    self._check_files()
                return results

    def _check_files(self) -> None:
        """Raise if the file or its log is not the one that was opened: no other process would see what is stored."""
        if _find_inodes(self._files) != self._inodes:
            raise BrokerError(
                f"{self._path}, or its log {self._path}-wal, was removed or replaced while it was in use, which may "
                "lose requests: stop all processes that use it, and start them again"
            )

    def _set_synchronous(self, mode: str) -> None:
        if mode != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = mode

    def _one(self, statement: str, *values: object) -> tuple[Any, ...]:
        """Return the only row of a statement that always has one; it may hold None."""
        row: tuple[Any, ...] = self._connection.execute(statement, values).fetchone()
        return row

    def _time(self, statement: str, *values: object) -> float | None:
        """Return the time in the only row of a statement that is in no transaction; None if there is none."""
        with broker_errors(self._path):
            (found,) = retry_while_busy(lambda: self._one(statement, *values))
        return None if found is None else float(found)

    # -- for applications

    def submit(self, new: NewRequest) -> bool | None:
        """Store a request. Return whether it was stored already, or None if another one has its operation id."""
        request, now = new.request, self._now()
        found = self._connection.execute(
            "SELECT content_sha256 FROM request WHERE operation_id = ?", (request.operation_id,)
        ).fetchone()
        if found is not None:
            return True if found[0] == new.digest else None
        asked_at = now if request.created_at is None else min(now, request.created_at.timestamp())
        expires_at = asked_at + min(request.expires_in, LONGEST_WAIT)
        self._connection.execute(
            "INSERT INTO request (operation_id, content_sha256, body, traceparent, requested_at, expires_at, stored_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (request.operation_id, new.digest, new.body, new.traceparent, asked_at, expires_at, now),
        )
        self._connection.execute(
            "INSERT INTO waiting SELECT id, name, ?, 0, 0, 0, ? FROM request WHERE id = last_insert_rowid()",
            (now, request.version),
        )
        return False

    def next_unread(self, reader: str) -> float | None:
        """Return when an outcome is due for a reader; None if there is none. A new reader is due at once."""
        return self._time(
            "SELECT CASE WHEN EXISTS (SELECT 1 FROM reader WHERE name = ?)"
            " THEN (SELECT min(due_at) FROM unread WHERE reader = ?) ELSE 0 END",
            reader,
            reader,
        )

    def take_unread(self, reader: str) -> Unread | None:
        """Take the outcome that has been due longest; None if none is due. To a new reader, all are unread."""
        now = self._now()
        if self._connection.execute("INSERT OR IGNORE INTO reader VALUES (?, '', 1)", (reader,)).rowcount:
            self._connection.execute("INSERT INTO unread SELECT ?, id, ?, 0 FROM outcome", (reader, now))
        found = self._connection.execute(
            "SELECT r.id, r.name, u.failures, o.body"
            " FROM unread u JOIN outcome o ON o.id = u.id JOIN request r ON r.id = u.id"
            " WHERE u.reader = ? AND u.due_at <= ? ORDER BY u.due_at, u.id LIMIT 1",
            (reader, now),
        ).fetchone()
        if found is None:
            return None
        id_, name, failures, data = found
        self._connection.execute(
            "UPDATE unread SET due_at = ?, failures = ? WHERE reader = ? AND id = ?",
            (now + max(_HANDED_ON, outcome_pause(failures + 1)), failures + 1, reader, id_),
        )
        return Unread(reader, Row(id_, name), failures + 1, data)

    def forget_unread(self, unread: Unread) -> None:
        """Forget an outcome that the reader has handled."""
        self._connection.execute(
            "DELETE FROM unread WHERE reader = ? AND id = (SELECT id FROM request WHERE id = ? AND name = ?)",
            (unread.reader, *unread.row),
        )

    def put_off_unread(self, unread: Unread, delay: float | None) -> None:
        """Put an outcome off, unless another process of the reader has it by now."""
        due_at = self._now() + (outcome_pause(unread.failures) if delay is None else delay)
        self._connection.execute(
            "UPDATE unread SET due_at = ? WHERE reader = ?"
            " AND id = (SELECT id FROM request WHERE id = ? AND name = ?) AND failures = ?",
            (due_at, unread.reader, *unread.row, unread.failures),
        )

    # -- for workers

    def next_due(self) -> float | None:
        """Return when a request is due for these workers; None if none waits."""
        return self._time(
            "SELECT min(due_at) FROM (SELECT min(due_at) due_at FROM waiting WHERE version <= ?1"
            " UNION ALL SELECT min(due_at) + ?2 FROM waiting WHERE version <> 1 AND version > ?1)",
            self._version,
            _HEAD_START,
        )

    def take(self, up_to: int, lease: float, *, untried: int | None) -> list[TableMessage]:
        """Take requests that are due, and beside them a few of a later version."""
        newer = self._ids(_NEWER, self._now() - _HEAD_START, self._version, _MOST_NEWER)
        return self._deliver(
            [*newer, *(self._due(up_to) if untried is None else self._by_order(up_to, untried))], lease
        )

    def _due(self, up_to: int) -> list[int]:
        return self._ids(_DUE, self._now(), self._version, up_to)

    def _by_order(self, up_to: int, untried: int) -> list[int]:
        """Return those with the fewest failures. One search of the index for each number avoids a sort of thousands."""
        newest = self._ids(_RANKED.format(" DESC"), 0, Standing.UNTRIED, self._now(), self._version, up_to)
        chosen, rest = newest[:untried], newest[untried:]
        failures = self._one("SELECT min(failures) FROM waiting")[0]
        while failures is not None and len(chosen) < up_to:
            for standing, order in ((Standing.ANSWERED, ""), (Standing.CREATED, " DESC")):
                ranked = failures, standing, self._now(), self._version, up_to - len(chosen)
                chosen += self._ids(_RANKED.format(order), *ranked)
            chosen, rest = [*chosen, *rest][:up_to], []  # which have no failures
            failures = self._one("SELECT min(failures) FROM waiting WHERE failures > ?", failures)[0]
        return chosen

    def take_overdue(self, up_to: int, lease: float, grace: float) -> list[TableMessage]:
        """Take requests that are due and whose time is over."""
        now = self._now()
        overdue = self._ids(
            "SELECT r.id FROM request r JOIN waiting w ON w.id = r.id"
            " WHERE r.decided_at IS NULL AND r.expires_at <= ? AND w.due_at <= ? AND w.version <= ?"
            " ORDER BY r.expires_at LIMIT ?",
            now - grace,
            now,
            self._version,
            up_to,
        )
        return self._deliver(overdue, lease)

    def _ids(self, statement: str, *values: object) -> list[int]:
        return [id_ for (id_,) in self._connection.execute(statement, values).fetchall()]

    def _deliver(self, ids: list[int], lease: float) -> list[TableMessage]:
        """Deliver requests, and make them due again after the lease."""
        if not ids:
            return []
        chosen = json.dumps(ids)
        self._connection.execute(
            "UPDATE waiting SET deliveries = deliveries + 1, due_at = ? WHERE id IN (SELECT value FROM json_each(?))",
            (self._now() + lease, chosen),
        )
        found = self._connection.execute(
            "SELECT r.id, r.name, r.body, r.traceparent, r.stored_at, w.deliveries, w.failures FROM json_each(?) j"
            " JOIN request r ON r.id = j.value JOIN waiting w ON w.id = r.id ORDER BY j.key",
            (chosen,),
        )
        return [message_of(row) for row in found.fetchall()]

    def _put_off(self, calls: list[PutOff]) -> None:
        """Deliver requests again later, unless they have been delivered again already. See `ExchangeResult`."""
        now = self._now()
        rows = [(*row, number, now + min(delay, MOST_PUT_OFF), result) for row, number, delay, result in calls]
        self._connection.execute(
            "REPLACE INTO waiting SELECT w.id, w.name, json_extract(j.value, '$[3]'),"
            " w.deliveries - (json_extract(j.value, '$[4]') = :none),"
            " CASE json_extract(j.value, '$[4]')"
            " WHEN :failed THEN min(w.failures + 1, :most_failures) WHEN :none THEN w.failures ELSE 0 END,"
            " w.answered OR json_extract(j.value, '$[4]') = :answered, w.version"
            " FROM json_each(:rows) j JOIN waiting w ON w.id = json_extract(j.value, '$[0]')"
            " WHERE w.name = json_extract(j.value, '$[1]') AND w.deliveries = json_extract(j.value, '$[2]')",
            {
                "answered": ExchangeResult.ANSWERED,
                "failed": ExchangeResult.FAILED,
                "none": ExchangeResult.NONE,
                "most_failures": _MOST_FAILURES,
                "rows": json.dumps(rows),
            },
        )

    def decide(self, row: Row, outcome: str, data: bytes) -> bool:
        """Store an outcome for each reader, and remove its request from the waiting ones."""
        now, id_ = self._now(), row.id
        self._connection.execute("DELETE FROM waiting WHERE id = ? AND name = ?", row)
        decided = self._connection.execute(
            "UPDATE request SET decided_at = ? WHERE id = ? AND name = ? AND decided_at IS NULL", (now, *row)
        ).rowcount
        if not decided:
            return False
        self._connection.execute("INSERT INTO outcome VALUES (?, ?, ?, ?)", (id_, outcome, data, now))
        self._connection.execute("INSERT INTO unread SELECT name, ?, ?, 0 FROM reader", (id_, now))
        return True

    def claim(self, row: Row, number: int) -> Claim:
        """Note that a delivery is about to ask the user; the operation id is its request's, until that is decided."""
        found = self._connection.execute(
            "SELECT asked IS NOT NULL FROM request WHERE id = ? AND name = ? AND decided_at IS NULL", row
        ).fetchone()
        if found is None:
            return Claim.ANOTHERS
        self._connection.execute("UPDATE request SET asked = ? WHERE id = ?", (number, row.id))
        return Claim.HELD if found[0] else Claim.NEW

    def was_asked(self, row: Row) -> bool:
        """Return whether the user may have been asked."""
        return bool(self._one("SELECT count(*) FROM request WHERE id = ? AND name = ? AND asked IS NOT NULL", *row)[0])

    def unclaim(self, row: Row, number: int) -> bool:
        """Take back the note of a delivery."""
        changed = self._connection.execute(
            "UPDATE request SET asked = NULL WHERE id = ? AND name = ? AND asked = ?", (*row, number)
        )
        return changed.rowcount > 0

    # -- housekeeping

    def serve(self, service: str) -> str:
        """Record the service of the first worker that names one, and return it."""
        self._connection.execute("INSERT OR IGNORE INTO service VALUES (1, ?)", (service,))
        stored: str = self._one("SELECT base_url FROM service")[0]
        return stored

    def repair(self, lease: float) -> None:
        """Make requests and outcomes due that are put off for too long, because the clock was set back."""
        now = self._now()
        self._connection.execute(
            "UPDATE waiting SET due_at = ? WHERE due_at > ?", (now, now + max(MOST_PUT_OFF, lease))
        )
        self._connection.execute("UPDATE unread SET due_at = ? WHERE due_at > ?", (now, now + LONGEST_PAUSE))

    def clean(self, after: int) -> int | None:
        """Remove old data from a page of rows. Return the last row of the page, or None at the end."""
        last = self._one(
            "SELECT max(id) FROM (SELECT id FROM request WHERE id > ? ORDER BY id LIMIT ?)", after, _CLEANED
        )
        page, now = (after, last[0]), self._now()
        for statement, kept in _CLEANING:
            self._connection.execute(statement, (*page, now - kept))
        found: int | None = last[0]
        return found

    def inspect(self) -> Inspection:
        """Return the state of the fleet."""
        self._check_files()
        with broker_errors(self._path):
            waiting, backlog, oldest = retry_while_busy(
                lambda: self._one(
                    "SELECT count(*), sum(w.deliveries = 0), min(r.stored_at)"
                    " FROM waiting w JOIN request r ON r.id = w.id"
                )
            )
        unread = self._of_readers(_UNREAD.format("count(*), min(o.decided_at)", ""))
        return Inspection(
            waiting=waiting,
            backlog=backlog or 0,
            oldest_age=self._age(oldest),
            unread={reader: count for reader, count, _ in unread},
            oldest_unread_age={reader: self._age(oldest) for reader, _, oldest in unread},
        )

    def list_unread(self, up_to: int) -> list[UnreadOutcome]:
        """Return the oldest of the unread outcomes that `inspect` counts."""
        found = self._of_readers(
            _UNREAD.format(
                "o.decided_at, r.operation_id, u.failures",
                "JOIN request r ON r.id = o.id ORDER BY o.decided_at, o.id LIMIT ?",
            ),
            up_to,
        )
        oldest = sorted(found, key=itemgetter(1))[:up_to]
        return [
            UnreadOutcome(reader, operation_id, self._age(decided_at), failures)
            for reader, decided_at, operation_id, failures in oldest
        ]

    def _of_readers(self, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a statement about each reader, after the reader's name."""

        def read() -> list[tuple[Any, ...]]:
            readers = self._connection.execute("SELECT name FROM reader ORDER BY name").fetchall()
            return [
                (reader, *row)
                for (reader,) in readers
                for row in self._connection.execute(statement, (reader, MOST_UNREAD, *values)).fetchall()
            ]

        with broker_errors(self._path):
            return retry_while_busy(read)

    def _age(self, since: float | None) -> float:
        return 0.0 if since is None else max(0.0, self._now() - since)


def _find_inodes(files: tuple[str, ...]) -> list[int] | None:
    """Return the numbers of files; None if one is not there."""
    try:
        return [Path(file).stat().st_ino for file in files]
    except OSError:
        return None
