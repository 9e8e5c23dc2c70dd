"""CPU of a call: of this process alone, so that neither the server nor the neighbours of a shared machine count."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from .bench import Pairs, order
from .report import Spread, Table
from .server import Workload

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping

    from .bench import Bench
    from .server import Server

    Call = Callable[[str], Awaitable[object]]


_SELDOM: Final = 5  # a slow side has a turn in every so many rounds


@dataclass(frozen=True, slots=True)
class Spending:
    """What one side spent, and how busy it kept the server."""

    seconds: dict[int, float]  # of CPU, a call, by the number of the round
    server_share: float  # of the server's core
    server_bound: bool

    def over(self, other: Spending) -> Spread | None:
        """Return the ratios in the rounds that both took part in, None where either was the server's figure."""
        if self.server_bound or other.server_bound:
            return None
        rounds = sorted(self.seconds.keys() & other.seconds.keys())
        return Pairs([self.seconds[k] for k in rounds], [other.seconds[k] for k in rounds]).ratio


async def spent(call: Call, operation_ids: Collection[str], in_flight: int) -> float:
    """Make these calls, so many in flight, and return the seconds of CPU that one took on average."""
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


async def spent_in_turn(
    bench: Bench,
    server: Server,
    calls: Mapping[str, Call],
    *,
    in_flight: int,
    rounds: int,
    count: int,
    slow: Collection[str] = (),
) -> dict[str, Spending]:
    """Measure the calls in turn, round by round, after one round that only warms up.

    Args:
        bench: Where progress goes.
        server: Whom they ask.
        calls: The sides.
        in_flight: Calls under way at once.
        rounds: How many rounds.
        count: Calls a side makes in a round.
        slow: Sides that make a third of that and sit rounds out, so that most of the time is not theirs.
    """
    operation_ids = [str(uuid.uuid4()) for _ in range(count)]
    ids = {name: operation_ids[: max(count // 3, in_flight)] if name in slow else operation_ids for name in calls}
    for name, call in calls.items():
        await spent(call, ids[name], in_flight)
    gc.collect()
    gc.freeze()  # what all sides together have imported is no side's: no collection walks it from here on
    seconds: dict[str, dict[int, float]] = {name: {} for name in calls}
    workloads: dict[str, list[Workload]] = {name: [] for name in calls}
    for k in range(rounds):
        for name in order([name for name in calls if name not in slow or k % _SELDOM == 0], k):
            with Workload(server) as workload:
                seconds[name][k] = await spent(calls[name], ids[name], in_flight)
            workloads[name].append(workload)
        if (k + 1) % 20 == 0:
            bench.say(f"  {in_flight} in flight: round {k + 1} of {rounds}")
    return {name: _spending(seconds[name], workloads[name]) for name in calls}


def _spending(seconds: dict[int, float], workloads: list[Workload]) -> Spending:
    share = statistics.median(workload.share for workload in workloads)
    return Spending(seconds, share, sum(workload.bound for workload in workloads) > len(workloads) / 2)


def spending_table(title: str, spendings: Mapping[str, Spending], reference: str) -> Table:
    """Write what the sides spent, and each over the reference. No figure where the server was the bottleneck."""
    table = Table(title, ["", "CPU per call, us", f"over {reference}", "server busy"])
    for name, spending in spendings.items():
        over = spending.over(spendings[reference])
        table.rows.append(
            [
                name,
                "server-bound" if spending.server_bound else micros(spending.seconds.values(), 1),
                "1" if name == reference else "" if over is None else over.text(3),
                f"{spending.server_share:.0%}",
            ]
        )
    return table


def micros(seconds: Iterable[float], digits: int) -> str:
    """Write durations in microseconds."""
    return Spread.of([1e6 * value for value in seconds]).text(digits)
