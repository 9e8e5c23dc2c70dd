"""Two tenants in one process, of one region, with the same users and ids: nothing of one reaches the other."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from waiting import PATIENCE, until

from aiokeyless import ClientClosedError, KeylessClient
from aiokeyless.events import DeliveryEnded, OutcomePublished, PollEnded, PollResult
from aiokeyless.otel import OpenTelemetryListener
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker, next_outcome, submit_approval
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from aiokeyless.events import Event

CONTENT: dict[str, Any] = {"operation_id": "order-1", "operation_payload": "Pay 40", "external_user_id": "ann"}


class Tenants:
    """Acme and Zeta, whose services have one address, and are told apart by the key alone, as a region's are."""

    def __init__(self, acme: Sandbox, zeta: Sandbox, session: aiohttp.ClientSession, url: str) -> None:
        self.events: list[Event] = []
        self._reader = InMemoryMetricReader()
        metrics = OpenTelemetryListener(meter_provider=MeterProvider([self._reader], shutdown_on_exit=False))
        options: dict[str, Any] = {"base_url": url, "session": session, "listeners": [self.events.append, metrics]}
        self.acme, self.zeta = acme, zeta
        self.clients = [KeylessClient(name, name=name, **options) for name in ("acme", "zeta")]

    def points(self, metric: str) -> dict[object, Any]:
        """The points of a metric, by the name of the client."""
        data = self._reader.get_metrics_data()
        assert data is not None
        [found] = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics if m.name == metric]
        return {(point.attributes or {}).get("aiokeyless.client.name"): point for point in found.data.data_points}

    async def until_polled(self, name: str, more: int = 2) -> None:
        """Wait until the waits of a tenant have been polled so many times more."""
        before = len(self.events)

        def polls() -> int:
            return sum(
                isinstance(event, PollEnded | DeliveryEnded) and event.client == name for event in self.events[before:]
            )

        await until(lambda: polls() >= more)


@pytest.fixture
async def tenants() -> AsyncGenerator[Tenants]:
    async with (
        Sandbox(api_key="acme") as acme,
        Sandbox(api_key="zeta") as zeta,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), cookie_jar=aiohttp.DummyCookieJar()) as session,
        one_address({"acme": acme, "zeta": zeta}) as url,
    ):
        tenants = Tenants(acme, zeta, session, url)
        async with tenants.clients[0], tenants.clients[1]:
            yield tenants


@asynccontextmanager
async def one_address(services: dict[str, Sandbox]) -> AsyncGenerator[str]:
    async def forward(request: web.Request) -> web.Response:
        url = services[request.headers["X-Api-Key"]].url + request.raw_path
        async with http.request(request.method, url, headers=request.headers, data=await request.read()) as answer:
            body, kind = await answer.read(), answer.headers["Content-Type"]
            cookie = {"Set-Cookie": f"tenant={request.headers['X-Api-Key']}"}
            assert "Cookie" not in request.headers
            return web.Response(status=answer.status, body=body, headers={"Content-Type": kind, **cookie})

    application = web.Application()
    application.router.add_route("*", "/{path:.*}", forward)
    runner = web.AppRunner(application, access_log=None, handler_cancellation=True, shutdown_timeout=1)
    async with aiohttp.ClientSession() as http:
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()


@pytest.mark.looptime
async def test_an_approval_for_one_tenant_ends_neither_wait_nor_hold_of_the_other(tenants: Tenants) -> None:
    acme, zeta = tenants.clients
    tickets = [await client.create_operation("C0FFEE", **CONTENT) for client in tenants.clients]
    waits = [asyncio.create_task(client.wait_for_approval("order-1")) for client in tenants.clients]
    hold = asyncio.create_task(zeta.hold_for_approval(tickets[1], seconds=20))
    await tenants.until_polled("zeta")
    tenants.acme.approve("order-1")
    approved = [await waits[0], await acme.hold_for_approval(tickets[0], seconds=20)]
    assert [operation.is_approved for operation in approved if operation is not None] == [True, True]
    await tenants.until_polled("zeta")
    assert await hold is None
    assert not waits[1].done()
    results = {(event.client, event.result) for event in tenants.events if isinstance(event, PollEnded)}
    assert {client for client, result in results if result is PollResult.APPROVED} == {"acme"}
    assert {*tenants.points("aiokeyless.wait.duration")} == {"acme"}
    await zeta.aclose()
    with pytest.raises(ClientClosedError):
        await waits[1]


@pytest.mark.looptime
async def test_a_tenant_that_fails_is_seen_alone_in_logs_and_metrics(
    tenants: Tenants, caplog: pytest.LogCaptureFixture
) -> None:
    for client in tenants.clients:
        await client.create_operation("C0FFEE", **CONTENT)
    tenants.acme.fail_next(503, times=None)
    waits = [asyncio.create_task(client.wait_for_approval("order-1")) for client in tenants.clients]
    acme, zeta = tenants.clients
    await until(lambda: acme.statistics.is_failing)
    assert not zeta.statistics.is_failing
    assert zeta.statistics.transient_failures == 0
    assert {name: point.value for name, point in tenants.points("aiokeyless.service.failing").items()} == {
        None: 0,
        "acme": 1,
    }
    assert len([record for record in caplog.records if "Keyless fails" in record.getMessage()]) == 1
    tenants.zeta.approve("order-1")
    await waits[1]
    assert not waits[0].done()
    await acme.aclose()  # as when it is deleted while it fails
    assert tenants.points("aiokeyless.service.failing")["acme"].value == 0
    with pytest.raises(ClientClosedError):
        await waits[0]


async def test_an_approval_for_one_tenant_is_no_outcome_of_the_others_workers(tenants: Tenants, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        brokers = [await stack.enter_async_context(SqliteBroker(tmp_path / f"{n}.db")) for n in range(2)]
        workers = [
            await stack.enter_async_context(ApprovalWorker(client, broker))
            for client, broker in zip(tenants.clients, brokers, strict=True)
        ]
        for broker in brokers:
            await submit_approval(broker, "C0FFEE", **CONTENT)
        await until(lambda: "order-1" in tenants.acme.operations and "order-1" in tenants.zeta.operations)
        tenants.acme.approve("order-1")
        async with asyncio.timeout(PATIENCE), next_outcome(brokers[0], "shop") as event:
            assert (event.outcome, event.operation_id) == ("approved", "order-1")
        await tenants.until_polled("zeta")
        assert [worker.statistics.approved for worker in workers] == [1, 0]
        assert [event.client for event in tenants.events if isinstance(event, OutcomePublished)] == ["acme"]
        tenants.zeta.approve("order-1", auth_type="pin")
        async with asyncio.timeout(PATIENCE), next_outcome(brokers[1], "shop") as event:
            assert event.auth_type == "pin"
    assert {*tenants.points("aiokeyless.wait.duration")} == {"acme", "zeta"}
