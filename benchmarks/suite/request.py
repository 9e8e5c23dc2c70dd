"""CPU per get_operation and per poll of a wait, against other HTTP clients and decoders.

All sides call the same server over keep-alive connections, in one process, in turn, and build the URL from the
operation id for each call. Each combination of event loop and number in flight has a process of its own.

A poll of a wait is measured twice: the exchange alone, and as a whole, with all that a real wait does besides.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import uuid
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec
from tenacity import wait_fixed

from aiokeyless import KeylessClient
from benchmarks import pictures
from benchmarks.baselines import BARE, BARE_REPEATED, OURS, AiohttpClient, BareClient, bare_session, default_session
from benchmarks.clients import ContentClient, MinimalClient, httpx2_client, httpx_client, niquests_session
from benchmarks.cpu_cost import CpuCost, cpu_cost_table, measure_in_turn
from benchmarks.decoders import pydantic_operation
from benchmarks.loops import loop_factory
from benchmarks.report import CannotMeasureError, Goal, Report
from benchmarks.server import API_KEY, Server, serving

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.figure import Figure

    from benchmarks.bench import Bench
    from benchmarks.cpu_cost import Call, Driven
    from benchmarks.report import Json

_GOAL_AT: Final = 16
_WAITS_PER_SLOT: Final = 24  # each is due again after 20 ms, the least: so many keep all slots busy
WHOLE_POLL: Final = f"{OURS}, a whole poll of a wait"
EXCHANGE: Final = f"{OURS}, a poll's exchange alone"
DEFAULTS: Final = f"{BARE}, default session"
PYDANTIC: Final = "aiohttp + pydantic"
HTTPX: Final = "httpx + msgspec"
HTTPX2: Final = "httpx2 + msgspec"
NIQUESTS: Final = "niquests + msgspec"
LIMIT: Final = "parsed by hand + msgspec: the limit"


class Loop(StrEnum):
    """Which event loop the client runs on."""

    ASYNCIO = "asyncio's loop"
    UVLOOP = "uvloop"


def run(bench: Bench) -> Report:
    """Measure at 1, 16 and 100 in flight, on both loops."""
    report = Report("request: CPU of the client process per get_operation")
    with serving() as server:
        for loop in Loop:
            for in_flight in bench.pick(full=[1, 16, 100], quick=[16], smoke=[16]):
                key = _key(loop, in_flight)
                bench.progress(f"  {key}")
                try:
                    costs = bench.in_fresh_process(measure, bench, server, loop, in_flight)
                except CannotMeasureError as error:
                    report.notes.append(f"{key}: not measured, {error}")
                    continue
                report.tables.append(cpu_cost_table(key, costs, BARE))
                report.raw[key] = msgspec.to_builtins(costs, str_keys=True)
                if in_flight == _GOAL_AT:
                    report.goals += _goals(key, costs)
    return report


def _goals(key: str, costs: Mapping[str, CpuCost]) -> list[Goal]:
    figures = {name: over.median for name in (OURS, WHOLE_POLL, EXCHANGE) if (over := costs[name].over(costs[BARE]))}
    return [
        Goal(f"{key}: {OURS} over {BARE}", 1.05, figures.get(OURS), "x"),
        Goal("the same, stretch", 0.95, figures.get(OURS), "x"),
        Goal("a whole poll of a wait", 1.0, figures.get(WHOLE_POLL), "x"),
        Goal("a poll's exchange alone, stretch", 0.95, figures.get(EXCHANGE), "x"),
    ]


def _key(loop: Loop, in_flight: int) -> str:
    return f"{loop}, {in_flight} in flight"


def measure(bench: Bench, server: Server, loop: Loop, in_flight: int) -> dict[str, CpuCost]:
    """Measure all sides on this loop."""
    with asyncio.Runner(loop_factory=loop_factory(uvloop=loop is Loop.UVLOOP)) as runner:
        return runner.run(_measure(bench, server, in_flight))


async def _measure(bench: Bench, server: Server, in_flight: int) -> dict[str, CpuCost]:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        client = await enter(KeylessClient(API_KEY, base_url=server.base_url))
        bare = await enter(bare_session())
        transport, _ = client._open()  # noqa: SLF001  # there is no public method for a single poll
        calls: dict[str, Call | Driven] = {
            WHOLE_POLL: WholePolls(server, in_flight),
            EXCHANGE: transport.poll,
            OURS: client.get_operation,
            BARE: BareClient(bare, server).get_operation,
            BARE_REPEATED: BareClient(bare, server).get_operation,
            DEFAULTS: BareClient(await enter(default_session()), server).get_operation,
            PYDANTIC: AiohttpClient(bare, server, pydantic_operation).get_operation,
            HTTPX: ContentClient(await enter(httpx_client(in_flight)), server).get_operation,
            HTTPX2: ContentClient(await enter(httpx2_client(in_flight)), server).get_operation,
            NIQUESTS: ContentClient(await enter(niquests_session(in_flight)), server).get_operation,
            LIMIT: (await enter(MinimalClient(server))).get_operation,
        }
        return await measure_in_turn(
            bench,
            server,
            calls,
            in_flight=in_flight,
            rounds=bench.pick(full=30, quick=10, smoke=2),
            count=bench.pick(full=300, quick=200, smoke=50),
            slow={HTTPX, HTTPX2, NIQUESTS},
        )


class WholePolls:
    """The polls of real waits, so many of them that some are always due.

    Args:
        server: Answers them.
        in_flight: Polls in flight at once.
    """

    def __init__(self, server: Server, in_flight: int) -> None:
        self._base_url = server.base_url
        self._in_flight = in_flight
        self._waits = _WAITS_PER_SLOT * in_flight

    async def cpu_per_call(self, calls: int) -> float:
        """Return the CPU seconds of a poll, measured over so many; starting and ending the waits does not count."""
        async with KeylessClient(
            API_KEY,
            base_url=self._base_url,
            max_in_flight=self._in_flight,
            max_polls_per_second=None,
            schedule=wait_fixed(0.0),
        ) as client:
            waiting = [asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()))) for _ in range(self._waits)]
            await self._until(client, self._waits)
            gc.collect()
            before, polls = time.process_time(), client.statistics.polls
            await self._until(client, polls + calls)
            seconds = (time.process_time() - before) / (client.statistics.polls - polls)
        await asyncio.gather(*waiting, return_exceptions=True)
        return seconds

    async def _until(self, client: KeylessClient, polls: int) -> None:
        while client.statistics.polls < polls:  # noqa: ASYNC110  # no event tells that without costing each poll
            await asyncio.sleep(0.005)


def draw(raw: Mapping[str, Json]) -> Figure:
    """Draw the CPU of each side over the reference, at the number in flight of the goal; one diagram per loop."""
    keys = [key for loop in Loop if (key := _key(loop, _GOAL_AT)) in raw]
    figure, axes = pictures.panels(len(keys) or 1, width=5.6)
    for key, ax in zip(keys, axes, strict=False):
        costs = msgspec.convert(raw[key], dict[str, CpuCost], strict=False)  # keys are strings in JSON
        ratios = {name: over.median for name in costs if (over := costs[name].over(costs[BARE]))}
        # Bars start at the reference, on a log scale: half is as long as twice.
        ax.set_xscale("log")
        for name, ratio in ratios.items():
            color = pictures.OURS if name in {OURS, WHOLE_POLL, EXCHANGE} else pictures.OTHERS[0]
            ax.barh(name, ratio - 1, left=1, height=0.5, color=color)
            ax.plot(ratio, name, "o", color=color)  # visible if the bar has no length
            ax.annotate(f"{ratio:.2f}", (ratio, name), (8, 0), textcoords="offset points", va="center")
        ax.axvline(1, color="black", linewidth=0.8, zorder=0)
        ax.invert_yaxis()  # the first side on top
        ax.margins(x=0.15)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(key)
        ax.set_xlabel(f"CPU per call over {BARE}")
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)  # the same sides
    return figure
