"""The connection to the broker: one clear error if it cannot be made, and reconnecting later."""

from __future__ import annotations

import asyncio
import logging
import re
import ssl
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import nats.errors
from nats.aio.client import Client

from aiokeyless._rules.backoff import error_delay
from aiokeyless.errors import BrokerError, ConfigurationError
from aiokeyless.worker.logs import log

from .failures import raise_lost_cancellations

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from nats.aio.client import Server

_CONNECT_WITHIN: Final = 5.0  # seconds
_CLOSE_WITHIN: Final = 5.0  # seconds
#: With these, a silent broker is noticed within 15 s, and not after six minutes.
_PING_INTERVAL: Final = 5  # seconds
_MAX_OUTSTANDING_PINGS: Final = 2
#: An older server does not answer a pull for a deleted consumer. Its worker would receive nothing, without an error.
_OLDEST_SERVER: Final = (2, 11)
_ROOM_FOR_EVENT: Final = 8 << 10  # bytes by which an event with its headers may exceed its request
_SMALLEST: Final = 1 << 10  # bytes that a request must be allowed to have
#: Options of ``nats.connect`` by which a worker observes its connection, and keeps it.
_OWN_OPTIONS: Final = frozenset(
    {
        "allow_reconnect",
        "closed_cb",
        "disconnected_cb",
        "error_cb",
        "max_reconnect_attempts",
        "reconnect_time_wait",
        "reconnect_to_server_handler",
        "servers",
    }
)
#: Options of the first attempt to connect, and those of a connection that is made.
_ONCE: Final = {"allow_reconnect": False, "max_reconnect_attempts": 1, "reconnect_time_wait": 0}
_FOREVER: Final = {"allow_reconnect": True, "max_reconnect_attempts": -1, "reconnect_time_wait": 2}
#: Errors of the server's about a login or a limit, and not about what was sent. An operator may correct them, so the
#: connection is made again. nats-py would close it for good. A subject, in quotes, may hold any word.
_CORRECTABLE: Final = re.compile('[^"]*(authori[sz]ation|authentication|connections exceeded)', re.IGNORECASE)
#: The part of an address that may be shown: a host and a port, and no part of a password.
_HOST_AND_PORT: Final = re.compile(r"(?:[\w.-]+|\[[\da-fA-F:.]+\])(?::\d+)?")


def check_options(options: Mapping[str, object]) -> None:
    """Refuse options of ``nats.connect`` that are the worker's own."""
    if own := ", ".join(sorted(_OWN_OPTIONS.intersection(options))):
        raise ConfigurationError(
            f"connect_options must not hold what the worker sets itself: {own}", argument="connect_options"
        )


async def connect(nats_url: str, options: Mapping[str, object], *, on_loss: Callable[[BrokerError], None]) -> Client:
    """Connect to one of the addresses, which are separated by commas, with options of ``nats.connect``.

    `on_loss` is called if the connection will not come back or is useless: the broker ended it, or does not permit what
    a worker does.

    Raises:
        BrokerError: The broker cannot be reached, does not let this user in, or is not fit.
    """
    given: dict[str, Any] = {
        "name": "aiokeyless worker",
        "connect_timeout": _CONNECT_WITHIN,
        "ping_interval": _PING_INTERVAL,
        "max_outstanding_pings": _MAX_OUTSTANDING_PINGS,
        "reconnect_to_server_handler": _next_server,
        **options,
    }
    servers = [url.strip() for url in nats_url.split(",")]
    # The scheme of a WebSocket decides about TLS, before the server sends anything.
    schemes = {server.partition("://")[0].lower() for server in servers if "://" in server}
    if given.get("tls") and "ws" in schemes:
        raise BrokerError(f"no connection to the broker at {_hosts(servers)}: ws:// is without TLS, use wss://")
    is_secure = (bool(given.get("tls")) or "tls" in schemes) and schemes.isdisjoint({"ws", "wss"})
    client = _Client(on_loss, is_secure=is_secure)
    callbacks = {"error_cb": client.on_error, "disconnected_cb": client.on_disconnect, "closed_cb": client.on_close}
    try:
        await _connect_once(client, servers, {**given, **callbacks})
    except ModuleNotFoundError as error:  # nats-py imports it to sign with credentials
        raise BrokerError(f'credentials need {error.name}: install the extra "nats"') from None
    except (nats.errors.Error, OSError, ValueError) as error:
        # nats-py raises that no server is left; the reason is an earlier error.
        is_summary = isinstance(error, nats.errors.NoServersError | TimeoutError)
        cause = client.failures[-1] if client.failures and is_summary else error
        reason = str(cause) or type(cause).__name__
        # It is away, hangs, or has too many connections. Others are about TLS, the login or the address.
        is_away = isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError)
        may_pass = is_away or "connections exceeded" in reason
        raise BrokerError(f"no connection to the broker at {_hosts(servers)}: {reason}", may_pass=may_pass) from None
    client.is_made = True
    client.options.update(_FOREVER)
    return client


