"""Snapshots of what the sandbox's page shows: the users' phones, their history, and the latest requests.

A snapshot is complete, and ready for JSON; its times are seconds since the epoch. It has only the latest of everything,
so that an open page costs little in a load test.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import msgspec

    from aiokeyless.models import Authentication, Operation

    from .store import OperationStore

_MOST_PHONES: Final = 24
_MOST_REQUESTS: Final = 12
_MOST_HISTORY: Final = 50
#: Operations of one phone.
_MOST_OPERATIONS: Final = 20
#: Characters of a payload on a phone, and in the history.
_MOST_PAYLOAD: Final = 2000
_MOST_EXCERPT: Final = 120

Fault = Literal["recover", "fail", "drop"]
"""What the API does, by the command that led to it: it works, answers with errors, or drops connections."""


class PhoneBook:
    """The users that the page shows, and what happened on their phones.

    Args:
        store: Holds the operations.
        requests: Returns the journal, oldest first.
        fault: Returns what the API does.

    Attributes:
        changed: Set at the next change of what the page shows; then another event takes its place.
    """

    def __init__(
        self, store: OperationStore, requests: Callable[[], Sequence[msgspec.Struct]], fault: Callable[[], Fault]
    ) -> None:
        self._store = store
        self._requests = requests
        self._fault = fault
        # By arrival.
        self._users: dict[str, None] = {}
        self._history: deque[dict[str, object]] = deque(maxlen=_MOST_HISTORY)
        self.changed: asyncio.Event = asyncio.Event()

    def refresh(self) -> None:
        """Send the pages a new snapshot."""
        self.changed.set()
        self.changed = asyncio.Event()

    def show(self, user: str) -> None:
        """Show a user's phone, from now on."""
        self._users.setdefault(user)
        if len(self._users) > _MOST_PHONES:
            del self._users[next(iter(self._users))]
        self.refresh()

    def add_attempt(self, user: str, attempt: Authentication) -> None:
        """Add an attempt to the history: on the page or elsewhere, successful or not."""
        operation = self._store.operations.get(attempt.operation_id or "")
        self._history.appendleft(
            {
                "key": None if operation is None else _key(operation),
                "user": user,
                "authType": attempt.auth_type,
                "errorCode": attempt.error_code or 0,
                "reason": attempt.reason,
                "text": None if operation is None else _shorten(operation.operation_payload, _MOST_EXCERPT),
                "at": time.time(),
            }
        )
        self.refresh()

    def snapshot(self, user: str) -> dict[str, object]:
        """Return all that a page shows: of one user's phone, or of all phones and the requests.

        Args:
            user: The user; "": all.
        """
        return {
            "fault": self._fault(),
            "phones": [self._show_phone(each) for each in ([user] if user else self._users)],
            "history": [each for each in self._history if user in ("", each["user"])],
            "requests": [] if user else self._requests()[: -_MOST_REQUESTS - 1 : -1],
        }

    def _show_phone(self, user: str) -> dict[str, object]:
        """Return a phone, the newest operation first. Old ones may stay pending for ever."""
        users, pending = self._store.users, self._store.pending(user)
        return {
            "user": user,
            "externalUserId": users.external_id(user),
            "removed": not users.can_approve(user),
            "lockedFor": self._store.locked_for(user),
            "pending": [_show_card(pending[each]) for each in islice(reversed(pending), _MOST_OPERATIONS)],
            "more": max(0, len(pending) - _MOST_OPERATIONS),
        }


def _show_card(operation: Operation) -> dict[str, object]:
    created = operation.created_at
    assert created is not None  # noqa: S101  # the store writes timestamps only
    return {
        "key": _key(operation),
        "operationId": operation.operation_id,
        "operationPayload": _shorten(operation.operation_payload, _MOST_PAYLOAD),
        "externalUserId": operation.external_user_id,
        "at": created.timestamp(),
    }


def _key(operation: Operation) -> str:
    """Return a name of the operation. Unlike an operation id, it is never used again."""
    return f"{operation.id} {operation.timestamp}"


def _shorten(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"
