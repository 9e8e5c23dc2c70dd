"""The fleet on PostgreSQL while standbys take over: only what the failover itself loses is lost.

The primary dies while its standby is some hundred milliseconds behind, and the standby takes over under load; then it
gets a standby of its own. Meanwhile a transaction holds a snapshot, and the servers' disk gets full. See `soak_fleet`.
"""

from __future__ import annotations

import asyncio
import os
import signal
import tempfile
import time
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn, TypeVar

import asyncpg
import psutil  # type: ignore[import-untyped]  # it has no type hints

from aiokeyless.worker.postgres.adapters.asyncpg import ERRORS
from benchmarks.postgres import PostgresServer
from benchmarks.programs import wholly
from benchmarks.report import Goal, Report, Table
from benchmarks.soak.disk import full, small_disk
from benchmarks.soak.journal import Reader
from benchmarks.soak.verdicts import Entry, Event

from .soak_fleet import Plan, Soak, planned

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

    from benchmarks.bench import Bench
    from benchmarks.soak.fleet import Told

_LAG: Final = (0.1, 0.9)  # seconds by which a standby is behind when its primary dies
_DISK: Final = 1024  # megabytes, for two servers
_LOG_FILES: Final = 3  # that are there in advance, about
_FILL_LOG_FILE: Final = "SELECT pg_logical_emit_message(true, '', repeat('x', 1 << 24))"
SENDER: Final = "SELECT pid FROM pg_stat_replication WHERE state = 'streaming'"
SETTINGS: Final = {"fsync": "on", "min_wal_size": "32MB", "max_wal_size": "128MB", "wal_keep_size": "64MB"}

S = TypeVar("S", bound="FailoverSoak")


class Takeover(NamedTuple):
    """A failover: which orders the standby had, when that was, and when the primary died."""

    kept: set[str]
    since: float
    until: float


