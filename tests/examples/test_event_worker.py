"""The event worker on a real broker and the real clock: what goes wrong first, then a thousand events at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import sysconfig
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import nats
import nats.js.errors
import pytest
from tenacity import wait_fixed

EXAMPLE = Path(__file__).parents[2] / "examples" / "event_worker"
sys.path.insert(0, str(EXAMPLE))

from worker import Payment, Verdict, make_app  # noqa: E402  # examples are programs, not a package

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from nats.js import JetStreamContext
    from nats.js.api import ConsumerInfo

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

PATIENCE = 20.0
RETRY = 0.2


class Sent(NamedTuple):
    kind: str
    payment_id: str


class Broker:
    """A broker's stream of payments, seen from outside."""

    def __init__(self, url: str, stream: JetStreamContext) -> None:
        self.url = url
        self._stream = stream

    async def is_ready(self) -> bool:
        try:
            await self.consumer()
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def request(self, payment: Payment) -> None:
        await self.send(payment.model_dump_json())

    async def send(self, event: str) -> None:
        await self._stream.publish("payments.requested", event.encode(), stream="payments")

    async def verdicts(self) -> list[Sent]:
        state = (await self._stream.stream_info("payments")).state
        events = [await self._stream.get_msg("payments", number) for number in range(1, state.last_seq + 1)]
        return [
            Sent(event.subject or "", Verdict.model_validate_json(event.data or b"").payment_id)
            for event in events
            if event.subject != "payments.requested"
        ]

    async def settled(self) -> list[Sent]:
        """Wait until no event is left to do; return the verdicts."""

        async def nothing_to_do() -> bool:
            info = await self.consumer()
            return not info.num_pending and not info.num_ack_pending

        await until(nothing_to_do)
        return await self.verdicts()

    async def retried(self) -> bool:
        return bool((await self.consumer()).num_redelivered)

    async def consumer(self) -> ConsumerInfo:
        info: ConsumerInfo = await self._stream.consumer_info("payments", "approvals")
        return info


async def until(condition: Callable[[], bool | Awaitable[bool]]) -> None:
    deadline = time.monotonic() + PATIENCE
    while True:
        met = condition()
        if met if isinstance(met, bool) else await met:
            return
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


