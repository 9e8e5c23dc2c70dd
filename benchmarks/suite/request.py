"""CPU per get_operation, against bare aiohttp and msgspec.

All sides speak to the same server over kept-alive connections, in one process, in turn, and build the URL from the
operation id for each call in the same way.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final

from aiokeyless import KeylessClient
from benchmarks.bench import Pairs
from benchmarks.report import Goal, Report, Spread, Table
from benchmarks.rivals import BareClient, bare_session, default_session
from benchmarks.server import API_KEY, Server, Workload, serving
from benchmarks.spending import spent_in_turn

if TYPE_CHECKING:
    from benchmarks.bench import Bench

_GOAL_AT: Final = 16
OURS: Final = "aiokeyless"
BARE: Final = "aiohttp + msgspec"
AGAIN: Final = "aiohttp + msgspec, once more"
DEFAULTS: Final = "aiohttp + msgspec, default session"


def run(bench: Bench) -> Report:
    """Measure at 1, 16 and 100 in flight."""
    report = Report("request: CPU of the client process per get_operation")
    ratio_at_goal: float | None = None
    with serving() as server:
        for in_flight in bench.pick(full=[1, 16, 100], quick=[16], smoke=[16]):
            spendings, share, bound = bench.apart(measure, bench, server, in_flight)
            if bound:
                report.notes.append(f"{in_flight} in flight: not measured, the server was the bottleneck ({share:.0%})")
                continue
            report.tables.append(_table(in_flight, spendings, share))
            report.raw[str(in_flight)] = {"server_share": share, **{name: [*v] for name, v in spendings.items()}}
            if in_flight == _GOAL_AT:
                ratio_at_goal = Pairs(spendings[OURS], spendings[BARE]).ratio.median
    report.goals.append(Goal(f"CPU over aiohttp + msgspec at {_GOAL_AT} in flight", 1.05, ratio_at_goal, "x"))
    return report


def measure(bench: Bench, server: Server, in_flight: int) -> tuple[dict[str, list[float]], float, bool]:
    """Return seconds of CPU per call for each side and round, the server's share of its core, whether it was full."""
    return asyncio.run(_measure(bench, server, in_flight))


async def _measure(bench: Bench, server: Server, in_flight: int) -> tuple[dict[str, list[float]], float, bool]:
    client = KeylessClient(API_KEY, base_url=server.base_url)
    async with client, bare_session() as bare, default_session() as default:
        calls = {
            OURS: client.get_operation,
            BARE: BareClient(bare, server).get_operation,
            AGAIN: BareClient(bare, server).get_operation,
            DEFAULTS: BareClient(default, server).get_operation,
        }
        with Workload(server) as workload:
            spendings = await spent_in_turn(
                bench,
                calls,
                in_flight=in_flight,
                rounds=bench.pick(full=100, quick=20, smoke=2),
                count=bench.pick(full=300, quick=200, smoke=50),
            )
    return spendings, workload.share, workload.bound


def _table(in_flight: int, spendings: dict[str, list[float]], share: float) -> Table:
    table = Table(
        f"{in_flight} in flight (server busy {share:.0%} of its core)",
        ["", "CPU per call, us", f"over {BARE}"],
    )
    for name, seconds in spendings.items():
        ratio = Pairs(seconds, spendings[BARE]).ratio
        micros = Spread.of([1e6 * value for value in seconds])
        table.rows.append([name, micros.text(1), "1" if name == BARE else ratio.text(3)])
    return table
