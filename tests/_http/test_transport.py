"""The HTTP of single calls: what is tried again and when, what is cut off, what is left behind, what is never shown."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import itertools
import logging
import math
import os
import re
import socket
import ssl
import subprocess
import sys
import tracemalloc
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp_version import may_not_leak, needs_free_sessions
from mocked_service import URL, MockedService
from raw_server import RawServer, answer, drip, failure, hang, now, operation, refused, reset, then_hang, unanswered
from waiting import spin_until

from aiokeyless import (
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    DecodeError,
    KeylessClient,
    KeylessError,
    NotFoundError,
    RateLimitError,
    RequestTimeoutError,
    Secret,
    ServerError,
    StatusError,
    TransportError,
    __version__,
)
from aiokeyless._http import protocol, proxies, transport
from aiokeyless._http.keys import ApiKeys

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator
    from pathlib import Path

    from raw_server import Handler

    from aiokeyless.sandbox import Sandbox

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

USER = "C0FFEE"
KEY = "k3y/S3CRET+odd"
MIB = 1 << 20
OWN_NAME = f"aiokeyless/{__version__}"
TRUNCATED = answer(b"{", length=100)
NOTHING = answer(b"", status=b"404 Not Found")
BUSY = answer(b"busy", b"Retry-After: 30", status=b"503 Busy")
START = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{"


@pytest.fixture
def sandbox(keyless_sandbox: Sandbox) -> Sandbox:
    keyless_sandbox.approve("a", user_id=USER)
    return keyless_sandbox


@pytest.fixture
async def session() -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as borrowed:
        yield borrowed


@pytest.fixture(params=["own session", "borrowed session"])
def lent(request: pytest.FixtureRequest, session: aiohttp.ClientSession) -> aiohttp.ClientSession | None:
    return session if request.param == "borrowed session" else None


def once(url: str, **options: Any) -> KeylessClient:
    """Make a client that tries once."""
    return KeylessClient(KEY, base_url=url, max_attempts=1, **options)


async def asked(*answers: bytes | Handler, **options: Any) -> object:
    """What a client makes of a server's answers, tried once."""
    async with RawServer(*answers) as server, once(server.url, **options) as client:
        return await client.get_operation("a")


async def failed(*answers: bytes | Handler, **options: Any) -> KeylessError:
    """How a client fails with a server's answers, tried once."""
    return await failure(asked(*answers, **options))


