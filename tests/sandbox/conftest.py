"""A sandbox, and two ways to speak to it: a plain aiohttp client, and bytes on a socket."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import aiohttp
import pytest

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

# looptime asks for the current loop before tests that have none, too. Unless told that there is none, asyncio makes
# one, which nobody closes.
asyncio.set_event_loop(None)


@pytest.fixture
async def sandbox() -> AsyncGenerator[Sandbox]:
    async with Sandbox() as running:
        yield running


@pytest.fixture
async def http(sandbox: Sandbox) -> AsyncGenerator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(sandbox.url, headers={"X-Api-Key": sandbox.api_key}) as session:
        yield session


@pytest.fixture
async def page(sandbox: Sandbox) -> AsyncGenerator[aiohttp.ClientSession]:
    """The sandbox's own page, as far as its requests show."""
    async with aiohttp.ClientSession(sandbox.url, headers={"Origin": sandbox.url}) as session:
        yield session


@pytest.fixture
def raw(sandbox: Sandbox) -> Callable[..., Awaitable[tuple[int, bytes]]]:
    async def ask(
        target: bytes,
        method: bytes = b"GET",
        headers: bytes = b"X-Api-Key: sandbox-key\r\n",
        body: bytes = b"",
        host: bytes = b"localhost",
    ) -> tuple[int, bytes]:
        """Send the bytes as they are and return status and body."""
        address = urlsplit(sandbox.url)
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        head = b"%b %b HTTP/1.1\r\nHost: %b\r\nConnection: close\r\n%b\r\n" % (method, target, host, headers)
        writer.write(head + body)
        head, _, content = (await reader.read()).partition(b"\r\n\r\n")
        writer.close()
        await writer.wait_closed()
        return int(head.split()[1]), content

    return ask
