"""`Transport`: sends requests with aiohttp, reads their answers within limits, and retries single calls.

protocol.py interprets the answers. Every exception of an exchange becomes a `TransportError`, or a `ClientClosedError`
once the session is closed. Only cancellation and exits pass through.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import math
import os
import socket
import ssl
import sys
import time
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import aiohttp
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception, stop_after_attempt, wait_random_exponential
from yarl import URL

from aiokeyless._version import __version__
from aiokeyless.errors import (
    ClientClosedError,
    ConfigurationError,
    DecodeError,
    KeylessError,
    RequestTimeoutError,
    StatusError,
    TransportError,
)
from aiokeyless.events import RequestEnded

from . import protocol
from .redaction import Redaction

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine
    from types import TracebackType

    from aiokeyless._listeners import Listeners
    from aiokeyless.models import Operation, Secret

T = TypeVar("T")

logger = logging.getLogger("aiokeyless")

#: Seconds. If the service asks for a longer pause, the call fails, and the caller reads ``retry_after``.
MAX_RETRY_AFTER: Final = 30.0
#: Exceptions that an exchange raises unchanged. Any other exception is a failure of the exchange.
_PROPAGATED: Final = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
#: Bytes that aiohttp reads ahead, and decompresses at once.
_BUFFER: Final = 1 << 18
_HEADERS: Final = {"Accept": "application/json", "User-Agent": f"aiokeyless/{__version__}"}
_IS_TRANSIENT: Final[Callable[[KeylessError], bool]] = attrgetter("is_transient")
_FULL_JITTER: Final = wait_random_exponential(multiplier=0.25, max=MAX_RETRY_AFTER)


def _max_connections(session: aiohttp.ClientSession) -> float:
    """Return how many connections to one host the connector of a borrowed session allows."""
    connector = session.connector
    limits = () if connector is None else (connector.limit, connector.limit_per_host)
    return min((limit for limit in limits if limit), default=math.inf)  # 0: no limit


class Transport:
    """The HTTP exchanges of one client, bound to the event loop in which it was created.

    Args:
        base_url: Checked base URL, without a trailing slash.
        api_key: The API key.
        session: A session to borrow, or None to create one.
        request_timeout: Seconds for one exchange, from connecting to the last byte.
        max_attempts: Attempts of one call on transient failures.
        listeners: Called for each exchange; None if there are none.
    """

    def __init__(
        self,
        base_url: str,
        api_key: Secret,
        *,
        session: aiohttp.ClientSession | None,
        request_timeout: float,
        max_attempts: int,
        listeners: Listeners | None = None,
    ) -> None:
        self._base = URL(base_url)
        # A checked URL has a host and a port.
        self._server, self._port = self._base.host or "", self._base.port or 0
        self._listeners = listeners
        self._now = asyncio.get_running_loop().time
        self._base_path = self._base.raw_path.rstrip("/")
        self._api_key = api_key
        self._redaction = Redaction(api_key)
        self._max_attempts = max_attempts
        self.request_timeout = request_timeout
        # These override the session's settings. A borrowed session may raise for statuses, follow redirects, not
        # decompress, or decompress a bomb at once into a buffer of any size.
        self._options: dict[str, Any] = {
            "allow_redirects": False,
            "raise_for_status": False,
            "auto_decompress": True,
            "read_bufsize": _BUFFER,
        }
        self._owns_session = session is None
        if session is None:
            session = aiohttp.ClientSession(
                # The poller limits the polls in flight, at a lower cost.
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                # Cheaper than per request: aiohttp then has nothing to merge.
                headers=_make_headers(api_key),
            )
        self.max_connections: float = math.inf if self._owns_session else _max_connections(session)
        """Requests at once, of all that the session is used for: more would queue in its connector."""
        self._session = session
        # The sessions to close: our own, and later perhaps one that does not send the key. Views share this list.
        self._owned_sessions = [session] if self._owns_session else []
        # By itself, aiohttp repeats a DELETE if the connection is lost. The 404 of the second request would then look
        # like an answer to the first. A borrowed session keeps its own middlewares, which these would replace.
        self._delete_options = (
            {**self._options, "middlewares": (_send_without_repeating,)} if self._owns_session else self._options
        )
        # No total: aiohttp's timer is entered twice. If the caller cancels in the same turn of the loop as the timeout,
        # it takes both cancellations for its own, and the caller's is lost. asyncio.timeout keeps that.
        self._call_timeout = aiohttp.ClientTimeout(total=None)
        # ceil_threshold: aiohttp would round a timeout of 5 s and more up to a whole second of the loop's clock.
        # No sock_read: the poller ends an exchange in time, with one timer for all. aiohttp's costs 8% of a poll.
        self._poll_timeout = aiohttp.ClientTimeout(total=None, sock_connect=request_timeout, ceil_threshold=math.inf)
        self._calls = _Calls()

    def with_max_attempts(self, max_attempts: int) -> Transport:
        """Return a view of this transport with another number of attempts; it shares the session and the calls."""
        view = copy.copy(self)
        view._max_attempts = max_attempts  # noqa: SLF001  # a transport, too
        return view

    async def aclose(self) -> None:
        """End the calls under way with `ClientClosedError`, and close the session unless it is borrowed."""
        self._calls.are_closed = True
        for call in tuple(self._calls):
            call.close()
        for session in self._owned_sessions:
            await session.close()

    def call(self) -> _Call:
        """Register a call of a client's method, so that `aclose` can end it: ``with transport.call():``."""
        return _Call(self._calls)

    def url(self, request: protocol.Request[Any]) -> URL:
        """Return the URL of a request, whose path and query are encoded already."""
        url = self._base.with_path(self._base_path + request.path, encoded=True)
        return URL(f"{url}?{request.query}", encoded=True) if request.query else url

    def path(self, url: URL) -> str:
        """Return the path of such a URL without the base path, for messages."""
        return url.raw_path.removeprefix(self._base_path)

    def _shown_path(self, endpoint: protocol.Endpoint[Any], url: URL) -> str:
        """Return the path for messages; an external user id may be personal, so then it is the documented route."""
        return endpoint.route if endpoint.is_personal else self.path(url)

    async def send(self, request: protocol.Request[T], *, attempt: int = 1) -> T:
        """Send a request once and read its answer.

        Args:
            request: The request.
            attempt: Which attempt of its call this is, for the listeners.
        """
        endpoint, url = request.endpoint, self.url(request)
        exchange = self._exchange(endpoint, url, timeouts=self._call_timeout, body=request.body)
        return await self._read_answer(endpoint, url, exchange, attempt=attempt)

    def poll(self, operation_id: str) -> Coroutine[Any, Any, Operation]:
        """Poll an operation once. The caller has checked the id, and cancels an exchange that takes too long.

        It returns the exchange's own coroutine: another one around it would make each poll a little slower.
        """
        path = self._base_path + protocol.operation_path(operation_id)
        url = self._base.with_path(path, encoded=True)
        exchange = self._exchange(protocol.GET_OPERATION, url, timeouts=self._poll_timeout)
        return self._read_answer(protocol.GET_OPERATION, url, exchange, attempt=1)

    async def _read_answer(
        self, endpoint: protocol.Endpoint[T], url: URL, exchange: Awaitable[protocol.Answer], *, attempt: int
    ) -> T:
        """Run an exchange, read its answer, and report the end to the listeners."""
        started = self._now()
        status: int | None = None
        request_id: str | None = None
        failure: str | None = None
        try:
            answer = await exchange
            if self._listeners is not None:
                status = answer.status
                request_id = protocol.request_id(answer, self._redaction)
            return protocol.read(endpoint, self._shown_path(endpoint, url), answer, self._redaction)
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            if self._listeners is not None:
                seconds = self._now() - started
                # The poller cancels a poll that has taken too long.
                if failure == "CancelledError" and seconds >= self.request_timeout:
                    failure = RequestTimeoutError.__name__
                self._listeners.tell(
                    RequestEnded(
                        method=endpoint.method,
                        route=endpoint.route,
                        server=self._server,
                        port=self._port,
                        status=status,
                        error=failure,
                        seconds=seconds,
                        attempt=attempt,
                        request_id=request_id,
                    )
                )

    async def fetch(self, request: protocol.Request[T]) -> T:
        """Send a request and read its answer. Retry transient failures, up to `max_attempts` attempts in total."""
        with self.call():
            try:
                return await self.send(request)
            except KeylessError as error:
                if not self._should_repeat(error, _IS_TRANSIENT):
                    raise
                return await self._repeat(lambda number: self.send(request, attempt=number), error, _IS_TRANSIENT)

    async def retry(
        self, attempt: Callable[[int], Awaitable[T]], may_repeat: Callable[[KeylessError], bool] = _IS_TRANSIENT
    ) -> T:
        """Run an attempt. Repeat it while `may_repeat` allows, up to `max_attempts` attempts in total.

        Args:
            attempt: Called with the number of the attempt, from 1.
            may_repeat: Returns whether to repeat it after a failure. Default: after a transient one.
        """
        try:
            return await attempt(1)
        except KeylessError as error:
            if not self._should_repeat(error, may_repeat):
                raise
            return await self._repeat(attempt, error, may_repeat)

    def _should_repeat(self, error: KeylessError, may_repeat: Callable[[KeylessError], bool]) -> bool:
        return self._max_attempts > 1 and _is_worth_repeating(error, may_repeat)

    async def _repeat(
        self, attempt: Callable[[int], Awaitable[T]], error: KeylessError, may_repeat: Callable[[KeylessError], bool]
    ) -> T:
        """Continue after the failure of the first attempt, so that a call that succeeds at once needs no tenacity.

        tenacity's first attempt only raises that failure.
        """
        # A traceback would keep answers alive as long as its error lives.
        first = [error.with_traceback(None)]
        del error
        earlier: list[KeylessError] = []
        # The same object, once for each attempt.
        states: list[RetryCallState] = []

        async def again() -> T:
            if first:
                raise first.pop()
            return await attempt(1 + len(earlier))

        def note(retry_state: RetryCallState) -> None:
            failure = _get_failure(retry_state)
            assert isinstance(failure, KeylessError)  # noqa: S101  # nothing else is repeated
            earlier.append(failure.with_traceback(None))

        retrying = AsyncRetrying(
            stop=stop_after_attempt(self._max_attempts),
            wait=_pause,
            retry=retry_if_exception(lambda e: isinstance(e, KeylessError) and _is_worth_repeating(e, may_repeat)),
            before=states.append,
            before_sleep=note,
            reraise=True,
        )
        try:
            return await retrying(again)
        except (TransportError, DecodeError, StatusError) as last:
            last.failures = tuple(earlier)
            # tenacity's frames reference it.
            last.__traceback__ = None
            raise
        finally:
            # The steps in it reference `retrying` and the last failure.
            retrying.iter_state.reset()
            # An outcome may be a cancellation, whose traceback stays and references the state.
            while states:
                states.pop().outcome = None

    async def _exchange(
        self,
        endpoint: protocol.Endpoint[Any],
        url: URL,
        *,
        timeouts: aiohttp.ClientTimeout,
        body: bytes | None = None,
    ) -> protocol.Answer:
        if self._calls.are_closed:
            raise ClientClosedError("the client is closed; nothing was sent")
        method = endpoint.method
        started = time.perf_counter() if logger.isEnabledFor(logging.DEBUG) else 0.0
        response: aiohttp.ClientResponse | None = None
        outcome: BaseException
        failure: BaseException | None = None
        try:
            if timeouts is self._call_timeout:
                async with asyncio.timeout(self.request_timeout):
                    response, content = await self._request(endpoint, url, timeouts, body)
            else:
                response, content = await self._request(endpoint, url, timeouts, body)
        # Most often, a cancellation.
        except _PROPAGATED as interruption:
            outcome = interruption
            outcome.__context__ = outcome.__cause__ = None
        except BaseException as error:  # noqa: BLE001  # connectors, middlewares and tracing hooks can raise anything
            outcome, failure = self._make_error(method, self._shown_path(endpoint, url), error), error
        else:
            if started:
                elapsed = (time.perf_counter() - started) * 1000
                path = self._shown_path(endpoint, url)
                logger.debug("%s %s -> %d in %.0f ms", method, path, response.status, elapsed)
            if content is not None:
                return protocol.Answer(response.status, response.headers, content)
            path = self._shown_path(endpoint, url)
            outcome = TransportError(
                f"{method} {path}: the answer is larger than {endpoint.max_body} bytes and was cut off",
                method=method,
                path=path,
            )
        _drop_tracebacks(failure, handled=sys.exception())
        # Raised outside the except block and without aiohttp's frames. Their variables include the request's headers,
        # and so the key. Error reporters print the local variables of every frame of a traceback, of its context and of
        # its causes. The repr of a response shows its headers, which may echo the key.
        response = body = failure = None
        try:
            raise outcome.with_traceback(None)
        finally:
            # Otherwise the error and this frame would reference each other.
            del outcome

    async def _request(
        self, endpoint: protocol.Endpoint[Any], url: URL, timeouts: aiohttp.ClientTimeout, body: bytes | None
    ) -> tuple[aiohttp.ClientResponse, bytes | None]:
        """Send a request, and return its answer and the body; the body is None if it is too large."""
        options = self._delete_options if endpoint.method == "DELETE" else self._options
        session = self._session if endpoint.sends_key else self._session_without_key()
        response = await session.request(
            endpoint.method, url, timeout=timeouts, data=body, headers=self._add_headers(endpoint, body), **options
        )
        try:
            return response, await _read(response, endpoint.max_body)
        # After a cancellation, too, the rest of the answer must not reach the next request.
        except BaseException:
            response.close()
            raise

    def _session_without_key(self) -> aiohttp.ClientSession:
        """Return a session that does not send the key by itself: our usual one does, a borrowed one does not."""
        if not self._owns_session:
            return self._session
        if self._owned_sessions[-1] is self._session:
            self._owned_sessions.append(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        return self._owned_sessions[-1]

    def _add_headers(self, endpoint: protocol.Endpoint[Any], body: bytes | None) -> dict[str, str] | None:
        """Return the headers that the session does not send already."""
        if not endpoint.sends_key:
            return dict(_HEADERS)
        headers = {} if self._owns_session else _make_headers(self._api_key)
        if body is not None:
            headers["Content-Type"] = "application/json"
        return headers or None

    def _make_error(self, method: str, path: str, failure: BaseException) -> KeylessError:
        """Return the error to raise for a failed exchange."""
        if self._calls.are_closed:
            return ClientClosedError(f"the client was closed during {method} {path}; the request may have taken effect")
        if self._session.closed:
            return ClientClosedError("the session that the client borrowed is closed; close it after the client")
        logger.debug("%s %s failed: %s", method, path, type(failure).__name__)
        # If connecting failed, nothing was sent. A total timeout does not show how far the exchange got.
        sent = not isinstance(failure, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        error: TransportError
        cause, tls_error = _find_system_error(failure), _find_tls_error(failure)
        if isinstance(failure, TimeoutError):
            error = RequestTimeoutError(
                f"{method} {path} took longer than request_timeout={self.request_timeout:g} s; try again later",
                method=method,
                path=path,
                sent=sent,
            )
        else:
            words = self._describe_tls(tls_error) if tls_error is not None else cause and cause.strerror
            reason = f"{type(failure).__name__}: {words}" if words else type(failure).__name__
            is_untrusted = isinstance(tls_error, ssl.SSLCertVerificationError)
            advice = "check base_url, and which authorities the session trusts" if is_untrusted else "try again later"
            error = TransportError(
                f"{method} {path} got no answer ({reason}); {advice}", method=method, path=path, sent=sent
            )
        error.__cause__ = cause
        return error

    def _describe_tls(self, tls_error: ssl.SSLError) -> str | None:
        """Return OpenSSL's reason, redacted: a hook may raise such an error with any text, even with the key."""
        words = getattr(tls_error, "verify_message", None) or getattr(tls_error, "reason", None)
        return self._redaction.redact(words if isinstance(words, str) else "TLS failed")


class _Calls(set["_Call"]):
    """The calls under way, of a transport and of all that share its session."""

    are_closed = False


class _Call:
    """One call of a client's method. `close` cancels it, and this cancellation becomes `ClientClosedError`.

    As with ``asyncio.timeout``, a cancellation by the caller, even at the same instant, stays a cancellation.
    """

    __slots__ = ("_calls", "_cancelling", "_closed", "_task")

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._closed = False

    def close(self) -> None:
        self._closed = True
        self._task.cancel()

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:
            raise ConfigurationError("a client's methods must be awaited in a task, such as one run by asyncio.run()")
        self._task = task
        self._cancelling = task.cancelling()
        self._calls.add(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _error: BaseException | None, _traceback: TracebackType | None
    ) -> None:
        self._calls.discard(self)
        if not self._closed:
            return
        if self._task.uncancel() <= self._cancelling and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise ClientClosedError(
                "the client was closed while this call was under way; the request may have taken effect"
            ) from None


def _make_headers(api_key: Secret) -> dict[str, str]:
    return {"X-Api-Key": api_key.reveal(), **_HEADERS}


async def _send_without_repeating(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Turn the loss of a connection into an error after which aiohttp does not repeat the request."""
    try:
        return await handler(request)
    # Nothing was sent, and aiohttp does not repeat the request.
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise aiohttp.ClientConnectionError from error


async def _read(response: aiohttp.ClientResponse, max_body: int) -> bytes | None:
    """Return the body. If it has more than `max_body` bytes after decompression, close the connection, return None."""
    content = response.content
    chunks: list[bytes] = []
    size = 0
    # Most bodies arrive in one chunk with their end, which saves a second await.
    while not content.at_eof():
        chunk = await content.readany()
        size += len(chunk)
        # The first chunk, too, may be large after decompression.
        if size > max_body:
            response.close()
            return None
        chunks.append(chunk)
    # Does not copy a single chunk.
    return b"".join(chunks)


def _is_worth_repeating(error: KeylessError, may_repeat: Callable[[KeylessError], bool]) -> bool:
    return may_repeat(error) and (_get_retry_after(error) or 0.0) <= MAX_RETRY_AFTER


def _get_retry_after(error: BaseException | None) -> float | None:
    return error.retry_after if isinstance(error, StatusError) else None


def _pause(retry_state: RetryCallState) -> float:
    """Return a delay in seconds with full jitter, at least the service's ``Retry-After``."""
    return max(_FULL_JITTER(retry_state), _get_retry_after(_get_failure(retry_state)) or 0.0)


def _get_failure(retry_state: RetryCallState) -> BaseException | None:
    return retry_state.outcome.exception() if retry_state.outcome is not None else None


def _drop_tracebacks(failure: BaseException | None, *, handled: BaseException | None) -> None:
    """Drop the tracebacks of a failure and of the exceptions behind it.

    aiohttp's frames reference the failure. Without this, they, the request's headers and the socket would stay until
    the garbage collector runs.

    Args:
        failure: The failure of an exchange.
        handled: The exception that the caller was handling when it made the call, if any. Python has chained the
            failure to it, but its traceback is the caller's.
    """
    while failure is not None and failure is not handled and failure.__traceback__ is not None:
        failure.__traceback__ = None
        failure = failure.__cause__ or failure.__context__


def _find_tls_error(failure: BaseException) -> ssl.SSLError | None:
    """Return the TLS error of a failure.

    While connecting, aiohttp's error wraps it. Later, it is the cause of an OSError.
    """
    for error in (getattr(failure, "os_error", None), failure, failure.__cause__):
        if isinstance(error, ssl.SSLError):
            return error
    return None


def _find_system_error(failure: BaseException) -> OSError | None:
    """Return the operating system's error of a failure, with its number and the system's text for it.

    The failure's own text may contain the key: some of aiohttp's errors carry the request's headers, some quote the
    server, and a tracing hook can raise anything.
    """
    # aiohttp's error wraps the operating system's.
    error = getattr(failure, "os_error", failure)
    # The numbers of TLS errors are OpenSSL's.
    if _find_tls_error(failure) is not None:
        return None
    # The resolver has its own numbers.
    if isinstance(error, socket.gaierror):
        return socket.gaierror(error.errno, error.strerror)
    if isinstance(error, OSError) and isinstance(error.errno, int) and error.errno > 0:
        return OSError(error.errno, os.strerror(error.errno))
    return None