def pauses(sandbox: Sandbox) -> list[float]:
    times = [record.at for record in sandbox.requests]
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.fixture
def longest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let chance choose the longest pause always."""
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda _low, high: high)


@pytest.fixture
def shortest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda low, _high: low)


# What is tried again


TRANSIENT: dict[str, bytes | Handler] = {
    **{f"{status}": answer(b"", status=b"%d Oh" % status) for status in (408, 425, 429, 500, 502, 503, 504, 599)},
    "a page of a gateway": answer(b"<html>Sign in</html>"),
    "a cut off answer": TRUNCATED,
    "no answer": hang,
}


@pytest.mark.parametrize("transient", TRANSIENT.values(), ids=TRANSIENT.keys())
async def test_transient_failure_is_tried_again(transient: bytes | Handler) -> None:
    async with (
        RawServer(transient, transient, answer(operation())) as server,
        KeylessClient(KEY, base_url=server.url) as client,
    ):
        assert (await client.get_operation("a")).operation_id == "a"
        assert len(server.heads) == 3


@pytest.mark.parametrize("attempts", [2, 3, 7])
async def test_last_failure_is_raised_when_the_attempts_are_used_up(sandbox: Sandbox, attempts: int) -> None:
    sandbox.fail_next(500, times=attempts - 1)
    sandbox.fail_next(502, times=None)
    async with sandbox.client(max_attempts=attempts) as client:
        error = await failure(client.get_operation("a"))
    assert isinstance(error, ServerError)
    assert error.status == 502
    assert sandbox.request_count == attempts


@pytest.mark.parametrize(
    ("lasting", "kind"), [({"status": 401}, AuthenticationError), ({"body": b'{"id": 1}'}, DecodeError)]
)
async def test_lasting_failure_ends_the_attempts(
    mocked: MockedService, lasting: dict[str, Any], kind: type[KeylessError]
) -> None:
    for options in ({"status": 503}, lasting):
        mocked.get("/v2/operations/a", **options)
    async with KeylessClient(KEY, base_url=URL) as client:
        assert type(await failure(client.get_operation("a"))) is kind


# When it is tried again


@pytest.mark.usefixtures("longest")
async def test_longest_pause_doubles_from_a_quarter_second_up_to_30(sandbox: Sandbox) -> None:
    sandbox.fail_next(503, times=None)
    async with sandbox.client(max_attempts=10) as client:
        await failure(client.get_operation("a"))
    assert pauses(sandbox) == pytest.approx([0.25, 0.5, 1, 2, 4, 8, 16, 30, 30], abs=1e-3)


@pytest.mark.usefixtures("shortest")
async def test_shortest_pause_is_next_to_none(sandbox: Sandbox) -> None:
    sandbox.fail_next(503, times=None)
    async with sandbox.client(max_attempts=5) as client:
        await failure(client.get_operation("a"))
    assert pauses(sandbox) == pytest.approx([0.02] * 4, abs=1e-3)


@pytest.mark.usefixtures("longest")
@pytest.mark.parametrize("status", [429, 503, 500, 408])
async def test_next_attempt_is_made_when_the_service_wants_it(
    sandbox: Sandbox, client: KeylessClient, status: int
) -> None:
    sandbox.fail_next(status, retry_after=30)
    sandbox.fail_next(status, retry_after=2.5)
    assert (await client.get_operation("a")).is_approved
    assert pauses(sandbox) == pytest.approx([30, 2.5], abs=1e-3)


@pytest.mark.usefixtures("longest")
async def test_service_does_not_shorten_the_pause(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.fail_next(503, retry_after=0)
    await client.get_operation("a")
    assert pauses(sandbox) == pytest.approx([0.25], abs=1e-3)


@pytest.mark.parametrize(("status", "earlier"), [(429, 0), (503, 0), (503, 1)])
async def test_longer_than_30_seconds_is_for_the_caller_to_decide(
    sandbox: Sandbox, client: KeylessClient, status: int, earlier: int
) -> None:
    for _ in range(earlier):
        sandbox.fail_next(503)
    sandbox.fail_next(status, retry_after=31)
    started = now()
    error = await failure(client.get_operation("a"))
    assert isinstance(error, RateLimitError | ServerError)
    assert error.retry_after == 31
    assert now() - started <= 0.25 * earlier + 1e-3
    assert sandbox.request_count == 1 + earlier


# The time of one exchange


ENDLESS: dict[str, Handler] = {
    "no answer": hang,
    "half a status line": then_hang(b"HTTP/1.1 2"),
    "half of the headers": then_hang(b"HTTP/1.1 200 OK\r\nContent-Le"),
    "headers and no body": then_hang(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"),
    "half a body": then_hang(START),
    "a body that is whole at the limit": then_hang(b"HTTP/1.1 200 OK\r\n\r\n" + operation().ljust(MIB)),
    "half a chunk": then_hang(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{"),
    "a body without end": drip(b"HTTP/1.1 200 OK\r\n\r\n", b" "),
    "chunks without end": drip(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "headers without end": drip(b"HTTP/1.1 200 OK\r\nX-Slow: ", b"a"),
    "100 Continue without end": drip(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
}


@pytest.mark.parametrize("handler", ENDLESS.values(), ids=ENDLESS.keys())
async def test_exchange_ends_after_request_timeout(handler: Handler) -> None:
    async with RawServer(handler) as server, once(server.url, request_timeout=7.3) as client:
        started = now()
        error = await failure(client.get_operation("a"))
        assert now() - started == pytest.approx(7.3, abs=1e-3)
        assert isinstance(error, RequestTimeoutError)
        assert isinstance(error, TimeoutError)
        assert (error.method, error.path, error.sent) == ("GET", "/v2/operations/a", True)
        await asyncio.sleep(1)  # a server that drips notices with the next drop
        assert not server.connections


@pytest.mark.parametrize("seconds", [0.3, 4.9, 5.0, 5.4, 12.5, 100.1])
async def test_request_timeout_is_exact(seconds: float) -> None:
    async with RawServer(hang) as server, once(server.url, request_timeout=seconds) as client:
        await asyncio.sleep(0.77)  # aiohttp likes to round to whole seconds of the loop's clock
        started = now()
        error = await failure(client.get_operation("a"))
        assert now() - started == pytest.approx(seconds, abs=1e-3)
    assert f"request_timeout={seconds:g} s" in str(error)


async def test_connecting_counts_into_request_timeout_and_may_need_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    monkeypatch.setattr(proxies, "is_loopback", lambda _: False)
    with unanswered() as url:
        async with once(url.replace("http:", "https:"), request_timeout=6.2) as client:
            started = now()
            error = await failure(client.get_operation("a"))
            assert isinstance(error, RequestTimeoutError)
            assert str(error).endswith("with trust_env=True")
            assert now() - started == pytest.approx(6.2, abs=1e-3)


async def test_each_attempt_has_its_own_request_timeout(sandbox: Sandbox) -> None:
    sandbox.latency = 2
    async with sandbox.client(request_timeout=1.5) as client:
        started = now()
        await failure(client.get_operation("a"))
        assert 4.5 <= now() - started <= 5.25 + 1e-3
    assert sandbox.request_count == 3


async def test_each_of_two_calls_at_once_has_its_own_request_timeout() -> None:
    async with RawServer(hang) as server, once(server.url, request_timeout=5) as client:
        started = now()
        creation = asyncio.create_task(failure(client.create_operation(USER)))
        await asyncio.sleep(2)
        error = await failure(client.get_operation("a"))
        assert now() - started == pytest.approx(2 + 5, abs=1e-3)
        assert isinstance(error, RequestTimeoutError)
        assert isinstance(await creation, RequestTimeoutError)
        assert now() - started == pytest.approx(2 * 5, abs=1e-3)  # the create was checked


# No answer


async def test_refused_connection_was_not_sent() -> None:
    async with once(refused()) as client:
        error = await failure(client.get_operation("a"))
    assert type(error) is TransportError
    assert not error.sent
    assert (error.method, error.path) == ("GET", "/v2/operations/a")
    assert "ClientConnectorError" in str(error)


async def test_host_without_an_address_is_told_in_the_words_of_the_resolver(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(*_: object, **__: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolve)
    async with once("https://nowhere.example") as client:
        error = await failure(client.get_operation("a"))
    assert isinstance(error, TransportError)
    assert "Error: Name or service not known); " in str(error)
    assert repr(error.__cause__) == "gaierror(-2, 'Name or service not known')"
    assert not error.sent


async def test_failed_tls_was_not_sent() -> None:
    def plain(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(answer(operation()))
        writer.close()

    async with (
        await asyncio.start_server(plain, "127.0.0.1", 0) as server,
        once(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client,
    ):
        error = await failure(client.get_operation("a"))
    assert type(error) is TransportError
    assert re.search(
        r"got no answer \(ClientConnectorSSLError: [A-Z_]+\); what answers there speaks no TLS; check", str(error)
    )
    assert error.__cause__ is None
    assert not error.sent


async def test_service_whose_certificate_is_not_trusted_is_sent_nothing(certificate: tuple[Path, Path]) -> None:
    heard: list[bytes] = []

    async def hear(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.read(1))
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    async with (
        await asyncio.start_server(hear, "127.0.0.1", 0, ssl=context) as server,
        once(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client,
    ):
        error = await failure(client.get_operation("a"))
    assert type(error) is TransportError
    assert re.search(
        r"got no answer \(ClientConnectorCertificateError: self.signed certificate\); check base_url, and which "
        r"authorities the session trusts; name a private one in \$SSL_CERT_FILE before the process starts$",
        str(error),
    )
    assert error.__cause__ is None  # OpenSSL's number 1 is not the operating system's
    assert not error.sent
    assert heard == []


async def test_tls_that_fails_after_the_handshake_is_told_in_the_words_of_openssl(
    certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")  # which is no advice once a connection was made

    async def garbage(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        os.write(writer.get_extra_info("socket").fileno(), b"no record of TLS")
        await reader.read()
        writer.close()

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    trusting.check_hostname = False
    async with (
        await asyncio.start_server(garbage, "127.0.0.1", 0, ssl=context) as server,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=trusting)) as session,
        once(f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}", session=session) as client,
    ):
        error = await failure(client.get_operation("a"))
    # OpenSSL's name of it, which depends on its version; Python does not know all of them.
    assert re.search(r"got no answer \(ClientOSError: ([A-Z_]+|TLS failed)\); try again later$", str(error))
    assert error.__cause__ is None


BROKEN: dict[str, bytes | Handler] = {
    "reset": reset,
    "closed": b"",
    "half of the headers": b"HTTP/1.1 200 OK\r\nContent-Le",
    "cut off": TRUNCATED,
    "cut off in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n20\r\n{}",
    "no chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
    "no second chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\nzz",
    "no HTTP": b"220 mail.example ESMTP\r\n\r\n",
    "headers without end": answer(b"{}", b"X-Long: " + b"a" * 9000),
    "two lengths": answer(operation(), b"Content-Length: 3"),
}


@pytest.mark.real_clock
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN.keys())
async def test_broken_answer_is_a_transport_error(broken: bytes | Handler) -> None:
    error = await failed(broken)
    assert type(error) is TransportError
    assert error.sent
    assert str(error).startswith("GET /v2/operations/a got no answer (")


async def test_broken_answer_breaks_no_other_call() -> None:
    async with RawServer(BROKEN["no chunk size"], answer(operation())) as server, once(server.url) as client:
        await failure(client.get_operation("a"))
        assert (await client.get_operation("a")).operation_id == "a"


# Compressed answers


@pytest.mark.parametrize("encoding", [b"gzip", b"GZip"])
async def test_gzip_of_a_gateway_is_read(lent: aiohttp.ClientSession | None, encoding: bytes) -> None:
    assert await asked(answer(gzip.compress(operation()), b"Content-Encoding: " + encoding), session=lent)


@pytest.mark.parametrize(
    ("body", "encoding", "words"),
    [
        (gzip.compress(operation())[:-9], b"gzip", "the gzip of the answer is truncated"),
        (operation(), b"gzip\r\nContent-Encoding: br", "the content encoding gzip, br, but none was accepted"),
    ],
    ids=["truncated", "two headers"],
)
@pytest.mark.parametrize("status", [b"200 OK", b"503 Busy"])
async def test_any_other_encoding_is_a_transient_error_that_names_it(
    lent: aiohttp.ClientSession | None, body: bytes, encoding: bytes, words: str, status: bytes
) -> None:
    error = await failed(answer(body, b"Content-Encoding: " + encoding, status=status), session=lent)
    assert type(error) is TransportError
    assert str(error).startswith("GET /v2/operations/a: ")
    assert str(error).endswith(words)
    assert error.is_transient
    assert error.sent


async def test_empty_content_encoding_is_none() -> None:
    assert await asked(answer(operation(), b"Content-Encoding: "))


# Answers over the limit


def with_length(body: bytes) -> bytes:
    return answer(body)


def without_length(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n\r\n" + body


def in_chunks(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


def gzipped(body: bytes) -> bytes:
    return answer(gzip.compress(body, 1), b"Content-Encoding: gzip")


FRAMINGS = [with_length, without_length, in_chunks, gzipped]


@pytest.mark.parametrize("frame", FRAMINGS)
async def test_answer_of_a_mebibyte_is_read(frame: Callable[[bytes], bytes]) -> None:
    assert await asked(frame(operation().ljust(MIB)))


@pytest.mark.real_clock
@pytest.mark.parametrize("frame", FRAMINGS)
async def test_answer_of_more_is_cut_off(frame: Callable[[bytes], bytes]) -> None:
    async with RawServer(frame(operation().ljust(MIB + 1))) as server, once(server.url) as client:
        error = await failure(client.get_operation("a"))
        assert type(error) is TransportError
        assert error.sent
        assert f"larger than {MIB} bytes" in str(error)
        await spin_until(lambda: not server.connections)


@pytest.mark.parametrize("status", [b"200 OK", b"404 Not Found", b"500 Oh"])
async def test_limit_goes_for_every_status(status: bytes) -> None:
    assert type(await failed(answer(b" " * (MIB + 1), status=status))) is TransportError


async def test_pending_list_of_16_mebibytes_is_read_and_one_of_more_cut_off() -> None:
    lists = answer(b"[]".ljust(16 * MIB)), gzipped(b"[]".ljust(16 * MIB + 1))
    async with RawServer(*lists) as server, once(server.url) as client:
        assert await client.get_pending_operations(USER) == []
        assert f"larger than {16 * MIB} bytes" in str(await failure(client.get_pending_operations(USER)))


@pytest.mark.parametrize("settings", [{}, {"read_bufsize": sys.maxsize}], ids=["as it is", "buffers without end"])
async def test_bomb_takes_little_memory(settings: dict[str, Any]) -> None:
    bomb = gzipped(bytes(64 * MIB))
    async with (
        RawServer(bomb) as server,
        aiohttp.ClientSession(**settings) as session,
        once(server.url, session=session) as client,
    ):
        tracemalloc.start()
        try:
            error = await failure(client.get_operation("a"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert "larger than" in str(error)
    assert peak < 6 * MIB


async def test_answer_without_end_is_cut_off() -> None:
    error = await failed(drip(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 100_000, every=0), request_timeout=60)
    assert "larger than" in str(error)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
INTERIM = b"HTTP/1.1 100\r\n\r\n"
BESIDE_THE_BODY: dict[str, Handler] = {
    "interim answers": drip(b"", INTERIM * 20_000, every=0),
    "interim answers, a few at a time": drip(b"", INTERIM * 8, every=0.001),
    "headers": drip(b"HTTP/1.1 200 OK\r\n", b"A: b\r\n" * 20_000, every=0),
    "framing of chunks": drip(CHUNKED, b"1;%b\r\n \r\n" % (b"a" * 4000), every=0.001),
    "trailers": drip(CHUNKED + b"2\r\n{}\r\n0\r\n", b"A: b\r\n" * 20_000, every=0),
}


@pytest.mark.parametrize("flood", BESIDE_THE_BODY.values(), ids=BESIDE_THE_BODY.keys())
async def test_what_comes_without_end_beside_a_body_is_cut_off_and_takes_little_memory(flood: Handler) -> None:
    async with RawServer(flood) as server, once(server.url, request_timeout=60) as client:
        started = now()
        tracemalloc.start()
        try:
            error = await failure(client.get_operation("a"))
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert now() - started < 2
        await asyncio.sleep(1)  # a server that drips notices with the next drop
        assert not server.connections
    assert type(error) is TransportError
    assert peak < 8 * MIB


@pytest.mark.parametrize("flood", ["interim answers, a few at a time", "framing of chunks"])
async def test_what_is_beside_a_body_is_bounded_by_bytes(flood: str) -> None:
    error = await failed(BESIDE_THE_BODY[flood])
    assert str(error) == "GET /v2/operations/a: the answer has over 65536 bytes beside its body; check base_url"


async def test_body_in_the_smallest_chunks_after_some_interim_answers_is_read() -> None:
    body = operation(operationPayload="x" * 200_000)
    chunks = b"".join(b"5\r\n%b\r\n" % body[k : k + 5].ljust(5) for k in range(0, len(body), 5))
    assert await asked(INTERIM * 8 + CHUNKED + chunks + b"0\r\n\r\n")


async def test_headers_of_many_answers_on_one_connection_do_not_add_up() -> None:
    good = b"HTTP/1.1 200 OK\r\nX-Long: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        b"a" * 8000,
        len(operation()),
        operation(),
    )

    async def keep(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(19):
            writer.write(good)
            await reader.readuntil(b"\r\n\r\n")
        writer.write(good)
        await reader.read()

    async with RawServer(keep) as server, once(server.url) as client:
        for _ in range(20):
            assert (await client.get_operation("a")).operation_id == "a"
        assert len(server.heads) == 1


# The key stays here


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirect_is_not_followed(mocked: MockedService, status: int) -> None:
    for answered in (status, 503, status):
        mocked.get("/v2/operations/a", status=answered, headers={"Location": f"{URL}/elsewhere"})
    async with KeylessClient(KEY, base_url=URL) as client:
        for _ in range(2):
            error = await failure(client.get_operation("a"))
            assert type(error) is StatusError
            assert error.status == status
            assert "redirect" in str(error)
    assert len(mocked.sent_headers) == 3


async def test_cookies_are_not_kept() -> None:
    async with (
        RawServer(answer(operation(), b"Set-Cookie: session=1; Path=/")) as server,
        once(server.url.replace("127.0.0.1", "localhost")) as client,  # aiohttp keeps no cookies of an IP address
    ):
        for _ in range(2):
            await client.get_operation("a")
        assert b"cookie" not in server.heads[1].lower()


@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_proxy_is_advised_for_this_machine(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setenv("HTTPS_PROXY", refused())
    async with once(refused().replace("http:", f"{scheme}:")) as client:
        error = await failure(client.get_operation("a"))
    assert "HTTPS_PROXY" not in str(error)
    assert str(error).endswith("try again later")


@pytest.mark.parametrize(
    "start",
    [
        *(b"HTTP/1.1 200 OK\r\nNo Name: 1", b"HTTP/1.1 two OK", b"HTTP/1.1 200 OK\r\nContent-Length: x"),
        b"\x00\x00\x00\x04\x00\x00\x00\x00\x00",
    ],
    ids=["header", "status", "length", "HTTP/2"],
)
async def test_malformed_answer_is_blamed_on_the_address(start: bytes) -> None:
    async with RawServer(start + b"\r\n\r\n") as gateway, once(gateway.url) as client:
        error = await failure(client.get_operation("txn-1"))
    assert str(error).endswith("what came is not well-formed HTTP/1.1; check base_url")


ECHOES: dict[str, bytes | Handler] = {
    "a reset": reset,
    "silence": hang,
    "a closed connection": b"",
    **{
        name: raw.replace(b"KEY", KEY.encode())
        for name, raw in {
            "a status line": b"KEY/1.1 200 OK\r\n\r\n",
            "a status": b"HTTP/1.1 KEY OK\r\n\r\n",
            "a reason": b"HTTP/1.1 500 KEY\r\nContent-Length: 0\r\n\r\n",
            "a header": b"HTTP/1.1 200 OK\r\nX-Api-Key KEY\r\n\r\n",
            "the name of a header": b"HTTP/1.1 200 OK\r\nKEY\x00: 1\r\n\r\n",
            "a control character": b"HTTP/1.1 200 OK\r\nX-Api-Key: KEY\x00\r\n\r\n",
            "a long header": answer(b"", b"X-Long: " + b"KEY " * 3000),
            "a length": b"HTTP/1.1 200 OK\r\nContent-Length: KEY\r\n\r\n",
            "a transfer encoding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: KEY\r\n\r\n",
            "a content encoding": answer(b"KEY", b"Content-Encoding: KEY"),
            "a chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nKEY\r\n\r\n",
            "a later chunk size": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\n{\r\nKEY\r\n\r\n",
            "a trailer": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nKEY\x00\r\n\r\n",
            "a gzip": answer(b"KEY", b"Content-Encoding: gzip"),
            "a deflate": answer(b"KEY", b"Content-Encoding: deflate"),
            "a redirect": answer(b"", b"Location: https://KEY@[", status=b"302 Found"),
            "a cookie": answer(b"", b"Set-Cookie: KEY\xff=KEY; KEY", status=b"400 Bad"),
            "a request id": answer(b"", b"X-Request-Id: KEY", status=b"500 Oh"),
            "a request id of a good answer": answer(b"[]", b"X-Request-Id: KEY"),
            "a wait": answer(b"", b"Retry-After: KEY", status=b"503 Busy"),
            "a date": answer(b"", b"Date: KEY", b"Retry-After: Wed, 21 Oct 2015 07:28:00 GMT", status=b"503 Busy"),
            "a page": answer(b"<html>KEY</html>", b"Content-Type: KEY"),
            "a value": answer(b'{"id": "KEY", "KEY": "KEY"}'),
            "a bad UTF-8": answer(b'{"timestamp": "KEY\xff"}'),
            "a refusal": answer(b"wrong key: KEY", status=b"401 No"),
            "a conflict": answer(b'{"key": "KEY"}', status=b"409 No"),
            "a cut off answer": answer(b'"KEY', length=1000),
            "a switch": b"HTTP/1.1 101 KEY\r\nUpgrade: KEY\r\nConnection: upgrade\r\n\r\nKEY",
        }.items()
    },
}


def shown(error: BaseException) -> Iterator[str]:
    """All texts that an error shows, and those that its causes, its context and its facts show."""
    left: list[object] = [error]
    seen: set[int] = set()
    while left:
        thing = left.pop()
        if thing is None or id(thing) in seen:
            continue
        seen.add(id(thing))
        yield f"{thing} {thing!r}"
        if isinstance(thing, BaseException):
            left += [thing.__cause__, thing.__context__, thing.args, vars(thing), getattr(thing, "__notes__", None)]
            left += [
                getattr(thing, name)
                for name in ("os_error", "filename", "headers", "request_info", "message")
                if hasattr(thing, name)
            ]
        elif isinstance(thing, dict):
            left += [*thing, *thing.values()]
        elif isinstance(thing, list | tuple):
            left += thing


def logged(caplog: pytest.LogCaptureFixture) -> Iterator[str]:
    formatter = logging.Formatter()
    for record in caplog.records:
        yield f"{formatter.format(record)} {record.args!r} {record.msg!r}"


@pytest.mark.parametrize("echo", ECHOES.values(), ids=ECHOES.keys())
async def test_no_failure_shows_the_key(
    lent: aiohttp.ClientSession | None, echo: bytes | Handler, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with (
        RawServer(echo) as server,
        KeylessClient(KEY, base_url=server.url, session=lent, max_attempts=2) as client,
    ):
        errors = [
            await failure(client.get_operation("a")),
            await failure(client.create_operation(USER, operation_payload="Pay")),
        ]
    for text in [*(text for error in errors for text in shown(error)), *logged(caplog)]:
        assert KEY not in text
        assert "S3CRET" not in text


# The log


def own(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "aiokeyless"]


async def test_each_exchange_is_logged(
    sandbox: Sandbox, client: KeylessClient, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "aiokeyless")
    sandbox.fail_next(503, body=b"a body")
    await client.get_operation("a")
    refusal, success = own(caplog)
    assert re.fullmatch(r"GET /v2/operations/a -> 503 in \d+ ms", refusal)
    assert re.fullmatch(r"GET /v2/operations/a -> 200 in \d+ ms", success)
    assert {record.levelname for record in caplog.records} == {"DEBUG"}


async def test_failed_exchange_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "aiokeyless")
    await failed(TRUNCATED)
    assert own(caplog) == ["GET /v2/operations/a failed: ClientPayloadError"]


def test_log_without_handlers_prints_nothing() -> None:
    program = "import logging, aiokeyless; logging.getLogger('aiokeyless').warning('Keyless fails')"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert run.stderr == b""


# A borrowed session


@pytest.mark.parametrize(
    ("limit", "per_host", "most"), [(100, 0, 100), (0, 0, math.inf), (100, 20, 20), (0, 30, 30), (10, 20, 10)]
)
async def test_a_borrowed_session_bounds_the_polls_in_flight(
    sandbox: Sandbox, limit: int, per_host: int, most: float
) -> None:
    connector = aiohttp.TCPConnector(limit=limit, limit_per_host=per_host)
    async with aiohttp.ClientSession(connector=connector) as session, sandbox.client(session=session) as client:
        assert client._open().transport.max_connections == most


async def test_a_session_without_a_connector_bounds_nothing(
    sandbox: Sandbox, session: aiohttp.ClientSession, client: KeylessClient
) -> None:
    assert client._open().transport.max_connections == math.inf
    await session.close()
    async with sandbox.client(session=session) as closed:
        assert closed._open().transport.max_connections == math.inf


@pytest.mark.parametrize(
    ("headers", "name"),
    [({"user-agent": "shop/2", "X-Api-Key": "another"}, f"shop/2 {OWN_NAME}"), ({"X-Mine": "1"}, OWN_NAME)],
)
async def test_headers_of_a_borrowed_session_are_sent_with_ours_which_are_not_put_on_it(
    mocked: MockedService, headers: dict[str, str], name: str
) -> None:
    mocked.get("/v2/operations/a", body=operation())
    async with aiohttp.ClientSession(headers=headers) as session, once(URL, session=session) as client:
        await client.get_operation("a")
        assert dict(session.headers) == headers
    [sent] = mocked.sent_headers
    assert (sent["User-Agent"], sent["X-Api-Key"], sent.get("X-Mine")) == (name, KEY, headers.get("X-Mine"))


SETTINGS: dict[str, dict[str, Any]] = {
    "statuses raise": {"raise_for_status": True},
    "no unzipping": {"auto_decompress": False},
    "a short timeout": {"timeout": aiohttp.ClientTimeout(total=0.1, sock_read=0.1, sock_connect=0.1)},
    "headers": {"headers": {"X-Api-Key": "other", "Accept": "text/html", "User-Agent": "other", "Content-Type": "x/y"}},
    "headers left out": {"skip_auto_headers": ["Accept", "User-Agent", "Content-Type"]},
    "tiny buffers": {"read_bufsize": 1},
}


@pytest.mark.parametrize(
    "settings",
    [
        *(pytest.param(setting, id=name) for name, setting in SETTINGS.items()),
        pytest.param({"base_url": "http://127.0.0.1:9/other/"}, id="a base URL", marks=needs_free_sessions),
    ],
)
async def test_settings_of_a_borrowed_session_do_not_matter(sandbox: Sandbox, settings: dict[str, Any]) -> None:
    sandbox.latency = 1
    async with aiohttp.ClientSession(**settings) as session, sandbox.client(session=session) as client:
        await client.create_operation(USER, operation_id="b")
        assert (await client.get_operation("b")).operation_id == "b"
        assert isinstance(await failure(client.get_operation("c")), NotFoundError)
        sandbox.fail_next(200, body=gzip.compress(operation()), headers={"Content-Encoding": "gzip"})
        assert (await client.get_operation("a")).user_id == USER


async def test_session_that_its_owner_closed_ends_the_call(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    async with sandbox.client(session=session) as client:
        await client.get_operation("a")
        await session.close()
        started = now()
        error = await failure(client.get_operation("a"))
    assert isinstance(error, ClientClosedError)
    assert "borrowed" in str(error)
    assert now() == pytest.approx(started, abs=1e-3)


async def test_session_that_its_owner_closes_ends_the_call_under_way(session: aiohttp.ClientSession) -> None:
    async with RawServer(hang) as server, KeylessClient(KEY, base_url=server.url, session=session) as client:
        call = asyncio.create_task(client.get_operation("a"))
        await spin_until(lambda: server.heads)
        await session.close()
        assert isinstance(await failure(call), ClientClosedError)
        assert len(server.heads) == 1


# The end of a call that is under way


class Phase:
    """A server, and how to tell that a client's call has come to a phase."""

    def __init__(self, *answers: bytes | Handler, heads: int = 1) -> None:
        self.answers = answers
        self.heads = heads


