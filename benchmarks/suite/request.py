"""CPU per get_operation and per poll of a wait, against other HTTP clients and decoders.

All sides call the same server over keep-alive connections, in one process, in turn, and build the URL from the
operation id for each call. Each event loop has a process of its own.

A poll of a wait is measured twice: the exchange alone, and as a whole, with all that a real wait does besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import httpx
import httpx2
import niquests
from msgspec.structs import fields
from pydantic import TypeAdapter, create_model
from tenacity import wait_fixed

from aiokeyless import KeylessClient
from benchmarks.baselines import (
    BARE,
    BARE_REPEATED,
    HEADERS,
    OURS,
    BareClient,
    PlainOperation,
    bare_session,
    decode,
)
from benchmarks.bench import order
from benchmarks.process import loop_factory
from benchmarks.report import Goal, Report, Spread, Table
from benchmarks.server import API_KEY, OPERATIONS, Server, Workload, serving

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from benchmarks.bench import Bench

    Side = Callable[[int], Awaitable[float]]  # makes so many calls, and returns the CPU seconds of one

_IN_FLIGHT: Final = 16
_WAITS: Final = 24 * _IN_FLIGHT  # each is due again after 20 ms, the least: so many keep all slots busy
_SLOW_EVERY: Final = 5  # slow sides take part in every fifth round
_LOOPS: Final = {"asyncio's loop": False, "uvloop": True}
WHOLE_POLL: Final = f"{OURS}, a whole poll of a wait"
EXCHANGE: Final = f"{OURS}, a poll's exchange alone"
PYDANTIC: Final = "aiohttp + pydantic"
HTTPX: Final = "httpx + msgspec"
HTTPX2: Final = "httpx2 + msgspec"
NIQUESTS: Final = "niquests + msgspec"
_SLOW: Final = {HTTPX, HTTPX2, NIQUESTS}


#: An operation, for pydantic.
ModelOperation: Final = create_model(  # type: ignore[call-overload]  # by names that mypy does not see
    "ModelOperation", **{of.encode_name: (of.type, ... if of.required else None) for of in fields(PlainOperation)}
)


def run(bench: Bench) -> Report:
    """Measure on both loops."""
    report = Report("request: CPU of the client process per get_operation")
    with serving() as server:
        for loop, uvloop in _LOOPS.items():
            key = f"{loop}, {_IN_FLIGHT} in flight"
            bench.progress(f"  {key}")
            with Workload(server) as workload:
                seconds = bench.in_fresh_process(measure, bench, server, uvloop=uvloop)
            workload.check()
            report.tables.append(table := Table(key, ["", "CPU per call, us", f"over {BARE}"]))
            for name, of in seconds.items():
                microseconds = Spread.of([1e6 * each for each in of.values()]).text(1)
                table.rows.append([name, microseconds, "1" if name == BARE else _over(seconds, name).text(3)])
            report.raw[key] = {name: [*of.items()] for name, of in seconds.items()}
            for name, at_most in ((OURS, 1.05), (WHOLE_POLL, 1.0)):
                report.goals.append(Goal(f"{key}: {name} over {BARE}", at_most, _over(seconds, name).median, "x"))
    return report


def _over(seconds: dict[str, dict[int, float]], name: str) -> Spread:
    """Return the ratios to the reference of the rounds in which the side took part."""
    return Spread.of([each / seconds[BARE][k] for k, each in seconds[name].items()])


def measure(bench: Bench, server: Server, *, uvloop: bool) -> dict[str, dict[int, float]]:
    """Measure all sides on this loop: the CPU seconds of a call, by round."""
    with asyncio.Runner(loop_factory=loop_factory(uvloop=uvloop)) as runner:
        return runner.run(_measure(bench, server))


async def _measure(bench: Bench, server: Server) -> dict[str, dict[int, float]]:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        client = await enter(KeylessClient(API_KEY, base_url=server.base_url))
        bare = await enter(bare_session())
        transport = client._open().transport  # noqa: SLF001  # there is no public method for a single poll
        # Each with fast settings: as many connections as calls in flight, kept open, and no search for proxies.
        limits = {"max_connections": _IN_FLIGHT, "max_keepalive_connections": _IN_FLIGHT, "keepalive_expiry": None}
        with_httpx = httpx.AsyncClient(headers=HEADERS, limits=httpx.Limits(**limits), trust_env=False)
        with_httpx2 = httpx2.AsyncClient(headers=HEADERS, limits=httpx2.Limits(**limits), trust_env=False)
        with_niquests = niquests.AsyncSession(pool_maxsize=_IN_FLIGHT, headers=HEADERS)
        with_niquests.trust_env = False
        gets: dict[str, Callable[[str], Awaitable[object]]] = {
            EXCHANGE: transport.poll,
            OURS: client.get_operation,
            BARE: BareClient(bare, server).get_operation,
            BARE_REPEATED: BareClient(bare, server).get_operation,
            PYDANTIC: BareClient(bare, server, TypeAdapter(ModelOperation).validate_json).get_operation,
            HTTPX: ContentClient(await enter(with_httpx), server).get_operation,
            HTTPX2: ContentClient(await enter(with_httpx2), server).get_operation,
            NIQUESTS: ContentClient(await enter(with_niquests), server).get_operation,
        }
        sides: dict[str, Side] = {WHOLE_POLL: partial(_whole_polls, server)}
        sides |= {name: partial(_calls, get) for name, get in gets.items()}
        return await _in_turn(sides, *bench.pick(full=(30, 300), smoke=(2, 50)))


async def _in_turn(sides: dict[str, Side], rounds: int, count: int) -> dict[str, dict[int, float]]:
    """Measure the sides in turn, round by round, after one warm-up round.

    Slow sides make a third of the calls and skip rounds, so that they do not take most of the time.
    """
    counts = {name: max(count // 3, _IN_FLIGHT) if name in _SLOW else count for name in sides}
    for name, side in sides.items():
        await side(counts[name])
    gc.collect()
    gc.freeze()  # later collections skip the imports, which belong to no side
    seconds: dict[str, dict[int, float]] = {name: {} for name in sides}
    for k in range(rounds):
        for name in order([name for name in sides if name not in _SLOW or k % _SLOW_EVERY == 0], k):
            seconds[name][k] = await sides[name](counts[name])
    return seconds


async def _calls(get: Callable[[str], Awaitable[object]], count: int) -> float:
    """Make so many calls, some at a time, and return the CPU seconds of a call."""
    todo = iter([str(uuid.uuid4()) for _ in range(count)])

    async def worker() -> None:
        for operation_id in todo:
            await get(operation_id)

    gc.collect()
    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(_IN_FLIGHT):
            group.create_task(worker())
    return (time.process_time() - before) / count


async def _whole_polls(server: Server, count: int) -> float:
    """Make so many polls of real waits, of which some are always due; return the CPU seconds of a poll.

    Starting and ending the waits does not count.
    """

    async def until(polls: int) -> None:
        while client.statistics.polls < polls:  # noqa: ASYNC110  # no event tells that without costing each poll
            await asyncio.sleep(0.005)

    options: dict[str, Any] = {"max_polls_per_second": None, "schedule": wait_fixed(0.0)}
    async with KeylessClient(API_KEY, base_url=server.base_url, max_in_flight=_IN_FLIGHT, **options) as client:
        waiting = [asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()))) for _ in range(_WAITS)]
        await until(_WAITS)
        gc.collect()
        before, polls = time.process_time(), client.statistics.polls
        await until(polls + count)
        seconds = (time.process_time() - before) / (client.statistics.polls - polls)
    await asyncio.gather(*waiting, return_exceptions=True)
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
