"""The users' attempts to authenticate, as Telemetry reports them, and the lockouts that follow failures.

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
"""Seconds for which a user is locked out: the service's default."""

MOST_FAILURES: Final = 5
"""Failed attempts in a row after which a user is locked out."""

_PAGE_SIZE: Final = 20

#: The smallest error code of a user's own failure. Only such failures lock a user out.
_FIRST_USER_CODE: Final = 30_000


class Attempt(NamedTuple):
    """One attempt, its user, and its time by the log's clock."""

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
        # Those whom Telemetry knows, also without an attempt.
        self._users: set[str] = set()
        self._external_users: set[str] = set()
        self._consecutive_failures: dict[str, int] = {}
        self._locked_until: dict[str, float] = {}

    def add_user(self, user_id: str, external_user_id: str | None) -> None:
        """Add a user without attempts: Telemetry then answers with an empty list and not with 404."""
        self._users.add(user_id)
        if external_user_id:
            self._external_users.add(external_user_id)

    def has_user(self, user_id: str) -> bool:
        """Return whether the user was added, or made an attempt."""
        return user_id in self._users

    def add(self, user_id: str, external_user_id: str | None, authentication: Authentication) -> None:
        """Add an attempt. Five failures in a row lock the user out; a success resets the count."""
        now = self._clock()
        self._recent().append(Attempt(now, user_id, external_user_id, authentication))
        self.add_user(user_id, external_user_id)
        code = authentication.error_code or 0
        if code == 0:
            self._consecutive_failures.pop(user_id, None)
        elif code >= _FIRST_USER_CODE and code not in {CANCELLED, LOCKED_OUT}:
            failures = self._consecutive_failures[user_id] = self._consecutive_failures.get(user_id, 0) + 1
            if failures >= MOST_FAILURES:
                del self._consecutive_failures[user_id]
                self._locked_until[user_id] = now + LOCKOUT

    def locked_for(self, user_id: str) -> float:
        """Return the seconds for which a user is still locked out; 0.0 if they are not."""
        left = self._locked_until.get(user_id, -math.inf) - self._clock()
        if left > 0.0:
            return left
        self._locked_until.pop(user_id, None)
        return 0.0

    def unlock(self, user_id: str) -> None:
        """End a user's lockout, and reset the count of failures in a row."""
        self._locked_until.pop(user_id, None)
        self._consecutive_failures.pop(user_id, None)

    def get_all(self) -> list[Authentication]:
        """Return all users' attempts of the last ten minutes, oldest first."""
        return [attempt.authentication for attempt in self._recent()]

    def get_by_user(self, user_id: str) -> list[Authentication] | None:
        """Return a user's attempts of the last ten minutes, oldest first; None if there is no such user."""
        if user_id not in self._users:
            return None
        return [attempt.authentication for attempt in self._recent() if attempt.user_id == user_id]

    def get_by_external_user(self, external_user_id: str) -> list[Authentication] | None:
        """Return the attempts under an external user id, in its exact case; None if there is no such user."""
        if external_user_id not in self._external_users:
            return None
        return [attempt.authentication for attempt in self._recent() if attempt.external_user_id == external_user_id]

    def _recent(self) -> deque[Attempt]:
        """Remove the attempts that are too old, and return the others, oldest first."""
        now = self._clock()
        while self._all and now - self._all[0].at > MEMORY:
            self._all.popleft()
        return self._all


def telemetry_json(owner: dict[str, str], attempts: Iterable[Authentication], operation_id: str | None) -> bytes:
    """Return the body of Telemetry's answer: its first page, the newest attempt first.

    The documentation leaves open what counts as an element, and the order. This order is the most favourable one for a
    client that reads only the first page of 20. Clients must not rely on it.

    Args:
        owner: The user's id under its name on the wire.
        attempts: The user's attempts, oldest first.
        operation_id: Only attempts for this operation; None: all.
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
    """Return an attempt's fields, by their names on the wire."""
    # Spelt out, not derived from models.py: a misspelt name there must make the tests fail.
    fields = {
        "createdAt": attempt.created_at,
        "result": attempt.result,
        "errorCode": attempt.error_code,
        "operationId": attempt.operation_id,
        "deviceId": attempt.device_id,
        "authType": attempt.auth_type,
    }
    return {name: value for name, value in fields.items() if value is not None}
