"""CPU of a poll without a listener, with one that does nothing, and with OpenTelemetry.

Each side is a client whose waits are polled again as soon as they were answered "pending", so that what is measured is
all that a poll costs the process: exchange, decoding, poller, and the two events that a poll has.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from typing import TYPE_CHECKING, Final

import msgspec
from opentelemetry.metrics import NoOpMeterProvider
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from tenacity import wait_fixed

from aiokeyless import KeylessClient
from aiokeyless.otel import OpenTelemetryListener
from benchmarks.bench import order
from benchmarks.cpu_cost import CpuCost, cpu_cost_table
from benchmarks.report import Goal, Report
from benchmarks.server import API_KEY, Server, Workload, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from aiokeyless.events import Event, Listener
    from benchmarks.bench import Bench

NONE: Final = "no listener"
REPEATED: Final = "no listener, repeated"
IDLE: Final = "a listener that does nothing"
API: Final = "OpenTelemetry, no SDK"
SDK: Final = "OpenTelemetry, metrics by the SDK"
_IN_FLIGHT: Final = 16
_WAITS: Final = 400  # the schedule's shortest delay is 20 ms: with fewer, the process would be idle between polls
_BATCH: Final = 0.02  # seconds of polling between two checks of their number


def run(bench: Bench) -> Report:
    """Measure all sides in one process, in turn."""
    report = Report("listeners: CPU of a poll, by who is told of it")
    with serving() as server:
        costs = bench.in_fresh_process(measure, bench, server)
    report.tables.append(cpu_cost_table(f"{_IN_FLIGHT} in flight", costs, NONE))
    report.raw["costs"] = msgspec.to_builtins(costs, str_keys=True)
    ratios = {name: over.median for name in costs if (over := costs[name].over(costs[NONE]))}
    report.goals.append(Goal(f"{IDLE} over none", 1.03, ratios.get(IDLE), "x"))
    return report


def measure(bench: Bench, server: Server) -> dict[str, CpuCost]:
    """Measure all sides."""
    return asyncio.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> dict[str, CpuCost]:
    recorded = MeterProvider(metric_readers=[InMemoryMetricReader()])
    sides: dict[str, list[Listener]] = {
        NONE: [],
        REPEATED: [],
        IDLE: [_ignore],
        API: [OpenTelemetryListener(meter_provider=NoOpMeterProvider())],
        SDK: [OpenTelemetryListener(meter_provider=recorded)],
    }
    seconds: dict[str, dict[int, float]] = {name: {} for name in sides}
    workloads: dict[str, list[Workload]] = {name: [] for name in sides}
    polls = bench.pick(full=1000, quick=500, smoke=50)
    async with contextlib.AsyncExitStack() as stack:
        clients = {name: await stack.enter_async_context(_client(server, side)) for name, side in sides.items()}
        for client in clients.values():
            await _cpu_per_poll(client, polls)
        gc.collect()
        gc.freeze()  # as in `cpu_cost`
        for k in range(bench.pick(full=60, quick=10, smoke=2)):
            for name in order(list(clients), k):
                with Workload(server) as workload:
                    seconds[name][k] = await _cpu_per_poll(clients[name], polls)
                workloads[name].append(workload)
    recorded.shutdown()
    return {name: CpuCost.of(seconds[name], workloads[name]) for name in sides}


def _client(server: Server, listeners: list[Listener]) -> KeylessClient:
    return KeylessClient(
        API_KEY,
        base_url=server.base_url,
        schedule=wait_fixed(0),
        max_in_flight=_IN_FLIGHT,
        max_polls_per_second=None,
        listeners=listeners,
    )


def _ignore(_event: Event) -> None:
    """Do nothing."""


async def _cpu_per_poll(client: KeylessClient, count: int) -> float:
    """Poll at least so often, and return the average CPU seconds of a poll."""
    async with _polling(client):
        gc.collect()
        cpu, polls = time.process_time(), client.statistics.polls
        while (polled := client.statistics.polls - polls) < count:  # noqa: ASYNC110  # nobody signals a number of polls
            await asyncio.sleep(_BATCH)
        return (time.process_time() - cpu) / polled


@contextlib.asynccontextmanager
async def _polling(client: KeylessClient) -> AsyncIterator[None]:
    """Have more polls due than may be in flight, and every wait past its first one."""
    outcomes = client.wait_for_approvals([str(k) for k in range(_WAITS)], timeout=None)
    polls = client.statistics.polls
    waiting = asyncio.ensure_future(anext(outcomes))
    while client.statistics.polls < polls + 2 * _WAITS:  # noqa: ASYNC110  # as above
        await asyncio.sleep(_BATCH)
    try:
        yield
    finally:
        waiting.cancel()
        await asyncio.wait([waiting])
        await outcomes.aclose()