PHASES = {
    "waiting for the answer": Phase(hang),
    "reading the headers": Phase(then_hang(b"HTTP/1.1 200 OK\r\nContent-Le")),
    "reading the body": Phase(then_hang(START)),
    "pausing": Phase(BUSY),
    "in the second attempt": Phase(TRUNCATED, hang, heads=2),
}
by_phase = pytest.mark.parametrize("phase", PHASES.values(), ids=PHASES.keys())


def begin(client: KeylessClient) -> asyncio.Task[object]:
    return asyncio.create_task(client.get_operation("a"))


async def reach(phase: Phase, server: RawServer) -> None:
    await server.asked(phase.heads)
    await asyncio.sleep(1)


@by_phase
async def test_closing_ends_a_call(phase: Phase, lent: aiohttp.ClientSession | None) -> None:
    async with RawServer(*phase.answers) as server:
        before = asyncio.all_tasks()
        client = KeylessClient(KEY, base_url=server.url, session=lent)
        call = begin(client)
        await reach(phase, server)
        started = now()
        await client.aclose()
        error = await failure(call)
        assert isinstance(error, ClientClosedError)
        assert "may have taken effect" in str(error)
        assert error.__cause__ is None
        assert now() == started
        await spin_until(lambda: not server.connections)
        await spin_until(lambda: asyncio.all_tasks() <= before)
        assert lent is None or not lent.closed


