"""The web page with the phones of the sandbox's users: its content, its event stream, and the effects of its buttons.

The page is phone.html, served unchanged. It follows the sandbox by server-sent events, each of which is a complete
snapshot: a slow reader misses snapshots, but never the last one, and one that does not read is disconnected. So the
buffered data is bounded by the number of readers and the size of a snapshot. guard.py decides which requests are
accepted; operations are approved through `Sandbox.approve`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import secrets
import time
from collections import deque
from contextlib import suppress
from datetime import UTC
from functools import cache
from http import HTTPStatus
from importlib import resources
from itertools import count, islice
from typing import TYPE_CHECKING, Final, Literal, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from aiokeyless.errors import ConfigurationError

from .api import Answer, error_answer
from .guard import refuse_foreign_origin, refuse_host
from .journal import shorten
from .store import is_user_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from aiokeyless.models import Authentication, Operation

    from .journal import RequestRecord
    from .store import OperationStore

_Body = TypeVar("_Body")

#: Seconds between two snapshots: fast enough for a person, and a limit on the cost of many requests.
_INTERVAL: Final = 0.1
# Limits of a snapshot, so that in a load test an open page costs little beside the API.
_MOST_PHONES: Final = 24
_MOST_OPERATIONS: Final = 20  # per phone
_MOST_TEXT: Final = 10_000  # characters per phone; an operation has at most about 6000
_MOST_REQUESTS: Final = 12
_MOST_APPROVALS: Final = 50
_MOST_READERS: Final = 32  # concurrent streams, enough for a demonstration to a group
_CHUNK: Final = 1 << 16  # bytes of a snapshot that are written to a connection at once
_WRITE_TIMEOUT: Final = 10.0  # seconds in which a reader must take a chunk

_PAGE_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Not no-referrer: under that one a browser may send "Origin: null" with the page's own POSTs.
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
_EVENT_HEADERS: Final = {**_PAGE_HEADERS, "Content-Type": "text/event-stream"}


class _Camel(msgspec.Struct, rename="camel"):
    """Base of the JSON that the page and the sandbox exchange."""


class _Card(_Camel):
    key: str
    number: int | float
    operation_id: str
    operation_payload: str | None
    external_user_id: str | None
    age: float


class _Phone(_Camel):
    user: str
    pending: list[_Card]
    more: int


class _Approved(_Camel):
    key: str
    auth_type: str | None


class _Request(_Camel):
    method: str
    path: str
    status: int | None
    age: float
    duration: float


class _Snapshot(_Camel):
    boot: str
    connection_lost: bool
    crowded: bool
    phones: list[_Phone]
    approved: list[_Approved]
    requests: list[_Request]


class _Approval(_Camel):
    """The body of ``POST /sandbox/approve``."""

    user: str
    key: str
    auth_type: Literal["biom", "pin"]


class _Connection(_Camel):
    """The body of ``POST /sandbox/connection``."""

    lost: bool


class Page(NamedTuple):
    """The page, and headers with a policy that allows its own script and style only."""

    html: bytes
    headers: Mapping[str, str]


class Phones:
    """The page's own endpoints, for one store and one journal.

    Args:
        store: Holds the operations.
        requests: Returns the journal, oldest first.
        approve: Approves an operation, given its id and its ``auth_type``.
        host: Name or address that the server listens on.
    """

    def __init__(
        self,
        store: OperationStore,
        requests: Callable[[], Sequence[RequestRecord]],
        approve: Callable[[str, str], object],
        host: str,
    ) -> None:
        self._store = store
        self._requests = requests
        self._approve_operation = approve
        self._host = host
        # A new sandbox numbers its operations from 1 again: a page that stayed open must not confuse old and new ones.
        self._boot = secrets.token_hex(4)
        self._users: dict[str, int] = {}  # the users on the page, last active last, with their order of arrival
        self._arrivals = count()
        self._crowded = False  # whether a phone was removed because there were too many
        self._approved: deque[Operation] = deque(maxlen=_MOST_APPROVALS)
        self._readers: dict[asyncio.Task[Any], asyncio.Event] = {}
        self.connection_lost: bool = False
        """Whether the page's switch is on: the API then answers 503 to every request."""

    def created(self, operation: Operation) -> None:
        """Show a new operation on its user's phone."""
        user = operation.user_id
        arrival = self._users.pop(user, None)
        self._users[user] = next(self._arrivals) if arrival is None else arrival
        if len(self._users) > _MOST_PHONES:
            del self._users[next(iter(self._users))]
            self._crowded = True
        self.refresh()

    def approved(self, operation: Operation) -> None:
        """Show that an operation was approved, on the page or by other means."""
        self._approved.append(operation)
        self.refresh()

    def attempted(self, _user_id: str, _attempt: Authentication) -> None:
        """Show that a user tried to authenticate, with success or not; see `Authentication.failed` and ``reason``."""
        self.refresh()

    def refresh(self) -> None:
        """Send the pages a new snapshot."""
        for changed in self._readers.values():
            changed.set()

    def close(self) -> None:
        """End the streams to the pages."""
        for reader in self._readers:
            reader.cancel()

    def page(self, request: web.Request) -> web.Response:
        """Answer ``GET /``."""
        if refused := refuse_host(request.headers.get("Host", ""), self._host):
            return _response(refused)
        page = load_page()
        return web.Response(body=page.html, headers=page.headers)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer all requests under ``/sandbox/``."""
        headers = request.headers
        refused = refuse_host(headers.get("Host", ""), self._host) or refuse_foreign_origin(request.method, headers)
        if refused:
            return _response(refused)
        match request.match_info["path"], request.method:
            case "events", "GET":
                return await self._events(request)
            case "approve", "POST":
                return _response(self._approve(await _decoded(request, _Approval)))
            case "connection", "POST":
                return _response(self._connection(await _decoded(request, _Connection)))
        return _response(error_answer(HTTPStatus.NOT_FOUND, "the phone has no such endpoint"))

    async def _events(self, request: web.Request) -> web.StreamResponse:
        """Send a snapshot now and after each change, until the page or the sandbox is closed."""
        user = request.query.get("user", "").upper()
        if user and not is_user_id(user):
            return _response(error_answer(HTTPStatus.BAD_REQUEST, "the user id must be hex"))
        if len(self._readers) >= _MOST_READERS:
            return _response(
                error_answer(
                    HTTPStatus.SERVICE_UNAVAILABLE, f"{_MOST_READERS} pages are open, which is the limit; close one"
                )
            )
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a running coroutine belongs to a task
        changed = self._readers[task] = asyncio.Event()
        changed.set()
        response = web.StreamResponse(headers=_EVENT_HEADERS)
        try:
            with suppress(ConnectionError):  # the page was closed
                await response.prepare(request)
                await response.write(b"retry: 500\n\n")
                while True:
                    await changed.wait()
                    changed.clear()
                    # Taken and encoded per sending, not per change.
                    await _write(response, b"data: %b\n\n" % msgspec.json.encode(self._snapshot(user)))
                    await asyncio.sleep(_INTERVAL)
        except TimeoutError:
            assert request.transport is not None  # noqa: S101  # a lost connection cancels this task
            request.transport.abort()  # close() would keep the unread data
        finally:
            del self._readers[task]
        return response

    def _approve(self, approval: _Approval | Answer) -> Answer:
        """Approve the operation that the page showed, and not another one that has its id by now."""
        if isinstance(approval, Answer):
            return approval
        for operation in self._store.pending(approval.user).values():
            if self._key(operation) == approval.key:
                try:
                    self._approve_operation(operation.operation_id, approval.auth_type)
                except ConfigurationError:  # it is there and pending, so nothing else stands in the way
                    return error_answer(HTTPStatus.CONFLICT, "You are locked out, after too many failed attempts.")
                return _DONE
        return error_answer(HTTPStatus.CONFLICT, "This operation is no longer pending.")

    def _connection(self, connection: _Connection | Answer) -> Answer:
        if isinstance(connection, Answer):
            return connection
        self.connection_lost = connection.lost
        self.refresh()
        return _DONE

    def _snapshot(self, user: str) -> _Snapshot:
        """Return one user's phone, or, for "", all phones and the journal."""
        users = [user] if user else sorted(self._users, key=self._users.__getitem__)
        return _Snapshot(
            boot=self._boot,
            connection_lost=self.connection_lost,
            crowded=self._crowded and not user,
            phones=[self._phone(user) for user in users],
            approved=[
                _Approved(self._key(operation), operation.auth_type)
                for operation in self._approved
                if user in ("", operation.user_id)
            ],
            requests=[] if user else _latest(self._requests()),
        )

    def _phone(self, user: str) -> _Phone:
        """Return a phone's content, the newest operation first: old ones that are never approved stay pending."""
        pending = self._store.pending(user)
        cards: list[_Card] = []
        space = _MOST_TEXT
        for each in islice(reversed(pending), _MOST_OPERATIONS):
            card = self._card(pending[each])
            space -= len(card.operation_id) + len(card.operation_payload or "") + len(card.external_user_id or "")
            if space < 0:
                break
            cards.append(card)
        return _Phone(user, cards, len(pending) - len(cards))

    def _card(self, operation: Operation) -> _Card:
        created = operation.created_at
        assert created is not None  # noqa: S101  # the store writes timestamps only
        return _Card(
            key=self._key(operation),
            number=operation.id,
            operation_id=shorten(operation.operation_id),
            operation_payload=operation.operation_payload and shorten(operation.operation_payload),
            external_user_id=operation.external_user_id and shorten(operation.external_user_id),
            age=max(0.0, time.time() - created.replace(tzinfo=UTC).timestamp()),
        )

    def _key(self, operation: Operation) -> str:
        return f"{self._boot}-{operation.id}"


