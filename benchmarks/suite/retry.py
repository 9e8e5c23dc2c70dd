"""CPU of the retry layer where nothing fails, against the retry libraries that people wrap around a call.

Ours over the same path through the library without its retry layer; theirs over the same aiohttp + msgspec call without
them. Since the difference is small beside the noise of a socket, each layer alone as well, around an attempt that does
nothing.
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

from aiokeyless import KeylessClient, protocol
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, bare_session
from benchmarks.server import API_KEY, Server, serving
from benchmarks.spending import Spending, micros, spending_table, spent_in_turn

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.models import Operation
    from aiokeyless.transport import Transport
    from benchmarks.bench import Bench
    from benchmarks.spending import Call

    Decorator = Callable[[Call], Call]

_IN_FLIGHT: Final = 16
_ATTEMPTS: Final = 3
_FAILURES: Final = (aiohttp.ClientError, TimeoutError)

WITH: Final = "aiokeyless"
WITHOUT: Final = "aiokeyless without"
AGAIN: Final = "aiokeyless without, once more"
BARE: Final = "aiohttp + msgspec"
BARE_AGAIN: Final = "aiohttp + msgspec, once more"
TENACITY: Final = "tenacity's decorator"
STAMINA: Final = "stamina's decorator"
AIOHTTP_RETRY: Final = "aiohttp-retry"

#: What is compared with what: the reference comes first.
_OURS: Final = (WITHOUT, AGAIN, WITH)
_THEIRS: Final = (BARE, BARE_AGAIN, TENACITY, STAMINA, AIOHTTP_RETRY)

_DECORATORS: Final[dict[str, Decorator]] = {
    TENACITY: tenacity.retry(
        stop=tenacity.stop_after_attempt(_ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=0.25, max=30),
        retry=tenacity.retry_if_exception_type(_FAILURES),
    ),
    STAMINA: stamina.retry(on=_FAILURES, attempts=_ATTEMPTS),
}


class Measured(NamedTuple):
    """What calls spent, and what the layers add to a call that does nothing: seconds of CPU, round by round."""

    spendings: dict[str, Spending]
    layers: dict[str, list[float]]


def run(bench: Bench) -> Report:
    """Measure at 16 in flight."""
    with serving() as server:
        spendings, layers = bench.apart(measure, bench, server)
    if busy := [name for name, spending in spendings.items() if spending.server_bound]:
        raise CannotMeasureError(f"the server was the bottleneck of {', '.join(busy)}")
    report = Report("retry: CPU of the retry layer on the happy path")
    for names in (_OURS, _THEIRS):
        report.tables.append(_table({name: spendings[name] for name in names}, names[0], layers))
    over_none = spendings[WITH].over(spendings[WITHOUT])
    report.goals += [
        Goal("CPU with the retry layer over none", 1.02, over_none.median if over_none else None, "x"),
        Goal("the same, from the layer alone", 1.02, _alone(layers[WITH], spendings[WITHOUT]).median, "x"),
    ]
    report.raw = {
        "in_flight": _IN_FLIGHT,
        "layers": msgspec.to_builtins(layers),
        "calls": msgspec.to_builtins(spendings, str_keys=True),
    }
    return report


def _table(spendings: dict[str, Spending], reference: str, layers: dict[str, list[float]]) -> Table:
    table = spending_table(f"get_operation, {_IN_FLIGHT} in flight", spendings, reference)
    for name in (name for name in spendings if name in layers):
        over = _alone(layers[name], spendings[reference]).text(4)
        table.rows.append([f"{name}, the layer alone", micros(layers[name], 2), over, ""])
    return table


def _alone(layer: list[float], none: Spending) -> Spread:
    """Return what a call with the layer costs over one without, by the layer's own cost."""
    call = Spread.of([*none.seconds.values()]).median
    return Spread.of([1 + seconds / call for seconds in layer])


def measure(bench: Bench, server: Server) -> Measured:
    """Measure the calls in turn, then the layers."""
    return asyncio.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> Measured:
    async with KeylessClient(API_KEY, base_url=server.base_url) as client, bare_session() as session:
        transport, _ = client._open()  # noqa: SLF001  # the path without the layer has no public name

        async def without(operation_id: str) -> Operation:
            client._open()  # noqa: SLF001  # as get_operation does
            with transport.call():
                return await transport.send(protocol.get_operation(operation_id))

        bare = BareClient(session, server).get_operation
        retry_client = RetryClient(session, retry_options=JitterRetry(_ATTEMPTS, exceptions=set(_FAILURES)))
        calls: dict[str, Call] = {
            WITH: client.get_operation,
            WITHOUT: without,
            AGAIN: without,
            BARE: bare,
            BARE_AGAIN: bare,
            **{name: decorator(bare) for name, decorator in _DECORATORS.items()},
            AIOHTTP_RETRY: BareClient(retry_client, server).get_operation,
        }
        spendings = await spent_in_turn(
            bench,
            server,
            calls,
            in_flight=_IN_FLIGHT,
            rounds=bench.pick(full=120, quick=12, smoke=2),
            count=bench.pick(full=300, quick=200, smoke=50),
        )
        return Measured(spendings, await _layers(bench, transport))


async def _layers(bench: Bench, transport: Transport) -> dict[str, list[float]]:
    async def nothing(_operation_id: str) -> None: ...

    async def ours(operation_id: str) -> None:
        await transport.retry(lambda: nothing(operation_id), protocol.is_transient)

    layered: dict[str, Call] = {WITH: ours, **{name: decorator(nothing) for name, decorator in _DECORATORS.items()}}
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
