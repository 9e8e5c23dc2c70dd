"""Snapshots of what the sandbox's page shows: the users' phones, their history, and the latest requests.

A snapshot is complete and bounded, so that an open page costs little in a load test. Nothing here does I/O.
"""

from __future__ import annotations

import secrets
import time
from collections import deque
from datetime import UTC
from itertools import count, islice
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from .journal import shorten

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from aiokeyless.models import Authentication, Operation

    from .journal import RequestRecord
    from .store import OperationStore

READABLE: Final = 20_000
"""Most characters of a payload that the page can show: about ten pages. It cannot approve longer ones."""

_MOST_PHONES: Final = 24
_MOST_REQUESTS: Final = 12
_MOST_HISTORY: Final = 50

# Per phone:
_MOST_OPERATIONS: Final = 20
_MOST_DEVICES: Final = 5
#: Characters of all operations together. The newest one is always there.
_MOST_TEXT: Final = 5000

# Characters of one field:
#: The page requests the rest of a longer payload.
_MOST_PAYLOAD: Final = 2000
#: Enough for every id that the client accepts.
_MOST_ID: Final = 600
_MOST_PATH: Final = 400
_MOST_EXCERPT: Final = 120

Fault = Literal["none", "unavailable", "dropped"]
"""The fault that is chosen on the page: none, a 503 for every request, or connections that close without an answer."""


class Camel(msgspec.Struct, rename="camel"):
    """Base of the JSON that the page and the sandbox exchange."""


class Card(Camel):
    """A pending operation on a phone.

    If the payload is longer than `_MOST_PAYLOAD`, `operation_payload` is its start. `characters` is its full length.
    """

    key: str
    number: int | float
    operation_id: str
    operation_payload: str | None
    characters: int
    readable: bool
    external_user_id: str | None
    age: float


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

    number: int
    key: str | None
    user: str
    auth_type: str | None
    error_code: int
    reason: str | None
    text: str | None
    age: float


class Request(Camel):
    """A request to the API."""

    method: str
    path: str
    status: int | None
    age: float
    duration: float


class Snapshot(Camel):
    """Everything that a page shows."""

    boot: str
    fault: Fault
    fails: bool  # whether a program told the API to fail
    signs: bool
    ended: bool
    crowded: bool
    phones: list[Phone]
    history: list[Entry]
    requests: list[Request]


class _Attempt(msgspec.Struct):
    number: int
    operation_id: str | None
    key: str | None
    user: str
    auth_type: str | None
    error_code: int
    reason: str | None
    text: str | None
    at: float


