"""The message handler on FastStream's broker in memory: one payment, what may befall it, and who wants two."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
from faststream import TestApp
from faststream.rabbit import TestRabbitBroker
from faststream.rabbit.message import RabbitMessage
from payment_record import PaymentRecord
from pydantic import ValidationError
from waiting import until

from aiokeyless import ConfigurationError, ConflictError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

PROGRAM = (Path(__file__).parents[2] / "examples" / "message_handler.py").read_text()
PAYMENT = {"id": "payment-1", "user_id": "C0FFEE", "text": "Pay 40 to Alice"}
ASKED, PAID, ENDED = ({"payment-1": state} for state in ("asked", "paid", "ended"))


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[PaymentRecord]:
    monkeypatch.setenv("PAYMENTS_DB", str(tmp_path / "payments.sqlite3"))
    with closing(sqlite3.connect(tmp_path / "payments.sqlite3", isolation_level=None)) as database:
        yield PaymentRecord(database)


class Process:
    """One process of the program, and the fates of its messages: ack, nack or reject. One that is kept has none."""

    def __init__(self, program: ModuleType) -> None:
        self.program = program
        self.fates: list[str] = []
        self.returns = 0

    async def deliver(self, **fields: str) -> None:
        await self.program.broker.publish(PAYMENT | fields, "payments")

    async def deliver_later(self, payment: dict[str, str]) -> None:
        """Do what RabbitMQ does with the queue of the messages that go back."""
        self.returns += 1
        asyncio.get_running_loop().call_later(5, lambda: asyncio.ensure_future(self.deliver(**payment)))

    async def close_client(self) -> None:
        """Do what a signal does."""
        await self.program.app.context.get("client").aclose()


@asynccontextmanager
async def process(sandbox: Sandbox) -> AsyncGenerator[Process]:
    program = ModuleType("message_handler")
    process = Process(program)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KEYLESS_BASE_URL", sandbox.url)
        patch.setenv("KEYLESS_API_KEY", sandbox.api_key)
        exec(PROGRAM, vars(program))  # noqa: S102  # our own example
        for fate in ("ack", "nack", "reject"):

            async def meet(_message: RabbitMessage, fate: str = fate, **_options: Any) -> None:
                process.fates.append(fate)

            patch.setattr(RabbitMessage, fate, meet)
        program.broker.subscriber("payments.later")(process.deliver_later)
        async with TestRabbitBroker(program.broker), TestApp(program.app):
            yield process


async def approve(sandbox: Sandbox, *, after: float = 60, factor: str = "biom") -> None:
    """Approve the payment a while after the user is asked."""
    await until(lambda: "payment-1" in sandbox.operations)
    await asyncio.sleep(after)
    sandbox.approve("payment-1", auth_type=factor)


async def test_a_payment_that_is_approved_in_time_is_paid(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), approve(sandbox))
        assert handler.fates == ["ack"]
    assert (record.states, record.moved) == (PAID, ["payment-1"])


async def test_a_payment_that_is_paid_is_not_asked_about_or_paid_again(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), approve(sandbox))
        sandbox.requests.clear()
        await handler.deliver()
        await handler.deliver(text="Pay 4000 to Mallory")
        assert handler.fates == ["ack"] * 3
    assert not sandbox.requests
    assert record.moved == ["payment-1"]


async def test_an_approval_after_the_timeout_pays_nothing(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        began = asyncio.get_running_loop().time()
        await handler.deliver()
        assert asyncio.get_running_loop().time() - began == pytest.approx(120, abs=5)
        assert (handler.fates, record.states) == (["ack"], ENDED)
        sandbox.approve("payment-1")
        sandbox.requests.clear()
        await handler.deliver()
    assert not sandbox.requests
    assert (record.states, record.moved) == (ENDED, [])


async def test_a_fourth_payment_of_a_user_goes_back_and_is_asked_when_one_ends(
    sandbox: Sandbox, record: PaymentRecord
) -> None:
    async def tap() -> None:
        await until(lambda: len(sandbox.operations) == 3)
        await until(lambda: handler.returns > 9)
        assert len(sandbox.operations) == 3
        sandbox.approve(next(iter(sandbox.operations)))
        await until(lambda: len(sandbox.operations) == 4)
        for payment in sandbox.operations:
            sandbox.approve(payment)

    payments = {"1st": "C0FFEE", "2nd": "c0ffee", "3rd": "C0FFEE", "4th": "c0ffee"}
    async with process(sandbox) as handler:
        await asyncio.gather(*[handler.deliver(id=each, user_id=user) for each, user in payments.items()], tap())
        await until(lambda: len(record.moved) == 4)
    assert set(handler.fates) == {"ack"}
    assert sorted(record.moved) == sorted(sandbox.operations) == sorted(payments)


async def test_nobody_waits_behind_a_hundred_payments_of_another_user(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        greedy = [asyncio.ensure_future(handler.deliver(id=f"greedy-{number}")) for number in range(100)]
        await until(lambda: sum(each.done() for each in greedy) == 97)
        began = asyncio.get_running_loop().time()
        other = asyncio.ensure_future(handler.deliver(id="other", user_id="BEEF"))
        await until(lambda: "other" in sandbox.operations)
        assert asyncio.get_running_loop().time() - began < 1
        assert len(sandbox.operations) == 4
        await handler.close_client()
        await asyncio.gather(*greedy, other)
    assert set(handler.fates) == {"ack"}
    assert list(record.states.values()) == ["asked"] * 4


async def test_a_pin_pays_nothing(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), approve(sandbox, factor="pin"))
        assert handler.fates == ["ack"]
        await handler.deliver()
    assert (record.states, record.moved) == (ENDED, [])


async def test_a_pin_while_no_process_runs_pays_nothing(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), killed(handler, sandbox))
    sandbox.approve("payment-1", auth_type="pin")
    async with process(sandbox) as handler:
        await handler.deliver()
    assert (record.states, record.moved) == (ENDED, [])


async def killed(handler: Process, sandbox: Sandbox) -> None:
    """Close the client while the user is asked."""
    await until(lambda: any(request.method == "GET" for request in sandbox.requests))
    await handler.close_client()


async def test_a_message_whose_client_closes_is_paid_by_the_next_one(sandbox: Sandbox, record: PaymentRecord) -> None:
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), killed(handler, sandbox))
        await handler.deliver()  # it came just before the consumer was cancelled
        assert (handler.fates, record.states) == ([], ASKED)
    sandbox.approve("payment-1")
    async with process(sandbox) as handler:
        await handler.deliver()
        assert handler.fates == ["ack"]
    assert record.moved == ["payment-1"]
    assert list(sandbox.operations) == ["payment-1"]


@pytest.mark.parametrize("approved", [True, False])
async def test_a_payment_whose_time_passed_while_no_process_ran_is_decided_by_the_last_poll(
    sandbox: Sandbox, record: PaymentRecord, *, approved: bool
) -> None:
    asked_at = datetime.now(UTC) - timedelta(hours=1)
    record.database.execute("INSERT INTO payments VALUES ('payment-1', 'C0FFEE', ?, 'asked')", (asked_at.isoformat(),))
    async with sandbox.client() as client:
        await client.create_operation("C0FFEE", operation_id="payment-1", operation_payload="Pay 40 to Alice")
    if approved:
        sandbox.approve("payment-1")
    async with process(sandbox) as handler:
        began = asyncio.get_running_loop().time()
        await handler.deliver()
        assert asyncio.get_running_loop().time() - began < 60
        assert handler.fates == ["ack"]
    assert record.states == (PAID if approved else ENDED)


@pytest.mark.parametrize("approved", [True, False])
async def test_a_message_that_is_delivered_twice_at_once_is_asked_about_once_and_decided_once(
    sandbox: Sandbox, record: PaymentRecord, *, approved: bool
) -> None:
    async with process(sandbox) as handler, process(sandbox) as other:
        deliveries = [handler.deliver(), handler.deliver(), other.deliver()]
        await asyncio.gather(*deliveries, *([approve(sandbox)] if approved else []))
        assert handler.fates + other.fates == ["ack"] * 3
    assert list(sandbox.operations) == ["payment-1"]
    assert record.moved == (["payment-1"] if approved else [])


@pytest.mark.parametrize("other", [{"text": "Pay 4000 to Mallory"}, {"user_id": "BAD"}], ids=["payload", "user"])
async def test_another_payment_under_the_id_is_rejected_and_takes_nothing_from_the_first(
    sandbox: Sandbox, record: PaymentRecord, other: dict[str, str]
) -> None:
    async def deliver_another() -> None:
        await until(lambda: "payment-1" in sandbox.operations)
        with pytest.raises(ConflictError):
            await handler.deliver(**other)
        assert (handler.fates, record.states) == (["reject"], ASKED)

    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), deliver_another(), approve(sandbox))
        assert handler.fates == ["reject", "ack"]
    assert record.moved == ["payment-1"]


@pytest.mark.parametrize("approved", [True, False])
async def test_an_operation_of_others_pays_nothing(sandbox: Sandbox, record: PaymentRecord, *, approved: bool) -> None:
    async with sandbox.client() as client:
        await client.create_operation("C0FFEE", operation_id="payment-1", operation_payload="Pay 4000 to Mallory")
    if approved:
        sandbox.approve("payment-1")
    async with process(sandbox) as handler:
        with pytest.raises(ConflictError):
            await handler.deliver()
        assert handler.fates == ["reject"]
    assert record.moved == []


@pytest.mark.parametrize("approved", [True, False])
async def test_an_outcome_that_an_outage_hides_is_found_when_it_ends(
    sandbox: Sandbox, record: PaymentRecord, *, approved: bool
) -> None:
    async def fail() -> None:
        await until(lambda: "payment-1" in sandbox.operations)
        sandbox.fail_next(503, times=None)
        if approved:
            sandbox.approve("payment-1")
        await asyncio.sleep(600)
        assert (handler.fates, record.states) == ([], ASKED)
        age(record)
        sandbox.recover()

    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), fail())
        assert handler.fates == ["ack"]
    assert record.states == (PAID if approved else ENDED)
    assert list(sandbox.operations) == ["payment-1"]


def age(record: PaymentRecord) -> None:
    """Let the time pass on the wall's clock, too, which a moved clock leaves as it is."""
    asked_at = datetime.now(UTC) - timedelta(hours=1)
    record.database.execute("UPDATE payments SET asked_at = ?", (asked_at.isoformat(),))


