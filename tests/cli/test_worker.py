"""``aiokeyless worker`` as a process: what it prints, how it ends, and that it never prints a secret."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import ssl
import subprocess
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import aiohttp
import nats
import pytest
from nats_server import NatsServer, jetstream
from ports import own_port
from waiting import PATIENCE, until

import aiokeyless.worker
from aiokeyless.cli.app import Exit, app
from aiokeyless.worker import Outcome, next_outcome, submit_approval
from aiokeyless.worker.nats import EventKeys, NatsBroker
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
    from pathlib import Path

    from nats.aio.client import Client

    from aiokeyless.sandbox import Sandbox

    from .terminal import Fail

Start: TypeAlias = "Callable[..., Awaitable[Worker]]"
EVENT_KEY = "a-key-of-the-workers-and-readers-only"
USER, PASSWORD = "worker", "n4ts-s3cret"
CONFIGURATION = f'authorization {{ users = [ {{ user: {USER}, password: "{PASSWORD}" }} ] }}'


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncGenerator[NatsServer]:
    """A broker that asks for a password."""
    async with NatsServer(tmp_path, configuration=CONFIGURATION) as server:
        yield server


@pytest.fixture
def nats_url(broker: NatsServer) -> str:
    return broker.url.replace("//", f"//{USER}:{PASSWORD}@")


@pytest.fixture
async def connection(nats_url: str) -> AsyncGenerator[Client]:
    """The connection of an application."""
    async with await nats.connect(nats_url) as connection:
        yield connection


@pytest.fixture
def environment(sandbox: Sandbox) -> Mapping[str, str]:
    return {
        **os.environ,
        "PYTHONWARNINGS": "error",
        "KEYLESS_BASE_URL": sandbox.url,
        "KEYLESS_API_KEY": sandbox.api_key,
        "KEYLESS_EVENT_KEY": EVENT_KEY,
    }


class Worker:
    """A worker in a process of its own, and the lines that it logged."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stderr is not None
        async for line in self.process.stderr:
            self.lines.append(line.decode().removesuffix("\n"))

    async def logged(self, text: str) -> None:
        await until(lambda: any(text in line for line in self.lines) or self._reader.done())
        assert any(text in line for line in self.lines), self.lines

    async def ended(self) -> int:
        assert self.process.stdout is not None
        assert await asyncio.wait_for(self.process.stdout.read(), PATIENCE) == b""
        await self._reader
        return await asyncio.wait_for(self.process.wait(), PATIENCE)

    async def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return await self.ended()


@pytest.fixture
async def start(environment: Mapping[str, str]) -> AsyncGenerator[Start]:
    """Starts workers as a shell does, and leaves none behind."""
    workers: list[Worker] = []

    async def start_worker(*arguments: str, **variables: str) -> Worker:
        command = sys.executable, "-m", "aiokeyless", "worker", *arguments
        pipe = subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, env={**environment, **variables}
        )
        workers.append(Worker(process))
        return workers[-1]

    yield start_worker
    for worker in workers:
        if worker.process.returncode is None:
            worker.process.kill()
        await worker.ended()


