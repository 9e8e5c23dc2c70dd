"""A proxy in front of a server that cuts a connection when a COMMIT passes: before the server has it, or after."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

    from postgres_server import PostgresServer


class CuttingProxy:
    """The proxy, on a socket in a folder of its own.

    Args:
        server: Where it leads to.
        cut_after: Whether the server gets the COMMIT, and its answer is what is lost.
    """

    def __init__(self, server: PostgresServer, *, cut_after: bool) -> None:
        self._server = server
        self._cut_after = cut_after
        self._is_armed = False
        self._is_cut = False
        self._folder = Path(tempfile.mkdtemp(prefix="aiokeyless-proxy-"))
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: list[StreamWriter] = []

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._folder}"

    def arm(self) -> None:
        """Cut at the next COMMIT."""
        self._is_armed = True

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_unix_server(self._serve, self._folder / ".s.PGSQL.5432")
        return self

    async def __aexit__(self, *_error: object) -> None:
        self._listening.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in self._writers:
            writer.transport.abort()
        shutil.rmtree(self._folder)

    async def _serve(self, client: StreamReader, to_client: StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(self._server.folder / ".s.PGSQL.5432")
        self._writers += [to_client, to_server]
        for coroutine in (self._ask(client, to_server, to_client), self._answer(server, to_client)):
            self._tasks.add(asyncio.create_task(coroutine))

    async def _ask(self, client: StreamReader, to_server: StreamWriter, to_client: StreamWriter) -> None:
        while data := await client.read(1 << 16):
            self._is_cut = self._is_armed and b"COMMIT" in data
            if self._is_cut and not self._cut_after:
                to_client.transport.abort()
                break
            to_server.write(data)
            await to_server.drain()
        to_server.close()

    async def _answer(self, server: StreamReader, to_client: StreamWriter) -> None:
        while data := await server.read(1 << 16):
            if self._is_cut:  # the server has committed
                to_client.transport.abort()
                return
            to_client.write(data)
        to_client.close()
