"""Payments on a real broker, with a real worker and the real clock: what goes wrong first, then a hundred at once."""

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
from unshown import UNSHOWN
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalEvent, ApprovalWorker, FailureReason, Outcome, submit_approval

EXAMPLE = Path(__file__).parents[2] / "examples" / "event_worker"
sys.path.insert(0, str(EXAMPLE))

from payments import Payment, Record, make_app, verdict  # noqa: E402  # examples are programs, not a package

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

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

    def __init__(self, connection: Client, broker: NatsServer, sandbox: Sandbox, database: sqlite3.Connection) -> None:
        self.connection = connection
        self.js = connection.jetstream(timeout=PATIENCE)
        self.broker = broker
        self.sandbox = sandbox
        self.database = database
        self.paid: list[Payment] = []

    @asynccontextmanager
    async def working(self) -> AsyncGenerator[None]:
        """Run a worker, which makes the streams."""
        async with self.sandbox.client() as client:
            worker = ApprovalWorker(client, self.broker.url, schedule=wait_fixed(0.05), grace=0.5)
            task = asyncio.create_task(worker.run())
            try:
                await until(lambda: worker.statistics.is_ready or task.done())
                yield
            finally:
                worker.stop()
                await task

    @asynccontextmanager
    async def deciding(self) -> AsyncGenerator[None]:
        """Run the application, on the record of all applications of a test."""
        async with make_app(self.database, self.broker.url, retry=RETRY, pay=self.paid.append):
            yield

    async def asked(self, payment_id: str = "1") -> None:
        await until(lambda: f"payment-{payment_id}" in self.sandbox.operations)

    async def approve(self, payment_id: str = "1", auth_type: str = "biom") -> None:
        """Approve a payment, once the user is asked."""
        await self.asked(payment_id)
        self.sandbox.approve(f"payment-{payment_id}", auth_type=auth_type)

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

    async def _is_done(self, stream: str, subject: str) -> bool:
        """Return whether the application has acknowledged all that is stored on a subject."""
        try:
            last = await self.js.get_last_msg(stream, subject)
        except nats.js.errors.NotFoundError:
            return True
        consumer = await self._consumer(stream)
        assert consumer.delivered
        assert last.seq
        # Not by num_pending: a busy server counts a message there only some time after it has stored it.
        return consumer.delivered.stream_seq >= last.seq and not consumer.num_ack_pending

    async def are_read(self) -> bool:
        try:
            await self.outcomes()
        except nats.js.errors.NotFoundError:
            return False
        return True

    async def are_asked(self) -> bool:
        return await self._is_done("payments", "payments.requested")

    async def are_waited_for_no_more(self) -> bool:
        return not (await self.js.stream_info("KEYLESS_REQUESTS")).state.messages

    async def are_decided(self) -> bool:
        return await self._is_done("KEYLESS_OUTCOMES", "keyless.approvals.*")

    async def has_verdicts(self) -> bool:
        return bool(await self.verdicts())

    async def asks_again(self) -> bool:
        return bool((await self.requests()).num_redelivered)

    async def decides_again(self) -> bool:
        return bool((await self.outcomes()).num_redelivered)


@pytest.fixture
async def streams(broker: NatsServer, sandbox: Sandbox, tmp_path: Path) -> AsyncGenerator[Streams]:
    """No worker, and no application yet."""
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as database:
        async with await nats.connect(broker.url, reconnect_time_wait=0) as connection:
            yield Streams(connection, broker, sandbox, database)


@pytest.fixture
async def served(streams: Streams) -> AsyncGenerator[Streams]:
    """With a worker."""
    async with streams.working():
        yield streams


@pytest.fixture
async def app(served: Streams) -> AsyncGenerator[Streams]:
    """With a worker, and the application."""
    async with served.deciding():
        yield served


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


