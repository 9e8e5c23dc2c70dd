"""What users would write instead of this library, as lean as possible, and the names of the sides in the tables."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from .server import API_KEY, OPERATIONS

if TYPE_CHECKING:
    from collections.abc import Callable

    from .server import Server

#: Names that several benchmarks show, so that a side has the same name in all tables.
OURS: Final = "aiokeyless"
BARE: Final = "aiohttp + msgspec"
BARE_REPEATED: Final = "aiohttp + msgspec, repeated"


class PlainOperation(msgspec.Struct, rename="camel"):
    """An operation with plain fields only: no `Secret`, no `repr` of its own."""

    id: int
    timestamp: str
    node_id: str
    user_id: str
    api_key: str
    operation_id: str
    result: bool
    state: str
    external_user_id: str | None = None
    operation_payload: str | None = None
    auth_type: str | None = None


decode: Final = msgspec.json.Decoder(PlainOperation).decode
HEADERS: Final = {"X-Api-Key": API_KEY, "Accept": "application/json"}


def bare_session(*, limit: int = 0) -> aiohttp.ClientSession:
    """Make a session as fast as settings make one: no limit on connections, no cookies, headers merged once."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit), cookie_jar=aiohttp.DummyCookieJar(), headers=HEADERS
    )


class BareClient:
    """aiohttp and a decoder, with URLs made for each call in the fastest known way."""

    def __init__(
        self, session: aiohttp.ClientSession, server: Server, decode: Callable[[bytes], PlainOperation] = decode
    ) -> None:
        self._session = session
        self._base = URL(server.base_url)
        self._decode = decode

    async def get_operation(self, operation_id: str) -> PlainOperation:
        """Get an operation."""
        url = self._base.with_path(OPERATIONS + quote(operation_id, safe=""), encoded=True)
        async with self._session.get(url) as response:
            if response.status != 200:
                raise RuntimeError(f"{url} answered {response.status}")
            body = await response.read()
        return self._decode(body)
