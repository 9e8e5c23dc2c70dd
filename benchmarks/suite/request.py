"""CPU per get_operation, against what people would write with other HTTP clients and decoders.

All sides speak to the same server over kept-alive connections, in one process, in turn, and make the URL from the
operation id for each call. Each event loop and each number in flight is a process of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
from enum import StrEnum
from typing import TYPE_CHECKING, Final

import msgspec

from aiokeyless import KeylessClient, protocol
from benchmarks import pictures
from benchmarks.clients import ByHandClient, ContentClient, httpx_client, niquests_session
from benchmarks.report import CannotMeasureError, Goal, Report
from benchmarks.rivals import AiohttpClient, BareClient, bare_session, default_session
from benchmarks.server import API_KEY, Server, serving
from benchmarks.shapes import pydantic_operation
from benchmarks.spending import Spending, spending_table, spent_in_turn

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from matplotlib.figure import Figure
    from yarl import URL

    from aiokeyless import Operation
    from benchmarks.bench import Bench
    from benchmarks.report import Json
    from benchmarks.spending import Call

_GOAL_AT: Final = 16
OURS: Final = "aiokeyless"
POLL: Final = "aiokeyless, a poll of a wait"
BARE: Final = "aiohttp + msgspec"
AGAIN: Final = "aiohttp + msgspec, once more"
DEFAULTS: Final = "aiohttp + msgspec, default session"
PYDANTIC: Final = "aiohttp + pydantic"
HTTPX: Final = "httpx + msgspec"
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
                bench.say(f"  {key}")
                try:
                    spendings = bench.apart(measure, bench, server, loop, in_flight)
                except CannotMeasureError as error:
                    report.notes.append(f"{key}: not measured, {error}")
                    continue
                report.tables.append(spending_table(key, spendings, BARE))
                report.raw[key] = msgspec.to_builtins(spendings, str_keys=True)
                if in_flight == _GOAL_AT:
                    report.goals += _goals(key, spendings)
    return report


def _goals(key: str, spendings: Mapping[str, Spending]) -> list[Goal]:
    figures = {name: over.median for name in (OURS, POLL) if (over := spendings[name].over(spendings[BARE]))}
    return [
        Goal(f"{key}: {OURS} over {BARE}", 1.05, figures.get(OURS), "x"),
        Goal("the same, stretch", 0.95, figures.get(OURS), "x"),
        Goal("a poll of a wait, stretch", 0.95, figures.get(POLL), "x"),
    ]


def _key(loop: Loop, in_flight: int) -> str:
    return f"{loop}, {in_flight} in flight"


def measure(bench: Bench, server: Server, loop: Loop, in_flight: int) -> dict[str, Spending]:
    """Measure all sides on this loop."""
    with asyncio.Runner(loop_factory=_loop_factory(loop)) as runner:
        return runner.run(_measure(bench, server, in_flight))


def _loop_factory(loop: Loop) -> Callable[[], asyncio.AbstractEventLoop] | None:
    if loop is Loop.ASYNCIO:
        return None
    try:
        import uvloop  # noqa: PLC0415  # not on Windows
    except ImportError:
        raise CannotMeasureError("uvloop is not installed") from None
    return uvloop.new_event_loop


async def _measure(bench: Bench, server: Server, in_flight: int) -> dict[str, Spending]:
    async with contextlib.AsyncExitStack() as stack:
        enter = stack.enter_async_context
        client = await enter(KeylessClient(API_KEY, base_url=server.base_url))
        bare = await enter(bare_session())
        calls: dict[str, Call] = {
            POLL: _polling(client),
            OURS: client.get_operation,
            BARE: BareClient(bare, server).get_operation,
            AGAIN: BareClient(bare, server).get_operation,
            DEFAULTS: BareClient(await enter(default_session()), server).get_operation,
            PYDANTIC: AiohttpClient(bare, server, pydantic_operation).get_operation,
            HTTPX: ContentClient(await enter(httpx_client(in_flight)), server).get_operation,
            NIQUESTS: ContentClient(await enter(niquests_session(in_flight)), server).get_operation,
            LIMIT: (await enter(ByHandClient(server))).get_operation,
        }
        return await spent_in_turn(
            bench,
            server,
            calls,
            in_flight=in_flight,
            rounds=bench.pick(full=30, quick=10, smoke=2),
            count=bench.pick(full=300, quick=200, smoke=50),
            slow={HTTPX, NIQUESTS},
        )


def _polling(client: KeylessClient) -> Call:
    """Return what the poller does for each look of a wait, which has had its URL since it began."""
    transport, _ = client._open()  # noqa: SLF001  # a poll has no public name
    urls: dict[str, URL] = {}

    async def poll(operation_id: str) -> Operation:
        url = urls.get(operation_id)
        if url is None:
            url = urls[operation_id] = transport.url(protocol.get_operation(operation_id))
        return await transport.look(url)

    return poll


def draw(raw: Mapping[str, Json]) -> Figure:
    """Draw each side's CPU over the reference's at the goal's number in flight, a diagram a loop."""
    keys = [key for loop in Loop if (key := _key(loop, _GOAL_AT)) in raw]
    figure, axes = pictures.panels(len(keys) or 1, width=5.6)
    for key, ax in zip(keys, axes, strict=False):
        spendings = msgspec.convert(raw[key], dict[str, Spending], strict=False)  # JSON's keys are strings
        ratios = {name: over.median for name in spendings if (over := spendings[name].over(spendings[BARE]))}
        # On a scale of ratios a bar begins at the reference: half is as long as twice.
        ax.set_xscale("log")
        for name, ratio in ratios.items():
            color = pictures.OURS if name in {OURS, POLL} else pictures.OTHERS[0]
            ax.barh(name, ratio - 1, left=1, height=0.5, color=color)
            ax.plot(ratio, name, "o", color=color)  # seen where the bar has no length
            ax.annotate(f"{ratio:.2f}", (ratio, name), (8, 0), textcoords="offset points", va="center")
        ax.axvline(1, color="black", linewidth=0.8, zorder=0)
        ax.invert_yaxis()  # which begins at the bottom
        ax.margins(x=0.15)
        ax.grid(visible=False, axis="y")
        ax.xaxis.set_major_formatter("{x:g}")
        ax.set_title(key)
        ax.set_xlabel(f"CPU per call over {BARE}")
    for ax in axes[1:]:
        ax.tick_params(labelleft=False)  # the same sides
    return figure
