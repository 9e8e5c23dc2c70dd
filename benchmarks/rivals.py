"""What people write instead of using this library, as lean as they could write it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import aiohttp
import msgspec
from yarl import URL

from .server import API_KEY, OPERATIONS

if TYPE_CHECKING:
    from .server import Server


class PlainOperation(msgspec.Struct, rename="camel"):
    """An operation without any manners."""

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
_HEADERS: Final = {"X-Api-Key": API_KEY, "Accept": "application/json"}


def bare_session(*, limit: int = 0) -> aiohttp.ClientSession:
    """Make a session as fast as settings make one: no limit on connections, no cookies, headers merged once."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=limit), cookie_jar=aiohttp.DummyCookieJar(), headers=_HEADERS
    )


def default_session() -> aiohttp.ClientSession:
    """Make a session as most people do."""
    return aiohttp.ClientSession(headers=_HEADERS)


class BareClient:
    """aiohttp and msgspec, with URLs made for each call in the fastest way we know: see `benchmarks/README.md`."""

    def __init__(self, session: aiohttp.ClientSession, server: Server) -> None:
        self._session = session
        self._base = URL(server.base_url)

    async def get_operation(self, operation_id: str) -> PlainOperation:
        """Get an operation."""
        url = self._base.with_path(OPERATIONS + quote(operation_id, safe=""), encoded=True)
        async with self._session.get(url) as response:
            if response.status != 200:
                raise RuntimeError(f"{url} answered {response.status}")
            body = await response.read()
        return decode(body)
