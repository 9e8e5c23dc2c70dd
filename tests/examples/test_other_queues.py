"""The queues of docs/howto/message-handlers.md that no extra installs: processes that end in the middle of waits."""

from __future__ import annotations

import asyncio
import importlib.util
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil  # type: ignore[import-untyped]  # it has no type hints
import pytest
from example_process import example_process
from payment_record import PaymentRecord
from ports import own_port
from waiting import PATIENCE, until

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from contextlib import AbstractAsyncContextManager

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
PAYMENTS = [f"payment-{number:02}" for number in range(12)]

# Seconds after which a queue takes the message of a killed process for lost.
TIMEOUT = 12

# What the programs have in common: the record and the waits of examples/message_handler.py.
COMMON = f"""
import asyncio, functools, json, os, sqlite3
from aiokeyless import KeylessClient, KeylessError
from message_handler import Payment, settle

URL, TIMEOUT = os.environ["QUEUE_URL"], {TIMEOUT}
PAYMENTS = [{{"id": name, "user_id": "C0FFEE", "text": f"Pay 40 to {{name}}"}} for name in {PAYMENTS}]

@functools.cache
def tools():
    return KeylessClient(), sqlite3.connect(os.environ["PAYMENTS_DB"], isolation_level=None)

async def pay_one(payment):
    await settle(*tools(), Payment(**payment))
"""

SAQ = """
from saq import CronJob, Queue

queue = Queue.from_url(URL)

async def pay(_context, *, payment):
    await pay_one(payment)

async def enqueue(payment):
    options = {"key": payment["id"], "timeout": TIMEOUT, "retries": 1000, "retry_delay": 1.0}
    await queue.enqueue("pay", payment=payment, **options)

async def enqueue_undecided(_context):
    [*undecided] = tools()[1].execute("SELECT id FROM payments WHERE state = 'asked'")
    for payment in PAYMENTS:
        if (payment["id"],) in undecided:
            await enqueue(payment)

settings = {
    "queue": queue,
    "functions": [pay],
    "concurrency": 100,
    "cron_jobs": [CronJob(enqueue_undecided, cron="* * * * * */2")],
    "timers": {"sweep": 1},
}

async def publish():
    await queue.connect()
    for payment in PAYMENTS:
        await enqueue(payment)

async def left():
    await queue.connect()
    return await queue.count("queued") + await queue.count("active")
"""

DRAMATIQ = """
import dramatiq
from dramatiq.brokers.redis import RedisBroker
from dramatiq.middleware import AsyncIO

broker = RedisBroker(url=URL, maintenance_chance=100_000, heartbeat_timeout=TIMEOUT * 1000)
broker.add_middleware(AsyncIO())
dramatiq.set_broker(broker)

@dramatiq.actor(max_retries=1500, min_backoff=100, max_backoff=1000)
async def pay(payment):
    try:
        async with asyncio.timeout(3):  # a stop waits for that long
            await pay_one(payment)
    except TimeoutError:
        raise dramatiq.errors.Retry(delay=100) from None

async def publish():
    for payment in PAYMENTS:
        pay.send(payment)

async def left():
    return sum(broker.client.hlen(f"dramatiq:default{name}.msgs") for name in ("", ".DQ", ".XQ"))
"""

SQS = """
import signal
import boto3

sqs = boto3.client("sqs", "eu-west-1", endpoint_url=URL, aws_access_key_id="a", aws_secret_access_key="b")
queue = sqs.create_queue(QueueName="payments", Attributes={"VisibilityTimeout": str(TIMEOUT)})["QueueUrl"]

async def keep(handle):
    while True:
        await asyncio.sleep(TIMEOUT / 3)
        await asyncio.to_thread(
            sqs.change_message_visibility, QueueUrl=queue, ReceiptHandle=handle, VisibilityTimeout=TIMEOUT
        )

async def handle(message):
    heartbeat = asyncio.create_task(keep(message["ReceiptHandle"]))
    try:
        await pay_one(json.loads(message["Body"]))
    except (KeylessError, sqlite3.OperationalError):
        return  # SQS delivers it again
    finally:
        heartbeat.cancel()
    await asyncio.to_thread(sqs.delete_message, QueueUrl=queue, ReceiptHandle=message["ReceiptHandle"])

async def work():
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, asyncio.current_task().cancel)
    async with asyncio.TaskGroup() as tasks:
        while True:
            batch = await asyncio.to_thread(
                sqs.receive_message, QueueUrl=queue, MaxNumberOfMessages=10, WaitTimeSeconds=1
            )
            for message in batch.get("Messages", []):
                tasks.create_task(handle(message))

async def publish():
    for payment in PAYMENTS:
        sqs.send_message(QueueUrl=queue, MessageBody=json.dumps(payment))

async def left():
    names = ["ApproximateNumberOfMessages", "ApproximateNumberOfMessagesNotVisible"]
    return sum(map(int, sqs.get_queue_attributes(QueueUrl=queue, AttributeNames=names)["Attributes"].values()))
"""


