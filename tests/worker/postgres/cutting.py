"""A connection that breaks at a COMMIT: before the server gets it, or after it, so that its answer is lost."""

from __future__ import annotations

import asyncio
import re
import tempfile
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

_SOCKET: Final = ".s.PGSQL.5432"
_CUT: Final = re.compile(rb"cut (before|after)")
_COMMIT: Final = re.compile(rb"COMMIT;?\0")


@asynccontextmanager
async def cutting(folder: Path) -> AsyncGenerator[str]:
    """Yield the folder of a socket to the server whose socket is in a folder.

    A connection that has sent ``SELECT 'cut before'`` or ``SELECT 'cut after'`` is cut at its next COMMIT.
    """

    async def serve(client: asyncio.StreamReader, to_client: asyncio.StreamWriter) -> None:
        server, to_server = await asyncio.open_unix_connection(folder / _SOCKET)
        answering = asyncio.create_task(copy(server, to_client))
        cut = b""
        while sent := await client.read(65536):
            if found := _CUT.search(sent):
                cut = found[1]
            if cut and _COMMIT.search(sent):
                break
            to_server.write(sent)
        answering.cancel()
        await asyncio.wait({answering})
        if cut == b"after":
            to_server.write(sent)
            assert await server.read(65536)  # it is committed
        to_client.close()
        to_server.close()

    with tempfile.TemporaryDirectory() as name:
        async with await asyncio.start_unix_server(serve, Path(name) / _SOCKET):
            yield name


async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(65536):
        target.write(data)
    target.close()
