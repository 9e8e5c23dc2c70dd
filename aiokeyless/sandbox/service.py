"""`Sandbox`: the API on a socket, in the caller's event loop, with faults, latency and a journal for tests.

api.py and store.py decide the content of an answer. This module decides whether and when it is sent. All timing uses
the loop's clock, so a test that moves that clock moves the sandbox too.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from http import HTTPStatus
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self, TypedDict, Unpack, assert_never

import msgspec
from aiohttp import web

from aiokeyless._validation import seconds
from aiokeyless.client import KeylessClient
from aiokeyless.errors import ConfigurationError
from aiokeyless.models import AuthType

from .api import JSON, TENANT, Answer, KeylessApi, error_answer
from .attempts import MISMATCH
from .control import Control
from .guard import refuse_host
from .journal import Journal
from .phone import Actions, Phones, wants_page
from .snapshot import PhoneBook
from .store import OperationStore

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Mapping
    from types import TracebackType

    import aiohttp
    from tenacity.wait import wait_base

    from aiokeyless.events import Listener
    from aiokeyless.models import Authentication, Device, Operation

    from .journal import RequestRecord
    from .signing import Signer
    from .snapshot import Fault

logger: Final = logging.getLogger("aiokeyless")
_BODY_LIMIT: Final = 1024 * 1024
#: Seconds. Only a connection that is still reading a refused body delays a shutdown by this much.
_SHUTDOWN_GRACE: Final = 0.1
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


class _Fault(msgspec.Struct):
    """A fault that replaces the answers to the next `left` requests; without an `answer`, it drops the connection."""

    left: float
    method: str | None
    stored: bool
    answer: Answer | None


_UNAVAILABLE: Final = error_answer(
    HTTPStatus.SERVICE_UNAVAILABLE, "the sandbox's page was told to let the API answer 503"
)


def _chosen_on_page(fault: Fault) -> _Fault | None:
    match fault:
        case "none":
            return None
        case "unavailable":
            return _Fault(math.inf, method=None, stored=False, answer=_UNAVAILABLE)
        case "dropped":
            return _Fault(math.inf, method=None, stored=False, answer=None)
        case _:
            assert_never(fault)


class Sandbox:
    """A Keyless service on localhost that strictly follows the documentation of the real one.

    In a browser, its URL shows the latest requests, and a phone for each user. There a person can approve and create
    operations, and let the API fail. ``/?user=C0FFEE`` shows the phone of one user.

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

    JOURNAL_LIMIT: Final = 10_000
    """Largest number of records in `requests`; the oldest are removed. It keeps fewer if their paths are long."""

    def __init__(
        self,
        port: int = 0,
        api_key: str = "sandbox-key",
        auto_approve: float | Callable[[Operation], float | None] | None = None,
        host: str = "127.0.0.1",
        on_request: Callable[[RequestRecord], object] | None = None,
    ) -> None:
        _check_whole("port", port, 0, 65535)
        _check_text("host", host)
        _check_text("api_key", api_key)
        if auto_approve is not None and not callable(auto_approve):
            auto_approve = _check_delay("auto_approve", auto_approve)
        self._host = host
        self._port = port
        self._api_key = api_key
        self._auto_approve = auto_approve
        self._on_request = on_request
        self._loop: asyncio.AbstractEventLoop | None = None
        # This machine's clock and the loop's, when they were last read.
        self._clocks = (time.time_ns(), time.monotonic())
        # Nanoseconds by which tests have moved the loop's clock.
        self._ahead = 0
        self._store = OperationStore(clock=self._time_ns, timer=self._now, on_attempt=self._show_attempt)
        self._api = KeylessApi(self._store, api_key, self._handle_creation, self._encode_key_set)
        self._lazy_signer: Signer | None = None
        self._journal = Journal()
        self._book = PhoneBook(
            self._store, lambda: self.requests, lambda: bool(self._faults), signs=find_spec("jwt") is not None
        )
        actions = Actions(
            approve=self._approve_on_phone,
            fail=self.fail_authentication,
            create=self._create_on_phone,
            enroll=lambda user, external_user_id: self.enroll(user, external_user_id=external_user_id),
            remove=self._store.users.remove_device,
            unlock=self.unlock,
            sign=self.sign,
        )
        self._phones = Phones(self._book, actions, host)
        self._latency = 0.0
        self._faults: list[_Fault] = []
        self._approvals: dict[str, asyncio.TimerHandle] = {}
        self._handlers: set[asyncio.Task[Any]] = set()
        self._runner: web.AppRunner | None = None
        self._url: str | None = None
        self.requests: list[RequestRecord] = self._journal.requests
        """The received requests, oldest first, at most `JOURNAL_LIMIT`; a live list that you may clear."""
        self.request_count: int = 0
        """Number of all received requests, also of those that were removed from `requests`."""

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
        self._clocks = (time.time_ns(), self._loop.time())
        self._phones.open()
        runner = self._runner = web.AppRunner(
            self._application(), access_log=None, handler_cancellation=True, shutdown_timeout=_SHUTDOWN_GRACE
        )
        try:
            await runner.setup()
            await _finish(web.TCPSite(runner, self._host, self._port).start())
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

    @property
    def api_key(self) -> str:
        """The key that requests must carry."""
        return self._api_key

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

    @property
    def tenant(self) -> str:
        """The tenant's name, for `aiokeyless.signatures.TransactionVerifier`."""
        return TENANT

    @property
    def operations(self) -> Mapping[str, Operation]:
        """A live, read-only view of the operations by operation id, oldest first; `tamper` does not change it."""
        return self._store.operations

    @property
    def authentications(self) -> list[Authentication]:
        """All users' attempts to authenticate in the last ten minutes, failed ones too, oldest first."""
        return self._store.authentications

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

        If there is no such operation and `user_id` is given, this stores an approved one, as the phone's
        ``operationInfo`` does. If there is one, the given `user_id`, `external_user_id` and `operation_payload` must be
        its own. Approving again has no effect. While the user is locked out (see `fail_authentication`), it raises, and
        Telemetry shows the attempt.

        Args:
            operation_id: The operation.
            user_id: The user, in hex; required only if there is no such operation. Default: not compared.
            auth_type: ``"biom"`` (biometric) or ``"pin"``. Default: ``"biom"``.
            external_user_id: The customer's own id of the user. Default: none, or not compared.
            operation_payload: The approved text. Default: none, or not compared.

        Returns:
            The approved operation.

        Raises:
            ConfigurationError: There is no such operation and `user_id` is missing, the user is locked out or has no
                device, or an argument is wrong. (It is not a `LookupError`: this library has one exception for wrong
                arguments.)
        """
        operation = self._store.approve(
            operation_id,
            user_id=user_id,
            auth_type=auth_type,
            external_user_id=external_user_id,
            operation_payload=operation_payload,
        )
        self._cancel_approval(operation_id)
        return operation

    def enroll(self, user_id: str, *, external_user_id: str | None = None) -> Device:
        """Enroll a user, or enroll them on one more device.

        You need not enroll a new user: their first operation enrolls them on one device. But a user who was deleted, or
        whose last device was removed, cannot approve anything until you enroll them again.

        Args:
            user_id: The user, in hex.
            external_user_id: Your own id of the user; it replaces an earlier one. Default: none, or the earlier one.

        Returns:
            The new device.

        Raises:
            ConfigurationError: The external user id belongs to another user, or an argument is wrong.
        """
        device = self._store.users.enroll(user_id, external_user_id)
        self._book.show(device.user_id)
        self._phones.refresh()
        return device

    def fail_authentication(
        self,
        operation_id: str,
        error_code: int = MISMATCH,
        *,
        user_id: str | None = None,
        auth_type: str = AuthType.BIOMETRIC,
        external_user_id: str | None = None,
    ) -> Authentication:
        """Let an attempt to approve an operation fail, as on the phone; the operation stays pending.

        Telemetry shows the attempt for ten minutes. The fifth failed attempt in a row locks the user out for ten
        minutes. During a lockout, `approve` raises, and each attempt fails with 30007. Cancelled attempts and those
        with a code below 30000 do not count.

        Args:
            operation_id: The operation; it must not be approved. If it does not exist, the attempt is for one that the
                phone would create.
            error_code: Why it fails: 30003 cancelled by the user, 30004 the face does not match, or another code from
                the vendor's page "Error handling". Default: 30004.
            user_id: The user, in hex; required only if there is no such operation. Default: not compared.
            auth_type: ``"biom"`` (biometric) or ``"pin"``. Default: ``"biom"``.
            external_user_id: The customer's own id of the user. Default: none, or not compared.

        Returns:
            The attempt, as Telemetry shows it.

        Raises:
            ConfigurationError: There is no such operation and `user_id` is missing, it is approved, the user has no
                device, or an argument is wrong.
        """
        return self._store.fail(
            operation_id,
            error_code=error_code,
            user_id=user_id,
            auth_type=auth_type,
            external_user_id=external_user_id,
        )

    def unlock(self, user_id: str) -> None:
        """End a user's lockout (see `fail_authentication`) before its time, and forget the failed attempts in a row.

        Args:
            user_id: The user, in hex. It has no effect for a user who is not locked out.

        Raises:
            ConfigurationError: `user_id` is not hex.
        """
        self._store.unlock(user_id)
        self._phones.refresh()

    def sign(self, operation_id: str, *, tampered: bool = False, claims: Mapping[str, object] | None = None) -> str:
        """Return the token with which the phone signed an approved operation. The app passes it to your backend.

        The phone signs the operation's payload, at the time of the approval, with the tenant's key at that time. This
        needs the extra ``jwt``.

        Args:
            operation_id: The operation.
            tampered: Whether to change the transaction data after signing, so that the signature is wrong.
                Default: False.
            claims: Claims to add, or to put in place of the usual ones, such as ``{"exp": 0}``. The signature covers
                them. Default: none.

        Raises:
            ConfigurationError: There is no such operation, it is not approved, or the extra ``jwt`` is not installed.

        Example::

            sandbox.approve("txn-1")
            token = sandbox.sign("txn-1")
        """
        operation, approved_at = self._store.get_approved(operation_id)
        token = self._signer.sign(
            operation.user_id,
            operation.operation_payload or "",
            operation.external_user_id or self._store.users.external_id(operation.user_id),
            approved_at,
            claims or {},
        )
        return self._signer.tamper(token) if tampered else token

    def rotate_keys(self, *, retire: bool = False) -> str:
        """Publish a new key, with which phones sign from now on. This needs the extra ``jwt``.

        Args:
            retire: Whether to stop publishing the earlier keys. Default: False.

        Returns:
            The ``kid`` of the new key.

        Raises:
            ConfigurationError: The extra ``jwt`` is not installed.
        """
        return self._signer.rotate(self._time_ns(), retire=retire)

    @property
    def _signer(self) -> Signer:
        if self._lazy_signer is None:
            try:
                from .signing import Signer  # noqa: PLC0415  # needs the extra
            except ModuleNotFoundError:
                raise ConfigurationError('signing needs PyJWT: install the extra "jwt"') from None
            self._lazy_signer = Signer()
        return self._lazy_signer

    def _encode_key_set(self) -> bytes:
        return self._signer.key_set_json()

    def forget(self, operation_id: str) -> None:
        """Remove an operation. A GET then answers 404, and the id can be used again.

        Args:
            operation_id: The operation.

        Raises:
            ConfigurationError: There is no such operation.
        """
        self._store.forget(operation_id)
        self._cancel_approval(operation_id)
        self._phones.refresh()

    def tamper(self, operation_id: str, /, **fields: object) -> None:
        """Return false fields from ``GET`` of an operation, to test how a client handles them.

        Only that answer changes; `operations` and the pending list do not. Each call replaces the false fields of
        earlier calls. A call without fields restores the true answer.

        Args:
            operation_id: The operation.
            **fields: Fields of `Operation` with the JSON values to return, of any type: ``state="denied"``,
                ``result=False``, ``user_id="BAD"``. None returns null; ``msgspec.UNSET`` leaves the field out.

        Raises:
            ConfigurationError: There is no such operation or field, or JSON cannot carry a value.

        Example::

            sandbox.approve("txn-1")
            sandbox.tamper("txn-1", operation_payload="Pay 9000 to mallory")
        """
        self._store.tamper(operation_id, fields)

    @property
    def latency(self) -> float:
        """Seconds between a request's effect and its answer; default 0. Faults are delayed too.

        The delay comes after the effect. So a slow creation takes effect even if the client stops waiting for its
        answer, and a poll returns the state at its arrival. This is the worst case of a slow network. A change applies
        to later requests. A very large latency simulates a service that hangs.

        Raises:
            ConfigurationError: The new value is not a finite number of seconds, at least 0.
        """
        return self._latency

    @latency.setter
    def latency(self, value: float) -> None:
        self._latency = _check_delay("latency", value)

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
        """Answer the next requests with an error or another answer, as a gateway in front of the service does.

        Faults are queued. Each request, even one with a wrong key, takes the first fault that matches its method.

        Args:
            status: Status of the answer, 200 to 599. Default: 503.
            times: Number of requests; None: all until `recover`. Default: 1.
            retry_after: ``Retry-After``: seconds, or a text to send unchanged (an HTTP date). Default: none.
            stored: Whether the request takes effect before it fails. Default: False, it never reaches the service.
            method: Only requests with this method. Default: any.
            body: Body of the answer. Default: JSON that names the error.
            content_type: ``Content-Type`` of the answer. Default: ``application/json``.
            headers: More headers of the answer (``{"Location": ...}``); they replace those above. Default: none.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        _check_whole("status", status, 200, 599)
        all_headers = {"Content-Type": content_type}
        if retry_after is not None:
            all_headers["Retry-After"] = _format_retry_after(retry_after)
        for name, value in (headers or {}).items():
            _check_text("the name of a header", name, argument="headers")
            # One spelling, since names are case-insensitive.
            all_headers[name.title()] = value
        arguments = {"Content-Type": "content_type", "Retry-After": "retry_after"}
        for name, value in all_headers.items():
            _check_text(name, value, argument=arguments.get(name, "headers"))
        if body is None:
            body = error_answer(status, f"the sandbox simulates a {status}").body
        self._add_fault(times, method, stored=stored, answer=Answer(status, body, all_headers))

    def drop_next(self, times: int | None = 1, *, stored: bool = False, method: str | None = None) -> None:
        """Close the connection of the next requests without an answer. These faults share the queue of `fail_next`.

        aiohttp's client by itself repeats a GET once if the dropped connection was a kept-alive one. The repetition is
        another request, and takes another fault.

        Args:
            times: Number of requests; None: all until `recover`. Default: 1.
            stored: Whether the request takes effect before it fails. Default: False, it never reaches the service.
            method: Only requests with this method. Default: any.

        Raises:
            ConfigurationError: An argument is wrong.
        """
        self._add_fault(times, method, stored=stored, answer=None)

    def recover(self) -> None:
        """Remove all faults: those of `fail_next` and `drop_next`, and the one chosen on the page."""
        self._faults.clear()
        self._book.fault = "none"
        self._phones.refresh()

    def _add_fault(self, times: int | None, method: str | None, *, stored: bool, answer: Answer | None) -> None:
        if times is not None:
            _check_whole("times", times, 1)
        if method is not None:
            _check_text("method", method)
        left = math.inf if times is None else times
        self._faults.append(_Fault(left, method and method.upper(), stored, answer))
        self._phones.refresh()

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
        record = self._record(request)
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
            self._phones.refresh()
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
        # While the page lets all requests fail, they take none of the faults that a test has queued.
        fault = _chosen_on_page(self._book.fault) or self._next_fault(request.method)
        if fault is None:
            answer: Answer | None = await self._take_effect(request)
        else:
            if fault.stored:
                await self._take_effect(request)
            answer = fault.answer
        if latency:
            await asyncio.sleep(latency)
        return answer

    def _record(self, request: web.Request) -> RequestRecord:
        now = asyncio.get_running_loop().time()
        record = self._journal.add(request.method, request.raw_path, now, self.JOURNAL_LIMIT)
        self.request_count += 1
        self._phones.refresh()
        return record

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

    def _now(self) -> float:
        """Return seconds by the clock of the sandbox's loop; before the first start, by this machine's."""
        return time.monotonic() if self._loop is None else self._loop.time()

    def _time_ns(self) -> int:
        """Return nanoseconds since the epoch, ahead by as much as tests have moved the loop's clock.

        That clock may also start again at 0, or stop while the machine sleeps. Neither moves the time back.
        """
        before, (now, moved_to) = self._clocks, (time.time_ns(), self._now())
        self._clocks = now, moved_to
        self._ahead += max(0, round((moved_to - before[1]) * 1e9) - (now - before[0]))
        return now + self._ahead

    def _show_attempt(self, user_id: str, attempt: Authentication) -> None:
        self._book.add_attempt(user_id, attempt)
        self._phones.refresh()

    def _approve_on_phone(self, operation_id: str, auth_type: str) -> None:
        self.approve(operation_id, auth_type=auth_type)

    def _create_on_phone(self, user_id: str, operation_payload: str) -> None:
        operation = self._store.create(
            user_id, f"page-{secrets.token_hex(8)}", operation_payload=operation_payload or None
        )
        assert operation is not None  # noqa: S101  # the id is random
        self._handle_creation(operation)

    def _handle_creation(self, operation: Operation) -> None:
        self._book.show(operation.user_id)
        self._phones.refresh()
        delay = self._auto_approve
        if callable(delay):
            delay = delay(operation)
            if delay is not None:
                delay = _check_delay("the result of auto_approve", delay)
        if delay is None:
            return
        if delay == 0:
            self._approve_automatically(operation.operation_id)
            return
        self._approvals[operation.operation_id] = asyncio.get_running_loop().call_later(
            delay, self._approve_automatically, operation.operation_id
        )

    def _approve_automatically(self, operation_id: str) -> None:
        try:
            self.approve(operation_id)
        # The user is locked out, or has no device. No caller could handle the error.
        except ConfigurationError as error:
            logger.info("the sandbox did not approve automatically: %s", error)

    def _cancel_approval(self, operation_id: str) -> None:
        if timer := self._approvals.pop(operation_id, None):
            timer.cancel()


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


def _check_delay(name: str, value: object) -> float:
    delay = seconds(value, name, zero=True)
    if math.isinf(delay):
        raise ConfigurationError(f"{name} must be a finite number of seconds, not {value!r}", argument=name)
    return delay


def _format_retry_after(value: float | str) -> str:
    if isinstance(value, str):
        return value
    delay = _check_delay("retry_after", value)
    return str(int(delay)) if delay.is_integer() else str(delay)


def _check_whole(name: str, value: object, least: int, most: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigurationError(f"{name} must be a whole number from {least} to {most}, not {value!r}", argument=name)


def _check_text(name: str, value: object, *, argument: str | None = None) -> None:
    """Check that a header can carry a value unchanged.

    Args:
        name: Name of the value, for the message.
        value: The value.
        argument: The argument that contains it; None: `name`.

    Raises:
        ConfigurationError: It is not a text of printable ASCII, is empty, or has surrounding blanks.
    """
    if (
        not isinstance(value, str)
        or not (value.isascii() and value.isprintable())
        or value.strip() != value
        or not value
    ):
        raise ConfigurationError(
            f"{name} must be a text of printable ASCII, not empty and without surrounding blanks",
            argument=argument or name,
        )
