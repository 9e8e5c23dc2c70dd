"""Good requests among two hundred whose operations always fail, at a real NATS server, on the real clock."""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from aiokeyless.worker.nats import NatsBroker
from benchmarks.broker import NatsServer
from benchmarks.fairness import measure
from benchmarks.report import Goal, Report, Table

if TYPE_CHECKING:
    from benchmarks.bench import Bench
    from benchmarks.fairness import Lateness

ONLY_BY_NAME: Final = True
_BAD: Final = 200


def run(bench: Bench) -> Report:
    """Measure at each rate of good requests."""
    logging.getLogger("aiokeyless.worker").setLevel(logging.CRITICAL)
    report = Report("fairness: good requests among 200 that always fail, on NATS")
    table = Table("seconds late, p95", ["good requests a second", "until asked", "until the approval is seen", "never"])
    for rate in bench.pick(full=(1.0, 2.0, 10.0), quick=(2.0,), smoke=(10.0,)):
        seconds = bench.pick(full=60.0, quick=20.0, smoke=8.0)
        found = asyncio.run(_measure(rate, seconds))
        asked, approved = found.asked_p95(), found.approved_p95()
        table.rows.append([f"{rate:g}", f"{asked:.2f}", f"{approved:.2f}", str(found.missing)])
        report.raw[f"{rate:g}"] = {"asked": [*found.asked], "approved": [*found.approved]}
        report.goals.append(Goal(f"asked, p95, at {rate:g}/s", 2.0, asked, "s"))
        report.goals.append(Goal(f"approved, p95, at {rate:g}/s", 3.0, approved, "s"))
    report.tables.append(table)
    return report


async def _measure(rate: float, seconds: float) -> Lateness:
    with tempfile.TemporaryDirectory() as folder:
        server = NatsServer(Path(folder))
        await server.start()
        try:
            async with NatsBroker(server.url) as broker:
                return await measure(broker, bad=_BAD, rate=rate, seconds=seconds)
        finally:
            server.stop()
