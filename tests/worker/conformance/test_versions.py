"""Workers, applications and readers of two releases at once, as while a fleet is upgraded or goes back."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from tenacity import wait_fixed
from waiting import PATIENCE, until

from aiokeyless.worker import ApprovalWorker, FailureReason, Outcome, applications, next_outcome, serving
from aiokeyless.worker.broker import Claim, ExchangeResult

from .brokers import LEASE, new_request, submit, take_n, those

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalEvent, Broker
    from aiokeyless.worker.broker import OutcomeDelivery
    from aiokeyless.worker.messages import Message

    from .brokers import Storage

OLD, NEW = b'{"version":1,', b'{"version":2,'
FIELD = b',"urgent":true}'  # which only the next release knows


def upgrade(broker: Any) -> None:
    """Make a broker one of the next release, which knows version 2 of both forms."""
    take, decide, next_outcome = broker.take, broker.decide, broker.next_outcome

    async def take_both(*limits: Any, **options: Any) -> Sequence[Message]:
        messages: Sequence[Message] = await take(*limits, **options)
        for message in messages:
            message.body = message.body.replace(NEW, OLD).replace(FIELD, b"}")
        return messages

    async def decide_later(message: Message, event: ApprovalEvent) -> bool:
        return bool(await decide(message, msgspec.structs.replace(event, version=2)))

    async def read_both(reader: str) -> OutcomeDelivery:
        outcome: OutcomeDelivery = await next_outcome(reader)
        outcome.data = outcome.data.replace(NEW, OLD)
        return outcome

    broker.request_version = 2
    broker.take, broker.decide, broker.next_outcome = take_both, decide_later, read_both


@asynccontextmanager
async def opened_by(storage: Storage, release: int) -> AsyncGenerator[Broker]:
    broker = storage.broker()
    if release == 2:
        upgrade(broker)
    async with broker as opened:
        yield opened


def name_of(message: Message) -> str:
    name: str = msgspec.json.decode(message.body)["operation_id"]
    return name


async def submit_newer(broker: Broker, *operation_ids: str) -> None:
    for operation_id in operation_ids:
        new = new_request(operation_id)
        request = msgspec.structs.replace(new.request, version=2)
        body = msgspec.json.encode(request)[:-1] + FIELD
        assert not await broker.submit(msgspec.structs.replace(new, request=request, body=body))


@pytest.fixture(autouse=True)
def _workers_pauses_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "NEWER_FOR", 0.05)
    monkeypatch.setattr(applications, "_UPGRADED_IN", 0.05)


@pytest.mark.parametrize("untried", [None, 1])
async def test_requests_of_a_later_version_come_beside_the_others(
    storage: Storage, broker: Broker, untried: int | None
) -> None:
    later = [f"later-{number}" for number in range(15)]
    await submit_newer(broker, *later)
    await submit(broker, "a", "b", "c")
    seen: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while not {"a", "b", "c", *later} <= {*seen}:
            taken = await broker.take(2, 1.0, untried=untried)
            assert sum(not name_of(message).startswith("later") for message in taken) <= 2
            seen += map(name_of, taken)
            newer = [message for message in taken if name_of(message).startswith("later")]
            assert {(message.is_untried, message.failures) for message in newer} <= {(True, 0)}
            await asyncio.gather(*(broker.put_off(message, 0.1, ExchangeResult.NONE) for message in newer))
    if storage.has_rows:
        assert len({"a", "b", "c"} & {*seen[:12]}) >= 2
        assert not [each for each in await broker.take_overdue(100, -1000.0) if name_of(each) in later]


@pytest.mark.parametrize("polls", [0, 1])
@those(which=lambda storage: storage.lasts)
async def test_a_request_that_was_given_back_is_untried_for_the_worker_that_knows_it(
    storage: Storage, polls: int
) -> None:
    async with opened_by(storage, 2) as new:
        await new.prepare(lease=LEASE, service="")
        async with opened_by(storage, 1) as old:  # whose pull must end
            await old.prepare(lease=LEASE, service="")
            await submit_newer(old, "a")
            for _ in range(3):
                [message] = await take_n(old, 1)
                await old.put_off(message, 0.0, ExchangeResult.NONE)
        [message] = await take_n(new, 1)
        assert message.is_untried
        for _ in range(polls):
            await new.put_off(message, 0.0, ExchangeResult.FAILED)
            [message] = await take_n(new, 1)
        assert await new.claim(message) is Claim.NEW
        assert (message.number, message.has_only_failed) == (polls + 1, polls > 0)
        await new.put_off(message, 0.0, ExchangeResult.FAILED)
        [message] = await take_n(new, 1)
        assert await new.claim(message) is Claim.HELD
        assert (message.number, message.is_untried, message.has_only_failed) == (polls + 2, False, True)


class Fleet:
    """Two workers and a reader, each of a release, and an application of both."""

    def __init__(self, storage: Storage, client: KeylessClient) -> None:
        self.storage, self.client = storage, client
        self.parts: dict[str, AsyncExitStack] = {}
        self.events: list[ApprovalEvent] = []
        self.submitted: list[str] = []

    async def start(self, part: str, release: int) -> None:
        if part in self.parts:
            await self.parts[part].aclose()
        stack = self.parts[part] = AsyncExitStack()
        broker = await stack.enter_async_context(opened_by(self.storage, release))
        if part == "reader":
            reading = asyncio.create_task(self.read(broker))
            stack.push_async_callback(asyncio.wait, {reading})
            stack.callback(reading.cancel)
        else:
            await stack.enter_async_context(ApprovalWorker(self.client, broker, schedule=wait_fixed(0.05)))

    async def read(self, broker: Broker) -> None:
        while True:
            async with next_outcome(broker, "shop") as event:
                self.events.append(event)

    async def submit(self) -> None:
        """Submit a request of each version."""
        number = len(self.submitted)
        self.submitted += (ids := [f"old-{number}", f"new-{number}"])
        async with opened_by(self.storage, 1) as broker:
            await submit(broker, ids[0])
            await submit_newer(broker, ids[1])

    async def aclose(self) -> None:
        for stack in self.parts.values():
            await stack.aclose()


@pytest.mark.parametrize("order", [["one", "two", "reader"], ["reader", "one", "two"]], ids="-".join)
@pytest.mark.parametrize("releases", [(1, 2), (2, 1, 2)], ids=["up", "back and up"])
@those(which=lambda storage: storage.lasts)
async def test_a_fleet_is_restarted_in_any_order_and_each_request_is_decided_once(
    storage: Storage, client: KeylessClient, sandbox: Sandbox, order: list[str], releases: tuple[int, ...]
) -> None:
    sandbox.auto_approve = 0.2
    fleet = Fleet(storage, client)
    try:
        for release in releases:
            for part in order if fleet.parts else ["one", "two", "reader"]:
                await fleet.start(part, release)
                await fleet.submit()
        await until(lambda: {event.operation_id for event in fleet.events} == {*fleet.submitted})
        assert len(fleet.events) == len(fleet.submitted)
        assert {event.outcome for event in fleet.events} == {Outcome.APPROVED}
        created = [record.path for record in sandbox.requests if record.method == "POST"]
        assert len(created) == len(fleet.submitted)
    finally:
        await fleet.aclose()


@pytest.mark.parametrize("is_claimed", [False, True])
@those(which=lambda storage: storage.lasts)
async def test_a_day_after_its_storing_a_request_of_a_later_version_has_failed(
    storage: Storage,
    client: KeylessClient,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    is_claimed: bool,
) -> None:
    async with opened_by(storage, 1) as old, opened_by(storage, 2) as new:
        await new.prepare(lease=LEASE, service="")
        await submit_newer(old, "a")
        if is_claimed:
            [message] = await take_n(new, 1)
            await new.claim(message)
            await new.put_off(message, 0.0, ExchangeResult.CREATED)
        async with ApprovalWorker(client, old) as worker:
            await until(lambda: "request.newer" in caplog.text)
            assert (await old.inspect()).waiting == 1
            monkeypatch.setattr(serving, "NEWER_KEPT_FOR", 0.0)
            async with next_outcome(old, "shop") as event:
                pass
        assert (worker.statistics.deliveries, worker.statistics.transient_failures) == (1, 0)
    reason = FailureReason.INTERNAL if is_claimed else FailureReason.INVALID_REQUEST
    assert (event.operation_id, event.reason) == ("a", reason)
