"""`Sandbox`: the service on a socket, in the caller's event loop, with a journal for tests.

service.py decides the content of an answer. This module decides whether and when it is sent. All timing uses the loop's
clock, so a test that moves that clock moves the sandbox too.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
import time
from collections.abc import Callable, Coroutine, Iterable
from http import HTTPStatus
from types import TracebackType
from typing import Any, Final, NoReturn, Self, TypedDict, Unpack

import aiohttp
import msgspec
from aiohttp import web
from tenacity.wait import wait_base

from aiokeyless._validation import whole_number
from aiokeyless.client import KeylessClient
from aiokeyless.errors import ConfigurationError
from aiokeyless.events import Listener

from .api import Answer, error_answer
from .control import Control
from .guard import refuse_host
from .phone import Phones, wants_page
from .service import AutoApprove, RequestRecord, Service

logger: Final = logging.getLogger("aiokeyless")
_BODY_LIMIT: Final = 1024 * 1024
#: Seconds. Only a connection that is still reading a refused body delays a shutdown by this much.
_SHUTDOWN_GRACE: Final = 0.1
#: Connections that wait to be accepted. A client opens 256 at once, and more than aiohttp's 128 would wait a second.
_BACKLOG: Final = 1024
#: A socket that is closed with it resets the connection.
_NO_LINGER: Final = struct.pack("ii", 1, 0)
#: Addresses to connect to, by the wildcard addresses that a server can listen on.
_REACHABLE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # a key of a table, not bound to


class ClientOptions(TypedDict, total=False):
    """The options that `Sandbox.client` passes to `KeylessClient`."""

    session: aiohttp.ClientSession | None
    request_timeout: float
    max_attempts: int
    max_in_flight: int
    max_polls_per_second: float | None
    schedule: wait_base | None
    listeners: Iterable[Listener]
    name: str | None


class Sandbox(Service):
    """A Keyless service on localhost that strictly follows the documentation of the real one.

    In a browser, its URL shows the latest requests, and a phone for each user. There a person can approve and create
    operations, and let the API fail. ``/?user=C0FFEE`` shows the phone of one user. Your application must
    notify a real phone.

    Enter it with ``async with``, or call `start` and `aclose`. To restart the service in a test, enter it again: it
    keeps its port and its operations.

    Args:
        port: Port to listen on. Default: 0, which selects a free port.
        api_key: The key that requests must carry. Default: ``"sandbox-key"``.
        auto_approve: Seconds after which a simulated user approves a created operation. 0: before the creation is
            answered. None: never. Or a callable that takes the `Operation` and returns one of these; if it raises, the
            error is logged and the creation answers 500. Default: None.
        host: Address or name to listen on. Default: ``"127.0.0.1"``, which other machines cannot reach. All requests
            must name ``localhost``, an IP address or this name as their host. Others are answered 421, so that no web
            page can reach the sandbox under another name (DNS rebinding).
        on_request: Called with the `RequestRecord` of each API request after it was answered, or ended without an
            answer. If it raises, the error is logged. Default: not called.

    Raises:
        ConfigurationError: An argument is wrong.

    Example::

        async with Sandbox(auto_approve=2) as sandbox, sandbox.client() as client:
            operation = await client.request_approval("C0FFEE", operation_payload="Log in?")
    """

    def __init__(
        self,
        port: int = 0,
        api_key: str = "sandbox-key",
        auto_approve: AutoApprove = None,
        host: str = "127.0.0.1",
        on_request: Callable[[RequestRecord], object] | None = None,
    ) -> None:
        whole_number(port, "port", 0, 65535)
        super().__init__(api_key, auto_approve, host)
        self._port = port
        self._on_request = on_request
        self._handlers: set[asyncio.Task[Any]] = set()
        self._old_connections: set[web.RequestHandler] = set()
        self._runner: web.AppRunner | None = None
        self._url: str | None = None
        self._phones: Phones

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Start serving, in the running event loop.

        Raises:
            ConfigurationError: The sandbox is running already.
            OSError: Listening on the address failed, most often because the port is in use.
        """
        if self._runner is not None:
            raise ConfigurationError("the sandbox is running already; enter it once, or close it first")
        self._loop = asyncio.get_running_loop()
        self._phones = Phones(self, self._book, self._host, self._create_on_phone)
        self._clocks = (time.time_ns(), self._loop.time())
        runner = self._runner = web.AppRunner(
            self._application(), access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_GRACE
        )
        try:
            await runner.setup()
            await _finish(web.TCPSite(runner, self._host, self._port, backlog=_BACKLOG).start())
        # After a cancellation, too, the sandbox can be started again.
        except BaseException:
            self._runner = None
            await runner.cleanup()
            raise
        address: tuple[str, int] = runner.addresses[0][:2]
        host, self._port = address
        host = _REACHABLE.get(host, host)
        self._url = f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    async def aclose(self) -> None:
        """Stop serving at once. Open requests lose their connection, and scheduled approvals are cancelled.

        Closing it again has no effect.
        """
        runner, self._runner, self._url = self._runner, None, None
        if runner is None:
            return
        try:
            await runner.cleanup()
            # Lets the closing transports run their last callbacks.
            await asyncio.sleep(0)
        finally:
            for timer in self._approvals.values():
                timer.cancel()
            self._approvals.clear()

    @property
    def url(self) -> str:
        """Base URL, such as ``http://127.0.0.1:41234``.

        Raises:
            ConfigurationError: The sandbox is not running.
        """
        if self._url is None:
            raise ConfigurationError("the sandbox has no URL until it is running; enter it with 'async with' first")
        return self._url

    def client(self, **options: Unpack[ClientOptions]) -> KeylessClient:
        """Return a new `KeylessClient` for this sandbox; the caller must close it.

        Args:
            **options: Options of `KeylessClient`. Default: those of `KeylessClient`.

        Returns:
            The client.

        Raises:
            ConfigurationError: The sandbox is not running, or an option is wrong.
        """
        return KeylessClient(self._api_key, base_url=self.url, **options)

    def reset_connections(self) -> None:
        """Reset each connection that is open now at its next API request, as a balancer that has failed over does.

        New connections work. The requests that are lost do not reach the service, and `requests` does not have them.
        """
        if self._runner is not None and self._runner.server is not None:
            self._old_connections = set(self._runner.server.connections)

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=_BODY_LIMIT)
        application.router.add_get("/", self._serve_root)
        application.router.add_route("*", "/sandbox/page/{path:.*}", self._phones.serve)
        application.router.add_route("*", "/sandbox/{name:.*}", Control(self, self._host).serve)
        # Unknown paths too: their requests are answered and recorded.
        application.router.add_route("*", "/{path:.*}", self._serve)
        application.on_shutdown.append(self._cancel_handlers)
        return application

    async def _cancel_handlers(self, _application: web.Application) -> None:
        for task in self._handlers:
            task.cancel()
        await self._phones.close()

    async def _serve_root(self, request: web.Request) -> web.Response:
        return self._phones.page(request) if wants_page(request) else await self._serve(request)

    async def _serve(self, request: web.Request) -> web.Response:
        if request.protocol in self._old_connections:
            _reset(request)
        record = self._record(request.method, request.raw_path)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a running coroutine belongs to a task
        self._handlers.add(task)
        try:
            # Refused before any fault or effect, so that it takes no fault that a test has queued.
            answer = refuse_host(request.headers.get("Host", ""), self._host) or await self._answer(request)
            if answer is None:
                _drop(request)
            msgspec.structs.force_setattr(record, "status", int(answer.status))
        finally:
            self._handlers.discard(task)
            msgspec.structs.force_setattr(record, "duration", asyncio.get_running_loop().time() - record.at)
            self._book.refresh()
            self._report(record)
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    def _report(self, record: RequestRecord) -> None:
        if self._on_request is None:
            return
        try:
            self._on_request(record)
        # An error of the caller's function does not affect the answer.
        except Exception:
            logger.exception("on_request of the sandbox failed for %s %s", record.method, record.path)

    async def _answer(self, request: web.Request) -> Answer | None:
        """Apply a request's effect, sleep for the latency, and return the answer; None: drop the connection."""
        latency = self._latency
        fault = self._next_fault(request.method)
        if fault is None:
            answer: Answer | None = await self._take_effect(request)
        else:
            if fault.stored:
                await self._take_effect(request)
            answer = fault.answer
        if latency:
            await asyncio.sleep(latency)
        return answer

    async def _take_effect(self, request: web.Request) -> Answer:
        body = b""
        if request.method in {"POST", "PATCH"}:
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                return error_answer(
                    HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body must have at most {_BODY_LIMIT} bytes"
                )
            except web.RequestPayloadError:
                return error_answer(HTTPStatus.BAD_REQUEST, "the body cannot be read")
        headers = request.headers
        try:
            return self._api.answer(
                request.method,
                request.raw_path,
                api_key=headers.get("X-Api-Key", ""),
                accept=",".join(headers.getall("Accept", ())),
                content_type=headers.get("Content-Type", ""),
                body=body,
            )
        # Most likely raised by the caller's auto_approve.
        except Exception:
            logger.exception("the sandbox failed in %s %s", request.method, request.raw_path)
            return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "the sandbox failed; see its log")


async def _finish(starting: Coroutine[Any, Any, None]) -> None:
    """Start a server, even if cancelled: asyncio would leave the socket of an interrupted start open."""
    task = asyncio.ensure_future(starting)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await asyncio.wait([task])
        # Otherwise asyncio logs that the exception was never retrieved.
        task.exception()
        raise
    task.result()


def _drop(request: web.Request) -> NoReturn:
    """Close the connection, and end the handler as a lost connection does."""
    request.protocol.force_close()
    raise asyncio.CancelledError


def _reset(request: web.Request) -> NoReturn:
    """Reset the connection, and end the handler as a lost connection does."""
    with contextlib.suppress(AttributeError):  # no socket: the client has left
        request.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    _drop(request)
