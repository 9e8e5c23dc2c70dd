"""`Transport`: sends requests with aiohttp, reads their answers within limits, and retries single calls.

protocol.py interprets the answers. Every exception of an exchange becomes a `TransportError`, or a `ClientClosedError`
once the session is closed. Only cancellation and exits pass through.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import logging
import math
import os
import socket
import ssl
import sys
import time
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, TypeVar

import aiohttp
from multidict import istr
from tenacity import wait_random_exponential
from yarl import URL

from aiokeyless._rules.quota import RepetitionQuota
from aiokeyless._version import __version__
from aiokeyless.errors import (
    AuthenticationError,
    ClientClosedError,
    DecodeError,
    KeylessError,
    RequestTimeoutError,
    StatusError,
    TransportError,
)
from aiokeyless.events import RequestEnded
from aiokeyless.schedule import next_delay

from . import protocol
from .calls import Call, Calls
from .content import UnusableContentError, decode_content, larger_than
from .meter import Meter
from .proxies import options_for, why_unused
from .redaction import find_place

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from multidict import CIMultiDict

    from aiokeyless._listeners import Listeners
    from aiokeyless.models import Operation, Secret

    from .keys import ApiKey, ApiKeys
    from .redaction import Redaction

T = TypeVar("T")

logger = logging.getLogger("aiokeyless")

#: Seconds. If the service asks for a longer pause, the call fails, and the caller reads ``retry_after``.
MAX_RETRY_AFTER: Final = 30.0
#: Exceptions that an exchange raises unchanged. Any other exception is a failure of the exchange.
_PROPAGATED: Final = (asyncio.CancelledError, GeneratorExit, KeyboardInterrupt, SystemExit)
#: After these, the service has received nothing.
_NOT_CONNECTED: Final = (
    aiohttp.ClientConnectorError,
    aiohttp.ClientHttpProxyError,  # instead of a tunnel
    aiohttp.ConnectionTimeoutError,
)
#: Bytes that aiohttp reads ahead.
_BUFFER: Final = 1 << 18
#: Seconds after which a connection is not used again. A host that is no longer the service's may go on answering.
_MAX_AGE: Final = 60.0
#: Seconds for which a name's addresses are kept. After aiohttp's 10 s, a failover by DNS is noticed late.
_MAX_NAME_AGE: Final = 3
#: Milliseconds after which the system gives a connection up whose data nobody acknowledges. A firewall that forgot its
#: connections drops what is sent on a kept one.
_MAX_SILENCE: Final = 3000
_ADVICE_FOR_CODE: Final = "a mock, or a middleware or a hook of the session, raised it; look there"
#: What to do, by OpenSSL's reason. The second is all that TLS 1.2 says.
_TLS_ADVICE: Final = {
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "lend a session whose SSL context has a client certificate",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "perhaps it wants a client certificate: lend a session whose SSL context has one",
    "WRONG_VERSION_NUMBER": "what answers there speaks no TLS; check the scheme and the port of base_url",
}
#: OpenSSL's codes for certificates that only VERIFY_X509_STRICT refuses.
_STRICT: Final = range(80, 95)
_USER_AGENT: Final = f"aiokeyless/{__version__}"
# Looking up an istr takes half the time of a str.
_CONTENT_ENCODING: Final = istr("Content-Encoding")
_IS_TRANSIENT: Final[Callable[[KeylessError], bool]] = attrgetter("is_transient")
_FULL_JITTER: Final = wait_random_exponential(multiplier=0.25, max=MAX_RETRY_AFTER)


def _make_headers(user_agent: str | None) -> dict[str, str]:
    """Return the headers of all requests; the client's name follows that of the application."""
    name = f"{user_agent} {_USER_AGENT}" if user_agent else _USER_AGENT
    return {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": name}


def _max_connections(session: aiohttp.ClientSession) -> float:
    """Return how many connections to one host the connector of a borrowed session allows."""
    connector = session.connector
    limits = () if connector is None else (connector.limit, connector.limit_per_host)
    return min((limit for limit in limits if limit), default=math.inf)  # 0: no limit


class Transport:
    """The HTTP exchanges of one client, bound to the event loop in which it was created.

    It makes a session unless it borrows one. A borrowed session connects by a proxy of its own, if any.
    """

    def __init__(
        self,
        base_url: str,
        api_keys: ApiKeys,
        *,
        session: aiohttp.ClientSession | None,
        request_timeout: float,
        max_attempts: int,
        listeners: Listeners | None = None,
        proxy: Secret | None = None,
    ) -> None:
        self._base = URL(base_url)
        # A checked URL has a host and a port.
        self._server, self._port = self._base.host or "", self._base.port or 0
        self._listeners = listeners
        self._now = asyncio.get_running_loop().time
        self._base_path = self._base.raw_path.rstrip("/")
        self._api_keys = api_keys
        self._max_attempts = max_attempts
        self._proxy = proxy
        self.quota: RepetitionQuota = RepetitionQuota()
        """Tokens for repetitions and checks, of this client and of all views of this transport."""
        self.request_timeout = request_timeout
        settings: dict[str, Any] = {
            "auto_decompress": False,
            "read_bufsize": _BUFFER,
            "raise_for_status": False,
            # No total: aiohttp's timer is entered twice. If the caller cancels in the same turn of the loop as the
            # timeout, it takes both cancellations for its own, and the caller's is lost.
            # No sock_read: a timer for all exchanges ends them in time. aiohttp's costs 8% of a poll.
            # ceil_threshold: aiohttp would round a timeout of 5 s and more up to a whole second of the loop's clock.
            "timeout": aiohttp.ClientTimeout(total=None, sock_connect=request_timeout, ceil_threshold=math.inf),
        }
        self._options: dict[str, Any] = {"allow_redirects": False}
        self._owned_sessions: list[aiohttp.ClientSession] = []
        self._headers: dict[str, str] = {}
        # The key that `_session` sends by itself, if any. Its headers go to a proxy, too, which must not see the key.
        sent_key = None if proxy is not None or session is not None else api_keys.static()
        self._sends_key = sent_key is not None
        # The second one is for what must not go on a connection that is kept, which may be dead as all others are.
        if session is None:
            # Cheaper than per request: aiohttp then has nothing to merge.
            settings["cookie_jar"] = aiohttp.DummyCookieJar()
            settings |= {"request_class": _Request, "response_class": _Response}
            headers = {"Host": _make_host(self._base)} | _make_headers(None)
            with_key = headers if sent_key is None else headers | {"X-Api-Key": sent_key.reveal()}
            self._session = _make_session(with_key, settings)
            self._session_of_new_connections = _make_session(headers, settings, force_close=True)
            self._owned_sessions += self._session, self._session_of_new_connections
            self._untraced_sessions = (
                _make_untraced(self._session, settings),
                _make_untraced(self._session_of_new_connections, settings),
            )
            self._owned_sessions += self._untraced_sessions
            self.max_connections: float = math.inf
            """Requests at once, of all that the session is used for: more would queue in its connector."""
        else:
            # By itself it may raise for statuses, or decompress a bomb into a buffer of any size.
            self._options |= settings
            self._session = self._session_of_new_connections = session
            self._untraced_sessions = session, session
            self._headers = _make_headers(session.headers.get("User-Agent"))
            self.max_connections = _max_connections(session)
        self._calls = Calls()
        self._renewed_at = -math.inf  # when a new connection was answered well last, while kept ones failed

    def with_max_attempts(self, max_attempts: int) -> Transport:
        """Return a view of this transport with another number of attempts; it shares the session and the calls."""
        view = copy.copy(self)
        view._max_attempts = max_attempts  # noqa: SLF001  # a transport, too
        return view

    async def aclose(self) -> None:
        """End the calls under way with `ClientClosedError`, and close the session unless it is borrowed."""
        self._calls.close()
        for session in self._owned_sessions:
            await session.close()

    def call(self) -> Call:
        """Register a call of a client's method, so that `aclose` can end it: ``with transport.call():``."""
        return Call(self._calls)

    async def receive(self, request: protocol.Request[Any]) -> protocol.RawAnswer:
        """Send a request once, and return its answer whatever the status; no listener is called."""
        return await self._receive(request, self._api_keys.current())

    def poll(self, operation_id: str, is_renewal: bool = False) -> Coroutine[Any, Any, Operation]:
        """Poll an operation once. The caller has checked the id, and cancels an exchange that takes too long.

        It returns the exchange's own coroutine: another one around it would make each poll a little slower.
        """
        request = protocol.Request(protocol.GET_OPERATION, protocol.operation_path(operation_id))
        return self.send(request, is_renewal=is_renewal, has_deadline=False)

    async def send(
        self,
        request: protocol.Request[T],
        *,
        attempt: int = 1,
        is_renewal: bool = False,
        has_deadline: bool = True,
    ) -> T:
        """Send a request once, read its answer, and report the end to the listeners.

        Args:
            request: The request.
            attempt: Which attempt of its call this is.
            is_renewal: Whether the request has a new connection. After a failover by DNS, a kept one may lead to a host
                that goes on failing. Once this one is answered well, a 5xx closes each connection that is older.
            has_deadline: Whether to end the exchange after `request_timeout`.
        """
        listeners = self._listeners
        started = 0.0 if listeners is None else self._now()
        status: int | None = None
        request_id: str | None = None
        failure: str | None = None
        try:
            key = self._api_keys.current()
            answer = await self._receive(
                request, key, is_first=attempt == 1, is_renewal=is_renewal, has_deadline=has_deadline
            )
            if listeners is not None:
                status = answer.status
                request_id = protocol.request_id(answer, key.redaction)
            try:
                return protocol.read(request.endpoint, request.shown_path, answer, key.redaction)
            except AuthenticationError as error:
                if self._api_keys.is_replaced(key):
                    error.key_was_replaced = True
                    what = str(error).removesuffix(error.advice)
                    error.args = (f"{what}the key was replaced meanwhile; try again",)
                raise
        except BaseException as error:
            failure = type(error).__name__
            raise
        finally:
            if listeners is not None:
                seconds = self._now() - started
                # The poller cancels a poll that has taken too long.
                if failure == "CancelledError" and seconds >= self.request_timeout:
                    failure = RequestTimeoutError.__name__
                listeners.tell(
                    RequestEnded(
                        method=request.endpoint.method,
                        route=request.endpoint.route,
                        server=self._server,
                        port=self._port,
                        status=status,
                        error=failure,
                        seconds=seconds,
                        attempt=attempt,
                        request_id=request_id,
                    )
                )

    async def fetch(self, request: protocol.Request[T], *, is_renewal: bool = False) -> T:
        """Send a request and read its answer. Retry transient failures, up to `max_attempts` attempts in total."""
        try:
            answer = await self.send(request, is_renewal=is_renewal)
        except KeylessError as error:
            with self.call():
                return await self._repeat(lambda number: self.send(request, attempt=number), error, _IS_TRANSIENT)
        self.quota.give_back()
        return answer

    async def retry(
        self,
        attempt: Callable[[int], Awaitable[T]],
        may_repeat: Callable[[KeylessError], bool] = _IS_TRANSIENT,
        *,
        lasts: float = 0.0,
    ) -> T:
        """Run an attempt, which gets its number. Repeat it while `may_repeat` allows, up to `max_attempts` in total.

        A call that `lasts` some seconds may have more attempts in that time, unless `max_attempts` is 1.
        """
        until = self._now() + lasts if lasts and self._max_attempts > 1 else None
        try:
            return await attempt(1)
        except KeylessError as error:
            return await self._repeat(attempt, error, may_repeat, until)

    def take_tokens(self, failure: KeylessError, omitted: str) -> bool:
        """Take the tokens for a request after a failure. If there are too few, the failure says what is omitted."""
        if self.quota.take(failure):
            return True
        failure.args = (f"{failure.args[0]}; {omitted}, as too many calls of this client fail",)
        return False

    def _choose_pause(self, error: KeylessError, attempts: int, until: float | None) -> float | None:
        """Return the seconds until the next attempt; None if there is none."""
        asked = _get_retry_after(error) or 0.0
        longest = MAX_RETRY_AFTER if until is None else max(until - self._now(), 0.0)
        has_time = until is not None and longest > 0.0
        if asked > longest or (attempts >= self._max_attempts and not has_time):
            return None
        jitter = next_delay(_FULL_JITTER, attempt_number=attempts, since_start=0.0)
        return max(min(jitter, longest) if has_time else jitter, asked)

    async def _repeat(
        self,
        attempt: Callable[[int], Awaitable[T]],
        error: KeylessError,
        may_repeat: Callable[[KeylessError], bool],
        until: float | None = None,
    ) -> T:
        """Continue after the failure of the first attempt; raise the last failure."""
        earlier: list[KeylessError] = []
        try:
            while (
                may_repeat(error)
                and (pause := self._choose_pause(error, 1 + len(earlier), until)) is not None
                and self.take_tokens(error, "it was not repeated")
            ):
                # A traceback would keep answers alive as long as its error lives.
                earlier.append(error.with_traceback(None))
                await asyncio.sleep(pause)
                try:
                    return await attempt(1 + len(earlier))
                except KeylessError as failure:
                    error = failure
            if earlier and isinstance(error, TransportError | DecodeError | StatusError):
                # A create whose check failed has failed as before.
                error.failures = tuple(dict.fromkeys(each for each in earlier if each is not error))
            raise error
        finally:
            # Otherwise the error and this frame would reference each other.
            del error, earlier

    async def _receive(
        self,
        request: protocol.Request[Any],
        key: ApiKey,
        *,
        is_first: bool = True,
        is_renewal: bool = False,
        has_deadline: bool = True,
    ) -> protocol.RawAnswer:
        """Send a request and return its answer. What goes wrong becomes a `KeylessError` without aiohttp's frames."""
        if self._calls.are_closed:
            raise ClientClosedError("the client is closed; nothing was sent")
        started = time.perf_counter() if logger.isEnabledFor(logging.DEBUG) else 0.0
        outcome: BaseException
        failure: BaseException | None = None
        call = Call(self._calls, self._now() + self.request_timeout) if has_deadline else None
        try:
            if call is None:
                answer = await self._request(request, key, is_first, is_renewal)
            else:
                with call:
                    answer = await self._request(request, key, is_first, is_renewal)
        # Most often, a cancellation.
        except _PROPAGATED as interruption:
            outcome = interruption
            outcome.__context__ = outcome.__cause__ = None
        except BaseException as error:  # noqa: BLE001  # connectors, middlewares and tracing hooks can raise anything
            outcome, failure = self._make_error(request, key, error), error
        else:
            if started:
                elapsed = (time.perf_counter() - started) * 1000
                logger.debug(
                    "%s %s -> %d in %.0f ms", request.endpoint.method, request.shown_path, answer.status, elapsed
                )
            return answer
        _drop_tracebacks(failure, handled=sys.exception())
        # Raised outside the except block and without aiohttp's frames. Their variables include the request's headers,
        # and so the key. Error reporters print the local variables of every frame of a traceback, of its context and of
        # its causes.
        call = failure = None
        try:
            raise outcome.with_traceback(None)
        finally:
            # Otherwise the error and this frame would reference each other.
            del outcome

    async def _request(
        self, request: protocol.Request[Any], key: ApiKey, is_first: bool, is_renewal: bool
    ) -> protocol.RawAnswer:
        """Send a request and return its answer.

        A GET that loses its connection is sent once more, on a new one: a balancer that fails over resets each old
        connection at its next use. If a new connection is lost, the service has failed. Repetitions have new ones.
        """
        endpoint, body, url = request.endpoint, request.body, self._url_of(request)
        response: aiohttp.ClientResponse | None = None
        session, session_of_new_connections = (
            self._untraced_sessions if endpoint.is_personal else (self._session, self._session_of_new_connections)
        )
        options = self._options if self._proxy is None else {**self._options, **options_for(self._proxy)}
        # Only the session of new connections never sends the key by itself.
        if is_first and endpoint.sends_key and not is_renewal:
            headers = None if self._sends_key and body is None else self._choose_headers(key, body)
            try:
                response = await session.request(endpoint.method, url, data=body, headers=headers, **options)
            except _ConnectionLostError as error:
                if endpoint.method != "GET" or error.had_begun:
                    raise
        if response is None:
            headers = self._choose_headers(key if endpoint.sends_key else None, body)
            if is_renewal and not self._owned_sessions:
                headers["Connection"] = "close"  # so the next one is new
            response = await session_of_new_connections.request(
                endpoint.method, url, data=body, headers=headers, **options
            )
        if is_renewal or response.status >= 500:
            self._judge_connections(response, is_renewal)
        stream = response.content
        try:
            # Most bodies arrive with the head.
            content = stream.read_nowait() if stream.is_eof() else await _read(stream, endpoint.max_body)
        # After a cancellation, too, the rest of the answer must not reach the next request.
        except BaseException:
            response.close()
            raise
        if len(content) > endpoint.max_body:
            response.close()
            raise larger_than(endpoint.max_body)
        if _CONTENT_ENCODING in response.headers:
            encoding = key.redaction.redact(", ".join(response.headers.getall(_CONTENT_ENCODING)))
            content = decode_content(content, encoding or "", endpoint.max_body)
        return protocol.RawAnswer(response.status, response.headers, content)

    def _judge_connections(self, response: aiohttp.ClientResponse, is_renewal: bool) -> None:
        """Close a connection that fails and is older than one that was made to find out, and was answered well."""
        if response.status < 500:
            self._renewed_at = self._now()
        elif isinstance(response, _Response) and not is_renewal:
            response.close_if_older(self._renewed_at)

    def _url_of(self, request: protocol.Request[Any]) -> URL:
        url = self._base.with_path(self._base_path + request.path, encoded=True)
        return URL(f"{url}?{request.query}", encoded=True) if request.query else url

    def _choose_headers(self, key: ApiKey | None, body: bytes | None) -> dict[str, str]:
        """Return the headers that the session does not send already."""
        headers = self._headers.copy()
        if key is not None:
            headers["X-Api-Key"] = key.secret.reveal()
        if body is not None:
            headers["Content-Type"] = "application/json"
        return headers

    def _make_error(self, request: protocol.Request[Any], key: ApiKey, failure: BaseException) -> KeylessError:
        """Return the error to raise for a failed exchange."""
        method, path = request.endpoint.method, request.shown_path
        if self._calls.are_closed:
            return ClientClosedError(f"the client was closed during {method} {path}; the request may have taken effect")
        if self._session.closed:
            return ClientClosedError("the session that the client borrowed is closed; close it after the client")
        if isinstance(failure, _ConnectionLostError):
            failure = failure.error
        logger.debug("%s %s failed: %s", method, path, type(failure).__name__)
        if isinstance(failure, UnusableContentError):
            return TransportError(f"{method} {path}: {failure}", method=method, path=path)
        # If connecting failed, nothing was sent. A total timeout does not show how far the exchange got.
        sent = not isinstance(failure, _NOT_CONNECTED)
        cause, tls_error = _find_system_error(failure), _find_tls_error(failure)
        place = None if isinstance(failure, aiohttp.ClientError | OSError) else find_place(failure)
        kind: type[TransportError] = RequestTimeoutError
        what = f"took longer than request_timeout={self.request_timeout:g} s"
        if not isinstance(failure, TimeoutError):
            own = getattr(failure, "os_error", failure)
            words = _describe_tls(tls_error, key.redaction) if tls_error is not None else cause and cause.strerror
            words = words or ("" if own is failure else type(own).__name__)
            reason = type(failure).__name__ + (f": {words}" if words else f" at {place}" if place else "")
            kind, what = TransportError, f"got no answer ({reason})"
        advice = _ADVICE_FOR_CODE if place else self._advise(failure, tls_error)
        error = kind(f"{method} {path} {what}; {advice}", method=method, path=path, sent=sent)
        error.__cause__ = cause
        return error

    def _advise(self, failure: BaseException, tls_error: ssl.SSLError | None) -> str:
        """Return what to do about an exchange without an answer."""
        if advice := tls_error and self._advise_on_tls(tls_error):
            return advice
        if isinstance(failure, aiohttp.ClientHttpProxyError):
            wrong = f"it must let a tunnel to {self._server}:{self._port} pass"
            if failure.status == 407:
                wrong = "check its URL, user name and password"
            return f"the proxy refused with {failure.status}; {wrong}"
        if isinstance(failure, aiohttp.ClientProxyConnectionError):
            return "the proxy cannot be reached; check its URL"
        if isinstance(failure, aiohttp.ClientResponseError):
            return "what came is not well-formed HTTP/1.1; check base_url"
        # A firewall that drops what does not come from the proxy lets connecting time out.
        if self._proxy is None and isinstance(failure, (*_NOT_CONNECTED, TimeoutError)):
            why = why_unused(str(self._base), None if self._owned_sessions else self._session)
            if why is not None:
                return f"$HTTPS_PROXY (or $ALL_PROXY) is set, but not used: {why}"
        return "try again later"

    def _advise_on_tls(self, error: ssl.SSLError) -> str | None:
        if not isinstance(error, ssl.SSLCertVerificationError):
            return _TLS_ADVICE.get(getattr(error, "reason", ""))  # a hook's may lack it
        if getattr(error, "verify_code", 0) in _STRICT:
            return "from 3.13 on, Python checks this: renew the authority's certificate, or lend a session"
        named = "; name a private one in $SSL_CERT_FILE before the process starts" if self._owned_sessions else ""
        return f"check base_url, and which authorities the session trusts{named}"


class _ConnectionLostError(aiohttp.ClientConnectionError):
    """The connection was lost before the head of an answer was complete. aiohttp repeats nothing after this error.

    `had_begun` says whether a part of an answer is known to have arrived.
    """

    def __init__(self, error: aiohttp.ClientOSError | aiohttp.ServerDisconnectedError) -> None:
        super().__init__()
        self.error = error
        self.had_begun = isinstance(error, aiohttp.ServerDisconnectedError) and not isinstance(error.message, str)


class _Response(aiohttp.ClientResponse):
    """An answer on one of our own sessions.

    By itself, aiohttp repeats a GET or a DELETE if the connection is lost, on the next one of its pool, which may be as
    dead. The 404 of a second DELETE would look like an answer to the first. It also takes what arrived on a connection
    while that was idle for the answer to the next request, whose own answer then goes to the one after it. And it takes
    any number of interim answers, and before 3.13.4 of headers and trailers.
    """

    _handler: ResponseHandler
    _made_at: float

    def close_if_older(self, at: float) -> None:
        """Close a connection that was made before that time, once the body is read."""
        if self._made_at >= at:
            return
        if self.connection is not None:
            self._handler.force_close()
        else:  # it is read, and the connection is in the pool again
            self._handler.close()

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        handler, transport = connection.protocol, connection.transport
        # The loop has not read since this request was written.
        if handler is None or transport is None or handler.should_close:
            raise _ConnectionLostError(aiohttp.ServerDisconnectedError())
        self._handler = handler
        now = self._loop.time()
        meter = transport.get_protocol()
        if isinstance(meter, Meter):
            meter.start()
        else:
            transport.set_protocol(meter := Meter(handler, transport, now))
            _limit_silence(transport)
        self._made_at = meter.made_at
        if now - meter.made_at >= _MAX_AGE:
            handler.force_close()
        try:
            await super().start(connection)
        except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
            raise _ConnectionLostError(error) from error
        meter.start_body(self.content)
        return self


def _limit_silence(transport: asyncio.Transport) -> None:
    """Let the system give this connection up after `_MAX_SILENCE`, if it can.

    The first request is written by then, but counts. Connecting has a limit of its own, and a proxy's tunnel ends with
    the request: aiohttp 3.10 has no earlier place for an option.
    """
    option: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)  # Linux has it
    connected: socket.socket | None = transport.get_extra_info("socket")  # None if TLS has lost the connection
    if option is not None and connected is not None:
        with contextlib.suppress(OSError):  # a system that knows the option, but refuses it
            connected.setsockopt(socket.IPPROTO_TCP, option, _MAX_SILENCE)


