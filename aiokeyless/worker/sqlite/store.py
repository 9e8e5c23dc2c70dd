"""What is stored in the file, and the statements that read and change it. All of it runs in one thread.

The methods take the calls of one turn of the event loop, and return a result for each. `execute` runs them in one
transaction. A statement for many rows is one statement: another thread may hold Python's lock between two.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from aiokeyless.errors import BrokerError, InvalidRequestError
from aiokeyless.events import Inspection
from aiokeyless.worker.broker import (
    FIRST_PAUSE,
    LONGEST_PAUSE,
    Claim,
    Claimed,
    Exchange,
    Message,
    NewRequest,
)

from .failures import broker_errors, retried
from .schema import MEMORY, connect

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokeyless.worker.messages import ApprovalEvent

#: Seconds that a request is put off for, at most: a clock that was set back holds up nothing for longer.
MOST_PUT_OFF: Final = 200.0
#: Seconds that a request may be waited for: for as long as its row is kept.
LONGEST_WAIT: Final = 400 * 24 * 3600.0
_BODIES_KEPT: Final = 7 * 24 * 3600.0  # seconds after the decision
_CLEANED: Final = 1000  # rows in one transaction
#: What removes a row, or a part of it, so many seconds after the decision.
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
_MOST_FAILURES: Final = 15  # that are counted: the backoff does not grow any more, and the order of probes needs few
#: Of those with as many failures: the ones that were answered, and then the ones that were never tried. Of these the
#: newest first: if many bad ones came at once, before the circuit opened, good ones do not wait behind them.
_PROVEN: Final = (
    "SELECT id FROM waiting WHERE failures = ? AND (deliveries = 0) = 0 AND due_at <= ? ORDER BY due_at LIMIT ?"
)
_UNTRIED: Final = (
    "SELECT id FROM waiting WHERE failures = ? AND (deliveries = 0) = 1 AND due_at <= ? ORDER BY due_at DESC LIMIT ?"
)
_HANDED_ON: Final = 30.0  # seconds that a reader has for an outcome, until it is delivered again


class SqliteMessage(Message):
    """One delivery of a request; ``id`` is its row."""

    __slots__ = ("id",)

    def __init__(
        self, id_: int, *, body: bytes, stored_at: float, number: int, failures: int, traceparent: str | None
    ) -> None:
        super().__init__(
            body=body,
            name=f"request-{id_}",
            stored_at=_time(stored_at),
            number=number,
            failures=failures,
            traceparent=traceparent,
        )
        self.id: int = id_


class Take(NamedTuple):
    """A call of `Store.take`: how many, for how long they are this worker's, in which order."""

    up_to: int
    lease: float
    probing: bool


class Overdue(NamedTuple):
    """A call of `Store.take_overdue`."""

    up_to: int
    lease: float
    grace: float


class PutOff(NamedTuple):
    """A call of `Store.put_off`."""

    id: int
    number: int
    delay: float
    exchange: Exchange


class Decide(NamedTuple):
    """A call of `Store.decide`."""

    id: int
    event: ApprovalEvent
    data: bytes


class Unread(NamedTuple):
    """An outcome that a reader has not handled.

    Attributes:
        reader: The reader.
        id: The request's row.
        failures: How often it was delivered.
        data: The event.
    """

    reader: str
    id: int
    failures: int
    data: bytes


class Call(NamedTuple):
    """What is to be done in a transaction.

    Attributes:
        method: One of the store's, which takes the arguments of several calls.
        argument: That of this call.
        lasting: Whether it is a promise, and must survive a power cut; pacing need not.
    """

    method: Callable[[list[Any]], Sequence[Any]]
    argument: object
    lasting: bool


