"""What users of web frameworks write in their first ten minutes: a program, and a test of it."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest
from waiting import PATIENCE

pytest_plugins = ["pytester"]


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
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function")
    pytester.makepyfile(test)
    pytester.runpytest_subprocess(timeout=PATIENCE).assert_outcomes(passed=1)


FOLDER = Path(__file__).parents[2] / "examples"
#: What a project of Django has besides the program.
DJANGO = {
    "settings": """
        DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:", "ATOMIC_REQUESTS": True}}
        INSTALLED_APPS = ["django.contrib.sessions", "payments"]
        MIDDLEWARE = ["django.contrib.sessions.middleware.SessionMiddleware"]
        ROOT_URLCONF = "django_views"
        SECRET_KEY = "of the sessions"
        USE_TZ = True
    """,
    "payments/models": "from django_views import Payment",
}


@pytest.mark.parametrize(
    ("program", "project", "options"),
    [
        ("sync/flask_app", {}, ()),
        ("sync/django_views", DJANGO, ("--ds", "settings")),
        ("shutdown/fastapi_app", {}, ()),
        ("shutdown/django_app", {}, ()),
    ],
)
def test_the_tests_of_a_program_pass_as_they_stand_in_its_page(
    pytester: pytest.Pytester, program: str, project: dict[str, str], options: tuple[str, ...]
) -> None:
    tests = (FOLDER / program).with_name(f"test_{Path(program).name}.py")
    for file in tests.parent.glob("*.py"):
        if not file.name.startswith("test_") or file == tests:
            pytester.path.joinpath(file.name).write_text(file.read_text())
    for name, text in project.items():
        pytester.path.joinpath(name).parent.mkdir(exist_ok=True)
        pytester.path.joinpath(f"{name}.py").write_text(dedent(text))
    pytester.makeini("[pytest]\npythonpath = .\nasyncio_default_fixture_loop_scope = function")
    pytester.runpytest_subprocess("-W", "error", *options, timeout=PATIENCE).assert_outcomes(passed=3)