@pytest.fixture
def refuse(fail: Fail, monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Runs a worker in this process, for one that ends before it asks the service, and returns its one line."""
    for name, value in {"KEYLESS_API_KEY": "a-key", "KEYLESS_BROKER": ""}.items():
        monkeypatch.setenv(name, value)
    return functools.partial(fail, "worker")


# -- a worker that runs


@pytest.mark.slow
async def test_it_runs_until_it_is_stopped_and_exits_0(
    start: Start, connection: Client, nats_url: str, sandbox: Sandbox
) -> None:
    worker = await start("--broker", nats_url)
    await worker.logged("worker.ready")
    await submit_approval(connection, "c0ffee", operation_id="txn-1")
    await until(lambda: "txn-1" in sandbox.operations)
    sandbox.approve("txn-1")
    async with asyncio.timeout(PATIENCE), next_outcome(connection, "test") as event:
        pass
    assert (event.outcome, event.operation_id) == (Outcome.APPROVED, "txn-1")
    await worker.logged("approval.approved")
    assert await worker.stop() == 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\d [\d:,]+ INFO worker\.ready max_in_flight=64", worker.lines[0])
    names = [line.split()[3] for line in worker.lines]
    assert names == ["worker.ready", "approval.approved", "worker.draining", "worker.done"]


@pytest.mark.slow
async def test_as_json_every_line_is_an_object(start: Start, connection: Client, nats_url: str) -> None:
    worker = await start("--broker", nats_url, "--json")
    await worker.logged("worker.ready")
    await jetstream(connection).publish("keyless.approvals.request", b"no request\n")
    await worker.logged("approval.failed")
    assert await worker.stop() == 0
    lines: list[dict[str, Any]] = [json.loads(line) for line in worker.lines]
    assert [line["event"] for line in lines] == ["worker.ready", "approval.failed", "worker.draining", "worker.done"]
    assert (lines[1]["reason"], lines[-1]["failed"]) == ("invalid_request", 1)


@pytest.mark.slow
async def test_the_environment_names_the_broker_and_options_its_settings(
    start: Start, connection: Client, nats_url: str
) -> None:
    worker = await start("--name", "staging", "--replicas", "1", KEYLESS_BROKER=nats_url, KEYLESS_EVENT_KEY="")
    await worker.logged("worker.events_unsigned")
    await worker.logged("worker.ready")
    assert (await jetstream(connection).stream_info("STAGING_REQUESTS")).config.num_replicas == 1
    assert await worker.stop() == 0


@pytest.mark.slow
@pytest.mark.parametrize("option", [True, False], ids=["file", "environment"])
async def test_it_signs_its_events_with_the_key_that_it_was_given(
    start: Start, connection: Client, nats_url: str, tmp_path: Path, *, option: bool
) -> None:
    file = tmp_path / "key"
    file.write_text(EVENT_KEY)
    variables = {"KEYLESS_EVENT_KEY": ""} if option else {}
    worker = await start("--broker", nats_url, *(["--event-key", str(file)] if option else []), **variables)
    await worker.logged("worker.ready")
    assert not any("worker.events_unsigned" in line for line in worker.lines)
    await submit_approval(connection, "C0FFEE", operation_id="txn-1", expires_in=0.01)
    reader = NatsBroker(connection, event_keys=EventKeys(EVENT_KEY))
    async with asyncio.timeout(PATIENCE), next_outcome(reader, "test") as event:
        assert event.outcome is Outcome.EXPIRED
    assert await worker.stop() == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tls-ca", "no-such-file.pem"], "--tls-ca: no-such-file.pem cannot be read: "),
        (["--tls-ca", __file__], f"--tls-ca must name a file with a certificate, not {__file__}: "),
        (["--creds", "no-such-file.creds"], "--creds: no-such-file.creds cannot be read: "),
        (["--event-key", "no-such-file"], "no event key can be read from no-such-file: "),
        (["--name", "a\n"], "--name must be "),
    ],
)
def test_an_option_of_nats_that_cannot_be_used_is_named_in_one_line(
    options: list[str], message: str, refuse: Fail
) -> None:
    assert refuse("--broker", "nats://127.0.0.1:1", *options).startswith(message)


def test_with_a_certificate_authority_it_speaks_tls(refuse: Fail, nats_url: str, tmp_path: Path) -> None:
    authority = tmp_path / "ca.pem"
    authority.write_text(ssl.DER_cert_to_PEM_cert(ssl.create_default_context().get_ca_certs(binary_form=True)[0]))
    message = refuse("--broker", nats_url.replace("nats://", "tls://"), "--tls-ca", str(authority))
    assert message.startswith("no connection to the broker")
    assert message.endswith(": it does not ask for TLS")  # this one has none


@pytest.mark.slow
async def test_no_line_holds_a_secret_or_a_payload(
    start: Start, connection: Client, nats_url: str, sandbox: Sandbox
) -> None:
    worker = await start("--broker", nats_url)
    await worker.logged("worker.ready")
    for operation_id in ("txn-1", "txn-2"):
        texts: Any = {"operation_payload": "Pay 40", "context": "confidential"}
        await submit_approval(connection, "c0ffee", operation_id=operation_id, **texts)
        await until(lambda name=operation_id: name in sandbox.operations)  # type: ignore[misc]
    sandbox.tamper("txn-1", operation_payload="Pay 4000")
    sandbox.approve("txn-2")
    await worker.logged("approval.failed")
    await worker.logged("approval.approved")
    assert await worker.stop() == 0
    text = "\n".join(worker.lines)
    sdk_key = sandbox.operations["txn-1"].api_key
    assert sdk_key is not None
    secrets = (PASSWORD, sandbox.api_key, "Pay 40", "confidential", sdk_key.reveal())
    assert [secret for secret in secrets if secret in text] == []


async def health(port: int) -> tuple[int, str]:
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/healthz") as response:
        return response.status, (await response.json())["status"]


@pytest.mark.parametrize(
    ("is_windows", "options", "number"), [(False, [], signal.SIGTERM), (True, ["--json"], signal.SIGINT)]
)
async def test_it_stops_in_a_loop_that_goes_on_as_it_does_in_a_process(
    sandbox: Sandbox,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    *,
    is_windows: bool,
    options: list[str],
    number: signal.Signals,
) -> None:
    def refuse(*_: object) -> None:
        raise NotImplementedError

    handler = signal.getsignal(number)
    if is_windows:
        monkeypatch.setattr(asyncio.get_running_loop(), "add_signal_handler", refuse)
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
    monkeypatch.setenv("KEYLESS_BROKER", f"sqlite:{tmp_path / 'keyless.db'}")
    port = own_port()

    async def is_served() -> bool:
        with suppress(aiohttp.ClientConnectionError):
            return await health(port) == (200, "ok")
        return False

    served = asyncio.create_task(app.run_async(["worker", "--health-port", str(port), *options]))
    await until(is_served)
    signal.raise_signal(number)
    assert await served is None
    with pytest.raises(aiohttp.ClientConnectionError):
        await health(port)
    if is_windows:
        assert signal.getsignal(number) is handler


# -- a worker that cannot start


def test_a_broker_that_is_not_there_is_one_line(refuse: Fail) -> None:
    line = refuse("--broker", f"nats://worker:{PASSWORD}@127.0.0.1:1")
    assert line.startswith("no connection to the broker at 127.0.0.1:1: ")
    assert PASSWORD not in line


@pytest.mark.usefixtures("service")
def test_a_wrong_key_is_one_line_without_it(refuse: Fail, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KEYLESS_API_KEY", "wr0ng-key")
    line = refuse("--broker", f"sqlite:{tmp_path / 'keyless.db'}")
    assert "answered 401: " in line
    assert "wr0ng-key" not in line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--broker", "postgresql://127.0.0.1:1/shop"], Exit.ERROR, "the database cannot be reached: "),
        ([], Exit.USAGE, "--broker or KEYLESS_BROKER must name the broker, "),
    ],
)
async def test_as_json_the_error_that_ends_it_is_an_object_too(
    start: Start, arguments: list[str], code: Exit, message: str
) -> None:
    worker = await start("--json", *arguments)
    assert await worker.ended() == code
    line = json.loads(worker.lines[-1])
    assert (line["level"], line["event"]) == ("critical", "worker.ended")
    assert line["error"].startswith(message)


@pytest.mark.parametrize("missing", ["nats", "nkeys"])
def test_a_missing_extra_is_one_line_that_says_how_to_install_it(
    refuse: Fail, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    forget_the_worker(monkeypatch)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.setenv("KEYLESS_BASE_URL", "http://127.0.0.1:1")
    assert refuse("--broker", "nats://127.0.0.1:1", "--creds", __file__).endswith(': install the extra "nats"')


def forget_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove it from the imported modules, and put it back after the test, where its parent has it too."""
    monkeypatch.setattr(aiokeyless, "worker", aiokeyless.worker)
    for name in [name for name in sys.modules if name.startswith("aiokeyless.worker")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("arguments", "variables", "named"),
    [
        ([], {}, "there is no default"),
        ([], {"NATS_URL": "nats://127.0.0.1:4222"}, "NATS_URL alone names none"),
        (["--broker", "redis://127.0.0.1"], {}, "not a URL of the scheme 'redis'"),
        (["--broker", "sqlite:///keyless.db"], {}, "without //"),
        (["--broker", "sqlite:keyless.db", "--name", "shop"], {}, "options for NATS"),
        (
            ["--broker", "keyless.db"],
            {},
            "--broker must be a URL (nats:, tls:, ws:, wss:, postgresql:, postgres:, sqlite:), not a text without",
        ),
        (["--broker", "postgresql+psycopg://127.0.0.1/shop", "--schema", "public"], {}, "--schema must be one of"),
        (["--broker", "sqlite:keyless.db", "--schema", "shop"], {}, "--schema needs a broker whose URL begins with"),
        (["--broker", "postgresql://127.0.0.1/shop", "--schema", "public"], {}, "--schema must be one of its own"),
    ],
)
def test_without_a_broker_that_is_known_it_is_one_line_and_exit_2(
    refuse: Fail, arguments: list[str], variables: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert named in refuse(*arguments, code=Exit.USAGE)


@pytest.mark.slow
async def test_a_file_needs_no_server(start: Start, sandbox: Sandbox, tmp_path: Path) -> None:
    path = tmp_path / "keyless.db"
    worker = await start("--broker", f"sqlite:{path}")
    await worker.logged("worker.ready")
    async with SqliteBroker(path) as opened, asyncio.timeout(PATIENCE):
        await submit_approval(opened, "c0ffee", operation_id="txn-1")
        await until(lambda: "txn-1" in sandbox.operations)
        sandbox.approve("txn-1")
        async with next_outcome(opened, "shop") as event:
            assert event.outcome is Outcome.APPROVED
    assert await worker.stop() == 0
