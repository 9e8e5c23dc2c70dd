"""Three brokers, of which one is lost: what a cluster is for."""

from __future__ import annotations

import asyncio
import re
import shutil
import ssl
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import aiohttp
import nats
import nats.errors
import pytest
from nats.js.api import ConsumerConfig
from nats_server import OUTCOMES, REQUESTS, NatsServer
from ports import own_port
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalWorker, BrokerError, Outcome, submit_approval
from aiokeyless.worker.nats import Fleet, NatsBroker, StreamSettings

from .reading import outcomes, read

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.cluster

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "nats"
NAMES = ("a", "b", "c")
WAITS = 50
IMPORTED: Final = Fleet(prefix="keyless.api")


@asynccontextmanager
async def running(servers: dict[str, NatsServer]) -> AsyncGenerator[dict[str, NatsServer]]:
    try:
        await asyncio.gather(*(server.start() for server in servers.values()))
        yield servers
    finally:
        for server in servers.values():
            server.kill()


@asynccontextmanager
async def cluster(folder: Path, **monitored: str) -> AsyncGenerator[dict[str, NatsServer]]:
    """Run three servers that know each other; those that are named have a port for monitoring."""
    routes = [f"nats://127.0.0.1:{own_port()}" for _ in NAMES]
    servers = {}
    for name, route in zip(NAMES, routes, strict=True):
        options = ["--server_name", name, "--cluster_name", "test", "--cluster", route, "--routes", ",".join(routes)]
        options += ["-m", monitored[name]] if name in monitored else []
        servers[name] = NatsServer(folder / name, *options)
    async with running(servers):
        yield servers


@asynccontextmanager
async def documented_cluster(folder: Path, certificate: tuple[Path, Path]) -> AsyncGenerator[dict[str, NatsServer]]:
    """Run three servers with the configuration of the documentation."""
    certificates, key = (str(file) for file in certificate)
    addresses = [f"127.0.0.1:{own_port()}" for _ in NAMES]
    shared = {"TLS_CERT": certificates, "TLS_KEY": key, "TLS_CA": certificates}
    shared |= {f"ROUTE_{number}": f"nats://{address}" for number, address in enumerate(addresses)}
    servers = {}
    for name, address in zip(NAMES, addresses, strict=True):
        place = folder / name
        place.mkdir()
        own = {**shared, "SERVER_NAME": name, "CLUSTER_LISTEN": address, "STORE": str(place / "store")}
        for file in ("cluster.conf", "accounts.conf"):
            (place / file).write_text(with_values((EXAMPLES / file).read_text(), own))
        servers[name] = NatsServer(place, "-c", str(place / "cluster.conf"), jetstream=False)  # the file turns it on
    async with running(servers):
        yield servers


def with_values(configuration: str, values: dict[str, str]) -> str:
    """Fill in what each server takes from its own environment."""
    for variable, value in values.items():
        configuration = re.sub(rf"\${variable}\b", f'"{value}"', configuration)
    return configuration


async def unheard(_error: Exception) -> None:
    """Take note of nothing: that a server is lost is what is tested."""


async def has_a_leader(connection: Client) -> bool:
    try:
        await connection.jetstream(timeout=1).account_info()
    except nats.errors.Error:
        return False
    return True


async def prepares(worker: ApprovalWorker) -> bool:
    """Make the streams, unless the leader has not heard of all servers yet: until then it has no place for replicas."""
    try:
        await worker.prepare()
    except BrokerError as error:
        if "start again when all of its servers are up" not in str(error):
            raise
        return False
    return True


async def has_a_reader(connection: Client) -> bool:
    return bool(await connection.jetstream(timeout=PATIENCE).consumers_info(OUTCOMES))


async def leader_of_the_requests(connection: Client) -> str:
    found = (await connection.jetstream(timeout=PATIENCE).stream_info(REQUESTS)).cluster
    assert found is not None
    assert found.leader is not None
    return found.leader


