"""The worker of the fixtures on PostgreSQL, in test suites such as users have: each runs in a pytest of its own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from postgres_server import PostgresServer

pytestmark = pytest.mark.slow  # each runs pytest

pytest_plugins = ["pytester"]

CONFTEST = """
import psycopg
import pytest

@pytest.fixture
def keyless_broker_url():
    return {url!r}

@pytest.fixture
def connection():
    with psycopg.connect({url!r}, autocommit=True) as connection:
        yield connection
"""
TESTS = """
import time
import pytest
from aiokeyless.sync import next_outcome, submit_approval

schemas = set()

@pytest.mark.parametrize("number", range(3))
def test_plain(number, keyless_worker, keyless_sandbox, connection):
    schemas.add(connection.execute("SELECT oid FROM pg_namespace WHERE nspname = 'keyless'").fetchone())
    assert len(schemas) == 1
    with connection.transaction():
        submit_approval(connection, "C0FFEE", operation_id="the same in each test", operation_payload=f"Pay {number}")
    while not keyless_sandbox.operations:
        time.sleep(0.01)
    keyless_sandbox.approve("the same in each test")
    with next_outcome(connection, "shop") as event:
        assert event.outcome == "approved"
    with connection.transaction():  # which the next test shall not ask
        submit_approval(connection, "C0FFEE", operation_id=f"late {number}")

def test_nothing_is_left(keyless_worker, keyless_sandbox, connection):
    for table in ("request", "waiting", "outcome", "unread", "reader"):
        assert connection.execute(f"SELECT count(*) FROM keyless.{table}").fetchone() == (0,)
    assert not keyless_sandbox.operations

async def test_async(keyless_worker, keyless_broker, keyless_sandbox):
    from aiokeyless.worker import submit_approval
    assert not (await submit_approval(keyless_broker, "C0FFEE", operation_id="the same in each test")).duplicate
"""
DJANGO = """
import django, pytest
from django.conf import settings
settings.configure(DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}})
django.setup()

@pytest.fixture
def db():  # as that of pytest-django
    from django.db import transaction
    with transaction.atomic():
        yield

@pytest.fixture
def keyless_broker_url():
    return {url!r}
"""
SHOP = """
import django, pytest
from django.conf import settings
database = {{"ENGINE": "django.db.backends.postgresql", "NAME": {name!r}, "HOST": {host!r}, "USER": "postgres"}}
settings.configure(DATABASES={{"default": database}})
django.setup()

@pytest.fixture
def transactional_db():  # as that of pytest-django
    from django.db import connection
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE orders (id text)")
    yield
    connection.close()

@pytest.fixture
def order():
    from django.db import connection

    class Order:
        id, user_id, text = "order-1", "C0FFEE", "Pay 40"

        def save(self):
            with connection.cursor() as cursor:
                cursor.execute("INSERT INTO orders VALUES (%s)", [self.id])

    return Order()
"""
EXAMPLE = Path(__file__).parents[3] / "examples" / "postgres_shop"


def run(pytester: pytest.Pytester, conftest: str, tests: str) -> pytest.RunResult:
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    pytester.makeconftest(conftest)
    pytester.makepyfile(tests)
    # Without what takes longer to import than pytest.
    left_out = ("cacheprovider", "looptime_plugin", "django", "faker", "langsmith_plugin")
    return pytester.runpytest_subprocess("-W", "error", *(f"-pno:{plugin}" for plugin in left_out))


def test_a_schema_is_made_once_and_empty_at_the_start_of_each_test(pytester: pytest.Pytester, url: str) -> None:
    run(pytester, CONFTEST.format(url=url), TESTS).assert_outcomes(passed=5)


def test_a_test_whose_transaction_never_commits_is_told_so(pytester: pytest.Pytester, url: str) -> None:
    result = run(pytester, DJANGO.format(url=url), "def test_django(db, keyless_worker): pass")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*use transactional_db*"])


def test_the_example_of_django_passes(pytester: pytest.Pytester, server: PostgresServer, database: str) -> None:
    pytester.copy_example(str(EXAMPLE / "django_orders.py"))
    conftest = SHOP.format(name=database, host=str(server.folder))
    run(pytester, conftest, (EXAMPLE / "test_django_orders.py").read_text()).assert_outcomes(passed=1)