class FailoverSoak(Soak):
    """One run, whose server changes."""

    def __init__(self, bench: Bench, plan: Plan, server: PostgresServer, folder: Path, disk: Path | None) -> None:
        super().__init__(bench, plan, server, folder)
        self._disk = disk
        self._one_at_a_time = asyncio.Lock()
        self._standby: PostgresServer | None = None
        self.takeovers: list[Takeover] = []
        self.unexplained: frozenset[str] = frozenset()
        self.unclaimed = 0
        self._asked_at: dict[str, float] = {}

    def close(self) -> None:
        """Stop the servers, and remove their files."""
        self._server.close()
        if self._standby is not None:
            self._standby.close()

    def _disturbances(self) -> list[Coroutine[Any, Any, None]]:
        return [
            self._hold_snapshots(),
            self._times(6, self._fail_over),
            *([] if self._disk is None else [self._times(4, partial(self._fill, self._disk))]),
            self._times(20, partial(self._kill, "worker killed", self.killed_worker)),
            self._times(20, partial(self._kill, "reader killed", self.killed_reader)),
            self._times(30, self._cut_all),
        ]

    async def _fail_over(self) -> None:
        async with self._one_at_a_time:
            await wholly(self._take_over())

    async def _take_over(self) -> None:
        primary = self._server
        standby = self._standby = await asyncio.to_thread(PostgresServer, primary, self._disk, **SETTINGS)
        await self._until_asked(lambda: primary.execute(SENDER) != [])
        kept, since = set(self.shop.committed), time.monotonic()
        ((position,),) = primary.execute("SELECT pg_current_wal_lsn()")
        await self._until_asked(lambda: standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{position}'") == [["t"]])
        ((sender,),) = primary.execute(SENDER)
        process = psutil.Process(int(sender))
        process.suspend()
        await asyncio.sleep(self._source.uniform(*_LAG))
        os.kill(primary.pid, signal.SIGQUIT)
        process.kill()
        self.takeovers.append(Takeover(kept, since, time.monotonic()))
        await asyncio.to_thread(standby.promote)
        self._server, self._standby = standby, None
        for proxy in self.proxies.values():
            proxy.server = standby
            proxy.cut_all()
        await asyncio.to_thread(primary.close)
        self._happen("primary killed, standby promoted")

    async def _hold_snapshots(self) -> NoReturn:
        """Hold a snapshot for as long as the server lives."""
        while True:
            with suppress(*ERRORS):
                connection = await asyncpg.connect(self._server.url(self._database))
                async with connection.transaction(isolation="repeatable_read"):
                    await connection.execute("SELECT count(*) FROM keyless.waiting")
                    self._happen("snapshot held")
                    while True:
                        await connection.execute("SELECT")
                        await asyncio.sleep(1.0)
            await asyncio.sleep(1.0)

    async def _fill(self, disk: Path) -> None:
        """Leave no room: in turn for tables, of which statements hear, and for the log, too, which ends the server."""
        async with self._one_at_a_time:
            self._happen("disk full")
            try:
                with full(disk):
                    if self.happened["disk full"] % 2 == 0:
                        with suppress(RuntimeError):
                            for _ in range(_LOG_FILES):
                                await asyncio.to_thread(self._ask, _FILL_LOG_FILE)
                    await asyncio.sleep(self.plan.down)
            finally:
                await self._until_asked(self._is_up)

    def _is_up(self) -> bool:
        """Return whether the server answers; if it has ended, start it again, as a supervisor does."""
        self._happen("server that a full disk ended", self._server.start_again())
        with suppress(RuntimeError):
            return self._ask("SELECT 1") == [["1"]]
        return False

    def _compare(self) -> None:
        created = Reader(self._folder / "record", Entry).read()
        self._asked_at = {entry.operation_id: entry.at for entry in created if entry.event is Event.CREATED}
        super()._compare()
        there = {row[0] for row in self._ask("SELECT id FROM orders")}
        self.lost = frozenset(self.shop.committed.keys() - there)
        self.unexplained = frozenset(order for order in self.lost if not self._is_taken_by_a_failover(order))

    def _is_taken_by_a_failover(self, order: str) -> bool:
        placed = self.shop.committed[order]
        return any(placed <= of.until and order not in of.kept for of in self.takeovers)

    def _is_documented(self, told: Told) -> bool:
        """Return whether a failover lost the claim of an operation that it did not keep from being created."""
        asked = self._asked_at.get(told.order_id, 0.0)
        is_so = told.event.reason in {"already_approved", "conflict"} and any(
            of.since <= asked <= of.until + self.plan.request_timeout for of in self.takeovers
        )
        self.unclaimed += is_so
        return is_so


def run(bench: Bench) -> Report:
    """Run the fleet for an hour, or the minutes that were asked for."""
    with ExitStack() as stack:
        disk = None
        with suppress(PermissionError):
            disk = stack.enter_context(small_disk(_DISK))
        return _report(soaked(FailoverSoak, bench, disk))


def soaked(kind: type[S], bench: Bench, disk: Path | None) -> S:
    """Return a run of this kind that has ended, on this disk, or where servers usually have their files."""
    with tempfile.TemporaryDirectory() as folder:
        server = PostgresServer(None, disk, **SETTINGS)
        with closing(kind(bench, planned(bench), server, Path(folder), disk)) as soak:
            asyncio.run(soak.run())
    return soak


def _report(soak: FailoverSoak) -> Report:
    figures = {
        "orders that a failover lost": len(soak.lost),
        "of these, users were asked about": len(soak.lost & soak.asked),
        "orders that failed because it lost their claim": soak.unclaimed,
    }
    report = soak.report("soak_failover", Table.of_pairs("what the failovers cost", figures))
    what = "orders lost that the standby had, or that no failover met"
    report.goals.append(Goal(what, 0, len(soak.unexplained), required=True))
    if not soak.happened["disk full"]:
        report.notes.append("no disk was full: this user may not mount a small one, or the time was short")
    report.raw |= figures
    return report