@pytest.mark.parametrize("kind", [ClientClosedError, asyncio.CancelledError], ids=["closed", "cancelled"])
async def test_call_that_is_ended_while_it_connects_leaves_nothing(
    kind: type[BaseException], lent: aiohttp.ClientSession | None
) -> None:
    with unanswered() as url:
        async with KeylessClient(KEY, base_url=url, session=lent) as client:
            before = asyncio.all_tasks()
            call = begin(client)
            await asyncio.sleep(1)
            started = now()
            if kind is ClientClosedError:
                await client.aclose()
            else:
                call.cancel()
            with pytest.raises(kind):
                await call
            assert now() == started
            await spin_until(lambda: asyncio.all_tasks() <= before)


async def test_closing_ends_a_call_that_has_not_run_yet(sandbox: Sandbox) -> None:
    client = sandbox.client()
    call = begin(client)
    await client.aclose()
    assert isinstance(await failure(call), ClientClosedError)
    assert sandbox.requests == []


@pytest.mark.parametrize("first", ["cancel", "close"])
@by_phase
async def test_cancellation_at_the_instant_of_closing_stays_one(
    phase: Phase, first: str, lent: aiohttp.ClientSession | None
) -> None:
    async with RawServer(*phase.answers) as server:
        client = KeylessClient(KEY, base_url=server.url, session=lent)
        call = begin(client)
        await reach(phase, server)
        if first == "cancel":
            call.cancel()
            await client.aclose()
        else:
            loop = asyncio.get_running_loop()
            assert client._opened is not None
            # Past the client and any task factory: in one turn of the loop, and in this order.
            closing = asyncio.Task(client._opened.transport.aclose(), loop=loop)
            loop.call_soon(call.cancel)
            await closing
            await client.aclose()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert call.cancelled()


