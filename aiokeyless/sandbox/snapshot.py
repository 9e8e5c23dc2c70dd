"""What the sandbox's page shows at one moment: the phones of the users, their history, and the latest requests.

A snapshot is complete and bounded: in a load test an open page costs little beside the API. Nothing here does I/O.
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
"""Characters of a payload that the phone can show: about ten pages. A longer one cannot be approved on the page."""

_MOST_PHONES: Final = 24
_MOST_OPERATIONS: Final = 20  # per phone
_MOST_PAYLOAD: Final = 2000  # characters that a snapshot has of a payload; the page asks for the others
_MOST_ID: Final = 600  # every id that the client accepts
_MOST_DEVICES: Final = 5  # per phone, the latest
_MOST_TEXT: Final = 5000  # characters per phone; its newest operation is always there
_MOST_REQUESTS: Final = 12
_MOST_PATH: Final = 400
_MOST_HISTORY: Final = 50
_MOST_EXCERPT: Final = 120

Fault = Literal["none", "unavailable", "dropped"]
"""What the page does to the API: nothing, 503 for every request, or a connection that closes without an answer."""


class Camel(msgspec.Struct, rename="camel"):
    """Base of the JSON that the page and the sandbox exchange."""


class Card(Camel):
    """A pending operation on a phone."""

    key: str
    number: int | float
    operation_id: str
    operation_payload: str | None  # its start, if `characters` says that there is more
    characters: int
    readable: bool
    external_user_id: str | None
    age: float


class DeviceLine(Camel):
    """A device of a user, by its public signing key."""

    key: str
    since: str


class Phone(Camel):
    """A user's phone: the newest operations, how many more are pending, and for how many seconds it is locked.

    One that was removed shows the operations and can approve none.
    """

    user: str
    external_user_id: str | None
    devices: list[DeviceLine]
    removed: bool
    locked_for: float
    pending: list[Card]
    more: int


class Entry(Camel):
    """An attempt to approve, in the history."""

    number: int
    key: str | None
    user: str
    auth_type: str | None
    error_code: int  # 0: approved
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
        fails: Tells whether a program told the API to fail.
        signs: Whether phones sign what is approved.
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
        # A new sandbox numbers its operations from 1 again: a page that stayed open must not confuse old and new ones.
        self._boot = secrets.token_hex(4)
        self._users: dict[str, int] = {}  # the users on the page, last active last, with their order of arrival
        self._arrivals = count()
        self._attempts = count(1)
        self._crowded = False  # whether a phone was removed because there were too many
        self._history: deque[_Attempt] = deque(maxlen=_MOST_HISTORY)
        self.fault: Fault = "none"
        self.ended: bool = False

    def show(self, user: str) -> None:
        """Show a user's phone, as that of the user who was active last."""
        arrival = self._users.pop(user, None)
        self._users[user] = next(self._arrivals) if arrival is None else arrival
        if len(self._users) > _MOST_PHONES:
            del self._users[next(iter(self._users))]
            self._crowded = True

    def has_device(self, user: str) -> bool:
        """Whether a user has a phone on which they can approve."""
        return self._store.users.can_approve(user)

    def attempted(self, user: str, attempt: Authentication) -> None:
        """Show that a user tried to approve an operation, on the page or by other means, with success or not."""
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

    def approved(self, number: int) -> str | None:
        """Return the id of the operation that an attempt in the history approved; None if there is no such attempt."""
        return next(
            (each.operation_id for each in self._history if each.number == number and not each.error_code), None
        )

    def key(self, operation: Operation) -> str:
        """Return what names an operation on the page: unlike its id, no other operation takes it later."""
        return f"{self._boot}-{operation.id}"

    def pending(self, user: str, key: str) -> Operation | None:
        """Return the pending operation that the page shows under a key; None if it is not pending any more."""
        return next((each for each in self._store.pending(user).values() if self.key(each) == key), None)

    def snapshot(self, user: str, now: float) -> Snapshot:
        """Return one user's phone, or, for "", all phones and the requests.

        Args:
            user: The user.
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
            phones=[self._phone(user) for user in users],
            history=[_entry(each) for each in reversed(self._history) if user in ("", each.user)],
            requests=[] if user else _latest(self._requests(), now),
        )

    def _phone(self, user: str) -> Phone:
        """Return a phone's content, the newest operation first: old ones that are never approved stay pending."""
        pending = self._store.pending(user)
        cards: list[Card] = []
        space = _MOST_TEXT
        for each in islice(reversed(pending), _MOST_OPERATIONS):
            card = self._card(pending[each])
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

    def _card(self, operation: Operation) -> Card:
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


def _entry(attempt: _Attempt) -> Entry:
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


def _latest(requests: Sequence[RequestRecord], now: float) -> list[Request]:
    """Return the latest requests, the newest first."""
    return [
        Request(record.method, shorten(record.path, _MOST_PATH), record.status, now - record.at, record.duration)
        for record in reversed(requests[-_MOST_REQUESTS:])
    ]
