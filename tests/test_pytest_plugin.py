"""The fixtures, in test suites such as users have: each runs in a pytest of its own."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from http.client import HTTPConnection
from typing import TYPE_CHECKING

import pytest
from freezegun import freeze_time
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import integers
from waiting import PATIENCE, until

from aiokeyless import ApprovalTimeoutError, ConfigurationError, TransportError, sync
from aiokeyless import KeylessClient as AsyncKeylessClient
from aiokeyless.sync import KeylessClient as SyncKeylessClient
from aiokeyless.worker import next_outcome, submit_approval

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalWorker, Broker

pytestmark = pytest.mark.platform

pytest_plugins = ["pytester"]

APPROVED = """
import asyncio
import pytest

{mark}
async def test_the_client_sees_what_the_sandbox_approved(keyless_sandbox, keyless_client):
    await keyless_client.create_operation("C0FFEE", operation_id="txn-1")
    keyless_sandbox.approve("txn-1")
    async with asyncio.timeout(60):
        assert (await keyless_client.get_operation("txn-1")).is_approved
"""
STRICT = ("-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=function")
AUTO = ("-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function")


def run(pytester: pytest.Pytester, test: str, *options: str, conftest: str) -> pytest.RunResult:
    # Without settings, those further up count, as of the checkout that the folder is in. As there, no plugin of the
    # examples' packages is loaded: each of these suites would import them anew.
    pytester.makeini("[pytest]\naddopts = -p no:django -p no:faker -p no:langsmith_plugin")
    pytester.makeconftest(conftest)
    pytester.makepyfile(test)
    return pytester.runpytest_inprocess("-W", "error", *options)


def passes(pytester: pytest.Pytester, test: str, *options: str, conftest: str = "", passed: int = 1) -> None:
    run(pytester, test, *options, conftest=conftest).assert_outcomes(passed=passed)


def fails_with(pytester: pytest.Pytester, message: str, test: str, *options: str, conftest: str = "") -> None:
    result = run(pytester, test, *options, conftest=conftest)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*{message}*"])


# -- in these tests themselves


async def test_a_test_may_block_its_loop_while_the_sandbox_answers(keyless_sandbox: Sandbox) -> None:
    assert ask_and_block(keyless_sandbox) == b"[]"


def ask_and_block(sandbox: Sandbox) -> bytes:
    headers = {"X-Api-Key": sandbox.api_key, "Accept": "application/json"}
    with closing(HTTPConnection(sandbox.url.removeprefix("http://"), timeout=PATIENCE)) as connection:
        connection.request("GET", "/v2/users/C0FFEE/operations/pending", headers=headers)
        return connection.getresponse().read()


async def test_the_sandbox_is_restarted_by_an_async_test_and_keeps_port_and_operations(
    keyless_sandbox: Sandbox, keyless_client: AsyncKeylessClient
) -> None:
    await keyless_client.create_operation("C0FFEE", operation_id="op-1")
    url = keyless_sandbox.url
    await keyless_sandbox.aclose()
    with pytest.raises(TransportError):
        await keyless_client.get_operation("op-1")
    async with keyless_sandbox:
        assert keyless_sandbox.url == url
        keyless_sandbox.approve("op-1")
        assert (await keyless_client.get_operation("op-1")).is_approved


async def test_an_async_test_makes_more_clients_of_its_own_face(keyless_sandbox: Sandbox) -> None:
    async with keyless_sandbox.client() as client:
        assert await client.get_pending_operations("C0FFEE") == []


async def test_an_async_test_may_freeze_all_clocks_but_that_of_asyncio(keyless_client: AsyncKeylessClient) -> None:
    with freeze_time("2026-12-01", real_asyncio=True):
        ticket = await keyless_client.create_operation("C0FFEE", expires_in=0.1)
        with pytest.raises(ApprovalTimeoutError):
            await keyless_client.wait_for_approval(ticket)


@pytest.mark.usefixtures("keyless_environment")
async def test_code_that_makes_its_client_in_an_async_test_finds_the_sandbox(keyless_sandbox: Sandbox) -> None:
    async with AsyncKeylessClient() as client:
        await client.create_operation("C0FFEE", operation_id="op-1")
    assert "op-1" in keyless_sandbox.operations


@pytest.mark.looptime
async def test_a_wait_of_two_minutes_takes_few_polls(keyless_client: AsyncKeylessClient) -> None:
    ticket = await keyless_client.create_operation("C0FFEE", expires_in=120)
    with pytest.raises(ApprovalTimeoutError) as caught:
        await keyless_client.wait_for_approval(ticket)
    assert caught.value.polls < 150


@pytest.mark.looptime
async def test_a_quick_approval_is_noticed_soon(keyless_sandbox: Sandbox, keyless_client: AsyncKeylessClient) -> None:
    ticket = await keyless_client.create_operation("C0FFEE")
    now = asyncio.get_running_loop().time
    noticed = asyncio.create_task(keyless_client.wait_for_approval(ticket))
    await asyncio.sleep(0.5)
    keyless_sandbox.approve(ticket.operation_id)
    approved_at = now()
    await noticed
    assert now() - approved_at < 0.2


# -- in these plain tests


def test_a_plain_test_gets_the_other_face(keyless_sandbox: Sandbox, keyless_client: SyncKeylessClient) -> None:
    ticket = keyless_client.create_operation("C0FFEE", operation_payload="Pay 40")
    keyless_sandbox.approve(*keyless_sandbox.operations)
    assert keyless_client.wait_for_approval(ticket).is_approved
    [attempt] = keyless_sandbox.authentications
    assert attempt.operation_id == ticket.operation_id
    another: object = keyless_sandbox.client()
    assert isinstance(another, SyncKeylessClient)
    another.close()


def test_a_plain_test_drives_the_sandbox_while_it_serves(
    keyless_sandbox: Sandbox, keyless_client: SyncKeylessClient
) -> None:
    def pay(number: int) -> bool:
        operation_id = keyless_client.create_operation("C0FFEE", operation_id=f"op-{number}").operation_id
        assert operation_id in [*keyless_sandbox.operations]
        keyless_sandbox.approve(operation_id)
        return keyless_client.get_operation(operation_id).is_approved

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(pay, range(100)))


@pytest.mark.usefixtures("keyless_environment")
def test_code_that_makes_its_client_in_a_plain_test_finds_the_sandbox(keyless_sandbox: Sandbox) -> None:
    with SyncKeylessClient() as client:
        client.create_operation("C0FFEE", operation_id="op-1")
    assert "op-1" in keyless_sandbox.operations


def test_an_error_of_the_sandbox_is_raised_where_a_plain_test_made_it(keyless_sandbox: Sandbox) -> None:
    with pytest.raises(ConfigurationError, match="no operation"):
        keyless_sandbox.approve("nobody-asked")


def test_a_worker_serves_a_plain_test(
    keyless_worker: ApprovalWorker, keyless_broker: Broker, keyless_sandbox: Sandbox
) -> None:
    sync.submit_approval(keyless_broker, "C0FFEE", operation_id="order-1", operation_payload="Pay 40")
    wait_for(lambda: "order-1" in keyless_sandbox.operations)
    keyless_sandbox.approve("order-1")
    with sync.next_outcome(keyless_broker, "test") as event:
        assert event.outcome == "approved"
    assert keyless_worker.statistics.approved == 1


async def test_a_worker_serves_an_async_test(
    keyless_worker: ApprovalWorker, keyless_broker: Broker, keyless_sandbox: Sandbox
) -> None:
    await submit_approval(keyless_broker, "C0FFEE", operation_id="order-1", operation_payload="Pay 40")
    await until(lambda: "order-1" in keyless_sandbox.operations)
    keyless_sandbox.approve("order-1")
    async with next_outcome(keyless_broker, "test") as event:
        assert event.outcome == "approved"
    assert keyless_worker.statistics.approved == 1


@given(number=integers())
@settings(max_examples=2, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_an_async_test_of_hypothesis_is_one(number: int, keyless_client: AsyncKeylessClient) -> None:
    assert await keyless_client.get_pending_operations(f"{abs(number):X}") == []


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.01)


# -- in other suites


def test_options_of_the_sandbox_are_a_fixture_of_both_kinds_of_tests(pytester: pytest.Pytester) -> None:
    options = """
        import pytest

        @pytest.fixture
        def keyless_sandbox_options():
            return {"auto_approve": 0}
    """
    test = """
        async def test_async(keyless_client):
            assert (await keyless_client.request_approval("C0FFEE")).is_approved

        def test_plain(keyless_client):
            assert keyless_client.request_approval("C0FFEE").is_approved
    """
    passes(pytester, test, *AUTO, conftest=options, passed=2)


def test_a_plain_test_needs_no_plugin(pytester: pytest.Pytester) -> None:
    test = """
        def test_plain(keyless_client):
            assert keyless_client.get_pending_operations("C0FFEE") == []
    """
    passes(pytester, test, "-p", "no:looptime_plugin", "-p", "no:asyncio")


def test_a_plain_test_whose_worker_cannot_start_is_told_why(pytester: pytest.Pytester) -> None:
    url = """
        import pytest

        @pytest.fixture
        def keyless_broker_url():
            return "sqlite:/nowhere/at/all.db"
    """
    fails_with(pytester, "nowhere", "def test_plain(keyless_worker): pass", *STRICT, conftest=url)


def test_they_live_in_the_loop_of_the_test_whatever_its_scope(pytester: pytest.Pytester) -> None:
    test = """
        import pytest

        @pytest.mark.parametrize("time", [1, 2])
        class TestScopes:
            @pytest.mark.asyncio(loop_scope="class")
            async def test_class(self, time, keyless_client):
                await keyless_client.get_pending_operations("C0FFEE")

            @pytest.mark.asyncio(loop_scope="module")
            async def test_module(self, time, keyless_client):
                await keyless_client.get_pending_operations("C0FFEE")

            @pytest.mark.asyncio(loop_scope="session")
            async def test_session(self, time, keyless_client):
                await keyless_client.get_pending_operations("C0FFEE")
    """
    passes(pytester, test, *STRICT, "-o", "asyncio_default_test_loop_scope=package", passed=6)


@pytest.mark.parametrize("what", ["fixture", "test"])
def test_they_live_in_the_loop_of_the_test_whatever_is_the_default(pytester: pytest.Pytester, what: str) -> None:
    passes(pytester, APPROVED.format(mark=""), *AUTO, "-o", f"asyncio_default_{what}_loop_scope=session")


@pytest.mark.parametrize(
    "options", [("-p", "no:looptime_plugin", "-p", "no:asyncio"), STRICT], ids=["alone", "beside it"]
)
def test_anyio_runs_them(pytester: pytest.Pytester, options: tuple[str, ...]) -> None:
    test = APPROVED.format(mark="@pytest.mark.anyio")
    backend = "import pytest\n@pytest.fixture\ndef anyio_backend(): return 'asyncio'"
    passes(pytester, test, *options, conftest=backend)


def test_an_override_of_the_sandbox_is_what_the_client_belongs_to(pytester: pytest.Pytester) -> None:
    override = """
        import pytest_asyncio
        from aiokeyless.sandbox import Sandbox

        @pytest_asyncio.fixture
        async def keyless_sandbox():
            async with Sandbox(api_key="another", auto_approve=0) as sandbox:
                yield sandbox
    """
    test = """
        async def test_it_is_approved_at_once(keyless_sandbox, keyless_client):
            ticket = await keyless_client.create_operation("C0FFEE")
            assert (await keyless_client.get_operation(ticket.operation_id)).is_approved
            assert keyless_sandbox.api_key == "another"
    """
    passes(pytester, test, *AUTO, conftest=override)


def test_both_are_closed_after_the_test(pytester: pytest.Pytester) -> None:
    test = """
        import pytest
        from aiokeyless import ClientClosedError, ConfigurationError

        kept = []

        async def test_first(keyless_sandbox, keyless_client):
            kept[:] = keyless_sandbox, keyless_client

        async def test_second():
            sandbox, client = kept
            with pytest.raises(ConfigurationError, match="no URL"):
                sandbox.url
            with pytest.raises(ClientClosedError):
                await client.get_operation("txn-1")
    """
    passes(pytester, test, *AUTO, passed=2)


# -- whose clock moves


@pytest.mark.parametrize(
    ("option", "marks_in_the_thread", "marks_in_the_loop"),
    [
        ("-v", ["", "looptime(False)"], ["looptime"]),
        ("--looptime", ["looptime(False)"], ["", "looptime"]),
        ("--no-looptime", ["", "looptime"], []),
        ("-pno:looptime_plugin", ["", "looptime"], []),
    ],
)
def test_the_sandbox_is_in_the_loop_of_the_test_only_if_looptime_moves_its_clock(
    pytester: pytest.Pytester, option: str, marks_in_the_thread: list[str], marks_in_the_loop: list[str]
) -> None:
    options = """
        import threading
        import pytest

        def pytest_configure(config):
            config.addinivalue_line("markers", "looptime: may be missing")

        @pytest.fixture
        def threads():
            return []

        @pytest.fixture
        def keyless_sandbox_options(threads):
            return {"on_request": lambda _: threads.append(threading.current_thread())}
    """
    tests = [
        f"""
{f"@pytest.mark.{mark}" if mark else ""}
async def test_{number}(keyless_client, threads):
    await keyless_client.get_pending_operations("C0FFEE")
    assert (threads == [threading.main_thread()]) is {mark in marks_in_the_loop}
