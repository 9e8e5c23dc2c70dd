"""``/healthz``: what whoever starts and stops a worker is told."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, cast

import aiohttp
import msgspec
import pytest

from aiokeyless.worker import BrokerError, WorkerStatistics, serve_health

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from aiohttp import web

    from aiokeyless.worker import ApprovalWorker

STATISTICS = WorkerStatistics(
    in_flight=1,
    deliveries=20,
    looks=19,
    created=2,
    approved=1,
    expired=0,
    failed=0,
    duplicates=0,
    transient_failures=3,
    is_ready=True,
    is_down=True,
    is_draining=False,
)


class Worker:
    """A worker as it is seen from outside."""

    def __init__(self) -> None:
        self.statistics = STATISTICS


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def served(worker: Worker) -> AsyncGenerator[web.AppRunner]:
    runner = await serve_health(cast("ApprovalWorker", worker), 0)
    yield runner
    await runner.cleanup()


async def asked(runner: web.AppRunner, method: str = "GET", path: str = "/healthz") -> tuple[int, str, Any]:
    host, port = runner.addresses[0]
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{host}:{port}{path}") as response,
    ):
        is_json = response.content_type == "application/json"
        return response.status, response.content_type, await response.json() if is_json else None


async def test_a_worker_that_takes_requests_is_ok_and_tells_its_statistics(served: web.AppRunner) -> None:
    status, content_type, body = await asked(served)
    assert (status, content_type) == (200, "application/json")
    assert body["status"] == "ok"
    assert {name: body[name] for name in STATISTICS.__struct_fields__} == {
        name: getattr(STATISTICS, name) for name in STATISTICS.__struct_fields__
    }


async def test_a_worker_that_takes_none_is_unavailable(served: web.AppRunner, worker: Worker) -> None:
    worker.statistics = msgspec.structs.replace(STATISTICS, is_ready=False, is_draining=True)
    status, content_type, body = await asked(served)
    assert (status, content_type) == (503, "application/json")
    assert (body["status"], body["is_draining"]) == ("unavailable", True)


async def test_it_listens_on_this_machine_only(served: web.AppRunner) -> None:
    assert [address[0] for address in served.addresses] == ["127.0.0.1"]


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("POST", "/healthz", 405)])
async def test_there_is_nothing_else(served: web.AppRunner, method: str, path: str, status: int) -> None:
    assert (await asked(served, method, path))[0] == status


async def test_a_port_that_is_taken_is_one_line(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"^cannot serve /healthz on 127\.0\.0\.1 port {port}: .*in use$"):
            await serve_health(cast("ApprovalWorker", worker), port)


async def test_an_address_of_another_machine_is_one_line(worker: Worker) -> None:
    with pytest.raises(BrokerError, match=r"^cannot serve /healthz on 192\.0\.2\.1 port 0: "):
        await serve_health(cast("ApprovalWorker", worker), 0, "192.0.2.1")
