"""Payments on a real broker, with a real worker and the real clock: what goes wrong first, then a thousand at once."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
import sys
import time
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import nats
import nats.js.errors
import pytest
from msgspec.structs import replace
from nats.js.api import DiscardPolicy
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalEvent, ApprovalWorker, FailureReason, Outcome, submit_approval

EXAMPLE = Path(__file__).parents[2] / "examples" / "event_worker"
sys.path.insert(0, str(EXAMPLE))

from payments import Payment, Record, make_app, verdict  # noqa: E402  # examples are programs, not a package

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from nats.aio.client import Client
    from nats.js.api import ConsumerInfo
    from nats_server import NatsServer

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.usefixtures("short_pulls")

RETRY = 0.2


class Verdict(NamedTuple):
    kind: str
    payment_id: str
    amount: str = "40.00"


class Streams:
    """What the application reads and writes, seen from outside."""

    def __init__(self, connection: Client) -> None:
        self.connection = connection
        self.js = connection.jetstream(timeout=PATIENCE)

    async def request(self, payment: Payment) -> None:
        await self.send(msgspec.json.encode(payment))

    async def send(self, event: bytes) -> None:
        await self.js.publish("payments.requested", event, stream="payments")

    async def verdicts(self) -> list[Verdict]:
        last = (await self.js.stream_info("payments")).state.last_seq
        events = [await self.js.get_msg("payments", number) for number in range(1, last + 1)]
        return [
            Verdict(kind, payment.payment_id, payment.amount)
            for event in events
            if (kind := (event.subject or "").partition(".")[2]) != "requested"
            for payment in [msgspec.json.decode(event.data or b"", type=Payment)]
        ]

    async def settled(self) -> list[Verdict]:
        """Wait until no event is left to do; return the verdicts."""
        # In the order in which one thing follows another: nothing more comes of what is done.
        await until(self.are_asked)
        await until(self.are_waited_for_no_more)
        await until(self.are_decided)
        return await self.verdicts()

    async def requests(self) -> ConsumerInfo:
        return await self._consumer("payments")

    async def outcomes(self) -> ConsumerInfo:
        return await self._consumer("KEYLESS_OUTCOMES")

    async def _consumer(self, stream: str) -> ConsumerInfo:
        info: ConsumerInfo = await self.js.consumer_info(stream, "payments")
        return info

    async def are_read(self) -> bool:
        try:
            await self.outcomes()
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def are_asked(self) -> bool:
        return is_idle(await self.requests())

    async def are_waited_for_no_more(self) -> bool:
        return not (await self.js.stream_info("KEYLESS_REQUESTS")).state.messages

    async def are_decided(self) -> bool:
        return is_idle(await self.outcomes())

    async def has_verdicts(self) -> bool:
        return bool(await self.verdicts())

    async def asks_again(self) -> bool:
        return bool((await self.requests()).num_redelivered)

    async def decides_again(self) -> bool:
        return bool((await self.outcomes()).num_redelivered)


def is_idle(consumer: ConsumerInfo) -> bool:
    return not consumer.num_pending and not consumer.num_ack_pending


@pytest.fixture
async def connection(broker: NatsServer) -> AsyncGenerator[Client]:
    async with await nats.connect(broker.url, reconnect_time_wait=0) as connection:
        yield connection


@pytest.fixture
def streams(connection: Client) -> Streams:
    return Streams(connection)


@asynccontextmanager
async def working(broker: NatsServer, sandbox: Sandbox) -> AsyncGenerator[None]:
    async with sandbox.client() as client:
        worker = ApprovalWorker(client, broker.url, schedule=wait_fixed(0.05), grace=0.5)
        task = asyncio.create_task(worker.run())
        try:
            await until(lambda: worker.statistics.is_ready or task.done())
            yield
        finally:
            worker.stop()
            await task


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The record of all applications of a test, on disk."""
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as database:
        yield database


@asynccontextmanager
async def deciding(
    broker: NatsServer, database: sqlite3.Connection, paid: list[Payment] | None = None
) -> AsyncGenerator[None]:
    pays: list[Payment] = [] if paid is None else paid
    async with make_app(database, broker.url, retry=RETRY, pay=pays.append):
        yield


@pytest.fixture
async def worker(broker: NatsServer, sandbox: Sandbox) -> AsyncGenerator[None]:
    async with working(broker, sandbox):
        yield


@pytest.fixture
async def application(
    broker: NatsServer,
    worker: None,  # noqa: ARG001  # it makes the streams
    database: sqlite3.Connection,
) -> AsyncGenerator[None]:
    async with deciding(broker, database):
        yield


