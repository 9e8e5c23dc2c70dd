"""A proxy in front of a PostgreSQL server that cuts a connection at a COMMIT: before the server has it, or after.

It can also cut all connections at once, and hold back what is sent. A client in another process arms it by a statement
that has "cut before" or "cut after" in it.

The tests use it too, so this module needs only the standard library.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from .postgres import PostgresServer

_ORDER: Final = re.compile(rb"cut (before|after)")


class CuttingProxy:
    """The proxy, on a socket in a folder of its own.

    Args:
        server: Where it leads to.
        cut_after: Whether the server gets the COMMIT, and its answer is what is lost.
    """

    def __init__(self, server: PostgresServer, *, cut_after: bool = False) -> None:
        self.server = server
        """Where new connections lead to; it may be changed."""
        self._cut_after = cut_after
        self._is_armed = False
        # The name of a socket may have 107 bytes, and $TMPDIR may be long.
        self.folder = Path(tempfile.mkdtemp(prefix="aiokeyless-proxy-", dir="/tmp"))
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.cuts = 0
        """How many connections were cut at a COMMIT."""

    def url(self, database: str) -> str:
        """Return the URL of a database behind the proxy."""
        return f"postgresql://postgres@/{database}?host={self.folder}"

    def arm(self) -> None:
        """Cut at the next COMMIT, whoever sends it."""
        self._is_armed = True

    def cut_all(self) -> int:
        """Cut all connections now, and return how many."""
        for task in self._tasks:
            task.cancel()
        return len(self._tasks)

    async def hang(self, seconds: float) -> None:
        """Hold back everything that is sent for so long; then it arrives."""
        self._flows.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._flows.set()

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_unix_server(self._serve, self.folder / ".s.PGSQL.5432")
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        shutil.rmtree(self.folder)

    async def _serve(self, client: StreamReader, to_client: StreamWriter) -> None:
        task = asyncio.create_task(self._carry(client, to_client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: to_client.transport.abort())  # also if it is cut before its first step

    async def _carry(self, client: StreamReader, to_client: StreamWriter) -> None:
        """Carry one connection, until one of its ends is closed or it is cut."""
        try:
            server, to_server = await asyncio.open_unix_connection(self.server.folder / ".s.PGSQL.5432")
        except OSError:  # the server is away
            return
        is_cut = asyncio.Event()
        both = [self._ask(client, to_server, is_cut), self._answer(server, to_client, is_cut)]
        tasks = [asyncio.create_task(coroutine) for coroutine in both]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            to_server.transport.abort()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _ask(self, client: StreamReader, to_server: StreamWriter, is_cut: asyncio.Event) -> None:
        while data := await client.read(1 << 16):
            if (order := _ORDER.search(data)) is not None:
                self._is_armed, self._cut_after = True, order[1] == b"after"
            if self._is_armed and b"COMMIT" in data.replace(b"READ COMMITTED", b""):  # of a BEGIN
                self._is_armed = False
                self.cuts += 1
                is_cut.set()
                if not self._cut_after:
                    return
            await self._flows.wait()
            to_server.write(data)
            await to_server.drain()

    async def _answer(self, server: StreamReader, to_client: StreamWriter, is_cut: asyncio.Event) -> None:
        while data := await server.read(1 << 16):
            if is_cut.is_set():  # the server has committed
                return
            await self._flows.wait()
            to_client.write(data)
