"""pytest fixtures for users of the library: `keyless_sandbox`, `keyless_client`, `keyless_worker`, `keyless_broker`.

pytest loads this module whenever aiokeyless is installed, so it imports the rest of the library only when a test
requests a fixture. The fixtures run in the event loop of the test, from pytest-asyncio (either mode, any loop scope) or
anyio's plugin. Each plugin accepts only async fixtures that are marked as its own. So each fixture is defined once per
plugin and scope, and the public fixtures select one.
"""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from tenacity.wait import wait_base

    from aiokeyless.client import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalWorker
    from aiokeyless.worker.sqlite import SqliteBroker


@pytest.fixture
def keyless_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A running `aiokeyless.sandbox.Sandbox`, closed after the test.

    It runs in the event loop of the test, which must be async. To use other options, override this fixture:
    `keyless_client` then connects to your sandbox.

    Example::

        async def test_paying_waits_for_the_phone(keyless_sandbox, keyless_client):
            ticket = await keyless_client.create_operation("C0FFEE", operation_id="txn-1")
            keyless_sandbox.approve("txn-1")
            assert await pay(keyless_client, ticket)
    """
    sandbox: Sandbox = request.getfixturevalue(f"_keyless_sandbox_{_find_loop(request)}")
    return sandbox


@pytest.fixture
def keyless_client(request: pytest.FixtureRequest, keyless_sandbox: Sandbox) -> KeylessClient:  # noqa: ARG001  # its order
    """An `aiokeyless.KeylessClient` for `keyless_sandbox`, closed after the test.

    It polls every 20 ms at first, since tests approve faster than people, and then less often, up to every 2 s. A wait
    of two minutes takes about a hundred polls: milliseconds, if looptime moves the clock.
    """
    client: KeylessClient = request.getfixturevalue(f"_keyless_client_{_find_loop(request)}")
    return client


@pytest.fixture
def keyless_worker(request: pytest.FixtureRequest, keyless_client: KeylessClient) -> ApprovalWorker:  # noqa: ARG001  # its order
    """A running `aiokeyless.worker.ApprovalWorker` on `keyless_broker`, stopped after the test.

    It polls as often as `keyless_client`.

    Example::

        async def test_a_payment_waits_for_the_phone(keyless_worker, keyless_broker, keyless_sandbox):
            submission = await submit_approval(keyless_broker, "C0FFEE", operation_id="order-1")
            ...
    """
    worker: ApprovalWorker = request.getfixturevalue(f"_keyless_worker_{_find_loop(request)}")[0]
    return worker


@pytest.fixture
def keyless_broker(request: pytest.FixtureRequest, keyless_worker: ApprovalWorker) -> SqliteBroker:  # noqa: ARG001  # its order
    """The broker of `keyless_worker`, in memory. Pass it to the code under test in place of its own."""
    broker: SqliteBroker = request.getfixturevalue(f"_keyless_worker_{_find_loop(request)}")[1]
    return broker


def _make_schedule() -> wait_base:
    from tenacity import wait_exponential  # noqa: PLC0415  # only when used

    return wait_exponential(multiplier=0.02, exp_base=1.1, max=2)


def _find_loop(request: pytest.FixtureRequest) -> str:
    """Return ``"anyio"`` if anyio runs the test, else the scope of the loop that pytest-asyncio provides for it."""
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
        if backend == "asyncio":
            return "anyio"
        pytest.fail(f"aiokeyless runs on asyncio, not on {backend}: set anyio_backend to 'asyncio'", pytrace=False)
    marker = request.node.get_closest_marker("asyncio")
    if marker is None or not request.config.pluginmanager.has_plugin("asyncio"):
        pytest.fail(
            f"{request.fixturename} runs in the event loop of a test: make the test async, and run it with "
            "pytest-asyncio or anyio's plugin",
            pytrace=False,
        )
    return str(marker.kwargs.get("loop_scope") or request.config.getini("asyncio_default_test_loop_scope"))


def _make_fixtures(loop: str, fixture: Callable[..., Any]) -> dict[str, object]:  # Any: the decorators are overloaded
    """Create the async fixtures for one kind of loop, as new functions, since pytest-asyncio marks functions."""

    async def sandbox() -> AsyncGenerator[Sandbox]:
        from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # only when used

        async with Sandbox() as sandbox:
            yield sandbox

    async def client(keyless_sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
        async with keyless_sandbox.client(schedule=_make_schedule()) as client:
            yield client

    async def worker(keyless_client: KeylessClient) -> AsyncGenerator[tuple[ApprovalWorker, SqliteBroker]]:
        from aiokeyless.worker import ApprovalWorker  # noqa: PLC0415
        from aiokeyless.worker.sqlite import SqliteBroker  # noqa: PLC0415

        async with (
            SqliteBroker(":memory:") as broker,
            ApprovalWorker(keyless_client, broker, schedule=_make_schedule()) as worker,
        ):
            yield worker, broker

    names = {"_keyless_sandbox": sandbox, "_keyless_client": client, "_keyless_worker": worker}
    return {f"{name}_{loop}": fixture(name=f"{name}_{loop}")(function) for name, function in names.items()}


globals().update(_make_fixtures("anyio", pytest.fixture))

# pytest-asyncio is optional.
with suppress(ModuleNotFoundError):
    import pytest_asyncio

    for _scope in ("function", "class", "module", "package", "session"):
        globals().update(_make_fixtures(_scope, partial(pytest_asyncio.fixture, loop_scope=_scope)))
