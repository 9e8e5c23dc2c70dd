"""A PostgreSQL cluster of a test's own; where there is no PostgreSQL, the test is skipped."""

from __future__ import annotations

import atexit
import os
import signal
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from anyio.from_thread import start_blocking_portal

from aiokeyless.worker.postgres import PostgresBroker
from benchmarks import postgres

if TYPE_CHECKING:
    from collections.abc import Iterator


async def prepare(url: str, schema: str = "keyless") -> None:
    async with PostgresBroker(url, schema) as broker:
        await broker.prepare(lease=150.0, service="")


class PostgresServer(postgres.PostgresServer):
    def __init__(self, primary: PostgresServer | None = None, **settings: str) -> None:
        if not postgres.is_installed():
            pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql pgbouncer)")
        super().__init__(primary, None, **settings)

    def prepared_database(self) -> str:
        """Make a database with the broker's schema, as a copy, which takes no longer than an empty one."""
        return self.new_database(self._prepared)

    @cached_property
    def _prepared(self) -> str:
        database = self.new_database()
        with start_blocking_portal() as portal:  # the tests' loop may run in this thread
            portal.call(prepare, self.url(database))
        return database

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Have it say nothing, and keep its connections."""
        stopped = [self.pid]
        try:
            os.kill(self.pid, signal.SIGSTOP)
            os.waitid(os.P_PID, self.pid, os.WSTOPPED)  # from now on it has no new children
            stopped += map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())
            for pid in stopped:
                os.kill(pid, signal.SIGSTOP)
            yield
        finally:
            for pid in reversed(stopped):  # the first would reap a child that has ended
                os.kill(pid, signal.SIGCONT)


@cache
def shared_server() -> PostgresServer:
    """Return the server of this process's tests, each of which makes a database in it, and none of which stops it."""
    server = PostgresServer(autovacuum="off")  # it would go round all their databases without end
    atexit.register(server.close)
    return server
