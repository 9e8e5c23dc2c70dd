"""The message handler on a real RabbitMQ: processes and brokers that end in the middle of a wait."""

from __future__ import annotations

import asyncio
import json
import random
import signal
import sqlite3
from contextlib import asynccontextmanager, closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import aio_pika
import pytest
from example_process import example_process
from faststream import TestApp
from payment_record import PaymentRecord
from rabbitmq_server import RabbitServer
from waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.rabbitmq

PROGRAM = (Path(__file__).parents[2] / "examples" / "message_handler.py").read_text()
KEPT = "raise SkipMessage from None"
PAYMENTS = [f"payment-{number}" for number in range(10)]


def variant(*changes: tuple[str, str]) -> str:
    """Return the program with these changes, each of one place."""
    program = PROGRAM
    for old, new in changes:
        assert program.count(old) == 1, old
        program = program.replace(old, new)
    return program


@pytest.fixture
def settings() -> dict[str, int]:
    """Settings of the broker."""
    return {}


@pytest.fixture
def rabbitmq(tmp_path: Path, settings: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> Iterator[RabbitServer]:
    server = RabbitServer(tmp_path, **settings)
    with server.running():
        monkeypatch.setenv("RABBITMQ_URL", server.url)
        yield server


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PaymentRecord]:
    monkeypatch.setenv("PAYMENTS_DB", str(tmp_path / "payments.sqlite3"))
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as database:
        yield PaymentRecord(database)