async def test_no_approval_is_lost_with_a_broker(tmp_path: Path, sandbox: Sandbox) -> None:
    async with cluster(tmp_path) as servers, sandbox.client() as client:
        urls = [server.url for server in servers.values()]
        async with await nats.connect(urls, error_cb=unheard) as connection:
            await until(lambda: has_a_leader(connection))
            settings = StreamSettings(replicas=len(NAMES))
            broker = await NatsBroker(",".join(urls), settings=settings).__aenter__()
            await until(lambda: prepares(ApprovalWorker(client, broker)))
            worker = ApprovalWorker(client, broker, schedule=wait_fixed(0.2))
            working = asyncio.create_task(worker.run())
            await until(lambda: worker.statistics.is_ready)
            for number in range(WAITS):
                await submit_approval(connection, "C0FFEE", operation_id=f"txn-{number}", context=number)
            await until(lambda: len(sandbox.operations) == WAITS)
            events = outcomes(connection, "test")
            first = asyncio.ensure_future(anext(events))
            await until(lambda: has_a_reader(connection))
            servers[await leader_of_the_requests(connection)].kill()
            for operation_id in list(sandbox.operations):
                sandbox.approve(operation_id)
            found = [await first, *[await anext(events) for _ in range(WAITS - 1)]]
            await events.aclose()
            worker.stop()
            await working
            await broker.aclose()
    assert [event.outcome for event in found] == [Outcome.APPROVED] * WAITS
    assert {event.read_context(int) for event in found} == set(range(WAITS))
    assert len(sandbox.operations) == WAITS


async def test_the_cluster_of_the_documentation_loses_no_approval_with_a_server(
    tmp_path: Path, certificate: tuple[Path, Path], sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    for user in ("OPERATOR", "WORKER", "SHOP"):
        monkeypatch.setenv(f"{user}_PASSWORD", "of-every-user")
    trusted = ssl.create_default_context(cafile=certificate[0])

    def options(user: str) -> dict[str, Any]:
        return {"user": user, "password": "of-every-user", "tls": trusted}

    async with documented_cluster(tmp_path, certificate) as servers, sandbox.client() as client:
        urls = [server.url.replace("nats://", "tls://") for server in servers.values()]
        async with (
            await nats.connect(urls, error_cb=unheard, **options("operator")) as operator,
            await nats.connect(urls, error_cb=unheard, **options("shop")) as shop,
        ):
            await until(lambda: has_a_leader(operator))
            settings = StreamSettings(replicas=len(NAMES))
            async with NatsBroker(",".join(urls), settings=settings, connect_options=options("worker")) as broker:
                await until(lambda: prepares(ApprovalWorker(client, broker)))
                async with ApprovalWorker(client, broker, schedule=wait_fixed(0.2)):
                    place = ConsumerConfig(durable_name="shop", max_ack_pending=-1)
                    await operator.jetstream(timeout=PATIENCE).add_consumer(OUTCOMES, place)
                    theirs = NatsBroker(shop, fleet=IMPORTED)
                    submission = await submit_approval(theirs, "C0FFEE", operation_id="txn-1")
                    await until(lambda: submission.operation_id in sandbox.operations)
                    servers[await leader_of_the_requests(operator)].kill()
                    sandbox.approve(submission.operation_id)
                    async with asyncio.timeout(PATIENCE):
                        [event] = await read(theirs, reader="shop")
    assert (event.outcome, event.operation_id) == (Outcome.APPROVED, submission.operation_id)


async def test_a_server_with_an_empty_store_says_when_others_have_filled_it(tmp_path: Path, sandbox: Sandbox) -> None:
    """The stream's own information counts a server as current that has just started, and has nothing yet."""
    port = str(own_port())
    async with cluster(tmp_path, c=port) as servers, sandbox.client() as client, aiohttp.ClientSession() as session:
        urls = [server.url for server in servers.values()]
        async with await nats.connect(urls[:2], error_cb=unheard) as connection:
            await until(lambda: has_a_leader(connection))
            async with NatsBroker(",".join(urls), settings=StreamSettings(replicas=len(NAMES))) as broker:
                await until(lambda: prepares(ApprovalWorker(client, broker)))
            for number in range(WAITS):
                await submit_approval(connection, "C0FFEE", operation_id=f"txn-{number}")
            servers["c"].kill()
            shutil.rmtree(tmp_path / "c" / "store")
            await servers["c"].start()

            async def is_filled() -> bool:
                async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                    return answer.status == HTTPStatus.OK

            await until(is_filled)
            async with session.get(f"http://127.0.0.1:{port}/jsz?streams=1") as answer:
                streams = (await answer.json())["account_details"][0]["stream_detail"]
    assert {stream["name"]: stream["state"]["messages"] for stream in streams}[REQUESTS] == WAITS
