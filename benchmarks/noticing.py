"""When users approve, and when the application is told: the plan of a measurement, and what became of it."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless.worker import Outcome, next_outcome

from .report import CannotMeasureError
from .server import approved_after

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from .fleet import Fleet
    from .server import Server

_LOST_AFTER: Final = 20.0  # seconds after which an unnoticed approval counts as lost


class Plan(NamedTuple):
    """When requests start and are approved."""

    starts: list[float]  # seconds from the start of the measurement
    ages: list[float]  # seconds from an operation's creation to its approval

    def operation_ids(self) -> list[str]:
        """Return new operation ids, with which the service approves at these ages."""
        return [approved_after(age) for age in self.ages]


class Noticed(NamedTuple):
    """The measurements of one approval."""

    late: float  # seconds from the approval until the application was told
    delivery: float  # seconds of these after the answer of the service
    polls: int
    at: float  # when the application was told, by `time.perf_counter`


async def request_all(operation_ids: list[str], plan: Plan, request: Callable[[str], Awaitable[None]]) -> None:
    """Start all requests, each at its time."""

    async def one(start: float, operation_id: str) -> None:
        await asyncio.sleep(start)
        await request(operation_id)

    await asyncio.gather(*map(one, plan.starts, operation_ids))


async def by_worker(
    workers: Fleet, plan: Plan, *, lost_after: float = _LOST_AFTER, readers: int = 1
) -> list[Noticed | None]:
    """Submit the requests, and read the outcomes of the fleet; None for an approval that was not noticed in time."""
    operation_ids, known = plan.operation_ids(), dict[str, float]()
    all_known = asyncio.Event()

    async def read() -> None:
        while True:
            async with next_outcome(workers.broker, "benchmark") as event:
                if event.outcome is Outcome.APPROVED and event.operation_id is not None:
                    known[event.operation_id] = time.perf_counter()
            if len(known) == len(operation_ids):
                all_known.set()

    with suppress(TimeoutError):  # approvals not known by then are lost
        async with asyncio.timeout(max(plan.starts) + max(plan.ages) + lost_after), asyncio.TaskGroup() as group:
            reading = [group.create_task(read()) for _ in range(readers)]
            await request_all(operation_ids, plan, workers.request)
            await all_known.wait()
            for task in reading:
                task.cancel()
    return noticed(workers.server, operation_ids, known)


def noticed(server: Server, operation_ids: list[str], known: dict[str, float]) -> list[Noticed | None]:
    """Compare the times of the approvals with those at which the application was told; None for a lost one."""
    approvals = server.approvals()

    def one(operation_id: str) -> Noticed | None:
        approval = approvals.get(operation_id)
        if approval is None or approval.reported is None or operation_id not in known:
            return None
        at = known[operation_id]
        return Noticed(at - approval.due, at - approval.reported, approval.polls, at)

    return [one(operation_id) for operation_id in operation_ids]


def known_of(name: str, noticed: list[Noticed | None]) -> list[Noticed]:
    """Return the approvals that were noticed; raise where there are too few for a spread."""
    known = [one for one in noticed if one is not None]
    if len(known) < 2:
        raise CannotMeasureError(f"{name}: {len(known)} of {len(noticed)} approvals were noticed")
    return known