class Process:
    """A process of the program, whose output is read all the time: a full pipe would stop it."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._output = asyncio.create_task(process.communicate())

    async def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        """Send a signal, and return what the process printed."""
        self._process.send_signal(number)
        output, _ = await asyncio.wait_for(self._output, PATIENCE)
        return output.decode()


class Application:
    """The queues of the broker, the processes that read them, and their record."""

    def __init__(self, rabbitmq: RabbitServer, sandbox: Sandbox, record: PaymentRecord, folder: Path) -> None:
        self._rabbitmq = rabbitmq
        self.sandbox = sandbox
        self.record = record
        self._folder = folder

    async def publish(self, *payments: str, **fields: object) -> None:
        """Publish payments, as another application does; without a queue they would be lost."""
        connection = await aio_pika.connect(self._rabbitmq.url)
        async with connection, connection.channel() as channel:
            for payment in payments:
                user = payment.encode().hex()  # each of their own: of one user, three are asked about at once
                body = {"id": payment, "user_id": user, "text": f"Pay 40 to {payment}"} | fields
                message = aio_pika.Message(json.dumps(body).encode(), delivery_mode=aio_pika.DeliveryMode.PERSISTENT)
                await channel.default_exchange.publish(message, "payments")

    async def waiting(self, queue: str = "payments") -> int:
        """Return how many messages wait in a queue, without those that a process has."""
        connection = await aio_pika.connect(self._rabbitmq.url)
        async with connection, connection.channel() as channel:
            declared = await channel.declare_queue(queue, passive=True)
            return declared.declaration_result.message_count or 0

    async def has_refused(self, messages: int) -> bool:
        return await self.waiting("payments.refused") == messages

    async def is_ready(self, processes: int = 1) -> bool:
        """Return whether at least so many processes read the queue."""
        try:
            connection = await aio_pika.connect(self._rabbitmq.url)
            async with connection, connection.channel() as channel:
                declared = await channel.declare_queue("payments", passive=True)
                return (declared.declaration_result.consumer_count or 0) >= processes
        except aio_pika.exceptions.AMQPError:
            return False

    async def restart(self, number: signal.Signals) -> None:
        """End the broker by a signal, and start it again."""
        self._rabbitmq.end(number)
        await asyncio.to_thread(self._rabbitmq.start)

    @asynccontextmanager
    async def process(self, program: str = PROGRAM) -> AsyncGenerator[Process]:
        """Run the program, or a variant of it."""
        async with example_process("-c", program, folder=self._folder, sandbox=self.sandbox) as process:
            yield Process(process)

    @asynccontextmanager
    async def asking(self, program: str = PROGRAM) -> AsyncGenerator[Process]:
        """Run a process that waits for all payments."""
        async with self.process(program) as process:
            await until(self.is_ready)
            await self.publish(*PAYMENTS)
            await self.asked(*PAYMENTS)
            yield process

    def approve(self) -> None:
        for payment in PAYMENTS:
            self.sandbox.approve(payment)

    async def are_paid(self) -> None:
        await until(lambda: len(self.record.moved) == len(PAYMENTS))

    def check_that_each_is_paid_once(self) -> None:
        assert sorted(self.record.moved) == sorted(self.sandbox.operations) == PAYMENTS

    async def asked(self, *payments: str) -> None:
        """Wait until each of the users is asked, and waited for."""
        polled = {f"/v2/operations/{payment}" for payment in payments}
        await until(lambda: polled <= {request.path for request in self.sandbox.requests if request.method == "GET"})


@pytest.fixture
def application(rabbitmq: RabbitServer, sandbox: Sandbox, record: PaymentRecord, tmp_path: Path) -> Application:
    return Application(rabbitmq, sandbox, record, tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_payments_outlive_their_process(application: Application, number: signal.Signals) -> None:
    async with application.asking() as process:
        assert "ERROR" not in await process.end(number)
    assert await application.waiting() == len(PAYMENTS)
    application.approve()
    async with application.process() as process:
        await application.are_paid()
        assert "ERROR" not in await process.end()
    application.check_that_each_is_paid_once()
    assert await application.waiting() == 0


async def test_no_payment_is_lost_if_only_faststream_hears_the_signal(application: Application) -> None:
    program = variant(
        ("close_on_signals(client)", "client"), ("RabbitBroker(", "RabbitBroker(graceful_timeout=0.1, url=")
    )
    async with application.asking(program) as process:
        await process.end()
    assert await application.waiting() == len(PAYMENTS)
    assert application.record.states == dict.fromkeys(PAYMENTS, "asked")


async def test_with_faststreams_default_all_payments_of_a_process_that_ends_are_lost(application: Application) -> None:
    async with application.asking(variant((KEPT, "raise"))) as process:
        await process.end()
    assert await application.waiting() == 0
    assert application.record.states == dict.fromkeys(PAYMENTS, "asked")


@pytest.mark.parametrize("clause", [KEPT, "raise NackMessage from None"], ids=["kept", "nacked"])
async def test_a_message_that_is_nacked_comes_back_at_once_and_over_again_and_one_that_is_kept_does_not(
    application: Application, monkeypatch: pytest.MonkeyPatch, clause: str
) -> None:
    monkeypatch.setenv("KEYLESS_BASE_URL", application.sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", application.sandbox.api_key)
    program, closed = ModuleType("message_handler"), list[str]()
    vars(program)["closed"] = closed
    changes = ("import SkipMessage", "import NackMessage, SkipMessage"), (KEPT, f"closed.append(payment.id); {clause}")
    exec(variant(*changes), vars(program))  # noqa: S102  # our own example
    async with TestApp(program.app):
        await application.publish("payment-1")
        await application.asked("payment-1")
        await program.app.context.get("client").aclose()
        await until(lambda: len(closed) >= (1 if clause == KEPT else 21))  # a quorum queue's limit, if it has one
    if clause == KEPT:

        async def is_back() -> bool:  # the broker puts it back a moment after the connection has ended
            return await application.waiting() == 1

        await until(is_back)
        assert len(closed) == 1


async def test_payments_outlive_a_broker_that_is_killed(application: Application) -> None:
    async with application.process() as process:
        await until(application.is_ready)
        await application.restart(signal.SIGTERM)  # a node that is killed half a second after it made a queue loses it
        await until(application.is_ready)
        await application.publish(*PAYMENTS)
        await application.asked(*PAYMENTS)
        await application.restart(signal.SIGKILL)
        application.approve()
        await application.are_paid()
        await process.end()
    application.check_that_each_is_paid_once()
    assert await application.waiting() == 0


@pytest.mark.parametrize("settings", [{"consumer_timeout": 500, "channel_tick_interval": 200}])
async def test_a_message_that_the_broker_takes_back_during_a_wait_is_paid_once(application: Application) -> None:
    async with application.process() as process:
        await until(application.is_ready)
        await application.publish(*PAYMENTS)
        await until(
            lambda: sum(request.method == "POST" for request in application.sandbox.requests) > 3 * len(PAYMENTS)
        )
        application.approve()
        await application.are_paid()
        await process.end()
    application.check_that_each_is_paid_once()


async def test_messages_that_are_published_twice_are_paid_once_by_two_processes(application: Application) -> None:
    async with application.process() as first, application.process() as second:
        await until(lambda: application.is_ready(2))
        await application.publish(*PAYMENTS, *PAYMENTS)
        await application.asked(*PAYMENTS)
        application.approve()
        await application.are_paid()
        await first.end()
        await second.end()
    application.check_that_each_is_paid_once()
    assert await application.waiting() == 0


async def test_a_message_that_is_wrong_is_kept_for_a_person(application: Application) -> None:
    async with application.process() as process:
        await until(application.is_ready)
        await application.publish("payment-1")
        await application.asked("payment-1")
        await application.publish("payment-1", text="Pay 4000 to Mallory")
        await application.publish("payment-2", user_id=None)
        await until(lambda: application.has_refused(2))
        await process.end()
    assert application.record.states == {"payment-1": "asked"}
    assert list(application.sandbox.operations) == ["payment-1"]


async def test_payments_of_one_user_are_asked_three_at_a_time_and_none_is_lost(application: Application) -> None:
    async with application.process() as process:
        await until(application.is_ready)
        await application.publish(*PAYMENTS, user_id="C0FFEE")
        await application.publish("payment-of-another")
        await application.asked("payment-of-another")
        while len(application.record.moved) < len(PAYMENTS):
            for payment in {*application.sandbox.operations} - {"payment-of-another", *application.record.moved}:
                application.sandbox.approve(payment)
            assert list(application.record.states.values()).count("asked") <= 4
            await asyncio.sleep(0.1)
        await process.end()
    assert sorted(application.record.moved) == PAYMENTS
    assert not await application.waiting("payments.refused")


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_is_killed_each_user_is_asked_once_and_each_approval_pays_once(
    application: Application, sandbox: Sandbox, record: PaymentRecord, seed: int
) -> None:
    chance = random.Random(seed)  # noqa: S311  # of who is killed, not of secrets
    payments = [f"payment-{number}" for number in range(40)]
    faces, pins, nobody = payments[:30], payments[30:35], payments[35:]

    async def tap(payment: str, factor: str) -> None:
        await until(lambda: payment in sandbox.operations)
        await asyncio.sleep(chance.uniform(0, 10))
        sandbox.approve(payment, auth_type=factor)

    async def run_and_kill() -> None:
        for _ in range(3):
            async with application.process() as process:
                await until(application.is_ready)
                await asyncio.sleep(chance.uniform(0, 3))
                await process.end(chance.choice([signal.SIGTERM, signal.SIGKILL]))

    async with application.process() as process:
        await until(application.is_ready)
        await application.publish(*payments, *chance.sample(payments, 20))
        await process.end()
    async with asyncio.TaskGroup() as tasks:
        for factor, users in (("biom", faces), ("pin", pins)):
            for payment in users:
                tasks.create_task(tap(payment, factor))
        for _ in range(2):
            tasks.create_task(run_and_kill())
    async with application.process():
        await until(lambda: "asked" not in {record.states[payment] for payment in faces + pins})
    assert sorted(record.moved) == sorted(faces)
    assert sorted(sandbox.operations) == sorted(payments)
    assert {record.states[payment] for payment in nobody} == {"asked"}
