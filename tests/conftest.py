"""What all tests share: a sandbox and a client for it, from the plugin that users get, and a clock that moves."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from aiohttp.web_protocol import RequestHandler
from aiohttp_version import AIOHTTP, NOT_THERE
from hypothesis import settings
from mocked_service import MockedService
from nats_server import NatsServer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Mapping

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.sqlite import SqliteBroker

# looptime asks for the current loop before tests that have none, too. Unless told that there is none, asyncio makes
# one, which nobody closes.
asyncio.set_event_loop(None)

# To look for garbage takes a fifth of the time of the collection, which leaves none: see pytest_collection_finish.
gc.disable()

# No property promises a time, and a busy machine takes any.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")

# At the very time of its timer, aiohttp 3.10 sets the same timer again. A clock that moves never leaves that time.
if AIOHTTP == (3, 10):
    RequestHandler._process_keepalive = lambda *_: None  # type: ignore[method-assign]

if os.environ.get("TEST_LOOP") == "uvloop":
    import uvloop

    def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
        """Run the async tests on uvloop; its clock does not move, so those marked looptime are left out."""
        return {"uvloop": uvloop.new_event_loop}


if os.environ.get("TEST_LOOP") == "eager":

    def eager_loop() -> asyncio.AbstractEventLoop:
        loop = asyncio.new_event_loop()
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009  # not there on Python 3.11
        return loop

    def pytest_asyncio_loop_factories() -> Mapping[str, Callable[[], asyncio.AbstractEventLoop]]:
        """Run the async tests on a loop whose tasks begin to run when they are made; its clock moves as ever."""
        return {"eager": eager_loop}


# The tests of the examples are of the second tier: their frameworks take longer to import than all other tests.
EXAMPLES = Path(__file__).parent / "examples"

#: Why a test may be skipped: with the extra "test" alone, and what a machine or a loop need not have.
NEEDS_EXAMPLES = 'needs the extra "examples"'
MAY_BE_MISSING = (
    *("this machine has no IPv6 loopback", "uvloop accepts by none of Python's sockets", NOT_THERE),
    "which a machine need not have",
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Import no framework for tests that are left out, unless a test of the examples is named on the command line."""
    if collection_path.parent != EXAMPLES or not collection_path.name.startswith("test_"):
        return None
    is_left_out = re.search(r"\bnot \([^)]*\bexamples\b", config.getoption("markexpr"))
    if is_left_out and not any("examples" in argument for argument in config.args):
        return True
    pytest.importorskip("temporalio", reason=NEEDS_EXAMPLES)
    return None


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Let each process of pytest-xdist begin with other files. Side by side, all would compile the same one at once."""
    report = yield
    worker = getattr(collector.config, "workerinput", None)
    if worker is not None and isinstance(collector, pytest.Directory):
        first = int(worker["workerid"].removeprefix("gw")) * len(report.result) // worker["workercount"]
        report.result = report.result[first:] + report.result[:first]
    return report


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path)  # which all have in common


def pytest_collection_finish() -> None:
    gc.freeze()  # the tests that look for garbage need not look at the tests
    gc.enable()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Name a text that is odd or long by the beginning of its ASCII, without backslashes.

    pytest escapes all else once more each time that a process collects the tests, so mutmut, which collects twice,
    would not find them by their names, and would count each mutant that they concern as one whose tests time out.
    """
    if isinstance(val, str | bytes) and ("\\" in (name := ascii(val)) or len(name) > 40):  # two fit a line
        return name[:40].replace("\\", "/")
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    assert "\\" not in item.name, f"{item.nodeid}: leave the names of parameters to pytest_make_parametrize_id"
    if item.path.parent == EXAMPLES:
        item.add_marker(pytest.mark.examples)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail a run of nox in which a test was skipped, for an extra, a browser or a program that should be there."""
    if "coverage" in sys.modules and (measured := sys.modules["coverage"].Coverage.current()):
        measured.save()  # pytest-xdist kills a process that takes over ten seconds to exit, as on a busy machine
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    extra = os.environ.get("TESTS_RUN_WITH")  # the extra that nox installed
    if extra is None or reporter is None:  # None: in a process of pytest-xdist
        return
    may_be_missing = MAY_BE_MISSING if extra == "dev" else (*MAY_BE_MISSING, NEEDS_EXAMPLES)
    if any(not report.longrepr[2].endswith(may_be_missing) for report in reporter.stats.get("skipped", ())):
        reporter.write_line(
            "\nThis run fails, as tests were skipped though all that they need should be there.", red=True
        )
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def sandbox(keyless_sandbox: Sandbox) -> Sandbox:
    return keyless_sandbox


@pytest.fixture
def mocked() -> Iterator[MockedService]:
    with (service := MockedService()):
        yield service


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    """A client as users make it, and not the one of the plugin, which polls fast."""
    async with sandbox.client() as client:
        yield client


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A real broker of the test's own."""
    async with NatsServer(tmp_path) as server:
        yield server


@pytest.fixture
async def memory() -> AsyncGenerator[SqliteBroker]:
    """A broker in memory, whose clock is the loop's."""
    from aiokeyless.worker.sqlite import SqliteBroker  # here, as every test loads this module

    async with SqliteBroker(":memory:") as broker:
        yield broker


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A certificate for this machine that nobody trusts, and its key."""
    if (openssl := shutil.which("openssl")) is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "certificate.pem", folder / "key.pem"
    options = "-x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=broker"
    more = (
        "-addext",
        "subjectAltName=IP:127.0.0.1,DNS:service.example",
        "-out",
        str(files[0]),
        "-keyout",
        str(files[1]),
    )
    subprocess.run([openssl, "req", *options.split(), *more], check=True, capture_output=True)
    return files


@pytest.fixture
def short_pulls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that end soon: one waits for its pulls to end, which takes a second otherwise."""
    monkeypatch.setattr("aiokeyless.worker.nats.intake.EXPIRES", 0.2)


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests must not depend on a key in the environment of the developer."""
    ours = ("KEYLESS_API_KEY", "KEYLESS_REGION", "KEYLESS_BASE_URL", "KEYLESS_SDK_KEY", "KEYLESS_BROKER", "NATS_URL")
    for name in ours:
        monkeypatch.delenv(name, raising=False)