@pytest.fixture
async def client(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    async with sandbox.client(schedule=wait_fixed(0.05)) as client:
        yield client


@pytest.fixture
async def broker(tmp_path: Path) -> AsyncGenerator[Broker]:
    program = Path(sysconfig.get_path("scripts"), "nats-server")
    options = ("-a", "127.0.0.1", "-p", "-1", "-js", "-sd", tmp_path, "--ports_file_dir", tmp_path)
    server = await asyncio.create_subprocess_exec(program, *options, stderr=asyncio.subprocess.DEVNULL)
    try:
        ports = tmp_path / f"nats-server_{server.pid}.ports"
        await until(lambda: url_in(ports) != "")
        async with await nats.connect(url_in(ports)) as connection:
            stream = connection.jetstream()
            await stream.account_info()  # the connection's own tasks are there from now on
            yield Broker(url_in(ports), stream)
    finally:
        server.terminate()
        await server.wait()


def url_in(ports: Path) -> str:
    try:
        return str(json.loads(ports.read_text())["nats"][0])
    except (FileNotFoundError, json.JSONDecodeError):  # not there yet, or half written
        return ""


@asynccontextmanager
async def worker(broker: Broker, client: KeylessClient) -> AsyncGenerator[None]:
    async with make_app(client, broker.url, retry=RETRY):
        yield


def payment(payment_id: str = "1", *, amount: str = "40.00", seconds: float = 60) -> Payment:
    by = datetime.now(UTC) + timedelta(seconds=seconds)
    return Payment(payment_id=payment_id, user_id="c0ffee", amount=amount, payee="alice", approve_by=by)


async def test_payment_that_nobody_approves_expires(broker: Broker, client: KeylessClient, sandbox: Sandbox) -> None:
    async with worker(broker, client):
        await broker.request(payment(seconds=0.3))
        assert await broker.settled() == [("payments.expired", "1")]
    assert sandbox.operations["payment-1"].operation_payload == "Pay 40.00 to alice"


async def test_late_approval_revives_nothing_even_when_the_event_comes_again(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    event = payment(seconds=0.3)
    async with worker(broker, client):
        await broker.request(event)
        await broker.settled()
        sandbox.approve("payment-1")
        await broker.request(event)
        assert await broker.settled() == [("payments.expired", "1")]


async def test_event_that_comes_too_late_asks_nobody(broker: Broker, client: KeylessClient, sandbox: Sandbox) -> None:
    async with worker(broker, client):
        await broker.request(payment(seconds=-1))
        assert await broker.settled() == [("payments.expired", "1")]
    assert not sandbox.operations


async def test_event_waits_for_its_verdict_while_keyless_is_down(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    sandbox.fail_next(503, None)
    async with worker(broker, client):
        await broker.request(payment())
        await until(broker.retried)
        assert await broker.verdicts() == []
        sandbox.recover()
        await until(lambda: "payment-1" in sandbox.operations)
        sandbox.approve("payment-1")
        assert await broker.settled() == [("payments.approved", "1")]


async def test_payment_that_nobody_knows_about_at_its_deadline_is_not_called_expired(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with worker(broker, client):
        await broker.request(payment(seconds=1))
        await until(lambda: "payment-1" in sandbox.operations)
        sandbox.drop_next(None)
        sandbox.approve("payment-1")  # in time, and nobody could see it
        await until(broker.retried)
        assert await broker.verdicts() == []
        sandbox.recover()
        assert await broker.settled() == [("payments.approved", "1")]


async def test_event_that_comes_twice_is_one_operation_and_has_one_verdict(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    event = payment()
    async with worker(broker, client):
        await broker.request(event)
        await broker.request(event)
        await until(lambda: client.statistics.waiting == 2)
        sandbox.approve("payment-1")
        assert await broker.settled() == [("payments.approved", "1")]
        await broker.request(event)
        assert await broker.settled() == [("payments.approved", "1")]
    assert list(sandbox.operations) == ["payment-1"]


async def test_approval_of_one_payment_is_none_of_another_that_has_its_id(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    async with worker(broker, client):
        await broker.request(payment())
        await until(lambda: "payment-1" in sandbox.operations)
        sandbox.approve("payment-1")
        assert await broker.settled() == [("payments.approved", "1")]
        await broker.request(payment(amount="9000.00"))
        await broker.request(payment("2", seconds=0.3))
        assert await broker.settled() == [("payments.approved", "1"), ("payments.expired", "2")]
    assert sandbox.operations["payment-1"].operation_payload == "Pay 40.00 to alice"


@pytest.mark.parametrize(
    "event",
    [
        "no json",
        payment().model_copy(update={"payment_id": "../1"}).model_dump_json(),
        payment().model_copy(update={"user_id": "alice"}).model_dump_json(),
        payment().model_copy(update={"amount": "-40"}).model_dump_json(),
        payment().model_copy(update={"payee": "alice\n\N{RIGHT-TO-LEFT OVERRIDE}"}).model_dump_json(),
        payment().model_copy(update={"approve_by": datetime(2026, 11, 24)}).model_dump_json(),  # noqa: DTZ001
    ],
    ids=["json", "payment_id", "user_id", "amount", "payee", "approve_by"],
)
async def test_malformed_event_asks_nobody_and_does_not_come_again(
    broker: Broker, client: KeylessClient, sandbox: Sandbox, event: str
) -> None:
    async with worker(broker, client):
        await broker.send(event)
        assert await broker.settled() == []
        assert not await broker.retried()
    assert not sandbox.operations


async def test_stopping_hands_the_waits_under_way_to_the_next_worker(
    broker: Broker, client: KeylessClient, sandbox: Sandbox
) -> None:
    before = asyncio.all_tasks()
    names = [f"{number}" for number in range(20)]
    async with worker(broker, client):
        for name in names:
            await broker.request(payment(name))
        await until(lambda: client.statistics.waiting == len(names))
        began = time.monotonic()
    assert time.monotonic() - began < 2
    await until(lambda: asyncio.all_tasks() <= before)
    assert await broker.verdicts() == []
    async with sandbox.client(schedule=wait_fixed(0.05)) as another, worker(broker, another):
        await until(lambda: another.statistics.waiting == len(names))
        for name in names:
            sandbox.approve(f"payment-{name}")
        assert sorted(await broker.settled()) == sorted(("payments.approved", name) for name in names)
    assert len(sandbox.operations) == len(names)


async def run(program: str, broker: Broker, sandbox: Sandbox) -> asyncio.subprocess.Process:
    environment = {"NATS_URL": broker.url, "KEYLESS_API_KEY": sandbox.api_key, "KEYLESS_BASE_URL": sandbox.url}
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", EXAMPLE / program),
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def test_sigterm_ends_the_program_promptly_and_keeps_the_event(broker: Broker, sandbox: Sandbox) -> None:
    program = await run("worker.py", broker, sandbox)
    await until(broker.is_ready)
    await broker.request(payment())
    await until(lambda: "payment-1" in sandbox.operations)
    began = time.monotonic()
    program.send_signal(signal.SIGTERM)
    _, log = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert time.monotonic() - began < 3
    assert program.returncode == 0
    assert b"payment 1 will be tried again" in log
    assert b"Traceback" not in log
    assert (await broker.consumer()).num_ack_pending == 1
    assert await broker.verdicts() == []


async def test_thousand_events_at_once_wait_on_one_client(broker: Broker, sandbox: Sandbox) -> None:
    program = await run("payday.py", broker, sandbox)
    await until(lambda: len(sandbox.operations) == 1000)  # all of them before the first verdict
    for operation_id in list(sandbox.operations):
        sandbox.approve(operation_id)
    out, log = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert program.returncode == 0, log
    assert "payments.approved: 1000" in out.decode().splitlines()
    assert sum(request.method == "POST" for request in sandbox.requests) == 1000
    assert sandbox.request_count < 20_000
