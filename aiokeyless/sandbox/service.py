"""`Sandbox`: the API on a socket of the caller's loop, with the faults, the latency and the journal that tests want.

What an answer says is decided in api.py and store.py; here is when it comes, whether it comes, and who is told.
Everything timed goes by the loop's clock, so tests that move it move the sandbox too.
"""

from __future__ import annotations

import asyncio
import logging
import math
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypedDict, Unpack

import msgspec
from aiohttp import web

from aiokeyless._validation import seconds
from aiokeyless.client import KeylessClient
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import AuthType

from .api import JSON, Answer, KeylessApi, error_answer
from .guard import refuse_host
from .journal import RequestRecord, shorten
from .phone import Phones, wants_page
from .store import OperationStore

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    import aiohttp
    from tenacity.wait import wait_base

    from aiokeyless.models import Operation

_LOGGER: Final = logging.getLogger("aiokeyless")
_BODY_LIMIT: Final = 1024 * 1024
# Only a connection that is still swallowing a refused body makes a shutdown wait for so long.
_SHUTDOWN_GRACE: Final = 0.1
_REACHABLE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # looked up, not bound to


class ClientOptions(TypedDict, total=False):
    """What `Sandbox.client` passes on to `KeylessClient`."""

    session: aiohttp.ClientSession | None
    request_timeout: float
    max_attempts: int
    max_in_flight: int
    schedule: wait_base | None


class _Fault(msgspec.Struct):
    """What happens to the next requests in place of their answer."""

    left: float
    method: str | None
    stored: bool
    answer: Answer | None  # None: the connection is dropped


_CONNECTION_LOST: Final = _Fault(
    math.inf,
    method=None,
    stored=False,
    answer=error_answer(HTTPStatus.SERVICE_UNAVAILABLE, "the connection was switched off on the sandbox's page"),
)


