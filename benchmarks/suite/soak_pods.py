"""The fleet on PostgreSQL in operators' weather: pods deployed, frozen, cut off; failovers by DNS; read-only minutes.

In a failover the two servers change places. For a while the database's name still leads to the one that is a standby
now, and connections to that one stay. Nothing is lost by it, so no order is excused. See `soak_fleet`.
"""

from __future__ import annotations

import asyncio
import os
import signal
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.postgres import PostgresServer
from benchmarks.programs import wholly
from benchmarks.report import Goal, Report

from .soak_failover import SENDER, SETTINGS, FailoverSoak, soaked
from .soak_fleet import ROLES

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from benchmarks.bench import Bench


class PodsSoak(FailoverSoak):
    """One run, in which two servers change places."""

    def _disturbances(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._times(6, self._fail_over),
            self._times(4, self._stop_writes),
            self._times(4, self._interrupt_service),
            self._times(10, self._cut_off),
            self._times(10, self._deploy),
            self._times(20, self._freeze),
            self._times(20, partial(self._kill, "worker killed", self.killed_worker)),
            self._times(20, partial(self._kill, "reader killed", self.killed_reader)),
            self._times(60, self._cut_commits),
        ]

    async def _observe(self) -> None:
        """Age nothing: outcomes may stay unread for longer than the other soaks keep their requests."""

    async def _take_over(self) -> None:
        primary = self._server
        standby = self._standby
        if standby is None:
            standby = self._standby = await asyncio.to_thread(PostgresServer, primary, None, **SETTINGS)
        await self._until_asked(lambda: primary.execute(SENDER) != [])
        await asyncio.to_thread(primary.stop)  # which waits until the standby has everything
        await asyncio.to_thread(standby.promote)
        primary.follow(standby)
        await asyncio.to_thread(primary.start)
        self._server, self._standby = standby, primary
        await asyncio.sleep(self.plan.down)
        for proxy in self.proxies.values():
            proxy.server = standby
        self._happen("failover by DNS")

    async def _stop_writes(self) -> None:
        """Let the server refuse all that writes, as a managed one does whose disk is full."""
        async with self._one_at_a_time:
            self._happen("database read-only for a minute")
            await wholly(self._be_read_only())

    async def _be_read_only(self) -> None:
        for value, seconds in ("on", 4 * self.plan.hang), ("off", 0.0):
            self._ask(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
            self._ask("SELECT pg_reload_conf()")
            await asyncio.sleep(seconds)

    async def _cut_off(self) -> None:
        """Let nothing through, in either direction, to or from all that have one role."""
        role = self._source.choice(ROLES)
        self._happen(f"{role} cut off")
        cut_off = (proxy.hang(3 * self.plan.hang) for (of, _), proxy in self.proxies.items() if of == role)
        await asyncio.gather(*cut_off)

    async def _deploy(self) -> None:
        """End each process by SIGTERM, one after the other."""
        self._happen("all pods deployed")
        for program in self._programs:
            if program.pid is not None:
                os.kill(program.pid, signal.SIGTERM)
            await asyncio.sleep(self.plan.down / 10)

    async def _freeze(self) -> None:
        program = self._source.choice(self._programs)
        pid = program.pid
        if pid is not None:
            self._happen("pod frozen")
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(self._source.uniform(0.0, 6 * self.plan.hang))
            finally:
                if program.pid == pid:  # nobody has killed it meanwhile
                    os.kill(pid, signal.SIGCONT)


def run(bench: Bench) -> Report:
    """Run the fleet for an hour, or the minutes that were asked for."""
    soak = soaked(PodsSoak, bench, None)
    report = soak.report("soak_pods")
    report.goals[-1] = Goal("orders lost", 0, len(soak.lost), required=True)  # each worker is started again
    return report
