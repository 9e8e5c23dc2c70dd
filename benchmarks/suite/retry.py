"""CPU of the retry layer when nothing fails, against retry libraries around the same call.

The reference of ours is the same path through the library without its retry layer; that of the others is the plain
aiohttp + msgspec call. The difference is small compared with the noise of a socket, so each layer is measured alone
too, around an attempt that does nothing.
"""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING, Final, NamedTuple

import aiohttp
import msgspec
import stamina
import tenacity
from aiohttp_retry import JitterRetry, RetryClient

from aiokeyless import KeylessClient
from aiokeyless._http import protocol
from benchmarks.baselines import BARE, BARE_REPEATED, OURS, BareClient, bare_session
from benchmarks.cpu_cost import CpuCost, cpu_cost_table, measure_in_turn, microseconds
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless._http.transport import Transport
    from aiokeyless.models import Operation
    from benchmarks.bench import Bench
    from benchmarks.cpu_cost import Call

    Decorator = Callable[[Call], Call]

_IN_FLIGHT: Final = 16
_ATTEMPTS: Final = 3
_FAILURES: Final = (aiohttp.ClientError, TimeoutError)

WITHOUT: Final = f"{OURS} without retries"
REPEATED: Final = f"{WITHOUT}, repeated"
TENACITY: Final = "tenacity's decorator"
STAMINA: Final = "stamina's decorator"
AIOHTTP_RETRY: Final = "aiohttp-retry"

#: The two comparisons: the reference comes first.
_OUR_SIDES: Final = (WITHOUT, REPEATED, OURS)
_OTHER_SIDES: Final = (BARE, BARE_REPEATED, TENACITY, STAMINA, AIOHTTP_RETRY)

_DECORATORS: Final[dict[str, Decorator]] = {
    TENACITY: tenacity.retry(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=30),
        retry=tenacity.retry_if_exception_type(_FAILURES),
    ),
    STAMINA: stamina.retry(on=_FAILURES, attempts=_ATTEMPTS),
}


class Measured(NamedTuple):
    """CPU seconds of the calls, and those that the layers add to a call that does nothing, round by round."""

    costs: dict[str, CpuCost]
    layers: dict[str, list[float]]


def run(bench: Bench) -> Report:
    """Measure at 16 in flight."""
    with serving() as server:
        costs, layers = bench.in_fresh_process(measure, bench, server)
    if busy := [name for name, cost in costs.items() if cost.server_bound]:
        raise CannotMeasureError(f"the server was the bottleneck of {', '.join(busy)}")
    report = Report("retry: CPU of the retry layer on the happy path")
    for names in (_OUR_SIDES, _OTHER_SIDES):
        report.tables.append(_table({name: costs[name] for name in names}, names[0], layers))
    over_none = costs[OURS].over(costs[WITHOUT])
    report.goals += [
        Goal("CPU with the retry layer over none", 1.02, over_none.median if over_none else None, "x"),
        Goal("the same, from the layer alone", 1.02, _ratio_from_layer(layers[OURS], costs[WITHOUT]).median, "x"),
    ]
    report.raw = {
        "in_flight": _IN_FLIGHT,
        "layers": msgspec.to_builtins(layers),
        "calls": msgspec.to_builtins(costs, str_keys=True),
    }
    return report


def _table(costs: dict[str, CpuCost], reference: str, layers: dict[str, list[float]]) -> Table:
    table = cpu_cost_table(f"get_operation, {_IN_FLIGHT} in flight", costs, reference)
    for name in (name for name in costs if name in layers):
        over = _ratio_from_layer(layers[name], costs[reference]).text(4)
        table.rows.append([f"{name}, the layer alone", microseconds(layers[name], 2), over, ""])
    return table


def _ratio_from_layer(layer: list[float], none: CpuCost) -> Spread:
    """Return the cost of a call with the layer over one without, computed from the layer alone."""
    call = Spread.of([*none.seconds.values()]).median
    return Spread.of([1 + seconds / call for seconds in layer])


def measure(bench: Bench, server: Server) -> Measured:
    """Measure the calls in turn, then the layers."""
    return asyncio.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> Measured:
    async with KeylessClient(API_KEY, base_url=server.base_url) as client, bare_session() as session:
        transport, _ = client._open()  # noqa: SLF001  # there is no public way around the retry layer

        async def without(operation_id: str) -> Operation:
            client._open()  # noqa: SLF001  # as get_operation does
            with transport.call():
                return await transport.send(protocol.get_operation(operation_id))

        bare = BareClient(session, server).get_operation
        retry_client = RetryClient(session, retry_options=JitterRetry(_ATTEMPTS, exceptions=set(_FAILURES)))
        calls: dict[str, Call] = {
            OURS: client.get_operation,
            WITHOUT: without,
            REPEATED: without,
            BARE: bare,
            BARE_REPEATED: bare,
            **{name: decorator(bare) for name, decorator in _DECORATORS.items()},
            AIOHTTP_RETRY: BareClient(retry_client, server).get_operation,
        }
        costs = await measure_in_turn(
            bench,
            server,
            calls,
            in_flight=_IN_FLIGHT,
            rounds=bench.pick(full=120, quick=12, smoke=2),
            count=bench.pick(full=300, quick=200, smoke=50),
        )
        return Measured(costs, await _layers(bench, transport))


async def _layers(bench: Bench, transport: Transport) -> dict[str, list[float]]:
    async def nothing(_operation_id: str) -> None: ...

    async def ours(operation_id: str) -> None:
        await transport.retry(lambda _attempt: nothing(operation_id))

    layered: dict[str, Call] = {OURS: ours, **{name: decorator(nothing) for name, decorator in _DECORATORS.items()}}
    count = bench.pick(full=20_000, quick=10_000, smoke=500)
    layers: dict[str, list[float]] = {name: [] for name in layered}
    for _ in range(bench.pick(full=10, quick=3, smoke=2)):
        for name, call in layered.items():
            layers[name].append(await _repeated(call, count) - await _repeated(nothing, count))
    return layers


async def _repeated(call: Callable[[str], Awaitable[object]], count: int) -> float:
    before = time.process_time()
    for _ in range(count):
        await call("")
    return (time.process_time() - before) / count