class Sandbox:
    """A Keyless service on localhost that behaves as the documented one does, strictly.

    Opened in a browser, its URL shows a phone for each user, where a person approves operations and sees the requests
    that come; ``/?user=C0FFEE`` shows one user's phone alone.

    Enter it with ``async with``, or `start` and `aclose` it. Entered again, it serves again, on the same port and with
    the operations it had: that is how a test takes the service down and brings it back.

    Args:
        port: Port to listen on; 0, the default, takes a free one.
        api_key: The key that requests must carry; default ``"sandbox-key"``.
        auto_approve: When a simulated user approves an operation that was created: None, the default, never; so
            many seconds after its creation (0: before the creation is answered); or a callable that is given the
            `Operation` and returns either. What the callable raises is logged, and the creation answers 500.
        host: Address or name to listen on; default ``"127.0.0.1"``, which other machines cannot reach. Requests, to the
            API too, must name ``localhost``, an IP address, or this name as their host; others are answered 421, so
            that no web page can reach the sandbox under a name of its own (DNS rebinding).

    Raises:
        ConfigurationError: An argument is wrong.

    Example::

        async with Sandbox(auto_approve=2) as sandbox, sandbox.client() as client:
            operation = await client.request_approval("C0FFEE", operation_payload="Log in?")
    """

    JOURNAL_LIMIT: Final = 10_000
    """Most records in `requests`; beyond, the oldest goes."""

    def __init__(
        self,
        port: int = 0,
        api_key: str = "sandbox-key",
        auto_approve: float | Callable[[Operation], float | None] | None = None,
        host: str = "127.0.0.1",
    ) -> None:
        _check_whole("port", port, 0, 65535)
        _check_text("host", host)
        _check_text("api_key", api_key)
        if auto_approve is not None and not callable(auto_approve):
            auto_approve = _delay("auto_approve", auto_approve)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._auto_approve = auto_approve
        self._store = OperationStore()
        self._api = KeylessApi(self._store, api_key, self._created)
        self._phones = Phones(self._store, lambda: self.requests, self._approve_on_phone, host)
        self._latency = 0.0
        self._faults: list[_Fault] = []
        self._approvals: dict[str, asyncio.TimerHandle] = {}
        self._handlers: set[asyncio.Task[Any]] = set()
        self._runner: web.AppRunner | None = None
        self._url: str | None = None
        self.requests: list[RequestRecord] = []
        """The requests that came, oldest first, at most `JOURNAL_LIMIT`; live, and yours to clear."""
        self.request_count: int = 0
        """How many requests ever came, those that are no longer in `requests` too."""

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def start(self) -> None:
        """Begin to serve, in the running loop.

        Raises:
            ConfigurationError: It serves already.
            OSError: The address cannot be listened on, most often because the port is taken.
        """
        if self._runner is not None:
            raise ConfigurationError("the sandbox is running already; enter it once, or close it first")
        runner = self._runner = web.AppRunner(
            self._application(), access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_GRACE
        )
        try:
            await runner.setup()
            await web.TCPSite(runner, self._host, self._port).start()
        except BaseException:
            self._runner = None
            await runner.cleanup()
            raise
        address: tuple[str, int] = runner.addresses[0][:2]
        host, self._port = address
        host = _REACHABLE.get(host, host)
        self._url = f"http://[{host}]:{self._port}" if ":" in host else f"http://{host}:{self._port}"

    async def aclose(self) -> None:
        """Stop serving at once: requests under way lose their connection, approvals still due do not come.

        Closing it again does nothing.
        """
        runner, self._runner, self._url = self._runner, None, None
        if runner is None:
            return
        try:
            await runner.cleanup()
            await asyncio.sleep(0)  # the transports are closing; their last callbacks are due now
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
            raise ConfigurationError("the sandbox has no URL until it runs; enter it with 'async with' first")
        return self._url

    @property
    def api_key(self) -> str:
        """The key that requests must carry."""
        return self._api_key

    def client(self, **options: Unpack[ClientOptions]) -> KeylessClient:
        """Return a new `KeylessClient` for this sandbox, for the caller to close.

        Args:
            **options: As `KeylessClient` takes them; default: its own defaults.

        Raises:
            ConfigurationError: The sandbox is not running, or an option is wrong.
        """
        return KeylessClient(self._api_key, base_url=self.url, **options)

    @property
    def operations(self) -> Mapping[str, Operation]:
        """The operations by operation id, oldest first, as they truly are: a live view, read-only."""
        return self._store.operations

    def approve(
        self,
        operation_id: str,
        *,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
        operation_payload: str | None = None,
    ) -> Operation:
        """Approve an operation, as the user does on the phone.

        An operation that is not there is stored as approved where `user_id` is given: so the phone's
        ``operationInfo`` makes one. Of one that is there, `user_id`, `external_user_id` and `operation_payload` must
        be its own where they are given. Approving again changes nothing.

        Args:
            operation_id: The operation.
            user_id: The user, in hex; needed only for an operation that is not there.
            auth_type: ``"biom"`` (face), the default, or ``"pin"``.
            external_user_id: The customer's own id of the user; default none.
            operation_payload: What was approved; default none.

        Returns:
            The approved operation.

        Raises:
            ConfigurationError: There is no such operation and no `user_id`, or an argument is wrong. It is this one,
                and no `LookupError`, since a wrong argument is what it is and has one exception in this library.
        """
        before = self._store.operations.get(operation_id)
        operation = self._store.approve(
            operation_id,
            user_id=user_id,
            auth_type=auth_type,
            external_user_id=external_user_id,
            operation_payload=operation_payload,
        )
        self._cancel_approval(operation_id)
        if operation is not before:
            self._phones.approved(operation)
        return operation

    def forget(self, operation_id: str) -> None:
        """Remove an operation, as if it had never been: it answers 404, and its id is free.

        Raises:
            ConfigurationError: There is no such operation.
        """
        self._store.forget(operation_id)
        self._cancel_approval(operation_id)
        self._phones.refresh()

    def tamper(self, operation_id: str, /, **fields: object) -> None:
        """Make ``GET`` of an operation lie, to test how a client takes it.

        Only that answer changes, not `operations` and not the pending list. Each call replaces the lies before;
        with no fields, the truth is back.

        Args:
            operation_id: The operation.
            **fields: Fields of `Operation` and the JSON values to answer, of any type: ``state="denied"``,
                ``result=False``, ``user_id="BAD"``; None answers null, ``msgspec.UNSET`` leaves the field out.

        Raises:
            ConfigurationError: There is no such operation or field, or a value that JSON cannot carry.

        Example::

            sandbox.approve("txn-1")
            sandbox.tamper("txn-1", operation_payload="Pay 9000 to mallory")
        """
        self._store.tamper(operation_id, fields)

    @property
    def latency(self) -> float:
        """Seconds between a request's effect and its answer; default 0. Faults come as late as answers.

        All of it lies after the effect: whoever gives up waiting for a creation has created, and a poll shows what was
        true when it arrived. That is the worst a slow network does, and what a client must bear. A change counts for
        requests that arrive after it; a huge latency hangs.

        Raises:
            ConfigurationError: Set to what is no number of seconds, at least 0.
        """
        return self._latency

    @latency.setter
    def latency(self, value: float) -> None:
        self._latency = _delay("latency", value)

    def fail_next(
        self,
        status: int = 503,
        times: int | None = 1,
        *,
        retry_after: float | str | None = None,
        stored: bool = False,
        method: str | None = None,
        body: bytes | None = None,
        content_type: str = JSON,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """Answer the next requests with an error, or with anything else, as a gateway in front of the service does.

        Faults queue up and each request takes the first that fits it, a request without the right key too.

        Args:
            status: Status to answer, 200 to 599; default 503.
            times: How many requests; default 1; None: all, until `recover`.
            retry_after: ``Retry-After``: seconds, or a text sent as it is (an HTTP date); default none.
            stored: Whether the request takes effect first; default: the service never sees it.
            method: Only requests with this method; default any.
            body: Body to answer; default: JSON that names the error.
            content_type: ``Content-Type`` of the answer; default ``application/json``.
            headers: More headers of the answer (``{"Location": ...}``), which win over the others; default none.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        _check_whole("status", status, 200, 599)
        all_headers = {"Content-Type": content_type}
        if retry_after is not None:
            all_headers["Retry-After"] = _retry_after(retry_after)
        for name, value in (headers or {}).items():
            _check_text("the name of a header", name, argument="headers")
            all_headers[name.title()] = value  # names are the same in any case
        arguments = {"Content-Type": "content_type", "Retry-After": "retry_after"}
        for name, value in all_headers.items():
            _check_text(name, value, argument=arguments.get(name, "headers"))
        if body is None:
            body = error_answer(status, f"the sandbox was told to answer {status}").body
        self._add_fault(times, method, stored=stored, answer=Answer(status, body, all_headers))

    def drop_next(self, times: int | None = 1, *, stored: bool = False, method: str | None = None) -> None:
        """Close the connection of the next requests without an answer. They queue up with those of `fail_next`.

        A client of aiohttp repeats a GET once by itself where the dropped connection was a kept-alive one: that is
        one more request here, and one more fault taken.

        Args:
            times: How many requests; default 1; None: all, until `recover`.
            stored: Whether the request takes effect first; default: the service never sees it.
            method: Only requests with this method; default any.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        self._add_fault(times, method, stored=stored, answer=None)

    def recover(self) -> None:
        """Drop the faults that `fail_next` and `drop_next` still have in store."""
        self._faults.clear()

    def _add_fault(self, times: int | None, method: str | None, *, stored: bool, answer: Answer | None) -> None:
        if times is not None:
            _check_whole("times", times, 1)
        if method is not None:
            _check_text("method", method)
        left = math.inf if times is None else times
        self._faults.append(_Fault(left, method and method.upper(), stored, answer))

    def _next_fault(self, method: str) -> _Fault | None:
        for index, fault in enumerate(self._faults):
            if fault.method is None or fault.method == method:
                fault.left -= 1
                if fault.left == 0:
                    del self._faults[index]
                return fault
        return None

    def _application(self) -> web.Application:
        application = web.Application(client_max_size=_BODY_LIMIT)
        application.router.add_get("/", self._serve_root)
        application.router.add_route("*", "/sandbox/{path:.*}", self._phones.serve)
        # All other paths, not those of the API only: what goes astray is answered and journaled like the rest.
        application.router.add_route("*", "/{path:.*}", self._serve)
        application.on_shutdown.append(self._cancel_handlers)
        return application

    async def _cancel_handlers(self, _application: web.Application) -> None:
        self._phones.close()
        for task in self._handlers:
            task.cancel()

    async def _serve_root(self, request: web.Request) -> web.Response:
        return self._phones.page(request) if wants_page(request) else await self._serve(request)

    async def _serve(self, request: web.Request) -> web.Response:
        record = self._journal(request)
        task = asyncio.current_task()
        assert task is not None  # noqa: S101  # a coroutine that runs is in a task
        self._handlers.add(task)
        try:
            # Before any fault or effect: a page that is kept out must not use up what a test has queued.
            answer = refuse_host(request.headers.get("Host", ""), self._host) or await self._answer(request)
            if answer is None:
                _drop(request)
            msgspec.structs.force_setattr(record, "status", int(answer.status))
        finally:
            self._handlers.discard(task)
            msgspec.structs.force_setattr(record, "duration", asyncio.get_running_loop().time() - record.at)
            self._phones.refresh()
        return web.Response(status=answer.status, body=answer.body, headers=answer.headers)

    async def _answer(self, request: web.Request) -> Answer | None:
        """Let a request take effect and wait out the latency; None: the connection is to be dropped."""
        latency = self._latency
        # The switch on the page takes no fault from those that a test has queued.
        fault = _CONNECTION_LOST if self._phones.connection_lost else self._next_fault(request.method)
        if fault is None:
            answer: Answer | None = await self._take_effect(request)
        else:
            if fault.stored:
                await self._take_effect(request)
            answer = fault.answer
        if latency:
            await asyncio.sleep(latency)
        return answer

    def _journal(self, request: web.Request) -> RequestRecord:
        method, path = shorten(request.method), shorten(request.raw_path)
        record = RequestRecord(method, path, None, asyncio.get_running_loop().time())
        self.requests.append(record)
        self.request_count += 1
        del self.requests[: -self.JOURNAL_LIMIT]
        self._phones.refresh()
        return record

    async def _take_effect(self, request: web.Request) -> Answer:
        body = b""
        if request.method == "POST":
            try:
                body = await request.read()
            except web.HTTPRequestEntityTooLarge:
                return error_answer(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body has at most {_BODY_LIMIT} bytes")
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
        except Exception:  # most likely of the caller's auto_approve
            _LOGGER.exception("the sandbox failed in %s %s", request.method, request.raw_path)
            return error_answer(HTTPStatus.INTERNAL_SERVER_ERROR, "the sandbox failed; its log says why")

    def _approve_on_phone(self, operation_id: str, auth_type: str) -> None:
        self.approve(operation_id, auth_type=auth_type)

    def _created(self, operation: Operation) -> None:
        self._phones.created(operation)
        delay = self._auto_approve
        if callable(delay):
            delay = delay(operation)
            if delay is not None:
                delay = _delay("what auto_approve returned", delay)
        if delay is None:
            return
        if delay == 0:
            self.approve(operation.operation_id)
            return
        self._approvals[operation.operation_id] = asyncio.get_running_loop().call_later(
            delay, self.approve, operation.operation_id
        )

    def _cancel_approval(self, operation_id: str) -> None:
        if timer := self._approvals.pop(operation_id, None):
            timer.cancel()


def _drop(request: web.Request) -> NoReturn:
    """Close the connection, and end the handler as a connection that is lost ends it."""
    request.protocol.force_close()
    raise asyncio.CancelledError


def _delay(name: str, value: object) -> float:
    delay = seconds(value, name, zero=True)
    if math.isinf(delay):
        raise ConfigurationError(f"{name} must be a finite number of seconds, not {value!r}", argument=name)
    return delay


def _retry_after(value: float | str) -> str:
    if isinstance(value, str):
        return value
    delay = _delay("retry_after", value)
    return str(int(delay)) if delay.is_integer() else str(delay)


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}, not {value!r}", argument=name)


def _check_text(name: str, value: object, *, argument: str | None = None) -> None:
    """Refuse what cannot be sent in a header, or would arrive changed.

    Args:
        name: What the message calls it.
        value: What the caller gave.
        argument: The argument that it was given in; None: the one called `name`.
    """
    if (
        not isinstance(value, str)
        or not (value.isascii() and value.isprintable())
        or value.strip() != value
        or not value
    ):
        raise ConfigurationError(
            f"{name} must be a text of printable ASCII, without blanks around it", argument=argument or name
        )
