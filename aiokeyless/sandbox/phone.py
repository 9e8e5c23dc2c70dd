"""The endpoints of the phones' web page: its event stream, and its buttons.

Each server-sent event is a complete snapshot (snapshot.py). A slow reader misses snapshots, but never the last one.
guard.py decides which requests are accepted.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Final

import msgspec
from aiohttp import web

from .api import Answer, error_answer
from .control import ENDPOINTS, Body, ControlEndpoint, UserId, apply
from .fields import is_user_id
from .guard import refuse_foreign_origin, refuse_host
from .page import HEADERS, load_page
from .snapshot import Fault

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .service import Service
    from .snapshot import PhoneBook

#: Seconds between two snapshots: fast enough for a person, and a limit on the cost of many requests.
_INTERVAL: Final = 0.1
#: Seconds for which `Phones.close` waits until the pages have their last snapshot.
_CLOSE_TIMEOUT: Final = 1.0

_EVENT_HEADERS: Final = {**HEADERS, "Content-Type": "text/event-stream"}


class _PageCreation(Body):
    """The body of ``POST /sandbox/page/create``."""

    user_id: UserId
    operation_payload: str | None = None


class _FaultChoice(Body):
    """The body of ``POST /sandbox/page/fault``."""

    fault: Fault


def _choose_fault(sandbox: Service, fault: Fault) -> None:
    sandbox.recover()
    if fault == "fail":
        sandbox.fail_next(times=None)
    elif fault == "drop":
        sandbox.drop_next(times=None)


#: Those buttons that do what a program can do, too.
_SHARED: Final = ("approve", "decline", "enroll", "unlock")


class Phones:
    """The page's own endpoints.

    Args:
        sandbox: The sandbox that the page's buttons drive.
        book: The users that the page shows.
        host: Name or address that the server listens on.
        create: Creates an operation, given its user and its payload.
    """

    def __init__(
        self, sandbox: Service, book: PhoneBook, host: str, create: Callable[[str, str | None], object]
    ) -> None:
        self._sandbox = sandbox
        self._book = book
        self._host = host
        self._streams: set[asyncio.Task[Any]] = set()
        self._closing = False
        self._buttons = {name: ENDPOINTS[name] for name in _SHARED} | {
            "create": ControlEndpoint(
                "POST", _PageCreation, lambda _, user_id, operation_payload: create(user_id.upper(), operation_payload)
            ),
            "fault": ControlEndpoint("POST", _FaultChoice, _choose_fault),
        }

    async def close(self) -> None:
        """Send the pages a last snapshot, and end their streams."""
        self._closing = True
        self._book.refresh()
        if self._streams:
            await asyncio.wait(self._streams, timeout=_CLOSE_TIMEOUT)

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
        path = request.match_info["path"]
        if path == "events":
            return await self._stream_events(request)
        return _to_response(await apply(request, path, self._buttons, self._sandbox))

    async def _stream_events(self, request: web.Request) -> web.StreamResponse:
        """Send a snapshot now and after each change, until the page or the sandbox is closed."""
        user = request.query.get("user", "").upper()
        if user and not is_user_id(user):
            return _to_response(error_answer(HTTPStatus.BAD_REQUEST, "the user id must be hex"))
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a running coroutine belongs to a task
        self._streams.add(task)
        response = web.StreamResponse(headers=_EVENT_HEADERS)
        try:
            # A ConnectionError means that the page was closed.
            with suppress(ConnectionError):
                await response.prepare(request)
                await response.write(b"retry: 500\n\n")
                await self._send_snapshots(response, user)
        finally:
            self._streams.remove(task)
        return response

    async def _send_snapshots(self, response: web.StreamResponse, user: str) -> None:
        while True:
            is_last, changed = self._closing, self._book.changed
            await response.write(b"data: %b\n\n" % msgspec.json.encode(self._book.snapshot(user)))
            if is_last:
                return
            await asyncio.sleep(_INTERVAL)
            await changed.wait()


def wants_page(request: web.Request) -> bool:
    """Return whether a request for ``/`` comes from a browser; all others are for the API."""
    return "text/html" in request.headers.get("Accept", "")


def _to_response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers={**HEADERS, **answer.headers})
