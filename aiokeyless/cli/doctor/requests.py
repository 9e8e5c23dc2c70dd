"""`PlainRequests`: what a client does not send, and the connection that it takes."""

from __future__ import annotations

import os
import ssl
import time
from typing import TYPE_CHECKING, Any, Final

import aiohttp

from aiokeyless._http import protocol
from aiokeyless._http.keys import ApiKeys
from aiokeyless._http.proxies import find_proxy
from aiokeyless._http.transport import Transport
from aiokeyless.models import Secret

if TYPE_CHECKING:
    import asyncio

    from aiohttp.connector import Connection

    from aiokeyless.client import KeylessClient

_GET: Final = protocol.GET_OPERATION
_GET_WITHOUT_KEY: Final = protocol.Endpoint(_GET.method, _GET.route, _GET.decode, sends_key=False)


class PlainRequests:
    """Sends each request once, as the client does, but returns its answer whatever the status; close `session`."""

    def __init__(self, client: KeylessClient) -> None:
        self._key = Secret(os.environ["KEYLESS_API_KEY"].strip())  # the client has checked it
        self.connections: list[tuple[asyncio.Transport, str]] = []
        """The connection of each request, and its description."""
        self.session: aiohttp.ClientSession = _open_session(self.connections)
        self._base_url, self._proxy = client.base_url, find_proxy(client.base_url)
        self._options: Any = {"session": self.session, "request_timeout": client.request_timeout, "max_attempts": 1}

    async def send(self, request: protocol.Request[Any], key: Secret | None = None) -> protocol.Answer:
        """Send a request, by default with the server key."""
        transport = Transport(self._base_url, ApiKeys(key or self._key), proxy=self._proxy, **self._options)
        return await transport.receive(request)

    async def get_without_key(self, operation_id: str) -> protocol.Answer:
        """GET an operation without a key."""
        return await self.send(protocol.Request(_GET_WITHOUT_KEY, protocol.get_operation(operation_id).path))


def describe_connection(connection: asyncio.BaseTransport) -> str:
    """Return the address family, the TLS version, and the issuer and the days of the certificate."""
    family = "IPv6" if ":" in connection.get_extra_info("peername")[0] else "IPv4"
    tls: ssl.SSLObject | None = connection.get_extra_info("ssl_object")
    if tls is None:
        return f"{family}, without TLS"
    certificate: dict[str, Any] = tls.getpeercert() or {}
    # ssl returns a name as a sequence of sets of pairs.
    issuer = dict(pair for pairs in certificate["issuer"] for pair in pairs)
    days = (ssl.cert_time_to_seconds(certificate["notAfter"]) - time.time()) / 86400
    who = issuer.get("organizationName") or issuer.get("commonName")
    return f"{family}, {tls.version()}, certificate of {who} for {days:.0f} more days"


def _open_session(connections: list[tuple[asyncio.Transport, str]]) -> aiohttp.ClientSession:
    class Response(aiohttp.ClientResponse):
        """Records its connection, which aiohttp drops as soon as the body is read."""

        async def start(self, connection: Connection) -> aiohttp.ClientResponse:
            assert connection.transport is not None  # noqa: S101  # it is open
            # Now, since a connection that is closed has forgotten its certificate.
            connections.append((connection.transport, describe_connection(connection.transport)))
            return await super().start(connection)

    return aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar(), response_class=Response)
