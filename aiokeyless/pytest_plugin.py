"""Fixtures for the tests of those who use the library: `keyless_sandbox` and `keyless_client`.

pytest loads this module wherever aiokeyless is installed, so it imports the sandbox and the client only when a test
asks for them. Both live in the event loop of the test, and who runs that loop differs: pytest-asyncio, in either mode
and with loops of any scope, or anyio's plugin. Each takes only async fixtures that are marked as its own, so each
fixture stands here once for each of them, and the public names choose.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from aiokeyless.client import KeylessClient
    from aiokeyless.sandbox import Sandbox


@pytest.fixture
def keyless_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A started `aiokeyless.sandbox.Sandbox`, closed after the test.

    It runs in the loop of the test, which must be async. For one with other options override the fixture;
    `keyless_client` then belongs to yours.

    Example::

        async def test_paying_waits_for_the_phone(keyless_sandbox, keyless_client):
            ticket = await keyless_client.create_operation("C0FFEE", operation_id="txn-1")
            keyless_sandbox.approve("txn-1")
            assert await pay(keyless_client, ticket)
    """
    sandbox: Sandbox = request.getfixturevalue(f"_keyless_sandbox_{_loop_of(request)}")
    return sandbox


@pytest.fixture
def keyless_client(request: pytest.FixtureRequest, keyless_sandbox: Sandbox) -> KeylessClient:  # noqa: ARG001  # its order
    """A `aiokeyless.KeylessClient` of `keyless_sandbox`, closed after the test."""
    client: KeylessClient = request.getfixturevalue(f"_keyless_client_{_loop_of(request)}")
    return client


def _loop_of(request: pytest.FixtureRequest) -> str:
    """Name whose loop a test runs in: anyio's, or the scope of the loop that pytest-asyncio gives it."""
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
        if backend == "asyncio":
            return "anyio"
        pytest.fail(f"aiokeyless runs on asyncio, not on {backend}: let anyio_backend be 'asyncio'", pytrace=False)
    marker = request.node.get_closest_marker("asyncio")
    if marker is None or not request.config.pluginmanager.has_plugin("asyncio"):
        pytest.fail(
            f"{request.fixturename} serves in the event loop of a test: make the test async, and have it run by "
            "pytest-asyncio or by anyio's plugin",
            pytrace=False,
        )
    return str(marker.kwargs.get("loop_scope") or request.config.getini("asyncio_default_test_loop_scope"))


def _fixtures(loop: str, fixture: Callable[..., Any]) -> dict[str, object]:  # Any: each of them is overloaded
    """Make the async fixtures of one sort of loop: functions of their own, since pytest-asyncio marks functions."""

    async def sandbox() -> AsyncGenerator[Sandbox]:
        from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # only when used

        async with Sandbox() as sandbox:
            yield sandbox

    async def client(keyless_sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
        async with keyless_sandbox.client() as client:
            yield client

    names = {"_keyless_sandbox": sandbox, "_keyless_client": client}
    return {f"{name}_{loop}": fixture(name=f"{name}_{loop}")(function) for name, function in names.items()}


globals().update(_fixtures("anyio", pytest.fixture))

with suppress(ModuleNotFoundError):  # it is not everybody's choice
    import pytest_asyncio

    for _scope in ("function", "class", "module", "package", "session"):
        globals().update(_fixtures(_scope, partial(pytest_asyncio.fixture, loop_scope=_scope)))
