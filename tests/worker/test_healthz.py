"""``/healthz``: what an orchestrator is told of a worker."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from typing import TYPE_CHECKING, cast

import aiohttp
import msgspec
import pytest
from aiohttp import web
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalWorker, BrokerError, WorkerStatistics, serve_health

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

STATISTICS = WorkerStatistics(
    in_flight=1, deliveries=20, polls=19, created=2, approved=1, transient_failures=3, is_failing=True, is_ready=True
)
UNREADY = msgspec.structs.replace(STATISTICS, is_ready=False, problems=("a stream is full", "a key is refused"))


class Worker:
    """A worker as it is seen from outside."""

    def __init__(self) -> None:
        self.statistics = STATISTICS


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def served(worker: Worker) -> AsyncGenerator[web.BaseRunner]:
    server = await serve_health(cast("ApprovalWorker", worker), 0)
    yield server
    await server.cleanup()


async def asked(server: web.BaseRunner, path: str = "/healthz", method: str = "GET") -> tuple[int, str, str]:
    """Return the status of the answer, its content type and its text."""
    host, port = server.addresses[0]
    url = f"http://{host}:{port}{path}"
    async with aiohttp.ClientSession() as session, session.request(method, url) as response:
        assert response.headers.get("Allow") == ("GET, HEAD" if response.status == 405 else None)
        return response.status, response.content_type, await response.text()


async def test_a_worker_that_takes_requests_is_ok_and_tells_its_statistics(
    served: web.BaseRunner, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    status, content_type, text = await asked(served)
    assert not caplog.records  # an orchestrator asks every few seconds
    assert (status, content_type) == (200, "application/json")
    assert msgspec.json.decode(text) == {"status": "ok"} | msgspec.json.decode(msgspec.json.encode(STATISTICS))


async def test_a_worker_that_takes_none_is_unavailable(served: web.BaseRunner, worker: Worker) -> None:
    worker.statistics = UNREADY
    status, content_type, text = await asked(served)
    assert (status, content_type) == (503, "application/json")
    body = msgspec.json.decode(text)
    assert (body["status"], body["problems"]) == ("unavailable", ["a stream is full", "a key is refused"])


async def test_it_is_ready_while_it_takes_requests_else_says_why_not(served: web.BaseRunner, worker: Worker) -> None:
    assert await asked(served, "/readyz") == (200, "text/plain", "ok\n")
    worker.statistics = UNREADY
    assert await asked(served, "/readyz") == (503, "text/plain", "a stream is full\na key is refused\n")


async def test_it_is_alive_whatever_keeps_it_from_being_ready(served: web.BaseRunner, worker: Worker) -> None:
    worker.statistics = UNREADY
    assert await asked(served, "/livez") == (200, "text/plain", "ok\n")


async def test_it_listens_on_this_machine_only(served: web.BaseRunner) -> None:
    assert [address[0] for address in served.addresses] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("method", "path", "told"),
    [("GET", "/", (404, "not found\n")), ("POST", "/healthz", (405, "use GET\n")), ("HEAD", "/readyz", (200, ""))],
)
async def test_one_may_ask_by_get_and_head_and_there_is_nothing_else(
    served: web.BaseRunner, method: str, path: str, told: tuple[int, str]
) -> None:
    status, _, text = await asked(served, path, method)
    assert (status, text) == told


async def test_a_port_that_is_taken_is_one_line(worker: Worker) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerError, match=rf"^cannot serve the probes on 127\.0\.0\.1 port {port}: .*in use"):
            await serve_health(cast("ApprovalWorker", worker), port)


# -- clients that mean no good


@pytest.mark.parametrize("head", [b"GET /healthz HTTP/1.1\r\nX: " + b"x" * 8192 + b"\r\n\r\n", b"\0\r\n\r\n"])
async def test_what_is_no_request_is_refused_and_fills_no_log(
    served: web.BaseRunner, caplog: pytest.LogCaptureFixture, head: bytes
) -> None:
    for _ in range(2):
        reader, writer = await asyncio.open_connection(*served.addresses[0])
        writer.write(head)
        assert b" 400 " in await reader.readline()
        writer.close()
    assert not caplog.records


async def test_an_answer_ends_its_connection(served: web.BaseRunner) -> None:
    reader, writer = await asyncio.open_connection(*served.addresses[0])
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    assert (await asyncio.wait_for(reader.read(), PATIENCE)).startswith(b"HTTP/1.1 200 OK")
    writer.close()


@pytest.mark.parametrize("sent", [b"", b"GET /readyz HTTP/1.1\r\nHo"])
@pytest.mark.looptime
async def test_a_connection_that_asks_for_nothing_is_closed_in_time(served: web.BaseRunner, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(*served.addresses[0])
    writer.write(sent)
    async with asyncio.timeout(11):
        assert await reader.read() == b""
    writer.close()


@pytest.mark.skipif(os.environ.get("TEST_LOOP") == "uvloop", reason="uvloop accepts by none of Python's sockets")
async def test_a_worker_without_a_descriptor_left_fills_no_log(
    served: web.BaseRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(_socket: socket.socket) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(socket.socket, "accept", refuse)
    monkeypatch.setattr("asyncio.constants.ACCEPT_RETRY_DELAY", 3600)
    with socket.create_connection(served.addresses[0]):
        await until(lambda: bool(caplog.records))
    assert len(caplog.records) < 6