def payment(payment_id: str = "1", *, amount: str = "40.00", seconds: float = 60) -> Payment:
    now = datetime.now(UTC)
    by = now + timedelta(seconds=seconds)
    return Payment(
        payment_id=payment_id,
        user_id="c0ffee",
        amount=amount,
        payee="alice",
        requested_at=now if seconds > 0 else by - timedelta(minutes=1),
        approve_by=by,
    )


async def asked(sandbox: Sandbox, payment_id: str = "1") -> None:
    await until(lambda: f"payment-{payment_id}" in sandbox.operations)


@pytest.mark.usefixtures("worker")  # it makes the streams
async def test_a_pin_pays_nothing_whoever_submitted_the_request(
    broker: NatsServer,
    database: sqlite3.Connection,
    connection: Client,
    streams: Streams,
    sandbox: Sandbox,
) -> None:
    paid: list[Payment] = []
    forged = payment("2")
    async with deciding(broker, database, paid):
        await streams.request(payment("1"))
        await submit_approval(  # by another application, which requires no face
            connection, "C0FFEE", operation_id="payment-2", operation_payload=forged.text, context=forged
        )
        for number in ("1", "2"):
            await asked(sandbox, number)
            sandbox.approve(f"payment-{number}", auth_type="pin")
        assert await streams.settled() == [Verdict("refused", "1")]
    assert not paid


@pytest.mark.usefixtures("application")
async def test_payment_that_nobody_approves_expires(streams: Streams, sandbox: Sandbox) -> None:
    await streams.request(payment(seconds=1))
    assert await streams.settled() == [Verdict("expired", "1")]
    assert sandbox.operations["payment-1"].operation_payload == "Pay 40.00 to alice"


@pytest.mark.usefixtures("application")
async def test_late_approval_revives_nothing_even_when_the_event_comes_again(
    streams: Streams, sandbox: Sandbox
) -> None:
    event = payment(seconds=1)
    await streams.request(event)
    await streams.settled()
    sandbox.approve("payment-1")
    await streams.request(event)
    assert await streams.settled() == [Verdict("expired", "1")]


@pytest.mark.usefixtures("application")
async def test_event_that_arrives_too_late_asks_nobody(streams: Streams, sandbox: Sandbox) -> None:
    await streams.request(payment(seconds=-1))
    assert await streams.settled() == [Verdict("expired", "1")]
    assert not sandbox.operations


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"outcome": Outcome.EXPIRED, "answered": False}, "unclear"),
        ({"outcome": Outcome.EXPIRED, "answered": False, "asked": True}, "unclear"),
        ({"outcome": Outcome.EXPIRED, "answered": False, "asked": False}, "expired"),
        ({"outcome": Outcome.FAILED, "reason": FailureReason.INTERNAL}, "unclear"),
        ({"outcome": Outcome.FAILED, "reason": FailureReason.UNREADABLE}, "unclear"),
        ({"outcome": Outcome.FAILED, "reason": FailureReason.POLL_REFUSED}, "unclear"),
        ({"outcome": Outcome.FAILED, "reason": FailureReason.ALREADY_APPROVED}, "unclear"),
        ({"outcome": Outcome.FAILED, "reason": FailureReason.MISMATCH}, "refused"),
        ({"outcome": Outcome.FAILED, "reason": "a reason of a later version"}, "refused"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(str(fact) for fact in value.values()),
)
def test_verdict_claims_no_more_than_the_worker_knows(facts: dict[str, Any], expected: str) -> None:
    now = datetime.now(UTC)
    event = ApprovalEvent(version=1, requested_at=now, decided_at=now, deliveries=1, **facts)
    assert verdict(event) == expected


@pytest.mark.parametrize(
    "event",
    [
        b"no json",
        msgspec.json.encode(replace(payment(), payment_id="../1")),
        msgspec.json.encode(replace(payment(), amount="40.00\n")),
        msgspec.json.encode(replace(payment(), user_id="alice")),
        msgspec.json.encode(replace(payment(), amount="-40")),
        msgspec.json.encode(replace(payment(), payee="alice\n\N{RIGHT-TO-LEFT OVERRIDE}")),
        msgspec.json.encode(replace(payment(), approve_by=datetime(2026, 11, 24))),  # noqa: DTZ001
    ],
    ids=["json", "payment_id", "newline", "user_id", "amount", "payee", "approve_by"],
)
@pytest.mark.usefixtures("application")
async def test_malformed_event_asks_nobody_and_is_not_delivered_again(
    streams: Streams, sandbox: Sandbox, event: bytes
) -> None:
    await streams.send(event)
    assert await streams.settled() == []
    assert not (await streams.requests()).num_redelivered
    assert not sandbox.operations