async def test_a_pin_pays_nothing_whoever_submitted_the_request(app: Streams) -> None:
    forged = payment("2")
    await app.request(payment("1"))
    await submit_approval(  # by another application, which requires no face
        app.connection, "C0FFEE", operation_id="payment-2", operation_payload=forged.text, context=forged
    )
    for number in ("1", "2"):
        await app.approve(number, auth_type="pin")
    assert await app.settled() == [Verdict("refused", "1")]
    assert not app.paid


async def test_payment_that_nobody_approves_expires(app: Streams) -> None:
    await app.request(payment(seconds=1))
    assert await app.settled() == [Verdict("expired", "1")]


async def test_late_approval_revives_nothing_even_when_the_event_comes_again(app: Streams) -> None:
    event = payment(seconds=1)
    await app.request(event)
    await app.settled()
    app.sandbox.approve("payment-1", user_id="C0FFEE")  # which a busy machine may have asked nobody about
    await app.request(event)
    assert await app.settled() == [Verdict("expired", "1")]


async def test_event_that_arrives_too_late_asks_nobody(app: Streams) -> None:
    await app.request(payment(seconds=-1))
    assert await app.settled() == [Verdict("expired", "1")]
    assert not app.sandbox.operations


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
        *(msgspec.json.encode(replace(payment(), payee=payee)) for payee in ("alice\n", *UNSHOWN)),
        msgspec.json.encode(replace(payment(), approve_by=datetime(2026, 11, 24))),  # noqa: DTZ001
    ],
)
async def test_malformed_event_asks_nobody_and_is_not_delivered_again(app: Streams, event: bytes) -> None:
    await app.send(event)
    assert await app.settled() == []
    assert not (await app.requests()).num_redelivered
    assert not app.sandbox.operations


async def test_event_that_comes_twice_is_one_operation_and_has_one_verdict(app: Streams) -> None:
    event = payment()
    await app.request(event)
    await app.request(event)
    await app.approve()
    assert await app.settled() == [Verdict("approved", "1")]
    await app.request(event)
    assert await app.settled() == [Verdict("approved", "1")]
    assert list(app.sandbox.operations) == ["payment-1"]


async def test_outcome_that_comes_twice_is_one_verdict(app: Streams) -> None:
    await app.request(payment())
    await app.approve()
    await app.settled()
    event = await app.js.get_msg("KEYLESS_OUTCOMES", 1)
    await app.js.publish(event.subject or "", event.data or b"")
    assert await app.settled() == [Verdict("approved", "1")]


async def test_another_payment_under_the_same_id_is_refused_and_takes_nothing_from_the_first(app: Streams) -> None:
    await app.request(payment())
    await app.asked()
    await app.request(payment(amount="9000.00"))
    await until(app.has_verdicts)
    app.sandbox.approve("payment-1")
    assert await app.settled() == [Verdict("refused", "1", "9000.00"), Verdict("approved", "1", "40.00")]
    assert app.sandbox.operations["payment-1"].operation_payload == "Pay 40.00 to alice"


async def test_outcome_of_another_application_is_no_verdict_on_a_payment(app: Streams) -> None:
    login = (await submit_approval(app.connection, "c0ffee", operation_id="login-7", context={"login": 7})).operation_id
    await until(lambda: login in app.sandbox.operations)
    app.sandbox.approve(login)
    assert await app.settled() == []


@pytest.mark.parametrize(
    "asked_for",
    [
        {"user_id": "BAD", "operation_id": "payment-1", "operation_payload": "Pay 40.00 to alice"},
        {"user_id": "c0ffee", "operation_id": "payment-2", "operation_payload": "Pay 40.00 to alice"},
        {"user_id": "c0ffee", "operation_id": "payment-1", "operation_payload": "Pay 0.01 to alice"},
    ],
)
async def test_approval_of_something_else_that_bears_a_payment_as_its_context_is_no_verdict(
    app: Streams, asked_for: dict[str, Any]
) -> None:
    await submit_approval(app.connection, **asked_for, context=payment())
    await until(lambda: asked_for["operation_id"] in app.sandbox.operations)
    app.sandbox.approve(asked_for["operation_id"])
    assert await app.settled() == []