"""
        for number, mark in enumerate([*marks_in_the_thread, *marks_in_the_loop])
    ]
    test = "".join(["import threading\nimport pytest\n", *tests])
    passes(pytester, test, *AUTO, option, conftest=options, passed=len(tests))


# -- where they cannot live


def test_an_async_test_without_a_mark_is_told_its_name(pytester: pytest.Pytester) -> None:
    test = "async def test_async(keyless_sandbox): pass"
    fails_with(pytester, "mark it with @pytest.mark.asyncio", test, *STRICT)


def test_a_backend_other_than_asyncio_is_told_so(pytester: pytest.Pytester) -> None:
    backend = "import pytest\n@pytest.fixture\ndef anyio_backend(): return 'trio'"
    test = "import pytest\n@pytest.mark.anyio\nasync def test_trio(keyless_client): pass"
    fails_with(pytester, "aiokeyless runs on asyncio, not on trio", test, *STRICT, conftest=backend)


def test_without_pytest_asyncio_the_plugin_loads_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {"_keyless_sandbox_anyio", "_keyless_sandbox_function"} <= fresh_plugin().keys()
    monkeypatch.setitem(sys.modules, "pytest_asyncio", None)
    names = fresh_plugin().keys()
    assert "_keyless_sandbox_anyio" in names
    assert "_keyless_sandbox_function" not in names


def fresh_plugin() -> dict[str, object]:
    """What is in the plugin's module when it is loaded now: pytest loaded its own before any test could run."""
    spec = importlib.util.find_spec("aiokeyless.pytest_plugin")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)