class _Request(aiohttp.ClientRequest):
    """A request on one of our own sessions, whose headers are all there. By itself, aiohttp copies them one by one."""

    def update_headers(self, headers: CIMultiDict[str]) -> None:  # type: ignore[override]  # what a session passes
        self.headers = headers


def _make_host(base: URL) -> str:
    """Return the header as aiohttp makes it: without a final dot, which TLS certificates do not have."""
    return base.with_host((base.raw_host or "").rstrip(".")).raw_authority


def _make_session(
    headers: dict[str, str], settings: dict[str, Any], *, force_close: bool = False
) -> aiohttp.ClientSession:
    """Make a session; it sends these headers with each request, the host first."""
    return aiohttp.ClientSession(
        # The poller limits the polls in flight, at a lower cost.
        connector=aiohttp.TCPConnector(limit=0, force_close=force_close, ttl_dns_cache=_MAX_NAME_AGE),
        headers=headers,
        **settings,
    )


def _make_untraced(session: aiohttp.ClientSession, settings: dict[str, Any]) -> aiohttp.ClientSession:
    """Make a session like this one, on its connections, whose URLs no instrumentation of aiohttp sees."""
    untraced = aiohttp.ClientSession(
        connector=session.connector, connector_owner=False, headers=session.headers, **settings
    )
    untraced.trace_configs.clear()
    return untraced


