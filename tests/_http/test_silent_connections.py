"""Connections whose packets nobody acknowledges, as a firewall forgot them, while new ones work."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import functools
import os
import re
import socket
import ssl
import struct
from typing import TYPE_CHECKING

import aiohttp
import pytest
from raw_server import RawServer, answer, kept_open, operation, tunnel_to

from aiokeyless import KeylessClient, Secret, TransportError
from aiokeyless._http import transport
from aiokeyless._http.keys import ApiKeys
from aiokeyless._http.transport import Transport
from aiokeyless._rules.ambiguity import may_have_taken_effect

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from aiohttp.connector import Connection

pytestmark = pytest.mark.platform

OPTION: int | None = getattr(socket, "TCP_USER_TIMEOUT", None)
needs_the_option = pytest.mark.skipif(OPTION is None, reason="this system has no TCP_USER_TIMEOUT")
_SO_ATTACH_FILTER = 26


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[socket.socket]]:
    """The sockets of all requests, which stay open."""
    used: list[socket.socket] = []
    start = aiohttp.ClientResponse.start

    async def record(self: aiohttp.ClientResponse, connection: Connection) -> aiohttp.ClientResponse:
        assert connection.transport is not None
        used.append(socket.socket(fileno=os.dup(connection.transport.get_extra_info("socket").fileno())))
        return await start(self, connection)

    monkeypatch.setattr(aiohttp.ClientResponse, "start", record)
    yield used
    for one in used:
        one.close()


def silences(sockets: list[socket.socket]) -> set[int]:
    """Return the milliseconds after which the system gives these connections up, 0 for its own default."""
    assert OPTION is not None
    assert sockets
    return {one.getsockopt(socket.IPPROTO_TCP, OPTION) for one in sockets}


def make_transport(url: str, session: aiohttp.ClientSession | None = None, proxy: str | None = None) -> Transport:
    behind = None if proxy is None else Secret(proxy)
    keys = ApiKeys(Secret("key"))
    return Transport(url, keys, session=session, request_timeout=5.0, max_attempts=1, proxy=behind)


@needs_the_option
@pytest.mark.parametrize("is_renewal", [False, True], ids=["kept", "new"])
@pytest.mark.parametrize("way", ["http", "https", "proxy"])
async def test_connection_of_ours_may_be_silent_for_3_seconds(
    monkeypatch: pytest.MonkeyPatch,
    certificate: tuple[Path, Path],
    sockets: list[socket.socket],
    way: str,
    *,
    is_renewal: bool,
) -> None:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*certificate)
    trusting = ssl.create_default_context(cafile=str(certificate[0]))
    monkeypatch.setattr(aiohttp, "TCPConnector", functools.partial(aiohttp.TCPConnector, ssl=trusting))
    async with (
        RawServer(answer(operation()), tls=None if way == "http" else tls) as server,
        RawServer(tunnel_to(server)) as proxy,
    ):
        url = server.url if way == "http" else server.url.replace("http:", "https:")
        sender = make_transport(url, proxy=proxy.url if way == "proxy" else None)
        await sender.poll("a", is_renewal)
        await sender.aclose()
        assert len(proxy.heads) == (way == "proxy")
    assert silences(sockets) == {3000}


@needs_the_option
async def test_connection_of_a_borrowed_session_stays_as_it_is(sockets: list[socket.socket]) -> None:
    async with RawServer(answer(operation())) as server, aiohttp.ClientSession() as session:
        await make_transport(server.url, session).poll("a")
    assert silences(sockets) == {0}


@pytest.mark.parametrize("option", [None, 9999], ids=["unknown", "refused"])
async def test_system_without_the_option_is_used_without_it(
    monkeypatch: pytest.MonkeyPatch, option: int | None
) -> None:
    if option is None:
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT", raising=False)
    else:
        monkeypatch.setattr(socket, "TCP_USER_TIMEOUT", option, raising=False)
    async with RawServer(answer(operation())) as server, KeylessClient("key", base_url=server.url) as client:
        assert (await client.get_operation("a")).operation_id == "a"


def test_tls_connection_that_is_lost_has_no_socket() -> None:
    transport._limit_silence(asyncio.Transport())


# A connection that swallows what is sent


async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer the first request. The system drops all packets of this connection from then on, as a firewall would."""
    drop_all = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))  # one instruction: return no byte
    program = struct.pack("HP", 1, ctypes.addressof(drop_all))
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, program)
    writer.write(kept_open("a"))
    await reader.read()


@pytest.fixture
def _short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "_MAX_SILENCE", 50)


@needs_the_option
@pytest.mark.usefixtures("_short_silence")
async def test_get_that_is_swallowed_is_asked_once_more_on_a_new_connection() -> None:
    async with (
        RawServer(answer_once, answer(operation(state="approved", result=True))) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        await client.get_operation("a")
        assert (await client.get_operation("a")).is_approved


@needs_the_option
@pytest.mark.usefixtures("_short_silence")
async def test_create_that_is_swallowed_may_have_taken_effect() -> None:
    async with (
        RawServer(answer_once, answer(status=b"404 No")) as server,
        KeylessClient("key", base_url=server.url, max_attempts=1) as client,
    ):
        await client.get_operation("a")
        with pytest.raises(TransportError, match=re.escape(os.strerror(errno.ETIMEDOUT))) as caught:
            await client.create_operation("C0FFEE", operation_id="b")
        assert may_have_taken_effect(caught.value)
        assert server.methods == ["GET", "GET"]  # the second one looks for the operation
