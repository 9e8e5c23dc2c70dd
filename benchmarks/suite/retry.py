"""CPU of the retry layer where nothing fails.

`get_operation` in pairs with the same path through the library without its retry layer; and, since the difference is
small beside the noise of a socket, the layer alone around an attempt that does nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final

from aiokeyless import KeylessClient, protocol
from benchmarks.bench import Pairs
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, Workload, serving
from benchmarks.spending import spent_in_turn

if TYPE_CHECKING:
    from aiokeyless.models import Operation
    from aiokeyless.transport import Transport
    from benchmarks.bench import Bench

_IN_FLIGHT: Final = 16
WITH: Final = "with the retry layer"
WITHOUT: Final = "without"
AGAIN: Final = "without, once more"


def run(bench: Bench) -> Report:
    """Measure at 16 in flight."""
    with serving() as server:
        spendings, layer = bench.apart(measure, bench, server)
    report = Report("retry: CPU of the retry layer on the happy path")
    table = Table(f"get_operation, {_IN_FLIGHT} in flight", ["", "CPU per call, us", "over none"])
    for name, seconds in spendings.items():
        ratio = Pairs(seconds, spendings[WITHOUT]).ratio
        micros = Spread.of([1e6 * value for value in seconds])
        table.rows.append([name, micros.text(1), "1" if name == WITHOUT else ratio.text(3)])
    call = Spread.of(spendings[WITHOUT]).median
    alone = Spread.of([1 + seconds / call for seconds in layer])
    table.rows.append(["the layer alone", Spread.of([1e6 * value for value in layer]).text(2), alone.text(4)])
    report.tables.append(table)
    ratio = Pairs(spendings[WITH], spendings[WITHOUT]).ratio
    report.goals += [
        Goal("CPU with the retry layer over none", 1.02, ratio.median, "x"),
        Goal("the same, from the layer alone", 1.02, alone.median, "x"),
    ]
    report.raw = {"in_flight": _IN_FLIGHT, "layer": [*layer], **{name: [*v] for name, v in spendings.items()}}
    return report


def measure(bench: Bench, server: Server) -> tuple[dict[str, list[float]], list[float]]:
    """Return seconds of CPU per call for each side and round, and of the layer alone."""
    return asyncio.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> tuple[dict[str, list[float]], list[float]]:
    async with KeylessClient(API_KEY, base_url=server.base_url) as client:
        transport, _ = client._open()  # noqa: SLF001  # the path without the layer has no public name

        async def without(operation_id: str) -> Operation:
            client._open()  # noqa: SLF001  # as get_operation does
            with transport.call():
                return await transport.send(protocol.get_operation(operation_id))

        with Workload(server) as workload:
            spendings = await spent_in_turn(
                bench,
                {WITH: client.get_operation, WITHOUT: without, AGAIN: without},
                in_flight=_IN_FLIGHT,
                rounds=bench.pick(full=200, quick=20, smoke=2),
                count=bench.pick(full=300, quick=200, smoke=50),
            )
        if workload.bound:
            raise CannotMeasureError(f"the server was the bottleneck ({workload.share:.0%} of its core)")
        layer = [
            await _layer_alone(transport, bench.pick(full=100_000, quick=50_000, smoke=1000))
            for _ in range(bench.pick(full=10, quick=5, smoke=2))
        ]
        return spendings, layer


async def _layer_alone(transport: Transport, count: int) -> float:
    async def nothing(_request: object) -> None: ...

    async def layered(request: object) -> None:
        await transport.retry(lambda: nothing(request), protocol.is_transient)

    spent: list[float] = []
    for attempt in (nothing, layered):
        before = time.process_time()
        for _ in range(count):
            await attempt(None)
        spent.append((time.process_time() - before) / count)
    return spent[1] - spent[0]