class PhoneBook:
    """The users that the page shows, and what happened on their phones.

    Args:
        store: Holds the operations.
        requests: Returns the journal, oldest first.
        fails: Returns whether a program lets the API fail. Default: it does not.
        signs: Whether phones sign approved operations.
    """

    def __init__(
        self,
        store: OperationStore,
        requests: Callable[[], Sequence[RequestRecord]],
        fails: Callable[[], bool] = lambda: False,
        *,
        signs: bool,
    ) -> None:
        self._store = store
        self._fails = fails
        self._signs = signs
        self._requests = requests
        # A new sandbox numbers its operations from 1 again. A page that stayed open must not confuse old and new ones.
        self._boot = secrets.token_hex(4)
        # The users on the page, the last active one last. The values order them by arrival.
        self._users: dict[str, int] = {}
        self._arrivals = count()
        self._attempts = count(1)
        # Whether a phone was removed from the page because there were too many.
        self._crowded = False
        self._history: deque[_Attempt] = deque(maxlen=_MOST_HISTORY)
        self.fault: Fault = "none"
        self.ended: bool = False

    def show(self, user: str) -> None:
        """Show a user's phone, and mark the user as the last active one."""
        arrival = self._users.pop(user, None)
        self._users[user] = next(self._arrivals) if arrival is None else arrival
        if len(self._users) > _MOST_PHONES:
            del self._users[next(iter(self._users))]
            self._crowded = True

    def has_device(self, user: str) -> bool:
        """Return whether a user has a phone to approve on."""
        return self._store.users.can_approve(user)

    def add_attempt(self, user: str, attempt: Authentication) -> None:
        """Add an attempt to the history: on the page or elsewhere, successful or not."""
        operation = self._store.operations.get(attempt.operation_id or "")
        text = None if operation is None else operation.operation_payload
        self._history.append(
            _Attempt(
                number=next(self._attempts),
                operation_id=attempt.operation_id,
                key=None if operation is None else self.key(operation),
                user=user,
                auth_type=attempt.auth_type,
                error_code=attempt.error_code or 0,
                reason=attempt.reason,
                text=text and _excerpt(text),
                at=time.monotonic(),
            )
        )

    def find_approved(self, number: int) -> str | None:
        """Return the id of the operation that an attempt in the history approved; None if there is no such attempt."""
        return next(
            (each.operation_id for each in self._history if each.number == number and not each.error_code), None
        )

    def key(self, operation: Operation) -> str:
        """Return the page's key for an operation. Unlike an operation id, it is never used again."""
        return f"{self._boot}-{operation.id}"

    def pending(self, user: str, key: str) -> Operation | None:
        """Return the pending operation with a key; None if it is no longer pending."""
        return next((each for each in self._store.pending(user).values() if self.key(each) == key), None)

    def snapshot(self, user: str, now: float) -> Snapshot:
        """Return a snapshot of one user's phone, or of all phones and the requests.

        Args:
            user: The user; "": all.
            now: The loop's clock, in seconds.
        """
        users = [user] if user else sorted(self._users, key=self._users.__getitem__)
        return Snapshot(
            boot=self._boot,
            fault=self.fault,
            fails=self._fails(),
            signs=self._signs,
            ended=self.ended,
            crowded=self._crowded and not user,
            phones=[self._show_phone(user) for user in users],
            history=[_to_entry(each) for each in reversed(self._history) if user in ("", each.user)],
            requests=[] if user else _list_requests(self._requests(), now),
        )

    def _show_phone(self, user: str) -> Phone:
        """Return a phone, the newest operation first. Old ones may stay pending for ever."""
        pending = self._store.pending(user)
        cards: list[Card] = []
        space = _MOST_TEXT
        for each in islice(reversed(pending), _MOST_OPERATIONS):
            card = self._show_card(pending[each])
            space -= len(card.operation_id) + len(card.operation_payload or "") + len(card.external_user_id or "")
            if space < 0 and cards:
                break
            cards.append(card)
        users = self._store.users
        return Phone(
            user=user,
            external_user_id=users.external_id(user),
            devices=[
                DeviceLine(each.public_signing_key, each.created_at) for each in users.devices(user)[-_MOST_DEVICES:]
            ],
            removed=not self.has_device(user),
            locked_for=self._store.locked_for(user),
            pending=cards,
            more=len(pending) - len(cards),
        )

    def _show_card(self, operation: Operation) -> Card:
        created = operation.created_at
        assert created is not None  # noqa: S101  # the store writes timestamps only
        payload = operation.operation_payload
        characters = len(payload or "")
        return Card(
            key=self.key(operation),
            number=operation.id,
            operation_id=shorten(operation.operation_id, _MOST_ID),
            operation_payload=payload and payload[:_MOST_PAYLOAD],
            characters=characters,
            readable=characters <= READABLE,
            external_user_id=operation.external_user_id and shorten(operation.external_user_id, _MOST_ID),
            age=max(0.0, time.time() - created.replace(tzinfo=UTC).timestamp()),
        )


def _to_entry(attempt: _Attempt) -> Entry:
    return Entry(
        number=attempt.number,
        key=attempt.key,
        user=attempt.user,
        auth_type=attempt.auth_type,
        error_code=attempt.error_code,
        reason=attempt.reason,
        text=attempt.text,
        age=time.monotonic() - attempt.at,
    )


def _excerpt(text: str) -> str:
    return text if len(text) <= _MOST_EXCERPT else f"{text[:_MOST_EXCERPT]}…"


def _list_requests(requests: Sequence[RequestRecord], now: float) -> list[Request]:
    """Return the latest requests, the newest first."""
    return [
        Request(record.method, shorten(record.path, _MOST_PATH), record.status, now - record.at, record.duration)
        for record in reversed(requests[-_MOST_REQUESTS:])
    ]