@pytest.mark.usefixtures("application")
async def test_event_that_comes_twice_is_one_operation_and_has_one_verdict(streams: Streams, sandbox: Sandbox) -> None:
    event = payment()
    await streams.request(event)
    await streams.request(event)
    await asked(sandbox)
    sandbox.approve("payment-1")
    assert await streams.settled() == [Verdict("approved", "1")]
    await streams.request(event)
    assert await streams.settled() == [Verdict("approved", "1")]
    assert list(sandbox.operations) == ["payment-1"]


@pytest.mark.usefixtures("application")
async def test_outcome_that_comes_twice_is_one_verdict(streams: Streams) -> None:
    await streams.request(payment(seconds=0.5))
    await streams.settled()
    event = await streams.js.get_msg("KEYLESS_OUTCOMES", 1)
    await streams.js.publish(event.subject or "", event.data or b"")
    assert await streams.settled() == [Verdict("expired", "1")]


@pytest.mark.usefixtures("application")
async def test_another_payment_under_the_same_id_is_refused_and_takes_nothing_from_the_first(
    streams: Streams, sandbox: Sandbox
) -> None:
    await streams.request(payment())
    await asked(sandbox)
    await streams.request(payment(amount="9000.00"))
    await until(streams.has_verdicts)
    sandbox.approve("payment-1")
    assert await streams.settled() == [Verdict("refused", "1", "9000.00"), Verdict("approved", "1", "40.00")]
    assert sandbox.operations["payment-1"].operation_payload == "Pay 40.00 to alice"


@pytest.mark.usefixtures("application")
async def test_outcome_of_another_application_is_no_verdict_on_a_payment(
    streams: Streams, connection: Client, sandbox: Sandbox
) -> None:
    login = (await submit_approval(connection, "c0ffee", operation_id="login-7", context={"login": 7})).operation_id
    await until(lambda: login in sandbox.operations)
    sandbox.approve(login)
    assert await streams.settled() == []


@pytest.mark.usefixtures("application")
@pytest.mark.parametrize(
    "asked_for",
    [
        {"user_id": "BAD", "operation_id": "payment-1", "operation_payload": "Pay 40.00 to alice"},
        {"user_id": "c0ffee", "operation_id": "payment-2", "operation_payload": "Pay 40.00 to alice"},
        {"user_id": "c0ffee", "operation_id": "payment-1", "operation_payload": "Pay 0.01 to alice"},
    ],
)
async def test_approval_of_something_else_that_bears_a_payment_as_its_context_is_no_verdict(
    streams: Streams, connection: Client, sandbox: Sandbox, asked_for: dict[str, Any]
) -> None:
    await submit_approval(connection, **asked_for, context=payment())
    await until(lambda: asked_for["operation_id"] in sandbox.operations)
    sandbox.approve(asked_for["operation_id"])
    assert await streams.settled() == []


async def test_event_stays_until_the_request_for_its_approval_is_stored(
    broker: NatsServer, streams: Streams, sandbox: Sandbox, database: sqlite3.Connection
) -> None:
    async with working(broker, sandbox):
        pass
    await streams.js.delete_stream("KEYLESS_REQUESTS")
    async with deciding(broker, database):
        await streams.request(payment())
        await until(streams.asks_again)
        async with working(broker, sandbox):  # it makes the stream again
            await asked(sandbox)
            sandbox.approve("payment-1")
            assert await streams.settled() == [Verdict("approved", "1")]


@pytest.mark.usefixtures("worker")
async def test_outcome_stays_until_its_verdict_is_stored_and_pays_once(
    broker: NatsServer, streams: Streams, sandbox: Sandbox, database: sqlite3.Connection
) -> None:
    asked_for, paid = payment(), list[Payment]()
    async with deciding(broker, database, paid):
        config = (await streams.js.stream_info("payments")).config
        await streams.request(asked_for)
        await streams.js.update_stream(config, max_msgs=1, discard=DiscardPolicy.NEW)  # full
        await asked(sandbox)
        sandbox.approve("payment-1")
        await until(streams.decides_again)
        await streams.js.update_stream(config)
        assert await streams.settled() == [Verdict("approved", "1")]
    assert paid == [asked_for]