async def _connect_once(client: Client, servers: list[str], options: dict[str, Any]) -> None:
    """Try each server, twice at most. nats-py, if it may reconnect, would try for minutes or forever."""
    try:
        # nats-py limits only parts of each attempt.
        async with asyncio.timeout(_CONNECT_WITHIN * (1 + len(servers))):
            with raise_lost_cancellations():
                await client.connect(servers, **{**options, **_ONCE})
        _check_version(client, servers)
        find_largest_request(client)
    except BaseException:  # after a cancellation, too, no connection may stay open
        if client._transport is not None:  # noqa: SLF001  # nats-py leaves one open if it is refused
            await disconnect(client)
        raise


class _Client(Client):
    """A client that reports why its connection cannot be made, and later what happens to it.

    It always reports its end, even if the broker is away. If nats-py still has data for a broker that is away, its
    close fails before the callback, and before all of its tasks have ended. It would not reconnect either, so its
    worker would never receive anything again.
    """

    def __init__(self, on_loss: Callable[[BrokerError], None], *, is_secure: bool) -> None:
        super().__init__()
        self.failures: list[Exception] = []  # why the connection could not be made so far
        self.is_made: bool = False
        self._lose = on_loss
        self._is_secure = is_secure

    async def on_error(self, error: Exception) -> None:
        if not self.is_made:
            self.failures.append(error)
            return
        log(logging.WARNING, "broker.error", {"error": f"{type(error).__name__}: {error}"})
        if "permissions violation" in str(error).lower():  # then the connection is useless
            self._lose(BrokerError(f"the broker does not permit what a worker does: {error}"))

    async def on_disconnect(self) -> None:
        if self.is_made and not self.is_closed:  # by the worker itself, at its end
            log(logging.WARNING, "broker.disconnected")

    async def on_close(self) -> None:
        if self.is_made:
            reason = self.last_error or "it did not say why"
            self._lose(BrokerError(f"the broker ended the connection for good: {reason}"))

    async def _process_err(self, err_msg: str) -> None:
        if _CORRECTABLE.match(err_msg):
            await self.on_error(nats.errors.Error(f"nats: {err_msg}"))
            await self._process_op_err(nats.errors.StaleConnectionError())
        else:
            await super()._process_err(err_msg)

    def _connect_command(self) -> bytes:
        try:
            return super()._connect_command()
        except Exception as error:  # noqa: BLE001  # of a file that is just being replaced; nats-py would stop trying
            assert self._transport is not None  # noqa: S101  # nats-py forgets it without closing it
            self._transport.close()  # type: ignore[no-untyped-call]  # nats-py has no types here
            raise nats.errors.Error(f"the credentials cannot be used: {type(error).__name__}") from None

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        # Otherwise nats-py goes on without TLS and sends its password. The server's first line is not encrypted, so an
        # attacker on the network can forge it.
        if self._is_secure and initial_connection and not info.get("tls_required"):
            raise nats.errors.Error("it does not ask for TLS")
        await super()._process_info(info, initial_connection)

    async def _close(self, status: int, do_cbs: bool = True) -> None:
        try:
            async with asyncio.timeout(_CLOSE_WITHIN):
                await super()._close(status, do_cbs)
        except (OSError, RuntimeError, TypeError):  # the second is uvloop's, the third asyncio's on Python 3.13
            for subscription in self._subs.values():
                subscription._stop_processing()  # noqa: SLF001
            if do_cbs and self._closed_cb is not None:
                await self._closed_cb()


def _check_version(client: Client, servers: list[str]) -> None:
    """Refuse a server that is too old. Accept one that has no version, or another form of it."""
    version = client.connected_server_version
    try:
        found = (version.major, version.minor)
    except (ValueError, TypeError):
        return
    if (0, 0) < found < _OLDEST_SERVER:
        raise BrokerError(
            f"the broker at {_hosts(servers)} is a nats-server {found[0]}.{found[1]}, and workers need "
            f"{_OLDEST_SERVER[0]}.{_OLDEST_SERVER[1]} or newer: upgrade it"
        )


def find_largest_request(client: Client) -> int:
    """Return the most bytes of a request for which an event can be stored. Refuse a server that allows hardly any."""
    largest = client.max_payload - _ROOM_FOR_EVENT
    if largest < _SMALLEST:
        raise BrokerError(
            f"the broker's max_payload is {client.max_payload} bytes, and must be {_ROOM_FOR_EVENT + _SMALLEST} or more"
        )
    return largest


async def disconnect(connection: Client) -> None:
    """End the connection, even if the broker is away."""
    with suppress(TimeoutError):
        async with asyncio.timeout(_CLOSE_WITHIN):
            await connection.close()


def _next_server(servers: list[Server], _info: dict[str, Any]) -> tuple[Server, float]:
    """Choose the least tried server, after a pause that grows with its tries."""
    server = min(servers, key=lambda candidate: candidate.reconnects)
    return server, error_delay(1 + min(server.reconnects, 4))


def _hosts(servers: list[str]) -> str:
    """Return addresses without the passwords and tokens that they may hold."""
    # Not by a URL parser: an unescaped slash in a password makes the URL invalid.
    addresses = (server.rpartition("@")[2].rpartition("//")[2].partition("/")[0] for server in servers)
    return ", ".join(address if _HOST_AND_PORT.fullmatch(address) else "(no host:port)" for address in addresses)
