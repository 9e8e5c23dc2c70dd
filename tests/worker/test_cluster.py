"""Three brokers, of which one is lost: what a cluster is for."""

from __future__ import annotations

import asyncio
import socket
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import nats
import nats.errors
import pytest
from nats_server import REQUESTS, NatsServer, until
from tenacity import wait_fixed

from aiokeyless.worker import ApprovalWorker, Outcome, StreamSettings, approval_outcomes, submit_approval

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from nats.aio.client import Client

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.cluster

NAMES = ("a", "b", "c")
WAITS = 50


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [bound.getsockname()[1] for bound in sockets]
    for bound in sockets:
        bound.close()
    return ports


@asynccontextmanager
async def cluster(folder: Path) -> AsyncGenerator[dict[str, NatsServer]]:
    """Run three servers that know each other."""
    routes = [f"nats://127.0.0.1:{port}" for port in free_ports(len(NAMES))]
    servers = {}
    for name, route in zip(NAMES, routes, strict=True):
        options = ("--server_name", name, "--cluster_name", "test", "--cluster", route, "--routes", ",".join(routes))
        servers[name] = NatsServer(folder / name, *options)
    try:
        await asyncio.gather(*(server.start() for server in servers.values()))
        yield servers
    finally:
        for server in servers.values():
            server.kill()


async def unheard(_error: Exception) -> None:
    """Take note of nothing: that a server is lost is what is tested."""


async def has_a_leader(connection: Client) -> bool:
    try:
        await connection.jetstream(timeout=1).account_info()
    except nats.errors.Error:
        return False
    return True


async def leader_of_the_requests(connection: Client) -> str:
    found = (await connection.jetstream().stream_info(REQUESTS)).cluster
    assert found is not None
    assert found.leader is not None
    return found.leader


async def test_no_approval_is_lost_with_a_broker(tmp_path: Path, sandbox: Sandbox) -> None:
    # With this timeout, what the lost server had in hand is delivered again after 13 s, not 40.
    async with cluster(tmp_path) as servers, sandbox.client(request_timeout=1) as client:
        urls = [server.url for server in servers.values()]
        async with await nats.connect(urls, error_cb=unheard) as connection:
            await until(lambda: has_a_leader(connection))
            settings = StreamSettings(replicas=len(NAMES))
            worker = ApprovalWorker(client, ",".join(urls), schedule=wait_fixed(0.2), settings=settings)
            working = asyncio.create_task(worker.run())
            await until(lambda: worker.statistics.is_ready)
            for number in range(WAITS):
                await submit_approval(connection, "C0FFEE", context=number)
            await until(lambda: len(sandbox.operations) == WAITS)
            events = approval_outcomes(connection, "test")
            first = asyncio.ensure_future(anext(events))
            servers[await leader_of_the_requests(connection)].kill()
            for operation_id in list(sandbox.operations):
                sandbox.approve(operation_id)
            found = [await first, *[await anext(events) for _ in range(WAITS - 1)]]
            await events.aclose()
            worker.stop()
            await working
    assert [event.outcome for event in found] == [Outcome.APPROVED] * WAITS
    assert {event.read_context(int) for event in found} == set(range(WAITS))
    assert len(sandbox.operations) == WAITS