_DONE: Final = Answer(HTTPStatus.OK, b"{}")


def wants_page(request: web.Request) -> bool:
    """Whether a request for ``/`` comes from a person's browser; all others are for the API."""
    return "text/html" in request.headers.get("Accept", "")


@cache
def load_page() -> Page:
    """Read the page; its policy allows its script and its style by their hashes, and no others."""
    html = resources.files("aiokeyless.sandbox").joinpath("phone.html").read_bytes()
    hashes = {tag: _hash(html, tag) for tag in ("script", "style")}
    policy = [
        "default-src 'none'",
        f"script-src {hashes['script']}",
        f"style-src {hashes['style']}",
        "connect-src 'self'",
        "img-src data:",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    headers = {"Content-Type": "text/html; charset=utf-8", "Content-Security-Policy": "; ".join(policy)}
    return Page(html, {**_PAGE_HEADERS, **headers})


def _hash(html: bytes, tag: str) -> str:
    [content] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(content).digest()).decode()}'"


def _response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers={**_PAGE_HEADERS, **answer.headers})


async def _decoded(request: web.Request, kind: type[_Body]) -> _Body | Answer:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, web.RequestPayloadError, RecursionError) as error:
        return error_answer(HTTPStatus.BAD_REQUEST, f"the body is not valid: {error}")


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Write in chunks, so that little is buffered for a slow reader.

    Raises:
        TimeoutError: The reader does not read.
    """
    for start in range(0, len(data), _CHUNK):
        async with asyncio.timeout(_WRITE_TIMEOUT):
            await response.write(data[start : start + _CHUNK])


def _latest(requests: Sequence[RequestRecord]) -> list[_Request]:
    """Return the latest requests, the newest first."""
    now = asyncio.get_running_loop().time()
    return [
        _Request(record.method, record.path, record.status, now - record.at, record.duration)
        for record in reversed(requests[-_MOST_REQUESTS:])
    ]
