"""The endpoints of the phones' web page: its event stream, and its buttons.

Each server-sent event is a complete snapshot (snapshot.py). A slow reader misses snapshots, but never the last one. A
reader that does not read is disconnected. So the number of readers and the size of a snapshot bound the buffered data.
guard.py decides which requests are accepted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Final, Literal, NamedTuple, TypeVar

import msgspec
from aiohttp import web

from aiokeyless._validation import MAX_IDENTIFIER
from aiokeyless.errors import ConfigurationError

from .api import Answer, error_answer
from .fields import is_user_id
from .guard import refuse_foreign_origin, refuse_host
from .page import HEADERS, load_page
from .snapshot import READABLE, Camel, Fault

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from .snapshot import PhoneBook

_Body = TypeVar("_Body")

#: Seconds between two snapshots: fast enough for a person, and a limit on the cost of many requests.
_INTERVAL: Final = 0.1
#: Concurrent event streams: enough for a demonstration to a group.
_MOST_READERS: Final = 32
#: Bytes of one write to a connection.
_CHUNK: Final = 1 << 14
#: Seconds that one write may take.
_WRITE_TIMEOUT: Final = 10.0
#: Seconds for which `Phones.close` waits until the pages have their last snapshot.
_CLOSE_TIMEOUT: Final = 1.0

_EVENT_HEADERS: Final = {**HEADERS, "Content-Type": "text/event-stream"}


class _Approval(Camel):
    """The body of ``POST /sandbox/page/approve``."""

    user: str
    key: str
    auth_type: Literal["biom", "pin"]


class _Failure(Camel):
    """The body of ``POST /sandbox/page/fail``."""

    user: str
    key: str
    # CANCELLED, MISMATCH
    error_code: Literal[30003, 30004]


class _Creation(Camel):
    """The body of ``POST /sandbox/page/create``."""

    user: str
    operation_payload: Annotated[str, msgspec.Meta(max_length=READABLE)]


class _Enrolment(Camel):
    """The body of ``POST /sandbox/page/enroll``. An empty external user id means none."""

    user: str
    external_user_id: Annotated[str, msgspec.Meta(max_length=MAX_IDENTIFIER)]


class _Removal(Camel):
    """The body of ``POST /sandbox/page/remove``; `key` is the public signing key of the device."""

    user: str
    key: str


class _Unlocking(Camel):
    """The body of ``POST /sandbox/page/unlock``."""

    user: str


class _FaultChoice(Camel):
    """The body of ``POST /sandbox/page/fault``."""

    fault: Fault


class _Encoded(NamedTuple):
    version: int
    at: float
    event: bytes


class Actions(NamedTuple):
    """What the page's buttons do.

    Attributes:
        approve: Approves an operation, given its id and the ``auth_type``.
        fail: Fails an attempt to approve an operation, given its id and an error code.
        create: Creates an operation, given its user and its payload ("" for none).
        enroll: Enrolls a user, given the user and the external user id, or None.
        remove: Removes a device, given its user and its public signing key.
        unlock: Ends the lockout of a user.
        sign: Returns the token of an approved operation, given its id.
    """

    approve: Callable[[str, str], object]
    fail: Callable[[str, int], object]
    create: Callable[[str, str], object]
    enroll: Callable[[str, str | None], object]
    remove: Callable[[str, str], object]
    unlock: Callable[[str], object]
    sign: Callable[[str], str]


class Phones:
    """The page's own endpoints.

    Args:
        book: The users that the page shows.
        actions: What the page's buttons do.
        host: Name or address that the server listens on.
    """

    def __init__(self, book: PhoneBook, actions: Actions, host: str) -> None:
        self._book = book
        self._actions = actions
        self._host = host
        self._readers: dict[asyncio.Task[Any], asyncio.Event] = {}
        self._closing = asyncio.Event()
        self._version = 0
        # By user: readers of the same phones share an encoded snapshot.
        self._encoded: dict[str, _Encoded] = {}
        self._buttons: Mapping[str, tuple[type[Any], Callable[[Any], Answer]]] = {
            "approve": (_Approval, self._approve),
            "fail": (_Failure, self._fail),
            "create": (_Creation, self._create),
            "enroll": (_Enrolment, self._enroll),
            "remove": (_Removal, self._remove),
            "unlock": (_Unlocking, self._unlock),
            "fault": (_FaultChoice, self._choose_fault),
        }

    def refresh(self) -> None:
        """Send the pages a new snapshot."""
        self._version += 1
        for changed in self._readers.values():
            changed.set()

    def open(self) -> None:
        """Accept readers, again after `close`."""
        self._closing = asyncio.Event()
        self._book.ended = False

    async def close(self) -> None:
        """Send the pages a last snapshot, marked as the last one, and end their streams."""
        self._book.ended = True
        self._closing.set()
        self.refresh()
        if readers := list(self._readers):
            await asyncio.wait(readers, timeout=_CLOSE_TIMEOUT)
        for reader in self._readers:
            reader.cancel()

    def page(self, request: web.Request) -> web.Response:
        """Answer ``GET /``."""
        if refused := refuse_host(request.headers.get("Host", ""), self._host):
            return _to_response(refused)
        page = load_page()
        return web.Response(body=page.html, headers=page.headers)

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer all requests under ``/sandbox/page/``."""
        headers = request.headers
        refused = refuse_host(headers.get("Host", ""), self._host) or refuse_foreign_origin(request.method, headers)
        if refused:
            return _to_response(refused)
        match request.method, request.match_info["path"]:
            case "GET", "events":
                return await self._stream_events(request)
            case "GET", "payload":
                return _to_response(self._get_payload(request.query.get("user", ""), request.query.get("key", "")))
            case "GET", "token":
                return _to_response(self._get_token(request.query.get("number", "")))
            case "POST", path if path in self._buttons:
                kind, act = self._buttons[path]
                body = await _decode(request, kind)
                return _to_response(body if isinstance(body, Answer) else act(body))
        return _to_response(error_answer(HTTPStatus.NOT_FOUND, "the phone has no such endpoint"))

    async def _stream_events(self, request: web.Request) -> web.StreamResponse:
        """Send a snapshot now and after each change, until the page or the sandbox is closed."""
        user = request.query.get("user", "").upper()
        if user and not is_user_id(user):
            return _to_response(error_answer(HTTPStatus.BAD_REQUEST, "the user id must be hex"))
        if len(self._readers) >= _MOST_READERS:
            return _to_response(
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
            # A ConnectionError means that the page was closed.
            with suppress(ConnectionError):
                await response.prepare(request)
                await response.write(b"retry: 500\n\n")
                await self._send_snapshots(response, user, changed)
        except TimeoutError:
            assert request.transport is not None  # noqa: S101  # a lost connection cancels this task
            # Unlike close(), this drops the data that was not read.
            request.transport.abort()
        finally:
            del self._readers[task]
            if not self._readers:
                self._encoded.clear()
        return response

    async def _send_snapshots(self, response: web.StreamResponse, user: str, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            last = self._closing.is_set()
            await _write(response, self._encode_event(user))
            if last:
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(_INTERVAL):
                    await self._closing.wait()

    def _encode_event(self, user: str) -> bytes:
        """Return the current snapshot as an event, encoded once for all readers of the same phones."""
        now = asyncio.get_running_loop().time()
        found = self._encoded.get(user)
        if found is None or found.version != self._version or now - found.at > _INTERVAL:
            event = b"data: %b\n\n" % msgspec.json.encode(self._book.snapshot(user, now))
            found = self._encoded[user] = _Encoded(self._version, now, event)
        return found.event

    def _get_payload(self, user: str, key: str) -> Answer:
        """Return the whole payload of an operation; snapshots have only its start."""
        operation = self._book.pending(user, key)
        if operation is None:
            return _NOT_PENDING
        payload = operation.operation_payload or ""
        if len(payload) > READABLE:
            return _UNREADABLE
        return Answer(HTTPStatus.OK, msgspec.json.encode({"operationPayload": payload}))

    def _approve(self, approval: _Approval) -> Answer:
        """Approve the operation that the page showed, not a later one with the same id."""
        operation = self._book.pending(approval.user, approval.key)
        if operation is None:
            return _NOT_PENDING
        if not self._book.has_device(approval.user):
            return _NO_DEVICE
        if len(operation.operation_payload or "") > READABLE:
            return _UNREADABLE
        try:
            self._actions.approve(operation.operation_id, approval.auth_type)
        # It exists and is pending, and its user has a device, so the only other reason is a lockout.
        except ConfigurationError:
            return error_answer(HTTPStatus.CONFLICT, "You are locked out, after too many failed attempts.")
        return _DONE

    def _fail(self, failure: _Failure) -> Answer:
        operation = self._book.pending(failure.user, failure.key)
        if operation is None:
            return _NOT_PENDING
        if not self._book.has_device(failure.user):
            return _NO_DEVICE
        self._actions.fail(operation.operation_id, failure.error_code)
        return _DONE

    def _create(self, creation: _Creation) -> Answer:
        user = creation.user.strip().upper()
        if not is_user_id(user):
            return _NO_USER_ID
        self._actions.create(user, creation.operation_payload)
        return _DONE

    def _enroll(self, enrolment: _Enrolment) -> Answer:
        user = enrolment.user.strip().upper()
        if not is_user_id(user):
            return _NO_USER_ID
        try:
            self._actions.enroll(user, enrolment.external_user_id or None)
        # The user id is valid, so the external id is refused.
        except ConfigurationError:
            return error_answer(HTTPStatus.CONFLICT, "This external id belongs to another user.")
        return _DONE

    def _remove(self, removal: _Removal) -> Answer:
        self._actions.remove(removal.user, removal.key)
        self.refresh()
        return _DONE

    def _unlock(self, unlocking: _Unlocking) -> Answer:
        if not is_user_id(unlocking.user):
            return _NO_USER_ID
        self._actions.unlock(unlocking.user)
        return _DONE

    def _get_token(self, number: str) -> Answer:
        """Return the token that the phone signed in an attempt of the history."""
        operation_id = self._book.find_approved(int(number)) if number.isdecimal() and number.isascii() else None
        try:
            token = None if operation_id is None else self._actions.sign(operation_id)
        # The operation was removed from the sandbox.
        except ConfigurationError:
            token = None
        if token is None:
            return error_answer(HTTPStatus.NOT_FOUND, "This operation is no longer there.")
        return Answer(HTTPStatus.OK, msgspec.json.encode({"token": token}))

    def _choose_fault(self, choice: _FaultChoice) -> Answer:
        self._book.fault = choice.fault
        self.refresh()
        return _DONE


_DONE: Final = Answer(HTTPStatus.OK, b"{}")
_NO_USER_ID: Final = error_answer(HTTPStatus.BAD_REQUEST, "A user id is a hex string, such as C0FFEE.")
_NOT_PENDING: Final = error_answer(HTTPStatus.CONFLICT, "This operation is no longer pending.")
_NO_DEVICE: Final = error_answer(HTTPStatus.CONFLICT, "This phone was removed, so it can approve nothing.")
_UNREADABLE: Final = error_answer(
    HTTPStatus.CONFLICT,
    f"A text of more than {READABLE} characters cannot be read here, so it cannot be approved here.",
)


def wants_page(request: web.Request) -> bool:
    """Return whether a request for ``/`` comes from a browser; all others are for the API."""
    return "text/html" in request.headers.get("Accept", "")


def _to_response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers={**HEADERS, **answer.headers})


async def _decode(request: web.Request, kind: type[_Body]) -> _Body | Answer:
    try:
        return msgspec.json.decode(await request.read(), type=kind)
    except (msgspec.DecodeError, web.RequestPayloadError, RecursionError) as error:
        return error_answer(HTTPStatus.BAD_REQUEST, f"the body is not valid: {error}")


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Write in chunks, so that little is buffered for a slow reader.

    Raises:
        TimeoutError: The reader did not take a chunk in time.
    """
    for start in range(0, len(data), _CHUNK):
        async with asyncio.timeout(_WRITE_TIMEOUT):
            await response.write(data[start : start + _CHUNK])