async def test_closing_ends_the_last_call_of_a_cancelled_task(sandbox: Sandbox) -> None:
    client = sandbox.client()

    async def use() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await client.get_operation("a")  # a last call, such as a careful caller makes

    task = asyncio.create_task(use())
    await asyncio.sleep(0)
    sandbox.latency = 5
    task.cancel()
    await asyncio.sleep(1)
    await client.aclose()
    error = await failure(task)
    assert isinstance(error, ClientClosedError)
    assert isinstance(error.__context__, asyncio.CancelledError)


@pytest.mark.parametrize("first", ["close", "deadline"])
async def test_deadline_at_the_instant_of_closing_stays_one(sandbox: Sandbox, first: str) -> None:
    sandbox.latency = 5
    client = sandbox.client()

    async def use() -> None:
        async with asyncio.timeout(2):
            await client.get_operation("a")

    async def close() -> None:
        await asyncio.sleep(2)
        await client.aclose()

    works = [close(), use()] if first == "close" else [use(), close()]
    outcomes = await asyncio.gather(*works, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {type(None), TimeoutError}


async def test_failure_in_place_of_the_cancellation_is_that_of_closing(mocked: MockedService) -> None:
    async def answer_nothing(*_: object, **__: object) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise aiohttp.ClientConnectionError("gone") from None

    mocked.get("/v2/operations/a", callback=answer_nothing)
    client = KeylessClient(KEY, base_url=URL)
    call = begin(client)
    await spin_until(lambda: mocked.requests)
    await client.aclose()
    error = await failure(call)
    assert isinstance(error, ClientClosedError)
    assert "during GET /v2/operations/a" in str(error)


@by_phase
async def test_cancelled_call_leaves_nothing(phase: Phase, lent: aiohttp.ClientSession | None) -> None:
    async with RawServer(*phase.answers) as server, KeylessClient(KEY, base_url=server.url, session=lent) as client:
        before = asyncio.all_tasks()
        call = begin(client)
        await reach(phase, server)
        started = now()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert now() == started
        await spin_until(lambda: not server.connections)
        await spin_until(lambda: asyncio.all_tasks() <= before)
        heads = len(server.heads)
        await asyncio.sleep(60)
        assert len(server.heads) == heads


# The transport itself


def make_transport(url: str, *, key: str = KEY, session: aiohttp.ClientSession | None = None) -> transport.Transport:
    return transport.Transport(url, ApiKeys(Secret(key)), session=session, request_timeout=1.0, max_attempts=3)


@pytest.mark.parametrize("sent", [NOTHING, BUSY, answer(b"<html>"), answer(b"", b"Location: /", status=b"302 Found")])
async def test_an_answer_is_received_whatever_it_is_and_nothing_is_tried_again(
    sent: bytes, session: aiohttp.ClientSession
) -> None:
    async with RawServer(sent) as server:
        sender = make_transport(server.url, session=session)
        received = await sender.receive(protocol.get_operation("a"))
        await sender.aclose()
    assert b" %d " % received.status in sent
    assert sent.endswith(received.body)
    assert [KEY.encode() in head for head in server.heads] == [True]


async def test_host_is_named_without_a_final_dot_which_certificates_do_not_have() -> None:
    sender = make_transport("https://gateway.example.:8443")
    await sender.aclose()
    assert sender._session.headers["Host"] == "gateway.example:8443"


# A closed client


async def test_a_transport_with_other_attempts_is_closed_with_the_one_it_is_of(sandbox: Sandbox) -> None:
    async with aiohttp.ClientSession() as session:
        sender = make_transport(sandbox.url, session=session)
        once = sender.with_max_attempts(1)
        sandbox.fail_next(times=1)
        with pytest.raises(ServerError):
            await once.fetch(protocol.get_operation("a"))
        assert len(sandbox.requests) == 1
        await sender.aclose()
        with pytest.raises(ClientClosedError):
            await once.fetch(protocol.get_operation("a"))
    assert len(sandbox.requests) == 1


@pytest.mark.parametrize("used", [False, True])
async def test_closing_again_is_harmless(sandbox: Sandbox, used: bool) -> None:
    client = sandbox.client()
    if used:
        await client.get_operation("a")
    await asyncio.gather(client.aclose(), client.aclose())
    await client.aclose()


async def test_closing_twice_at_once_ends_all_calls(sandbox: Sandbox) -> None:
    sandbox.latency = 5
    client = sandbox.client()
    calls = [begin(client) for _ in range(50)]
    await asyncio.sleep(1)
    await asyncio.gather(client.aclose(), client.aclose())
    assert all([isinstance(await failure(call), ClientClosedError) for call in calls])


# Loops and tasks


async def test_call_outside_a_task_is_refused(client: KeylessClient) -> None:
    outcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def drive() -> None:
        try:
            client.get_operation("a").send(None)
        except BaseException as error:  # noqa: BLE001  # whatever it is, the test shall see it
            outcome.set_exception(error)

    asyncio.get_running_loop().call_soon(drive)
    error = await failure(outcome)
    assert isinstance(error, ConfigurationError)
    assert "task" in str(error)


async def test_dropped_client_is_a_resource_warning(sandbox: Sandbox, session: aiohttp.ClientSession) -> None:
    client = sandbox.client(session=session)
    await client.get_operation("a")
    clients = [client]
    del client
    with pytest.warns(ResourceWarning, match="unclosed <KeylessClient base_url="):
        clients.clear()


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
async def test_client_dropped_before_its_use_or_after_closing_warns_of_nothing(sandbox: Sandbox) -> None:
    client = sandbox.client()
    del client
    client = sandbox.client()
    await client.get_operation("a")
    await client.aclose()
    del client
    gc.collect()


@pytest.mark.parametrize("name", ["get_operation", "create_operation"])
async def test_cancellation_in_the_turn_in_which_the_timeout_passes_is_not_lost(name: str) -> None:
    async with (
        RawServer(hang) as server,
        KeylessClient(KEY, base_url=server.url, request_timeout=1.0, max_attempts=1) as client,
    ):
        loop = asyncio.get_running_loop()
        started = loop.time()
        call = asyncio.create_task(getattr(client, name)("C0FFEE"))
        await server.asked(1)
        loop.call_at(started + 1.0, call.cancel)
        await asyncio.wait([call])
        assert call.cancelled()


@pytest.mark.parametrize("max_attempts", [1, 2])
@pytest.mark.parametrize("name", ["get_operation", "create_operation"])
async def test_call_in_an_except_block_leaves_the_handled_error_its_traceback(
    mocked: MockedService, name: str, max_attempts: int
) -> None:
    # Its context is the handled error.
    mocked.get(f"/v2/operations/{USER}", exception=LookupError, repeat=True)
    async with KeylessClient(KEY, base_url=URL, max_attempts=max_attempts) as client:
        tracebacks: list[TracebackType | None] = []
        try:
            int("the application's own failure")
        except ValueError as handled:
            tracebacks.append(handled.__traceback__)
            await failure(getattr(client, name)(USER))
            tracebacks.append(handled.__traceback__)
        before, after = tracebacks
        assert after is before is not None


@pytest.fixture
def uncollected() -> Iterator[Callable[[], list[str]]]:
    """Give a function that lists what of the library, aiohttp and tenacity waits for the garbage collector."""

    def listed() -> list[str]:
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        names = [f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage]
        names += [thing.f_globals["__name__"] for thing in gc.garbage if isinstance(thing, FrameType)]
        return sorted(name for name in names if name.startswith(("aiokeyless.", "aiohttp.", "tenacity.")))

    gc.disable()
    gc.freeze()  # else what an earlier test left, such as the frames of a failed one, could be listed here
    try:
        yield listed
    finally:
        gc.unfreeze()
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.parametrize("max_attempts", [1, 3])
@pytest.mark.parametrize(
    "answering",
    [pytest.param(reset, marks=may_not_leak), BUSY, TRUNCATED, answer(b"<html>"), answer(b"{}"), None],
    ids=["reset", "503", "cut off", "page", "another shape", "refused"],
)
@pytest.mark.parametrize("name", ["get_operation", "create_operation"])
async def test_failed_call_leaves_nothing_to_the_garbage_collector(
    name: str, answering: bytes | Handler | None, max_attempts: int, uncollected: Callable[[], list[str]]
) -> None:
    """Until it comes, that would be memory, sockets, and headers with the key; in an outage, very many of them."""
    async with RawServer(answering or reset) as server:
        url = refused() if answering is None else server.url
        async with KeylessClient(KEY, base_url=url, max_attempts=max_attempts) as client:
            for _ in range(3):
                with contextlib.suppress(KeylessError):
                    await getattr(client, name)(USER)
                    pytest.fail("it did not fail")
            await asyncio.sleep(1)  # the closed connections are gone
            assert uncollected() == []


@pytest.mark.parametrize("name", ["get_operation", "create_operation"])
async def test_call_cancelled_while_it_is_repeated_leaves_nothing_to_the_garbage_collector(
    name: str, uncollected: Callable[[], list[str]]
) -> None:
    """Until it comes, that would be memory, and the frames of the application."""
    answers = [BUSY, NOTHING] if name == "create_operation" else [BUSY]  # NOTHING: the operation was not created
    async with RawServer(*answers, hang) as server, KeylessClient(KEY, base_url=server.url) as client:
        call = asyncio.create_task(getattr(client, name)(USER))
        await server.asked(len(answers) + 1)
        call.cancel()
        await asyncio.wait([call])
        assert call.cancelled()
        del call
        await asyncio.sleep(1)  # the closed connections are gone
        assert uncollected() == []
