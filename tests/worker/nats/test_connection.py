"""The connection to the broker: refused at once and in one line at first, patient later, and no password in it."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import ssl
import subprocess
import sys
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlparse

import nats
import pytest
from aiohttp import web
from nats.aio.client import Server
from nats_server import NatsServer
from waiting import PATIENCE, until

from aiokeyless import ConfigurationError
from aiokeyless.worker import BrokerError
from aiokeyless.worker.nats import NatsBroker, connection
from aiokeyless.worker.nats.connection import connect, disconnect
from benchmarks.nats_logins import Operator

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client


INFO = b'INFO {"server_id":"x","max_payload":1048576}\r\n'
CONFIGURATION = 'authorization { users = [ { user: worker, password: "s3cret" } ] }'


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A broker that asks for a password."""
    async with NatsServer(tmp_path, configuration=CONFIGURATION, jetstream=False) as server:
        yield server


@pytest.fixture
async def server(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A broker that asks for nothing."""
    async with NatsServer(tmp_path, jetstream=False) as server:
        yield server


def host_of(server: NatsServer) -> str:
    return server.url.removeprefix("nats://")


def nothing(_error: BrokerError | None = None) -> None:
    """Nothing is to be done then."""


async def connected(url: str, **options: object) -> Client:
    return await connect(url, options, on_loss=nothing)


async def is_back(client: Client) -> None:
    """Wait until a lost connection was made again."""
    await until(lambda: client.is_connected and client.stats["reconnects"] > 0)


async def refusal(url: str, **options: object) -> str:
    began = time.monotonic()
    with pytest.raises(BrokerError) as caught:
        await connected(url, **options)
    assert time.monotonic() - began < 40  # nats-py alone would retry for minutes
    assert caught.value.__cause__ is None
    return str(caught.value)


# -- TLS


@pytest.fixture
async def secured(tmp_path: Path, certificate: tuple[Path, Path]) -> AsyncGenerator[NatsServer]:
    """A broker that speaks TLS only, and asks for a certificate too."""
    files = [str(file) for file in certificate]
    tls = ("--tlsverify", "--tlscert", files[0], "--tlskey", files[1], "--tlscacert", files[0])
    async with NatsServer(tmp_path, *tls, jetstream=False) as server:
        yield server


@pytest.mark.slow
async def test_a_certificate_that_is_not_trusted_is_one_line_and_hangs_nothing(secured: NatsServer) -> None:
    message = await refusal(secured.url.replace("nats://", "tls://"))
    assert "certificate verify failed" in message


@pytest.mark.slow
async def test_a_certificate_of_ones_own_lets_one_in_and_may_be_renewed_in_the_same_context(
    tmp_path: Path, certificate: tuple[Path, Path]
) -> None:
    renewed, trusted = (tmp_path / "renewed.pem", tmp_path / "renewed.key"), tmp_path / "trusted.pem"
    make = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=worker"
    make += f" -out {renewed[0]} -keyout {renewed[1]}"
    subprocess.run(["openssl", *make.split()], check=True, capture_output=True)  # noqa: ASYNC221, S607
    trusted.write_bytes(certificate[0].read_bytes())
    files = ("--tlscert", str(certificate[0]), "--tlskey", str(certificate[1]), "--tlscacert", str(trusted))
    context = ssl.create_default_context(cafile=certificate[0])
    context.load_cert_chain(*certificate)
    async with NatsServer(tmp_path, "--tlsverify", *files, jetstream=False) as server:
        client = await connected(server.url.replace("nats://", "tls://"), tls=context)
        trusted.write_bytes(renewed[0].read_bytes())  # and the old one is worth nothing any more
        context.load_cert_chain(*renewed)
        server.kill()
        await server.start()
        await is_back(client)
        await disconnect(client)


@pytest.mark.parametrize(("user", "option"), [("nats://worker", True), ("tls://worker", False), ("wsworker", True)])
async def test_a_broker_without_tls_is_sent_no_password_where_tls_was_asked_for(user: str, *, option: bool) -> None:
    """nats-py goes on without it."""
    sent: list[bytes] = []

    async def offer_no_tls(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b'INFO {"server_id":"x","max_payload":1048576,"auth_required":true}\r\n')
        sent.append(await reader.read())
        writer.close()

    async with await asyncio.start_server(offer_no_tls, "127.0.0.1", 0) as server:
        options = {"tls": ssl.create_default_context()} if option else {}
        message = await refusal(f"{user}:s3cret@127.0.0.1:{server.sockets[0].getsockname()[1]}", **options)
        await until(lambda: bool(sent))
    assert message.endswith(": it does not ask for TLS")
    assert set(sent) == {b""}


@pytest.mark.filterwarnings("ignore:parameter 'timeout':DeprecationWarning")  # of nats-py's call of aiohttp
async def test_a_websocket_with_tls_is_a_connection_although_the_broker_behind_it_does_not_ask_for_tls(
    certificate: tuple[Path, Path],
) -> None:
    async def answer_pings(request: web.BaseRequest) -> web.WebSocketResponse:
        await (socket := web.WebSocketResponse()).prepare(request)
        await socket.send_bytes(INFO)
        async for message in socket:
            if message.data == b"PING\r\n":
                await socket.send_bytes(b"PONG\r\n")
        return socket

    proxy = web.ServerRunner(web.Server(answer_pings))
    await proxy.setup()
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*certificate)
    await web.TCPSite(proxy, "127.0.0.1", 0, ssl_context=context).start()
    trusting = ssl.create_default_context(cafile=certificate[0])
    client = await connected(f"wss://127.0.0.1:{proxy.addresses[0][1]}", tls=trusting)
    assert client.is_connected
    await disconnect(client)
    await proxy.cleanup()


@pytest.mark.filterwarnings("ignore:parameter 'timeout':DeprecationWarning")  # of nats-py's call of aiohttp
async def test_a_websocket_whose_handshake_hangs_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "_CONNECT_WITHIN", 0.1)

    async def answer_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    tasks = asyncio.all_tasks()
    async with await asyncio.start_server(answer_nothing, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with asyncio.timeout(PATIENCE):
            assert await refusal(f"ws://{address}") == f"no connection to the broker at {address}: TimeoutError"
        await until(lambda: asyncio.all_tasks() == tasks)


async def test_a_websocket_without_tls_is_no_connection_where_tls_was_asked_for() -> None:
    message = await refusal("ws://127.0.0.1:1", tls=ssl.create_default_context())
    assert message == "no connection to the broker at 127.0.0.1:1: ws:// is without TLS, use wss://"


# -- at first


async def test_a_broker_that_is_not_there_is_one_line_at_once() -> None:
    began = time.monotonic()
    message = await refusal("nats://worker:s3cret@127.0.0.1:1")
    assert time.monotonic() - began < 1.5  # nats-py alone would wait 2 s, and try again
    assert message.startswith(f"no connection to the broker at 127.0.0.1:1: [Errno {errno.ECONNREFUSED}] ")


@asynccontextmanager
async def server_of_version(version: object, max_payload: int = 1 << 20) -> AsyncGenerator[str]:
    """A broker that tells this version, and answers pings."""

    async def answer_pings(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "max_payload": max_payload, "version": version}
        writer.write(b"INFO %b\r\n" % json.dumps(info).encode())
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    async with await asyncio.start_server(answer_pings, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("version", "shown"), [("2.10.26", "2.10"), ("2.9.25", "2.9"), ("2.0.0-rc1", "2.0"), ("1.4.1", "1.4")]
)
async def test_a_broker_that_is_too_old_is_one_line(version: str, shown: str) -> None:
    async with server_of_version(version) as address:
        message = await refusal(f"nats://worker:s3cret@{address}")
    assert message == (f"the broker at {address} is a nats-server {shown}, and workers need 2.11 or newer: upgrade it")


@pytest.mark.parametrize("version", ["2.11.0", "2.15.1", "3.0.0-beta.1", "v2.9", "", None, 2])
async def test_a_broker_of_any_other_version_is_used(version: object) -> None:
    async with server_of_version(version) as address:
        connection = await connected(f"nats://{address}")
        assert connection.is_connected
        await connection.close()


async def test_a_broker_that_has_no_room_for_a_request_is_one_line() -> None:
    line = "the broker's max_payload is 9215 bytes, and must be 9216 or more"
    async with server_of_version("2.15.1", max_payload=9215) as address:
        assert await refusal(f"nats://{address}") == line
        async with await nats.connect(f"nats://{address}") as connection:
            with pytest.raises(BrokerError, match=f"^{line}$"):
                NatsBroker(connection)
    async with server_of_version("2.15.1", max_payload=9216) as address:
        await (await connected(f"nats://{address}")).close()


@pytest.mark.parametrize(
    ("answer", "reason"),
    [(b"", "TimeoutError"), (b"-ERR 'maximum connections exceeded'\r\n", "nats: 'maximum connections exceeded'")],
    ids=["silent", "refusing"],
)
async def test_a_broker_that_goes_away_while_the_worker_starts_is_one_line_and_hangs_nothing(
    monkeypatch: pytest.MonkeyPatch, answer: bytes, reason: str
) -> None:
    monkeypatch.setattr(connection, "_CONNECT_WITHIN", 0.5)

    async def answer_no_ping(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(INFO)
        while line := await reader.readline():
            if line == b"PING\r\n" and answer:
                writer.write(answer)
                break
        writer.close()

    tasks, losses = asyncio.all_tasks(), list[BrokerError]()
    async with await asyncio.start_server(answer_no_ping, "127.0.0.1", 0) as server:
        address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(BrokerError, match=f"^no connection to the broker at {address}: {reason}$"):
            async with asyncio.timeout(PATIENCE):
                await connect(f"nats://{address}", {}, on_loss=losses.append)
    assert losses == []
    await until(lambda: asyncio.all_tasks() == tasks)


@pytest.mark.parametrize("credentials", ["", "worker:wr0ng@", "mallory:s3cret@", "t0ken@"])
async def test_a_wrong_password_is_one_line_without_it(guarded: NatsServer, credentials: str) -> None:
    assert await refusal(f"nats://{credentials}{host_of(guarded)}") == (
        f"no connection to the broker at {host_of(guarded)}: nats: 'Authorization Violation'"
    )


@pytest.mark.parametrize(
    "url",
    [
        "",
        ",",
        "nats://",
        "nats://[bad",
        "nats://127.0.0.1:port",
        "nats://127.0.0.1:65536",
        "http://127.0.0.1:1",
        "nats://a b:1",
        "nats://\x00:1",
        "nats://worker:s3cr3t@\udc80:1",
        "nats://worker:s3cr3t/more@127.0.0.1:1",
        "nats://worker:s3cr3t#more@127.0.0.1:1",
        "nats://worker:s3cr3t?more@127.0.0.1:1",
        "nats://worker:s3cr3t,more@127.0.0.1:1",
        "nats://worker:s3cr3t@ho\u2100st:1",
        "nats://worker:s3cr3t@[bad",
        "nats://worker:s3cr3t@127.0.0.1:port",
        f"nats://worker:s3cr3t@{'a' * 300}:1",
    ],
)
async def test_a_wrong_url_is_one_line_without_any_part_of_its_password(url: str) -> None:
    message = await refusal(url)
    assert message.startswith("no connection to the broker at ")
    assert "\n" not in message
    assert "s3cr3t" not in message
    assert "more" not in message


async def test_credentials_need_a_library_that_the_line_names(
    guarded: NatsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nkeys", None)
    assert await refusal(guarded.url, user_credentials="worker.creds") == (
        'credentials need nkeys: install the extra "nats"'
    )


async def test_a_server_that_is_there_is_enough(guarded: NatsServer) -> None:
    connection = await connected(f"nats://worker:s3cret@127.0.0.1:1,nats://worker:s3cret@{host_of(guarded)}")
    assert connection.is_connected
    await connection.close()


async def test_options_are_those_of_nats_py(guarded: NatsServer) -> None:
    connection = await connected(guarded.url, user="worker", password="s3cret", name="ours")
    assert (connection.is_connected, connection.options["name"]) == (True, "ours")
    await connection.close()


async def test_options_that_the_worker_sets_itself_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"what the worker sets itself: closed_cb, error_cb$") as caught:
        NatsBroker("nats://127.0.0.1:1", connect_options={"user": "worker", "error_cb": nothing, "closed_cb": nothing})
    assert caught.value.argument == "connect_options"


# -- later


async def test_a_broker_that_is_killed_and_started_again_is_found_again(
    server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "aiokeyless.worker")
    connection = await connect(server.url, {}, on_loss=nothing)
    server.kill()
    await until(lambda: not connection.is_connected)
    await until(lambda: any(record.getMessage().startswith("broker.error") for record in caplog.records))
    await server.start()
    await is_back(connection)
    await connection.flush(int(PATIENCE))
    await connection.close()
    events = [record.getMessage() for record in caplog.records]
    assert events.count("broker.disconnected") == 1
    assert {record.levelname for record in caplog.records} == {"WARNING"}


def test_of_several_servers_the_least_tried_one_is_next_after_a_pause_that_grows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(connection, "error_delay", float)
    for tries, pause in ((0, 1), (1, 2), (4, 5), (9, 5)):
        servers = [Server(urlparse(f"nats://{tried}"), tried) for tried in (tries + 1, tries, tries + 2)]
        assert connection._next_server(servers, {}) == (servers[1], pause)


async def test_a_connection_that_the_worker_closes_is_not_reported_as_lost(
    guarded: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    await (await connected(f"nats://worker:s3cret@{host_of(guarded)}")).close()
    assert caplog.records == []


async def test_a_connection_can_be_ended_while_the_broker_is_away_with_something_unsent(server: NatsServer) -> None:
    tasks = asyncio.all_tasks()
    connection = await connected(server.url)
    await connection.subscribe("somewhere", cb=ignore)
    server.kill()
    await until(lambda: not connection.is_connected)
    await connection.publish("elsewhere", b"unsent")
    await disconnect(connection)
    assert connection.is_closed
    await until(lambda: asyncio.all_tasks() == tasks)


@pytest.mark.slow
async def test_a_login_that_expires_comes_back_once_its_file_is_renewed_after_a_moment_in_which_it_was_empty(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """nats-py closes the connection for good."""
    operator, credentials, losses = Operator(), tmp_path / "worker.creds", list[BrokerError]()
    options = {"user_credentials": str(credentials)}
    async with NatsServer(tmp_path, configuration=operator.configuration, jetstream=False) as server:
        operator.write_login(credentials, lasts=2)
        client = await connect(server.url, options, on_loss=losses.append)
        credentials.write_text("")
        await until(lambda: "the credentials cannot be used" in caplog.text)
        operator.write_login(credentials, lasts=3600)
        await is_back(client)
        await client.flush(int(PATIENCE))
        assert losses == []
        assert "user authentication expired" in caplog.text
        await disconnect(client)


@pytest.mark.parametrize(
    ("configuration", "reason"),
    [
        ("accounts { A { limits: { max_connections: 0 }, users: [ { user: u, password: p } ] } }", "exceeded"),
        ("accounts { A { users: [ { user: u, password: another } ] } }", "authorization violation"),
    ],
    ids=["a limit of the account's connections", "a login that is gone"],
)
async def test_a_mistake_in_the_configuration_ends_a_connection_until_it_is_corrected(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, configuration: str, reason: str
) -> None:
    """nats-py closes the connection for good, and an application that uses it would need a restart."""
    right, losses = "accounts { A { users: [ { user: u, password: p } ] } }", list[BrokerError]()
    async with NatsServer(tmp_path, configuration=right, jetstream=False) as server:
        options = {"user": "u", "password": "p"}
        client = await connect(server.url, options, on_loss=losses.append)
        server.configure(configuration)
        await until(lambda: reason in caplog.text.lower())
        assert "broker.error error=\"Error: nats: '" in caplog.text
        server.configure(right)
        await is_back(client)
        await client.flush(int(PATIENCE))
        assert losses == []
        await disconnect(client)


@pytest.mark.parametrize(("told", "hangs"), [(True, False), (False, False), (True, True)])
async def test_an_end_with_something_unsent_is_told_of_too(
    guarded: NatsServer, monkeypatch: pytest.MonkeyPatch, *, told: bool, hangs: bool
) -> None:
    losses: list[BrokerError] = []
    tasks = asyncio.all_tasks()
    url = f"nats://worker:s3cret@{host_of(guarded)}"
    client = await connect(url, {}, on_loss=losses.append)
    await client.subscribe("somewhere", cb=ignore)
    await client.flush()
    transport = client._transport
    assert transport is not None

    async def is_reset() -> None:
        client._pending = []
        transport.close()  # type: ignore[no-untyped-call]  # nats-py has no types here
        if hangs:
            await asyncio.Event().wait()
        raise ConnectionResetError

    async def keep() -> None:
        client._pending, client._pending_data_size = [b"PING\r\n"], 1

    if hangs:
        monkeypatch.setattr(connection, "_CLOSE_WITHIN", 0.05)
    monkeypatch.setattr(transport, "drain", is_reset)
    monkeypatch.setattr(client, "_flush_pending", keep)
    async with asyncio.timeout(PATIENCE):
        await client._close(client.CLOSED, do_cbs=told)
    assert [str(loss) for loss in losses] == ["the broker ended the connection for good: it did not say why"] * told
    await until(lambda: asyncio.all_tasks() == tasks)


async def test_what_is_not_permitted_is_told_of_and_named_on_a_connection_that_stays(tmp_path: Path) -> None:
    """The subject sounds like a refused login, after which the connection is made again."""
    permissions = 'permissions: { publish: { deny: "authentication.>" } }'
    users = f"authorization {{ users = [ {{ user: u, password: p, {permissions} }} ] }}"
    losses: list[BrokerError] = []
    async with NatsServer(tmp_path, configuration=users, jetstream=False) as server:
        connection = await connect(server.url, {"user": "u", "password": "p"}, on_loss=losses.append)
        await connection.publish("authentication.all", b"")
        await until(lambda: bool(losses))
        assert connection.is_connected
        await connection.close()
    assert "does not permit" in str(losses[0])
    assert "authentication.all" in str(losses[0])


async def ignore(_message: object) -> None:
    """Nothing comes."""


@pytest.mark.slow
async def test_a_broker_that_falls_silent_is_noticed_in_seconds_and_not_in_minutes(
    server: NatsServer, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connected(server.url)
    try:
        server.pause()
        await until(lambda: "broker.disconnected" in caplog.text)  # with the defaults of nats-py, after six minutes
    finally:
        server.resume()
    await disconnect(client)


async def test_a_connection_whose_end_hangs_is_given_up(server: NatsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await connected(server.url)
    close = client.close

    async def hang() -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(client, "close", hang)
    monkeypatch.setattr(connection, "_CLOSE_WITHIN", 0.05)
    await disconnect(client)
    await close()