@pytest.mark.parametrize("status", [401, 403, 429, 503])
async def test_a_user_is_asked_once_keyless_answers(sandbox: Sandbox, record: PaymentRecord, status: int) -> None:
    async def recover() -> None:
        await until(lambda: len(sandbox.requests) > 1)
        await asyncio.sleep(60)
        assert (handler.fates, record.states) == ([], ASKED)
        sandbox.recover()
        await approve(sandbox)

    sandbox.fail_next(status, times=None)
    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), recover())
        assert handler.fates == ["ack"]
    assert record.moved == ["payment-1"]


async def test_a_record_that_fails_for_a_while_loses_no_approval(sandbox: Sandbox, record: PaymentRecord) -> None:
    async def fail() -> None:
        await until(lambda: "payment-1" in sandbox.operations)
        record.database.execute("ALTER TABLE payments RENAME TO gone")
        await approve(sandbox)
        await asyncio.sleep(60)
        assert handler.fates == []
        record.database.execute("ALTER TABLE gone RENAME TO payments")

    async with process(sandbox) as handler:
        await asyncio.gather(handler.deliver(), fail())
        assert handler.fates == ["ack"]
    assert record.moved == ["payment-1"]


@pytest.mark.parametrize(
    ("fields", "error"),
    [({"id": ["payment-1"]}, ValidationError), ({"user_id": "nobody"}, ConfigurationError)],
    ids=["shape", "user"],
)
async def test_a_message_that_is_wrong_asks_nobody_and_is_rejected(
    sandbox: Sandbox, record: PaymentRecord, fields: dict[str, Any], error: type[Exception]
) -> None:
    async with process(sandbox) as handler:
        with pytest.raises(error):
            await handler.deliver(**fields)
        assert handler.fates == ["reject"]
    assert not sandbox.operations
    assert record.moved == []
