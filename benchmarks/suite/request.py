"""CPU per get_operation and per poll of a wait, against other HTTP clients and decoders.

All sides call the same server over keep-alive connections, in one process, in turn, and build the URL from the
operation id for each call. Each event loop has a process of its own.

A poll of a wait is measured twice: the exchange alone, and as a whole, with all that a real wait does besides.

CPU time depends on what else the machine does. If valgrind is installed, it also counts the instructions of a call,
outside the kernel: those of a process that makes many calls, without those of a process that makes few.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
from functools import partial
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import httpx
import httpx2
import niquests
from msgspec.structs import fields
from pydantic import TypeAdapter, create_model

from benchmarks.baselines import BARE, BARE_REPEATED, HEADERS, OURS, BareClient, PlainOperation, bare_session, decode
from benchmarks.bench import order
from benchmarks.process import loop_factory
from benchmarks.report import Goal, Report, Spread, Table
from benchmarks.server import OPERATIONS, Server, Workload, serving
from benchmarks.sides import COUNTED, IN_FLIGHT, WHOLE_POLL, count_instructions, make_calls, open_sides

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from benchmarks.bench import Bench
    from benchmarks.sides import Side

_SLOW_EVERY: Final = 5  # slow sides take part in every fifth round
_LOOPS: Final = {"asyncio's loop": False, "uvloop": True}
PYDANTIC: Final = "aiohttp + pydantic"
HTTPX: Final = "httpx + msgspec"
HTTPX2: Final = "httpx2 + msgspec"
NIQUESTS: Final = "niquests + msgspec"
_SLOW: Final = {HTTPX, HTTPX2, NIQUESTS}
_GOALS: Final = {OURS: 1.0, WHOLE_POLL: 1.12}

#: An operation, for pydantic.
ModelOperation: Final = create_model(  # type: ignore[call-overload]  # by names that mypy does not see
    "ModelOperation", **{of.encode_name: (of.type, ... if of.required else None) for of in fields(PlainOperation)}
)


def run(bench: Bench) -> Report:
    """Measure on both loops."""
    report = Report("request: CPU of the client process per get_operation")
    with serving() as server:
        for loop, uvloop in _LOOPS.items():
            key = f"{loop}, {IN_FLIGHT} in flight"
            bench.progress(f"  {key}")
            with Workload(server) as workload:
                seconds = bench.in_fresh_process(measure, bench, server, uvloop=uvloop)
            workload.check()
            bench.progress("  its instructions")
            counted = bench.pick(full=COUNTED, smoke=COUNTED[:1])
            instructions = {name: _count(bench, server, name, uvloop=uvloop) for name in counted}
            ratios = {name: count / instructions[BARE] for name, count in instructions.items()}
            columns = ["", "CPU per call, us", f"over {BARE}", "instructions", f"over {BARE}"]
            report.tables.append(table := Table(key, columns))
            for name, of in seconds.items():
                cpu = Spread.of([1e6 * each for each in of.values()]).text(1)
                code = [f"{instructions[name]:.0f}", f"{ratios[name]:.3f}"] if name in ratios else ["-", "-"]
                table.rows.append([name, cpu, "1" if name == BARE else _over(seconds, name).text(3), *code])
            report.raw[key] = {name: [*of.items()] for name, of in seconds.items()} | {"instructions": instructions}
            for name, at_most in _GOALS.items():
                figure = ratios.get(name, _over(seconds, name).median)
                what = "instructions" if name in ratios else "CPU"
                report.goals.append(Goal(f"{key}: {what} of {name} over {BARE}", at_most, figure, "x"))
    return report


def _over(seconds: dict[str, dict[int, float]], name: str) -> Spread:
    """Return the ratios to the reference of the rounds in which the side took part."""
    return Spread.of([each / seconds[BARE][k] for k, each in seconds[name].items()])


def measure(bench: Bench, server: Server, *, uvloop: bool) -> dict[str, dict[int, float]]:
    """Measure all sides on this loop: the CPU seconds of a call, by round."""
    with asyncio.Runner(loop_factory=loop_factory(uvloop=uvloop)) as runner:
        return runner.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> dict[str, dict[int, float]]:
    async with _sides(server) as sides:
        return await _in_turn(sides, *bench.pick(full=(30, 300), smoke=(2, 50)))


def _count(bench: Bench, server: Server, name: str, *, uvloop: bool) -> float:
    """Return the instructions of one call."""
    few, many = bench.pick(full=(200, 1000), smoke=(20, 60))
    (before, few), (after, many) = (count_instructions(server, name, calls, uvloop=uvloop) for calls in (few, many))
    return (after - before) / (many - few)


@contextlib.asynccontextmanager
async def _sides(server: Server) -> AsyncIterator[dict[str, Side]]:
    async with open_sides(server) as sides, contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        bare = await enter(bare_session())
        # Each with fast settings: as many connections as calls in flight, kept open, and no search for proxies.
        limits = {"max_connections": IN_FLIGHT, "max_keepalive_connections": IN_FLIGHT, "keepalive_expiry": None}
        with_httpx = httpx.AsyncClient(headers=HEADERS, limits=httpx.Limits(**limits), trust_env=False)
        with_httpx2 = httpx2.AsyncClient(headers=HEADERS, limits=httpx2.Limits(**limits), trust_env=False)
        with_niquests = niquests.AsyncSession(pool_maxsize=IN_FLIGHT, headers=HEADERS)
        with_niquests.trust_env = False
        gets: dict[str, Callable[[str], Awaitable[object]]] = {
            BARE_REPEATED: BareClient(bare, server).get_operation,
            PYDANTIC: BareClient(bare, server, TypeAdapter(ModelOperation).validate_json).get_operation,
            HTTPX: ContentClient(await enter(with_httpx), server).get_operation,
            HTTPX2: ContentClient(await enter(with_httpx2), server).get_operation,
            NIQUESTS: ContentClient(await enter(with_niquests), server).get_operation,
        }
        yield sides | {name: partial(make_calls, get) for name, get in gets.items()}


async def _in_turn(sides: dict[str, Side], rounds: int, count: int) -> dict[str, dict[int, float]]:
    """Measure the sides in turn, round by round, after one warm-up round.

    Slow sides make a third of the calls and skip rounds, so that they do not take most of the time.
    """
    counts = {name: max(count // 3, IN_FLIGHT) if name in _SLOW else count for name in sides}
    for name, side in sides.items():
        await side(counts[name])
    gc.collect()
    gc.freeze()  # later collections skip the imports, which belong to no side
    seconds: dict[str, dict[int, float]] = {name: {} for name in sides}
    for k in range(rounds):
        for name in order([name for name in sides if name not in _SLOW or k % _SLOW_EVERY == 0], k):
            seconds[name][k], _ = await sides[name](counts[name])
    return seconds


class ContentClient:
    """httpx, httpx2 or niquests, which share the methods used here."""

    def __init__(self, session: httpx.AsyncClient | httpx2.AsyncClient | niquests.AsyncSession, server: Server) -> None:
        self._session = session
        self._base = server.base_url + OPERATIONS

    async def get_operation(self, operation_id: str) -> PlainOperation:
        """Get an operation."""
        url = self._base + quote(operation_id, safe="")
        response = await self._session.get(url)
        if response.status_code != 200:
            raise RuntimeError(f"{url} answered {response.status_code}")
        return decode(response.content or b"")