async def test_event_stays_until_the_request_for_its_approval_is_stored(streams: Streams) -> None:
    async with streams.working():
        pass
    await streams.js.delete_stream("KEYLESS_REQUESTS")
    async with streams.deciding():
        await streams.request(payment())
        await until(streams.asks_again)
        async with streams.working():  # it makes the stream again
            await streams.approve()
            assert await streams.settled() == [Verdict("approved", "1")]


async def test_outcome_stays_until_its_verdict_is_stored_and_pays_once(served: Streams) -> None:
    asked_for = payment()
    async with served.deciding():
        config = (await served.js.stream_info("payments")).config
        await served.request(asked_for)
        await served.js.update_stream(config, max_msgs=1, discard=DiscardPolicy.NEW)  # full
        await served.approve()
        await until(served.decides_again)
        await served.js.update_stream(config)
        assert await served.settled() == [Verdict("approved", "1")]
    assert served.paid == [asked_for]


async def test_outcome_that_comes_again_pays_once_though_the_stream_forgot_the_verdict(served: Streams) -> None:
    asked_for = payment()
    async with served.deciding():
        await served.request(asked_for)
        await served.approve()
        await served.settled()
    event = await served.js.get_msg("KEYLESS_OUTCOMES", 1)
    await served.js.delete_stream("payments")
    async with served.deciding():
        await served.js.publish(event.subject or "", event.data or b"")
        await until(served.has_verdicts)
        assert await served.settled() == [Verdict("approved", "1")]
    assert served.paid == [asked_for]


def test_first_verdict_counts_and_another_payment_under_a_paid_id_is_refused() -> None:
    first, second = payment("1"), payment("2")
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as database:
        record = Record(database)
        assert record.settle(first, "expired") == ("expired", True)
        assert record.settle(first, "approved") == ("expired", False)
        assert record.settle(second, "approved") == ("approved", True)
        assert record.settle(second, "approved") == ("approved", False)
        assert record.settle(replace(second, amount="9000.00"), "approved") == ("refused", False)


async def test_application_that_was_away_misses_nothing(served: Streams) -> None:
    names = [f"{number}" for number in range(20)]
    async with served.deciding():
        for name in names:
            await served.request(payment(name))
            await served.asked(name)
    for name in names:
        served.sandbox.approve(f"payment-{name}")
    await until(served.are_waited_for_no_more)
    assert await served.verdicts() == []
    async with served.deciding():
        assert sorted(await served.settled()) == sorted(Verdict("approved", name) for name in names)


async def test_application_outlives_a_broker_that_is_killed(app: Streams) -> None:
    app.broker.kill()
    await until(lambda: not app.connection.is_connected)
    await app.broker.start()
    await until(lambda: app.connection.is_connected)
    await app.request(payment())
    await app.approve()
    assert await app.settled() == [Verdict("approved", "1")]


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


async def test_sigterm_ends_the_program_promptly_and_keeps_the_payment(served: Streams) -> None:
    program = await start("-W", "error", EXAMPLE / "payments.py", broker=served.broker)
    await until(served.are_read)
    await served.request(payment())
    await served.asked()
    began = time.monotonic()
    program.send_signal(signal.SIGTERM)
    await ended(program)
    assert time.monotonic() - began < 30
    served.sandbox.approve("payment-1")
    async with served.deciding():
        assert await served.settled() == [Verdict("approved", "1")]


async def test_one_command_runs_all_of_the_example(tmp_path: Path) -> None:
    for file in EXAMPLE.glob("*.py"):
        (tmp_path / file.name).write_text(file.read_text().replace("COUNT = 1000", "COUNT = 100"))
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, tmp_path / "try_it.py"), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    out, _ = await ended(program)
    assert "payments.approved: 100" in out.splitlines()
