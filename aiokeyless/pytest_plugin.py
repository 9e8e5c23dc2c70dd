"""pytest fixtures for users of the library: `keyless_sandbox`, `keyless_client`, `keyless_worker` and others.

pytest loads this module whenever aiokeyless is installed, so it imports the rest of the library only when a test
requests a fixture. In an async test, client and worker run in the event loop of the test. That loop is of
pytest-asyncio (either mode, any loop scope) or of anyio's plugin. In a plain test, it is that of `aiokeyless.sync`. The
sandbox is always in the thread of the latter, since a test may block its loop, except if looptime moves its clock.

Each plugin accepts only async fixtures that are marked as its own. So each fixture is defined once per plugin and
scope, and the public fixtures select one.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator

    from tenacity.wait import wait_base

    from aiokeyless import sync
    from aiokeyless.client import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalWorker, Broker


@pytest.fixture
def keyless_sandbox_options() -> dict[str, Any]:
    """The arguments of `keyless_sandbox`, by name. Override this fixture to set some. Default: none.

    A function among them is called in the thread of the sandbox.
    """
    return {}


@pytest.fixture
def keyless_broker_url() -> str | None:
    """The URL of `keyless_broker`, if the code under test has requests and outcomes in its own database.

    Override this fixture. A PostgreSQL database must be of this test process alone: each test begins without the
    requests and outcomes of the others. Default: None, a broker in memory.
    """
    return None


@pytest.fixture
def keyless_sandbox(request: pytest.FixtureRequest) -> Sandbox:
    """A running `aiokeyless.sandbox.Sandbox`, closed after the test.

    It runs in a thread of its own, and can be used in any thread. If looptime moves the clock of the test's event loop,
    it runs in that loop. In a plain test, its `client` returns one of `aiokeyless.sync`.

    Example::

        async def test_paying_waits_for_the_phone(keyless_sandbox, keyless_client):
            ticket = await keyless_client.create_operation("C0FFEE", operation_id="txn-1")
            keyless_sandbox.approve("txn-1")
            assert await pay(keyless_client, ticket)
    """
    loop = _find_loop(request)
    place = loop if loop != "sync" and _is_clock_moved(request) else "thread"
    sandbox: Sandbox = request.getfixturevalue(f"_keyless_sandbox_{place}")
    return sandbox


@pytest.fixture
def keyless_environment(keyless_sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    """``$KEYLESS_BASE_URL`` and ``$KEYLESS_API_KEY`` of `keyless_sandbox`, for code under test that makes its client.

    Request it before whatever starts that code, such as the test client of an application.
    """
    monkeypatch.setenv("KEYLESS_BASE_URL", keyless_sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", keyless_sandbox.api_key)


@pytest.fixture
def keyless_client(
    request: pytest.FixtureRequest,
    keyless_sandbox: Sandbox,  # noqa: ARG001  # its order
) -> KeylessClient | sync.KeylessClient:
    """An `aiokeyless.KeylessClient` for `keyless_sandbox`, closed after the test; in a plain test, `aiokeyless.sync`'s.

    It polls every 20 ms at first, since tests approve faster than people, and then less often, up to every 2 s. A wait
    of two minutes takes about a hundred polls: milliseconds, if looptime moves the clock.
    """
    client: KeylessClient | sync.KeylessClient = request.getfixturevalue(f"_keyless_client_{_find_loop(request)}")
    return client


@pytest.fixture
def keyless_worker(
    request: pytest.FixtureRequest,
    keyless_client: object,  # noqa: ARG001  # its order
    keyless_broker_url: str | None,
) -> ApprovalWorker:
    """A running `aiokeyless.worker.ApprovalWorker` on `keyless_broker`, stopped after the test.

    It polls as often as `keyless_client`.

    Example::

        async def test_a_payment_waits_for_the_phone(keyless_worker, keyless_broker, keyless_sandbox):
            submission = await submit_approval(keyless_broker, "C0FFEE", operation_id="order-1")
            ...
    """
    if keyless_broker_url is not None:
        _refuse_hidden_transaction()
    worker: ApprovalWorker = request.getfixturevalue(f"_keyless_worker_{_find_loop(request)}")[0]
    return worker


@pytest.fixture
def keyless_broker(request: pytest.FixtureRequest, keyless_worker: ApprovalWorker) -> Broker:  # noqa: ARG001  # its order
    """The broker of `keyless_worker`: in memory, or that of `keyless_broker_url`. Pass it to the code under test."""
    broker: Broker = request.getfixturevalue(f"_keyless_worker_{_find_loop(request)}")[1]
    return broker


def _make_schedule() -> wait_base:
    from tenacity import wait_exponential  # noqa: PLC0415  # only when used

    return wait_exponential(multiplier=0.02, exp_base=1.1, max=2)


def _find_loop(request: pytest.FixtureRequest) -> str:
    """Return whose loop a test uses: ``"sync"``, ``"anyio"``, or the scope of that of pytest-asyncio."""
    test = request.function
    if not inspect.iscoroutinefunction(getattr(getattr(test, "hypothesis", None), "inner_test", test)):
        return "sync"
    if "anyio_backend" in request.fixturenames:
        backend = request.getfixturevalue("anyio_backend_name")
        if backend == "asyncio":
            return "anyio"
        pytest.fail(f"aiokeyless runs on asyncio, not on {backend}: set anyio_backend to 'asyncio'", pytrace=False)
    marker = request.node.get_closest_marker("asyncio")
    if marker is None or not request.config.pluginmanager.has_plugin("asyncio"):
        pytest.fail(
            f"{request.fixturename} runs in the event loop of this async test, which has none: mark it with "
            "@pytest.mark.asyncio of pytest-asyncio, or with @pytest.mark.anyio",
            pytrace=False,
        )
    return str(marker.kwargs.get("loop_scope") or request.config.getini("asyncio_default_test_loop_scope"))


def _is_clock_moved(request: pytest.FixtureRequest) -> bool:
    """Return whether looptime moves the clock of the loop of a test."""
    option = request.config.getoption("looptime", default=False)  # False: it is not installed, or forbidden
    marker = request.node.get_closest_marker("looptime")
    return option is not False and (bool(option) if marker is None else all(marker.args))


@asynccontextmanager
async def _run_worker(client: KeylessClient, url: str | None) -> AsyncGenerator[tuple[ApprovalWorker, Broker]]:
    """Run a worker on a broker that has no request and no outcome yet."""
    from aiokeyless.worker import ApprovalWorker  # noqa: PLC0415  # only when used
    from aiokeyless.worker.brokers import broker_for, hide_url  # noqa: PLC0415
    from aiokeyless.worker.sqlite import SqliteBroker  # noqa: PLC0415

    opened: Any = SqliteBroker(":memory:") if url is None else broker_for(hide_url(url))
    async with opened:
        if opened.system == "postgresql":
            await opened.empty_for_tests()
        async with ApprovalWorker(client, opened, schedule=_make_schedule()) as worker:
            yield worker, opened


def _refuse_hidden_transaction() -> None:
    """Refuse a test of Django whose transaction never commits, as its requests would never reach the worker."""
    if "django.db" in sys.modules:
        from django.conf import settings  # noqa: PLC0415
        from django.db import connections  # noqa: PLC0415

        if settings.configured and any(each.in_atomic_block for each in connections.all(initialized_only=True)):
            pytest.fail(
                "this test runs in a transaction that never commits, so keyless_worker would see no request: use "
                "transactional_db, or @pytest.mark.django_db(transaction=True), or django.test.TransactionTestCase",
                pytrace=False,
            )


@pytest.fixture
def _keyless_sandbox_thread(
    request: pytest.FixtureRequest, keyless_sandbox_options: dict[str, Any]
) -> Generator[Sandbox]:
    from aiokeyless import client, sync  # noqa: PLC0415
    from aiokeyless.sandbox.threads import ThreadSafeSandbox  # noqa: PLC0415

    make_client = sync.KeylessClient if _find_loop(request) == "sync" else client.KeylessClient
    sandbox = ThreadSafeSandbox(make_client, **keyless_sandbox_options)
    with sync.get_background().holding(sandbox):
        yield sandbox


@pytest.fixture
def _keyless_client_sync(keyless_sandbox: Any) -> Generator[sync.KeylessClient]:
    with keyless_sandbox.client(schedule=_make_schedule()) as client:
        yield client


@pytest.fixture
def _keyless_worker_sync(
    keyless_client: Any, keyless_broker_url: str | None
) -> Generator[tuple[ApprovalWorker, Broker]]:
    background, client = keyless_client._open()  # noqa: SLF001
    with background.holding(_run_worker(client, keyless_broker_url)) as (worker, broker), background.lending(broker):
        yield worker, broker


def _make_fixtures(loop: str, fixture: Callable[..., Any]) -> dict[str, object]:  # Any: the decorators are overloaded
    """Create the async fixtures for one kind of loop, as new functions, since pytest-asyncio marks functions."""

    async def sandbox(keyless_sandbox_options: dict[str, Any]) -> AsyncGenerator[Sandbox]:
        from aiokeyless.sandbox import Sandbox  # noqa: PLC0415  # only when used

        async with Sandbox(**keyless_sandbox_options) as sandbox:
            yield sandbox

    async def client(keyless_sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
        async with keyless_sandbox.client(schedule=_make_schedule()) as client:
            yield client

    async def worker(
        keyless_client: KeylessClient, keyless_broker_url: str | None
    ) -> AsyncGenerator[tuple[ApprovalWorker, Broker]]:
        async with _run_worker(keyless_client, keyless_broker_url) as running:
            yield running

    names = {"_keyless_sandbox": sandbox, "_keyless_client": client, "_keyless_worker": worker}
    return {f"{name}_{loop}": fixture(name=f"{name}_{loop}")(function) for name, function in names.items()}


globals().update(_make_fixtures("anyio", pytest.fixture))

# pytest-asyncio is optional.
with suppress(ModuleNotFoundError):
    import pytest_asyncio

    for _scope in ("function", "class", "module", "package", "session"):
        globals().update(_make_fixtures(_scope, partial(pytest_asyncio.fixture, loop_scope=_scope)))