@pytest.mark.usefixtures("worker")
async def test_outcome_that_comes_again_pays_once_though_the_stream_forgot_the_verdict(
    broker: NatsServer, streams: Streams, sandbox: Sandbox, database: sqlite3.Connection
) -> None:
    asked_for, paid = payment(), list[Payment]()
    async with deciding(broker, database, paid):
        await streams.request(asked_for)
        await asked(sandbox)
        sandbox.approve("payment-1")
        await streams.settled()
    event = await streams.js.get_msg("KEYLESS_OUTCOMES", 1)
    await streams.js.delete_stream("payments")
    async with deciding(broker, database, paid):
        await streams.js.publish(event.subject or "", event.data or b"")
        await until(streams.has_verdicts)
        assert await streams.settled() == [Verdict("approved", "1")]
    assert paid == [asked_for]


def test_first_verdict_counts_and_another_payment_under_a_paid_id_is_refused(database: sqlite3.Connection) -> None:
    record, first, second = Record(database), payment("1"), payment("2")
    assert record.settle(first, "expired") == ("expired", True)
    assert record.settle(first, "approved") == ("expired", False)
    assert record.settle(second, "approved") == ("approved", True)
    assert record.settle(second, "approved") == ("approved", False)
    assert record.settle(replace(second, amount="9000.00"), "approved") == ("refused", False)


@pytest.mark.usefixtures("worker")
async def test_application_that_was_away_misses_nothing(
    broker: NatsServer, streams: Streams, sandbox: Sandbox, database: sqlite3.Connection
) -> None:
    names = [f"{number}" for number in range(20)]
    async with deciding(broker, database):
        for name in names:
            await streams.request(payment(name))
            await asked(sandbox, name)
    for name in names:
        sandbox.approve(f"payment-{name}")
    await until(streams.are_waited_for_no_more)
    assert await streams.verdicts() == []
    async with deciding(broker, database):
        assert sorted(await streams.settled()) == sorted(Verdict("approved", name) for name in names)


@pytest.mark.usefixtures("application")
async def test_application_outlives_a_broker_that_is_killed(
    broker: NatsServer, streams: Streams, sandbox: Sandbox
) -> None:
    broker.kill()
    await until(lambda: not streams.connection.is_connected)
    await broker.start()
    await until(lambda: streams.connection.is_connected)
    await streams.request(payment())
    await asked(sandbox)
    sandbox.approve("payment-1")
    assert await streams.settled() == [Verdict("approved", "1")]


async def start(
    *arguments: str | Path, broker: NatsServer, sandbox: Sandbox | None = None
) -> asyncio.subprocess.Process:
    environment = {**os.environ, "NATS_URL": broker.url, "KEYLESS_BROKER": broker.url, "PAYMENTS_DB": ":memory:"}
    if sandbox is not None:  # a worker: nobody else needs a key
        environment |= {"KEYLESS_API_KEY": sandbox.api_key, "KEYLESS_BASE_URL": sandbox.url}
    pipe = asyncio.subprocess.PIPE
    return await asyncio.create_subprocess_exec(sys.executable, *arguments, env=environment, stdout=pipe, stderr=pipe)


async def ended(program: asyncio.subprocess.Process, *, status: int = 0) -> tuple[str, str]:
    out, log = await asyncio.wait_for(program.communicate(), PATIENCE)
    assert program.returncode == status, log.decode()
    assert b"Traceback" not in log, log.decode()
    return out.decode(), log.decode()


async def test_program_without_a_worker_says_in_one_line_what_to_do(broker: NatsServer) -> None:
    program = await start(EXAMPLE / "payments.py", broker=broker)
    _, log = await ended(program, status=1)
    assert log.splitlines()[-1] == "there is no stream KEYLESS_OUTCOMES: start a worker first, it makes it"


@pytest.mark.usefixtures("worker")
async def test_sigterm_ends_the_program_promptly_and_keeps_the_payment(
    broker: NatsServer, streams: Streams, sandbox: Sandbox, database: sqlite3.Connection
) -> None:
    program = await start("-W", "error", EXAMPLE / "payments.py", broker=broker)
    await until(streams.are_read)
    await streams.request(payment())
    await asked(sandbox)
    began = time.monotonic()
    program.send_signal(signal.SIGTERM)
    await ended(program)
    assert time.monotonic() - began < 30
    sandbox.approve("payment-1")
    async with deciding(broker, database):
        assert await streams.settled() == [Verdict("approved", "1")]


async def test_one_command_runs_all_of_the_example() -> None:
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, EXAMPLE / "try_it.py"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await ended(program)
    assert "payments.approved: 1000" in out.splitlines()
