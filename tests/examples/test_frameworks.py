"""What users of web frameworks write in their first ten minutes: a program, and a test of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from waiting import PATIENCE

pytest_plugins = ["pytester"]

#: Without plugins that take longer to import than pytest.
INI = "asyncio_default_fixture_loop_scope = function\naddopts = -p no:faker -p no:langsmith_plugin"


def test_litestars_test_client_which_blocks_the_loop_of_its_test_reaches_the_sandbox(pytester: pytest.Pytester) -> None:
    test = """
        from contextlib import asynccontextmanager
        from litestar import Litestar, post
        from litestar.datastructures import State
        from litestar.testing import AsyncTestClient
        from aiokeyless import KeylessClient

        @asynccontextmanager
        async def lifespan(app):
            async with KeylessClient() as app.state.keyless:
                yield

        @post("/logins")
        async def login(state: State) -> bool:
            return (await state.keyless.request_approval("C0FFEE")).is_approved

        async def test_an_approval_logs_in(keyless_sandbox, keyless_environment):
            keyless_sandbox.auto_approve = 0
            async with AsyncTestClient(Litestar([login], lifespan=[lifespan])) as browser:
                assert (await browser.post("/logins")).json() is True
    """
    pytester.makeini(f"[pytest]\nasyncio_mode = auto\n{INI}")
    pytester.makepyfile(test)
    pytester.runpytest_subprocess(timeout=PATIENCE).assert_outcomes(passed=1)


FOLDER = Path(__file__).parents[2] / "examples"
#: The settings of a project of Django.
SETTINGS = """
    DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:", "ATOMIC_REQUESTS": True}}
    INSTALLED_APPS = ["django.contrib.sessions", "billing"]
    MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
    ROOT_URLCONF = "billing.views"
    SECRET_KEY = "of the sessions"
    USE_TZ = True
"""


@pytest.mark.parametrize(
    ("folder", "tests", "options"),
    [
        ("sync", "test_flask_app.py", ()),
        ("django_site", "billing/test_views.py", ("--ds", "settings")),
        ("shutdown", "test_fastapi_app.py", ()),
        ("shutdown", "test_django_app.py", ()),
    ],
)
def test_the_tests_of_a_program_pass_as_they_stand_in_its_page(
    pytester: pytest.Pytester, folder: str, tests: str, options: tuple[str, ...]
) -> None:
    shutil.copytree(FOLDER / folder, pytester.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    pytester.makepyfile(settings=SETTINGS)
    pytester.makeini(f"[pytest]\npythonpath = .\n{INI}")
    pytester.runpytest_subprocess(tests, "-W", "error", *options, timeout=PATIENCE).assert_outcomes(passed=5)
