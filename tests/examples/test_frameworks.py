"""What users of web frameworks write in their first ten minutes: a program, and a test of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from waiting import PATIENCE

if TYPE_CHECKING:
    import pytest

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