async def _read(content: aiohttp.StreamReader, max_body: int) -> bytes:
    """Return the body as it arrives, or its beginning if it has more than `max_body` bytes."""
    chunks: list[bytes] = []
    size = 0
    while size <= max_body and not content.at_eof():
        chunk = await content.readany()
        size += len(chunk)
        chunks.append(chunk)
    return b"".join(chunks)


def _get_retry_after(error: KeylessError) -> float | None:
    # A failed check of a create is the cause of the create's own failure.
    newest = error.__cause__ if isinstance(error.__cause__, KeylessError) else error
    return newest.retry_after if isinstance(newest, StatusError) else None


def _drop_tracebacks(failure: BaseException | None, *, handled: BaseException | None) -> None:
    """Drop the tracebacks of a failure and of the exceptions behind it.

    aiohttp's frames reference the failure. Without this, they, the request's headers and the socket would stay until
    the garbage collector runs. Python has chained the failure to an exception that the caller was handling when it made
    the call, but that one's traceback is the caller's.
    """
    while failure is not None and failure is not handled and failure.__traceback__ is not None:
        failure.__traceback__ = None
        failure = failure.__cause__ or failure.__context__


def _describe_tls(tls_error: ssl.SSLError, redaction: Redaction) -> str | None:
    """Return OpenSSL's reason, redacted: a hook may raise such an error with any text, even with the key."""
    words = getattr(tls_error, "verify_message", None) or getattr(tls_error, "reason", None)
    return redaction.redact(words if isinstance(words, str) else "TLS failed")


def _find_tls_error(failure: BaseException) -> ssl.SSLError | None:
    """Return the TLS error of a failure.

    While connecting, aiohttp's error wraps it, in different versions under different names. Later, it is the cause of
    an OSError.
    """
    wrapped = (getattr(failure, name, None) for name in ("os_error", "certificate_error"))
    for error in (*wrapped, failure, failure.__cause__):
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