class Store:
    """The file.

    Args:
        path: The file, or ``:memory:``.
        now: The time, in seconds since 1970.
    """

    def __init__(self, path: str, now: Callable[[], float]) -> None:
        self._path = path
        self._now = now
        self._connection = connect(path, now=now())
        self._inode = None if path == MEMORY else Path(path).stat().st_ino
        self._synchronous = ""

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def execute(self, calls: list[Call]) -> list[Any]:
        """Execute calls in one transaction, those of one method together.

        Raises:
            UnavailableError: Nothing of it was done, and may be done later.
            BrokerError: The file cannot be used.
        """
        with broker_errors(self._path):
            self._set_synchronous("FULL" if any(call.lasting for call in calls) else "NORMAL")
            retried(lambda: self._connection.execute("BEGIN IMMEDIATE"))
            try:
                results = self._executed(calls)
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # a full disk has ended it by itself
                    self._connection.execute("ROLLBACK")
                raise
            return results

    def _executed(self, calls: list[Call]) -> list[Any]:
        methods: dict[Callable[[list[Any]], Sequence[Any]], list[int]] = {}
        for place, call in enumerate(calls):
            methods.setdefault(call.method, []).append(place)
        results: list[Any] = [None] * len(calls)
        for method, places in methods.items():
            answers = method([calls[place].argument for place in places])
            for place, answer in zip(places, answers, strict=True):
                results[place] = answer
        return results

    def _set_synchronous(self, mode: str) -> None:
        if mode != self._synchronous:
            self._connection.execute(f"PRAGMA synchronous = {mode}")
            self._synchronous = mode

    def _one(self, statement: str, *values: object) -> tuple[Any, ...]:
        """Return the one row of a statement that always has one, or None in it."""
        row: tuple[Any, ...] = self._connection.execute(statement, values).fetchone()
        return row

    # -- for applications

    def submit(self, calls: list[NewRequest]) -> list[bool | InvalidRequestError]:
        """Store requests; return for each whether it was stored already."""
        return [self._submit(new) for new in calls]

    def _submit(self, new: NewRequest) -> bool | InvalidRequestError:
        request, now = new.request, self._now()
        found = self._connection.execute(
            "SELECT content_sha256 FROM request WHERE operation_id = ?", (request.operation_id,)
        ).fetchone()
        if found is not None:
            if found[0] == new.digest:
                return True
            return InvalidRequestError(
                f"operation_id {request.operation_id!r} belongs to a different request: choose a new one"
            )
        asked_at = now if request.created_at is None else min(now, request.created_at.timestamp())
        expires_at = asked_at + min(request.expires_in, LONGEST_WAIT)
        self._connection.execute(
            "INSERT INTO request (operation_id, content_sha256, body, traceparent, requested_at, expires_at, stored_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?)",
            (request.operation_id, new.digest, new.body, new.traceparent, asked_at, expires_at, now),
        )
        self._connection.execute("INSERT INTO waiting VALUES (last_insert_rowid(), ?, 0, 0)", (now,))
        return False

    def add_reader(self, calls: list[str]) -> list[None]:
        """Add readers, for whom all outcomes that are stored are unread."""
        for name in calls:
            added = self._connection.execute("INSERT OR IGNORE INTO reader VALUES (?, '', 1)", (name,)).rowcount
            if added:
                self._connection.execute("INSERT INTO unread SELECT ?, id, ?, 0 FROM outcome", (name, self._now()))
        return [None] * len(calls)

    def next_unread(self, reader: str) -> float | None:
        """Return when an outcome is due for a reader; None if there is none."""
        with broker_errors(self._path):
            (due_at,) = retried(lambda: self._one("SELECT min(due_at) FROM unread WHERE reader = ?", reader))
        return None if due_at is None else float(due_at)

    def take_unread(self, calls: list[str]) -> list[Unread | None]:
        """Take the outcome of each reader that is due longest; None where none is due."""
        return [self._take_unread(reader) for reader in calls]

    def _take_unread(self, reader: str) -> Unread | None:
        now = self._now()
        found = self._connection.execute(
            "SELECT u.id, u.failures, o.body FROM unread u JOIN outcome o ON o.id = u.id"
            " WHERE u.reader = ? AND u.due_at <= ? ORDER BY u.due_at, u.id LIMIT 1",
            (reader, now),
        ).fetchone()
        if found is None:
            return None
        id_, failures, data = found
        self._connection.execute(
            "UPDATE unread SET due_at = ?, failures = ? WHERE reader = ? AND id = ?",
            (now + max(_HANDED_ON, _pause(failures + 1)), failures + 1, reader, id_),
        )
        return Unread(reader, id_, failures + 1, data)

    def handled(self, calls: list[Unread]) -> list[None]:
        """Forget outcomes that readers have handled."""
        self._connection.executemany(
            "DELETE FROM unread WHERE reader = ? AND id = ?", [(call.reader, call.id) for call in calls]
        )
        return [None] * len(calls)

    def put_off_unread(self, calls: list[tuple[Unread, float | None]]) -> list[None]:
        """Put outcomes off that readers have not handled, unless another process of the reader has them by now."""
        now = self._now()
        self._connection.executemany(
            "UPDATE unread SET due_at = ? WHERE reader = ? AND id = ? AND failures = ?",
            [
                (now + (_pause(unread.failures) if delay is None else delay), unread.reader, unread.id, unread.failures)
                for unread, delay in calls
            ],
        )
        return [None] * len(calls)

    # -- for workers

    def next_due(self) -> float | None:
        """Return when a request is due; None if none waits."""
        with broker_errors(self._path):
            (due_at,) = retried(lambda: self._one("SELECT min(due_at) FROM waiting"))
        return None if due_at is None else float(due_at)

    def take(self, calls: list[Take]) -> list[list[SqliteMessage]]:
        """Take requests that are due."""
        return [self._leased(self._probes(call) if call.probing else self._due(call), call.lease) for call in calls]

    def _due(self, call: Take) -> list[int]:
        found = self._connection.execute(
            "SELECT id FROM waiting WHERE due_at <= ? ORDER BY due_at LIMIT ?", (self._now(), call.up_to)
        )
        return [id_ for (id_,) in found.fetchall()]

    def _probes(self, call: Take) -> list[int]:
        """Return what to probe with: a search of the index for each number of failures sorts no thousands."""
        chosen: list[int] = []
        failures = self._one("SELECT min(failures) FROM waiting")[0]
        while failures is not None and len(chosen) < call.up_to:
            for statement in (_PROVEN, _UNTRIED):
                found = self._connection.execute(statement, (failures, self._now(), call.up_to - len(chosen)))
                chosen += [id_ for (id_,) in found.fetchall()]
            failures = self._one("SELECT min(failures) FROM waiting WHERE failures > ?", failures)[0]
        return chosen

    def take_overdue(self, calls: list[Overdue]) -> list[list[SqliteMessage]]:
        """Take requests that are due and whose time is over."""
        return [self._leased(self._overdue(call), call.lease) for call in calls]

    def _overdue(self, call: Overdue) -> list[int]:
        now = self._now()
        found = self._connection.execute(
            "SELECT r.id FROM request r JOIN waiting w ON w.id = r.id"
            " WHERE r.decided_at IS NULL AND r.expires_at <= ? AND w.due_at <= ? ORDER BY r.expires_at LIMIT ?",
            (now - call.grace, now, call.up_to),
        )
        return [id_ for (id_,) in found.fetchall()]

    def _leased(self, ids: list[int], lease: float) -> list[SqliteMessage]:
        """Deliver requests, and have them due again after the lease."""
        if not ids:
            return []
        chosen = json.dumps(ids)
        self._connection.execute(
            "UPDATE waiting SET deliveries = deliveries + 1, due_at = ? WHERE id IN (SELECT value FROM json_each(?))",
            (self._now() + lease, chosen),
        )
        found = self._connection.execute(
            "SELECT r.id, r.body, r.stored_at, r.traceparent, w.deliveries, w.failures FROM json_each(?) j"
            " JOIN request r ON r.id = j.value JOIN waiting w ON w.id = r.id ORDER BY j.key",
            (chosen,),
        )
        return [
            SqliteMessage(
                id_, body=body, stored_at=stored_at, number=number, failures=failures, traceparent=traceparent
            )
            for id_, body, stored_at, traceparent, number, failures in found.fetchall()
        ]

    def put_off(self, calls: list[PutOff]) -> list[None]:
        """Deliver requests again later, unless they were delivered once more by now."""
        now = self._now()
        rows = [
            (
                call.id,
                call.number,
                now + min(call.delay, MOST_PUT_OFF),
                call.exchange is Exchange.NONE,
                call.exchange is Exchange.FAILED,
            )
            for call in calls
        ]
        self._connection.execute(
            "REPLACE INTO waiting SELECT w.id, json_extract(j.value, '$[2]'),"
            " w.deliveries - json_extract(j.value, '$[3]'),"
            " CASE WHEN json_extract(j.value, '$[3]') THEN w.failures"
            " WHEN json_extract(j.value, '$[4]') THEN min(w.failures + 1, ?) ELSE 0 END"
            " FROM json_each(?) j JOIN waiting w ON w.id = json_extract(j.value, '$[0]')"
            " WHERE w.deliveries = json_extract(j.value, '$[1]')",
            (_MOST_FAILURES, json.dumps(rows)),
        )
        return [None] * len(calls)

    def decide(self, calls: list[Decide]) -> list[bool]:
        """Store outcomes, for each reader, and remove their requests from those that wait."""
        return [self._decide(call) for call in calls]

    def _decide(self, call: Decide) -> bool:
        now = self._now()
        self._connection.execute("DELETE FROM waiting WHERE id = ?", (call.id,))
        decided = self._connection.execute(
            "UPDATE request SET decided_at = ? WHERE id = ? AND decided_at IS NULL", (now, call.id)
        ).rowcount
        if not decided:
            return False
        self._connection.execute(
            "INSERT INTO outcome VALUES (?, ?, ?, ?)", (call.id, call.event.outcome.value, call.data, now)
        )
        self._connection.execute("INSERT INTO unread SELECT name, ?, ?, 0 FROM reader", (call.id, now))
        return True

    def claim(self, calls: list[SqliteMessage]) -> list[Claimed]:
        """Note that deliveries are about to ask the users; the operation ids are theirs."""
        return [self._claim(message) for message in calls]

    def _claim(self, message: SqliteMessage) -> Claimed:
        was_asked = self._asked(message.id) is not None
        self._connection.execute("UPDATE request SET asked = ? WHERE id = ?", (message.number, message.id))
        return Claimed(Claim.HELD if was_asked else Claim.NEW, message.number)

    def holds(self, calls: list[int]) -> list[bool]:
        """Return of requests whether their users may have been asked."""
        return [self._asked(id_) is not None for id_ in calls]

    def _asked(self, id_: int) -> int | None:
        found: tuple[int | None] | None = self._connection.execute(
            "SELECT asked FROM request WHERE id = ?", (id_,)
        ).fetchone()
        return None if found is None else found[0]

    def unclaim(self, calls: list[tuple[int, int]]) -> list[bool]:
        """Take back the notes of deliveries, by row and token."""
        return [
            self._connection.execute("UPDATE request SET asked = NULL WHERE id = ? AND asked = ?", call).rowcount > 0
            for call in calls
        ]

    # -- housekeeping

    def repair(self, calls: list[float]) -> list[None]:
        """Have due at once what is due in a longer time than anything is put off for: the clock was set back.

        Args:
            calls: The leases of workers.
        """
        now = self._now()
        self._connection.execute(
            "UPDATE waiting SET due_at = ? WHERE due_at > ?", (now, now + max(MOST_PUT_OFF, *calls))
        )
        self._connection.execute("UPDATE unread SET due_at = ? WHERE due_at > ?", (now, now + LONGEST_PAUSE))
        return [None] * len(calls)

    def clean(self, calls: list[int]) -> list[int | None]:
        """Remove what nobody needs any more, in some rows; return after which row to go on, or None at the end."""
        return [self._clean(after) for after in calls]

    def _clean(self, after: int) -> int | None:
        last = self._one(
            "SELECT max(id) FROM (SELECT id FROM request WHERE id > ? ORDER BY id LIMIT ?)", after, _CLEANED
        )
        page, now = (after, last[0]), self._now()
        for statement, kept in _CLEANING:
            self._connection.execute(statement, (*page, now - kept))
        found: int | None = last[0]
        return found

    def inspect(self) -> Inspection:
        """Return how the workers fare.

        Raises:
            BrokerError: The file is gone.
        """
        if self._inode is not None and not _is_there(self._path, self._inode):
            raise BrokerError(f"{self._path} was removed or replaced while it was in use: start the worker again")
        with broker_errors(self._path):
            waiting, backlog, oldest = retried(
                lambda: self._one(
                    "SELECT count(*), sum(w.deliveries = 0), min(r.stored_at)"
                    " FROM waiting w JOIN request r ON r.id = w.id"
                )
            )
        age = 0.0 if oldest is None else max(0.0, self._now() - oldest)
        return Inspection(waiting=waiting, backlog=backlog or 0, oldest_age=age)


def _is_there(path: str, inode: int) -> bool:
    try:
        return Path(path).stat().st_ino == inode
    except OSError:
        return False


def _time(seconds: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)


def _pause(failures: int) -> float:
    """Return for how long an outcome is put off that was delivered so often."""
    return float(min(FIRST_PAUSE * 2.0 ** (failures - 1), LONGEST_PAUSE))