CALL = "import asyncio, payments_queue; print(asyncio.run(payments_queue.{}()))"
REDIS = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--port"]
# For each: its program, the arguments of Python that run a worker, the command that serves it, the scheme of its URL.
QUEUES = {
    "saq": (SAQ, ["-m", "saq", "payments_queue.settings"], REDIS, "redis"),
    "dramatiq": (DRAMATIQ, ["-m", "dramatiq", "payments_queue", "--threads", "16", "--processes", "1"], REDIS, "redis"),
    "moto": (SQS, ["-c", CALL.format("work")], [sys.executable, "-m", "moto.server", "--port"], "http"),
}


class Queue:
    """A queue that is served, its program, and the processes that run it."""

    def __init__(self, name: str, folder: Path, sandbox: Sandbox) -> None:
        program, self._worker, self._command, scheme = QUEUES[name]
        if importlib.util.find_spec(name) is None or shutil.which(self._command[0]) is None:
            pytest.skip(f"{name} or {self._command[0]} is not installed, which a machine need not have")
        (folder / "payments_queue.py").write_text(COMMON + program)
        self._folder = folder
        self._sandbox = sandbox
        self._port = own_port()
        self._environment = {
            "PYTHONPATH": f"{EXAMPLES}:{folder}",
            "PAYMENTS_DB": str(folder / "payments.sqlite3"),
            "QUEUE_URL": f"{scheme}://127.0.0.1:{self._port}",
        }

    @asynccontextmanager
    async def served(self) -> AsyncGenerator[Self]:
        server = subprocess.Popen(  # noqa: ASYNC220  # it returns at once
            [*self._command, f"{self._port}"], cwd=self._folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            await until(self._accepts_clients)
            yield self
        finally:
            server.kill()
            server.wait()

    def _accepts_clients(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self._port)) == 0

    async def call(self, function: str) -> str:
        """Call a function of the program in a process of its own, and return what it printed."""
        async with self._process("-c", CALL.format(function)) as process:
            output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        return output.decode().split()[-1]

    async def is_empty(self) -> bool:
        return await self.call("left") == "0"

    @asynccontextmanager
    async def ended_by(self, number: signal.Signals) -> AsyncGenerator[None]:
        """Run a worker, and end it by this signal; SIGKILL ends its child processes, too."""
        self._sandbox.requests.clear()
        async with self._process(*self._worker) as process:
            reading = asyncio.create_task(process.communicate())  # a full pipe would stop it
            yield
            if number == signal.SIGKILL:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.send_signal(number)
            await asyncio.wait_for(reading, PATIENCE)

    async def waits_for(self, payments: list[str]) -> None:
        polled = {f"/v2/operations/{payment}" for payment in payments}
        await until(lambda: polled <= {record.path for record in self._sandbox.requests if record.method == "GET"})

    def _process(self, *command: str) -> AbstractAsyncContextManager[asyncio.subprocess.Process]:
        return example_process(*command, folder=self._folder, sandbox=self._sandbox, **self._environment)


def approve(sandbox: Sandbox, payments: list[str]) -> None:
    for payment in payments:
        sandbox.approve(payment)


@pytest.mark.parametrize("name", QUEUES)
async def test_each_payment_outlives_its_processes_and_is_decided_once(
    name: str, sandbox: Sandbox, tmp_path: Path
) -> None:
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as database:
        record = PaymentRecord(database)
        paid, late = PAYMENTS[:9], PAYMENTS[9:]
        async with Queue(name, tmp_path, sandbox).served() as queue:
            async with queue.ended_by(signal.SIGTERM):
                await queue.call("publish")
                await queue.waits_for(PAYMENTS)
            approve(sandbox, paid[:3])
            async with queue.ended_by(signal.SIGKILL):
                await queue.waits_for(PAYMENTS)
                await until(lambda: len(record.moved) == 3)
                approve(sandbox, paid[3:6])
            asked_at = datetime.now(UTC) - timedelta(hours=1)
            for payment in late:
                database.execute("UPDATE payments SET asked_at = ? WHERE id = ?", (asked_at.isoformat(), payment))
            approve(sandbox, paid[6:])  # while no process runs
            async with queue.ended_by(signal.SIGKILL):
                await until(lambda: any(record.method == "POST" for record in sandbox.requests))  # the first came back
            async with queue.ended_by(signal.SIGTERM):
                await until(lambda: [record.states[payment] for payment in late] == ["ended"] * 3)
                approve(sandbox, late)
                await until(lambda: len(record.moved) == len(paid))
                await until(queue.is_empty)
        assert sorted(record.moved) == paid
        assert sorted(sandbox.operations) == PAYMENTS
