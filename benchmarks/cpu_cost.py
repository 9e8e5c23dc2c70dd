"""CPU per call, of this process alone: neither the server nor other programs on a shared machine count."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from .bench import Pairs, order
from .report import Spread, Table
from .server import Workload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from .bench import Bench
    from .server import Server

    Call = Callable[[str], Awaitable[object]]


class Driven(Protocol):
    """A side that makes its calls by itself."""

    async def cpu_per_call(self, calls: int) -> float:
        """Make so many calls, and return the average CPU seconds of one."""


_SLOW_EVERY: Final = 5  # slow sides take part in every fifth round


@dataclass(frozen=True, slots=True)
class CpuCost:
    """The CPU time of one side, and the load that it put on the server."""

    seconds: dict[int, float]  # of CPU per call, by round number
    server_share: float  # of the server's core
    server_bound: bool

    @classmethod
    def of(cls, seconds: dict[int, float], workloads: list[Workload]) -> CpuCost:
        """Summarize the rounds of one side."""
        share = statistics.median(workload.share for workload in workloads)
        return cls(seconds, share, sum(workload.bound for workload in workloads) > len(workloads) / 2)

    def over(self, other: CpuCost) -> Spread | None:
        """Return the ratios of the rounds in which both took part; None if the server was the bottleneck of either."""
        if self.server_bound or other.server_bound:
            return None
        rounds = sorted(self.seconds.keys() & other.seconds.keys())
        return Pairs([self.seconds[k] for k in rounds], [other.seconds[k] for k in rounds]).ratio


async def cpu_per_call(call: Call | Driven, operation_ids: Collection[str], in_flight: int) -> float:
    """Make one call per id, ``in_flight`` at a time, and return the average CPU seconds of a call."""
    if not callable(call):
        return await call.cpu_per_call(len(operation_ids))
    todo = iter(operation_ids)

    async def worker() -> None:
        for operation_id in todo:
            await call(operation_id)

    gc.collect()
    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(in_flight):
            group.create_task(worker())
    return (time.process_time() - before) / len(operation_ids)


async def measure_in_turn(
    bench: Bench,
    server: Server,
    calls: Mapping[str, Call | Driven],
    *,
    in_flight: int,
    rounds: int,
    count: int,
    slow: Collection[str] = (),
) -> dict[str, CpuCost]:
    """Measure the sides in turn, round by round, after one warm-up round.

    Args:
        bench: Shows the progress.
        server: The server that all sides call.
        calls: The call of each side, by name.
        in_flight: Concurrent calls.
        rounds: Number of rounds.
        count: Calls per side and round.
        slow: Sides that make a third of the calls and skip rounds, so that they do not take most of the time.
    """
    operation_ids = [str(uuid.uuid4()) for _ in range(count)]
    ids = {name: operation_ids[: max(count // 3, in_flight)] if name in slow else operation_ids for name in calls}
    for name, call in calls.items():
        await cpu_per_call(call, ids[name], in_flight)
    gc.collect()
    gc.freeze()  # later collections skip the imports, which belong to no side
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    workloads: dict[str, list[Workload]] = {name: [] for name in calls}
    for k in range(rounds):
        for name in order([name for name in calls if name not in slow or k % _SLOW_EVERY == 0], k):
            with Workload(server) as workload:
                seconds[name][k] = await cpu_per_call(calls[name], ids[name], in_flight)
            workloads[name].append(workload)
        if (k + 1) % 20 == 0:
            bench.progress(f"  {in_flight} in flight: round {k + 1} of {rounds}")
    return {name: CpuCost.of(seconds[name], workloads[name]) for name in calls}


def cpu_cost_table(title: str, costs: Mapping[str, CpuCost], reference: str) -> Table:
    """Write the CPU of each side, and its ratio to the reference. No figure where the server was the bottleneck."""
    table = Table(title, ["", "CPU per call, us", f"over {reference}", "server busy"])
    for name, cost in costs.items():
        over = cost.over(costs[reference])
        table.rows.append(
            [
                name,
                "server-bound" if cost.server_bound else microseconds(cost.seconds.values(), 1),
                "1" if name == reference else "" if over is None else over.text(3),
                f"{cost.server_share:.0%}",
            ]
        )
    return table


def microseconds(seconds: Iterable[float], digits: int) -> str:
    """Write durations in microseconds."""
    return Spread.of([1e6 * value for value in seconds]).text(digits)
