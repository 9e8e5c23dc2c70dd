"""The attempts to authenticate of a sandbox's users: what Telemetry remembers of them, and who is locked out.

Nothing here depends on HTTP or on the event loop.

Source: Keyless documentation, Server API / Telemetry, and the SDK's pages "Error handling" and "Lockout policy".
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from aiokeyless.models import Authentication

CANCELLED: Final = 30003
MISMATCH: Final = 30004
LOCKED_OUT: Final = 30007

MEMORY: Final = 600.0
"""Seconds for which Telemetry remembers an attempt."""

LOCKOUT: Final = 600.0
"""Seconds for which a user is locked out; the service's default is 300 to 600."""

MOST_FAILURES: Final = 5
"""Failed attempts in a row after which a user is locked out."""

_PAGE_SIZE: Final = 20
_USER_CODES: Final = 30_000  # from here on, an error is the user's: others lock nobody out


class Attempt(NamedTuple):
    """One attempt, whose it was, and when, on the log's clock."""

    at: float
    user_id: str
    external_user_id: str | None
    authentication: Authentication


class AttemptLog:
    """The attempts of the last ten minutes, and the lockouts of all users.

    Args:
        clock: Returns seconds; its zero is arbitrary.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._all: deque[Attempt] = deque()
        # Indexed, so that one user's answer costs its own size only; empty for a user who is known and made none.
        self._by_user: dict[str, deque[Attempt]] = {}
        self._by_external_user: dict[str, deque[Attempt]] = {}
        self._failures: dict[str, int] = {}  # in a row, by user
        self._locked_until: dict[str, float] = {}

    def know(self, user_id: str, external_user_id: str | None) -> None:
        """Make a user known, so that Telemetry does not answer 404 about them."""
        self._by_user.setdefault(user_id, deque())
        if external_user_id:
            self._by_external_user.setdefault(external_user_id, deque())

    def knows(self, user_id: str) -> bool:
        """Whether a user is known."""
        return user_id in self._by_user

    def add(self, user_id: str, external_user_id: str | None, authentication: Authentication) -> None:
        """Remember an attempt; the fifth failure in a row locks the user out, and a success ends the row."""
        now = self._clock()
        self._forget_old(now)
        attempt = Attempt(now, user_id, external_user_id, authentication)
        self._all.append(attempt)
        self.know(user_id, external_user_id)
        for attempts in self._indexes(attempt):
            attempts.append(attempt)
        code = authentication.error_code or 0
        if code == 0:
            self._failures.pop(user_id, None)
        elif code >= _USER_CODES and code not in {CANCELLED, LOCKED_OUT}:
            failures = self._failures[user_id] = self._failures.get(user_id, 0) + 1
            if failures >= MOST_FAILURES:
                del self._failures[user_id]
                self._locked_until[user_id] = now + LOCKOUT

    def locked_for(self, user_id: str) -> float:
        """Return the seconds for which a user is still locked out; 0.0 if they are not."""
        left = self._locked_until.get(user_id, -math.inf) - self._clock()
        if left > 0.0:
            return left
        self._locked_until.pop(user_id, None)
        return 0.0

    def unlock(self, user_id: str) -> None:
        """End a user's lockout, and the row of failures that leads to one."""
        self._locked_until.pop(user_id, None)
        self._failures.pop(user_id, None)

    def recent(self) -> list[Authentication]:
        """Return all users' attempts of the last ten minutes, oldest first."""
        self._forget_old(self._clock())
        return [attempt.authentication for attempt in self._all]

    def of_user(self, user_id: str) -> list[Authentication] | None:
        """Return a user's attempts of the last ten minutes, oldest first; None if there is no such user."""
        return self._of(self._by_user.get(user_id))

    def of_external_user(self, external_user_id: str) -> list[Authentication] | None:
        """Return the attempts of the user whom the customer calls so; None if there is no such user."""
        return self._of(self._by_external_user.get(external_user_id))

    def _of(self, attempts: deque[Attempt] | None) -> list[Authentication] | None:
        self._forget_old(self._clock())
        return None if attempts is None else [attempt.authentication for attempt in attempts]

    def _forget_old(self, now: float) -> None:
        while self._all and now - self._all[0].at > MEMORY:
            for attempts in self._indexes(self._all.popleft()):
                attempts.popleft()  # the oldest of all is the oldest of its user

    def _indexes(self, attempt: Attempt) -> Iterable[deque[Attempt]]:
        yield self._by_user[attempt.user_id]
        if attempt.external_user_id:
            yield self._by_external_user[attempt.external_user_id]


def telemetry_json(owner: dict[str, str], attempts: Iterable[Authentication], operation_id: str | None) -> bytes:
    """Return the body of Telemetry's answer: its first page, the newest attempt first.

    The documentation does not say what is counted as an element, nor the order; a page of 20 that starts with the
    newest is what a reader of the first page would hope for, so clients must not rely on it.

    Args:
        owner: The user's id under its name on the wire.
        attempts: The user's attempts, oldest first.
        operation_id: The operation whose attempts are asked for; None for all.
    """
    found = [each for each in attempts if operation_id is None or each.operation_id == operation_id]
    page = {
        "number": 0,
        "size": _PAGE_SIZE,
        "totalElements": len(found),
        "totalPages": math.ceil(len(found) / _PAGE_SIZE),
    }
    shown = [attempt_fields(each) for each in reversed(found[-_PAGE_SIZE:])]
    return msgspec.json.encode({"page": page, "content": [{**owner, "authentications": shown}]})


def attempt_fields(attempt: Authentication) -> dict[str, object]:
    """Return an attempt under its names on the wire."""
    # Spelt out, not derived from models.py: otherwise a misspelt name there would go unnoticed.
    return {
        "createdAt": attempt.created_at,
        "result": attempt.result,
        "errorCode": attempt.error_code,
        "operationId": attempt.operation_id,
        "deviceId": attempt.device_id,
        "authType": attempt.auth_type,
    }
