"""A PostgreSQL cluster of a test's own; where there is no PostgreSQL, the test is skipped."""

from __future__ import annotations

import atexit
from functools import cache

import pytest

from benchmarks import postgres


class PostgresServer(postgres.PostgresServer):
    def __init__(self, primary: PostgresServer | None = None, **settings: str) -> None:
        if not postgres.is_installed():
            pytest.skip("PostgreSQL is not installed (Debian: apt-get install postgresql pgbouncer)")
        super().__init__(primary, None, **settings)


@cache
def shared_server() -> PostgresServer:
    """Return the server of this process's tests, each of which makes a database in it, and none of which stops it."""
    server = PostgresServer(autovacuum="off")  # it would go round all their databases without end
    atexit.register(server.close)
    return server
