"""What handles an outcome, and what does not."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from aiokeyless import ApprovalTicket, BrokerError, ConfigurationError, ConflictError
from aiokeyless.worker import Submission, next_outcome, request_to_json, submit_approval
from aiokeyless.worker.broker import ApplicationSide, OutcomeDelivery, UnavailableError
from aiokeyless.worker.messages import MAX_CONTEXT, MAX_DEPTH, ApprovalRequest

from .conformance.brokers import decide_all
from .reading import now, read

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.worker.broker import NewRequest
    from aiokeyless.worker.sqlite import SqliteBroker

pytestmark = pytest.mark.looptime


@pytest.fixture
async def decided(memory: SqliteBroker) -> SqliteBroker:
    """A broker with an outcome."""
    await memory.prepare(lease=2.0, service="")
    await decide_all(memory, "txn-1")
    return memory


async def is_handled(broker: SqliteBroker) -> bool:
    try:
        async with asyncio.timeout(600), next_outcome(broker, "shop"):
            return False
    except TimeoutError:
        return True


async def test_a_clean_exit_is_handled(decided: SqliteBroker) -> None:
    async with next_outcome(decided, "shop") as event:
        assert event.operation_id == "txn-1"
    assert await is_handled(decided)


async def test_an_exception_puts_it_off_and_goes_on_to_the_caller(decided: SqliteBroker) -> None:
    pauses = []
    for _ in range(12):
        began = now()
        with pytest.raises(ZeroDivisionError):  # noqa: PT012  # the body is what is tested
            async with next_outcome(decided, "shop"):
                pauses.append(round(now() - began))
                raise ZeroDivisionError
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 300, 300]
    assert not await is_handled(decided)


async def test_a_cancellation_puts_it_off(decided: SqliteBroker) -> None:
    async def handle() -> None:
        async with next_outcome(decided, "shop"):
            await asyncio.Event().wait()

    handling = asyncio.create_task(handle())
    await asyncio.sleep(1)
    handling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handling
    assert [event.operation_id for event in await read(decided, reader="shop")] == ["txn-1"]


async def test_one_whose_body_takes_too_long_is_delivered_again(decided: SqliteBroker) -> None:
    async with next_outcome(decided, "shop"):
        await asyncio.sleep(29)
        assert len(await read(decided, reader="another")) == 1
        async with asyncio.timeout(2):
            assert len(await read(decided, reader="shop")) == 1


async def test_what_is_no_event_is_logged_and_handled(decided: SqliteBroker, caplog: pytest.LogCaptureFixture) -> None:
    decided._store._connection.execute("UPDATE outcome SET body = x'7b'")
    assert await is_handled(decided)
    assert caplog.messages == ['outcome.unreadable place="request-1" error="Input data was truncated"']


async def test_an_event_of_a_later_version_waits_for_a_reader_that_was_upgraded(
    decided: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    body = decided._store._one("SELECT body FROM outcome")[0]
    later = {**msgspec.json.decode(body), "version": 2}
    decided._store._connection.execute("UPDATE outcome SET body = ?", (msgspec.json.encode(later),))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(130), next_outcome(decided, "shop"):
            pass
    told = 'outcome.newer place="request-1" error="version 2 is not known here, only up to 1: upgrade"'
    assert caplog.messages == [told] * 3
    decided._store._connection.execute("UPDATE outcome SET body = ?", (body,))
    assert len(await read(decided, reader="shop")) == 1


@pytest.mark.parametrize("reader", ["", "a.b", "a b", "é", "a\n", "x" * 129])
async def test_a_name_that_no_broker_keeps_is_refused(memory: SqliteBroker, reader: str) -> None:
    with pytest.raises(ConfigurationError, match="reader must be 1 to 128 letters"):
        await read(memory, reader=reader)


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth - 1):
        value = [value]
    return value


ENDLESS: list[object] = []
ENDLESS.append(ENDLESS)

#: The first day of the calendar begins in the year before it, in UTC.
TOO_EARLY = timezone(timedelta(hours=14))


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"require_auth_type": "face"}, "require_auth_type must be 'biom' for a face, 'pin'"),
        ({"started_by": "web"}, "started_by must be 'backend' or 'phone'"),
        ({"user_id": "xyz"}, "user_id"),
        ({"user_id": ""}, "user_id"),
        ({"user_id": 12}, "user_id"),
        ({"operation_id": ".."}, "operation_id"),
        ({"operation_id": ""}, "operation_id"),
        ({"operation_id": "a\n"}, "operation_id"),
        ({"operation_id": "a/b"}, "operation_id must not contain / or"),
        ({"operation_id": "a\\b"}, "operation_id must not contain / or"),
        ({"operation_id": ApprovalTicket.for_operation("a", user_id="AB").to_json()}, "ApprovalTicket.from_json"),
        ({"operation_payload": 40}, "operation_payload"),
        ({"operation_payload": "\ud800"}, "operation_payload"),
        ({"operation_payload": "x" * (1 << 20)}, "shorten operation_payload"),
        ({"external_user_id": "\ud800"}, "external_user_id"),
        *(({"expires_in": value}, "expires_in") for value in (0, -1, float("nan"), float("inf"), True, "120", 10**400)),
        pytest.param({"context": object()}, "context", id="context"),
        ({"context": ENDLESS}, "context cannot be written as JSON"),
        ({"context": "\ud800"}, "context"),
        ({"context": {1.5: {2}, (1, 2): 3}}, "context"),
        ({"context": "x" * MAX_CONTEXT}, f"context is {MAX_CONTEXT + 2} bytes"),
        ({"context": nested(MAX_DEPTH + 1)}, "context is nested more than 64 deep"),
        ({"context": nested(930)}, "context"),
        *(
            ({"created_at": value}, "created_at")
            for value in ("2026-11-24", 7, datetime(2026, 11, 24), datetime.min.replace(tzinfo=TOO_EARLY))  # noqa: DTZ001
        ),
    ],
)
async def test_a_wrong_argument_is_refused_by_name_and_nothing_is_stored(
    memory: SqliteBroker, wrong: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigurationError, match=named) as caught:
        await submit_approval(memory, **{"user_id": "c0ffee", "operation_id": "txn-1", **wrong})
    assert caught.value.argument in {None, *wrong}
    assert (await memory.inspect()).waiting == 0


async def test_a_url_and_what_is_no_broker_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="not a URL"):
        await read("sqlite:keyless.db")
    for url, kind in (
        ("sqlite:keyless.db", "SqliteBroker"),
        ("postgresql://a:pw@127.0.0.1/shop", "PostgresBroker"),
        ("tls://127.0.0.1", "NatsBroker"),
    ):
        match = rf"not a URL; .*: async with {kind}\(\.\.\.\) as broker$"
        with pytest.raises(ConfigurationError, match=match) as caught:
            await submit_approval(url, "C0FFEE", operation_id="txn-1")
        assert caught.value.argument == "broker"
    with pytest.raises(ConfigurationError, match="not int"):
        await submit_approval(7, "C0FFEE", operation_id="txn-1")


async def test_one_except_clause_is_for_a_used_operation_id_at_a_broker_and_at_the_client(
    memory: SqliteBroker, client: KeylessClient
) -> None:
    for ask in (partial(submit_approval, memory), client.create_operation):
        await ask("C0FFEE", operation_id="txn-1", operation_payload="Pay 40")
        with pytest.raises(ConflictError) as caught:
            await ask("C0FFEE", operation_id="txn-1", operation_payload="Pay 4000")
        assert caught.value.operation_id == "txn-1"


async def test_a_request_as_json_is_what_submitting_stores(memory: SqliteBroker) -> None:
    arguments: dict[str, Any] = {
        "operation_id": "txn-1",
        "operation_payload": "Pay 40",
        "context": {"order": 7},
        "created_at": datetime(2026, 11, 24, 9, tzinfo=timezone(timedelta(hours=2))),
        "started_by": "phone",
    }
    for is_duplicate in (False, True):
        submission = await submit_approval(memory, "c0ffee", **arguments)
        assert submission == Submission(operation_id="txn-1", duplicate=is_duplicate)
    text = request_to_json("c0ffee", **arguments)
    assert memory._store._one("SELECT body FROM request")[0] == text.encode()
    request = msgspec.json.decode(text, type=ApprovalRequest)
    assert (request.user_id, request.started_by) == ("C0FFEE", "phone")
    assert request.created_at == datetime(2026, 11, 24, 7, tzinfo=UTC)
    shortest = msgspec.json.decode(request_to_json("C0FFEE", operation_id="txn-1"), type=ApprovalRequest)
    assert (shortest.started_by, shortest.created_at) == ("backend", None)


class Away(ApplicationSide):
    """A broker that is away; an outcome that it had handed out cannot be settled."""

    largest_request = 1 << 20

    def __init__(self, outcome: OutcomeDelivery | None = None) -> None:
        self.outcome = outcome

    async def submit(self, new: NewRequest) -> bool:
        raise BrokerError("the cable is out")

    async def next_outcome(self, reader: str) -> OutcomeDelivery:
        if self.outcome is None:
            raise UnavailableError("the cable is out")
        return self.outcome


class Stuck(OutcomeDelivery):
    def __init__(self, data: bytes) -> None:
        self.data = data
        self.place = "1"

    async def mark_handled(self) -> None:
        raise BrokerError("it may be delivered again")

    async def put_off(self, delay: float | None = None) -> None:
        raise UnavailableError("the cable is out")


async def test_a_broker_that_is_away_is_a_broker_error_that_says_what_to_repeat() -> None:
    with pytest.raises(BrokerError, match=r"not stored, as far as is known \(the cable is out\); submit it") as caught:
        await submit_approval(Away(), "C0FFEE", operation_id="txn-1")
    assert caught.value.operation_id == "txn-1"
    with pytest.raises(BrokerError, match="outcomes cannot be read: the cable is out"):
        await read(Away())


async def test_where_the_broker_went_away_in_the_body_its_own_error_counts(
    decided: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    broker = Away(Stuck((await decided.next_outcome("shop")).data))
    with pytest.raises(ZeroDivisionError):
        async with next_outcome(broker, "shop"):
            raise ZeroDivisionError
    assert "outcome.not_put_off" in caplog.text
    with pytest.raises(BrokerError, match="may be delivered again"):
        await read(broker, reader="shop")


async def test_where_the_broker_was_closed_in_the_body_its_own_error_counts(
    decided: SqliteBroker, caplog: pytest.LogCaptureFixture
) -> None:
    async def close() -> None:
        async with next_outcome(decided, "shop"):
            await decided.aclose()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await close()
    assert "outcome.not_put_off" in caplog.text
