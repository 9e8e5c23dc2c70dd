"""Snapshots of what the sandbox's page shows: the users' phones, their history, and the latest requests.

A snapshot is complete. It has only the latest of everything, so that an open page costs little in a load test.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from datetime import UTC
from itertools import islice
from typing import TYPE_CHECKING, Final, Literal

import msgspec

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.models import Authentication, Operation

    from .journal import RequestRecord
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


class Camel(msgspec.Struct, rename="camel"):
    """Base of the JSON that the page and the sandbox exchange."""


class Card(Camel):
    """A pending operation on a phone. Unlike an operation id, a `key` is never used again."""

    key: str
    operation_id: str
    operation_payload: str | None
    external_user_id: str | None
    at: float


class DeviceLine(Camel):
    """A device of a user; `key` is its public signing key."""

    key: str
    since: str


class Phone(Camel):
    """A user's phone: the newest operations, the number of further pending ones, and the seconds of a lockout.

    A phone that was removed shows the operations but cannot approve them.
    """

    user: str
    external_user_id: str | None
    devices: list[DeviceLine]
    removed: bool
    locked_for: float
    pending: list[Card]
    more: int


class Entry(Camel):
    """An attempt to approve, in the history; `error_code` 0 means that it succeeded."""

    key: str | None
    user: str
    auth_type: str | None
    error_code: int
    reason: str | None
    text: str | None
    at: float


class Snapshot(Camel):
    """Everything that a page shows. Times are seconds since the epoch."""

    fault: Fault
    phones: list[Phone]
    history: list[Entry]
    requests: list[RequestRecord]


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
        self, store: OperationStore, requests: Callable[[], list[RequestRecord]], fault: Callable[[], Fault]
    ) -> None:
        self._store = store
        self._requests = requests
        self._fault = fault
        # By arrival.
        self._users: dict[str, None] = {}
        self._history: deque[Entry] = deque(maxlen=_MOST_HISTORY)
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

    def remove_device(self, user: str, key: str) -> None:
        """Remove a device of a user, given its public signing key."""
        self._store.users.remove_device(user, key)
        self.refresh()

    def add_attempt(self, user: str, attempt: Authentication) -> None:
        """Add an attempt to the history: on the page or elsewhere, successful or not."""
        operation = self._store.operations.get(attempt.operation_id or "")
        self._history.appendleft(
            Entry(
                key=None if operation is None else _key(operation),
                user=user,
                auth_type=attempt.auth_type,
                error_code=attempt.error_code or 0,
                reason=attempt.reason,
                text=None if operation is None else _shorten(operation.operation_payload, _MOST_EXCERPT),
                at=time.time(),
            )
        )
        self.refresh()

    def snapshot(self, user: str) -> Snapshot:
        """Return a snapshot of one user's phone, or of all phones and the requests.

        Args:
            user: The user; "": all.
        """
        return Snapshot(
            fault=self._fault(),
            phones=[self._show_phone(each) for each in ([user] if user else self._users)],
            history=[each for each in self._history if user in ("", each.user)],
            requests=[] if user else self._requests()[: -_MOST_REQUESTS - 1 : -1],
        )

    def _show_phone(self, user: str) -> Phone:
        """Return a phone, the newest operation first. Old ones may stay pending for ever."""
        users, pending = self._store.users, self._store.pending(user)
        return Phone(
            user=user,
            external_user_id=users.external_id(user),
            devices=[DeviceLine(each.public_signing_key, each.created_at) for each in users.devices(user)],
            removed=not users.can_approve(user),
            locked_for=self._store.locked_for(user),
            pending=[_show_card(pending[each]) for each in islice(reversed(pending), _MOST_OPERATIONS)],
            more=max(0, len(pending) - _MOST_OPERATIONS),
        )


def _show_card(operation: Operation) -> Card:
    created = operation.created_at
    assert created is not None  # noqa: S101  # the store writes timestamps only
    return Card(
        key=_key(operation),
        operation_id=operation.operation_id,
        operation_payload=_shorten(operation.operation_payload, _MOST_PAYLOAD),
        external_user_id=operation.external_user_id,
        at=created.replace(tzinfo=UTC).timestamp(),
    )


def _key(operation: Operation) -> str:
    return f"{operation.id} {operation.timestamp}"


def _shorten(text: str | None, most: int) -> str | None:
    return text if text is None or len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"
