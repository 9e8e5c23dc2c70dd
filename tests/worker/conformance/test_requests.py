from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from waiting import PATIENCE, until

from aiokeyless.errors import BrokerError, ConfigurationError, ConflictError
from aiokeyless.worker.broker import Claim, ExchangeResult, UnavailableError

from ..reading import now  # noqa: TID252
from .brokers import (
    LEASE,
    SHORT_LEASE,
    decide,
    is_waiting,
    new_request,
    operation_of,
    submit,
    take_all,
    take_n,
    take_only,
    those,
)

if TYPE_CHECKING:
    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def test_a_request_that_is_stored_is_delivered_as_it_was_submitted(broker: Broker) -> None:
    before = broker.now()
    new = new_request("payment-1", TRACE, operation_payload="Pay 40 EUR", context=b'{"order": 7}')
    assert not await broker.submit(new)
    (message,) = await take_n(broker, 1)
    assert message.body == new.body
    assert message.traceparent == TRACE
    assert (message.number, message.failures) == (1, 0)
    assert before - timedelta(seconds=1) <= message.stored_at <= broker.now() + timedelta(seconds=1)


async def test_the_same_request_twice_is_one_also_if_only_created_at_differs(broker: Broker, storage: Storage) -> None:
    created_at = broker.now() - timedelta(seconds=5)
    assert not await broker.submit(new_request("payment-1"))
    assert await broker.submit(new_request("payment-1"))
    assert await broker.submit(new_request("payment-1", created_at=created_at))
    await take_only(broker, 1, storage.quiet)


@pytest.mark.parametrize("changed", [{"operation_payload": "Pay 4000 EUR"}, {"require_auth_type": None}], ids=str)
async def test_a_different_request_under_a_used_operation_id_is_refused_or_left_to_the_worker(
    broker: Broker, storage: Storage, changed: dict[str, str | None]
) -> None:
    fields = {"operation_payload": "Pay 40 EUR", "require_auth_type": "biom"}
    stored, other = new_request("payment-1", **fields), new_request("payment-1", **fields | changed)
    assert not await broker.submit(stored)
    if storage.has_rows:
        with pytest.raises(ConflictError, match="payment-1"):
            await broker.submit(other)
        assert [message.body for message in await take_only(broker, 1, storage.quiet)] == [stored.body]
        return
    assert not await broker.submit(other)
    ours, theirs = await take_n(broker, 2)
    assert [await broker.claim(message) for message in (ours, theirs)] == [Claim.NEW, Claim.ANOTHERS]
    assert not await broker.unclaim(theirs)
    assert [await broker.has_claim(message) for message in (ours, theirs)] == [True, False]
    assert await broker.unclaim(ours)
    assert await broker.claim(theirs) is Claim.NEW


async def test_a_take_waits_no_longer_than_it_is_told_and_gives_no_more_than_it_is_asked_for(
    broker: Broker, storage: Storage
) -> None:
    began = now()
    assert not await broker.take(10, 0.1)
    assert 0.09 <= now() - began < 1.3 + storage.slack
    await submit(broker, "a", "b", "c")
    first = await take_n(broker, 2)
    assert len(first) == 2
    (third,) = await take_n(broker, 1)
    assert {operation_of(message) for message in [*first, third]} == {"a", "b", "c"}


async def test_a_take_that_waits_gets_what_is_submitted_meanwhile(opened: Opened, storage: Storage) -> None:
    worker, application = await opened(), await opened()
    taking = asyncio.create_task(take_n(worker, 1))
    await asyncio.sleep(0.1)
    assert not taking.done()
    began = now()
    await submit(application, "a")
    assert [operation_of(message) for message in await taking] == ["a"]
    assert now() - began < 1.0 + storage.slack


async def test_a_request_that_is_put_off_comes_then_and_not_before(broker: Broker, storage: Storage) -> None:
    await submit(broker, "a")
    (message,) = await take_n(broker, 1)
    began = now()
    await broker.put_off(message, 0.1, ExchangeResult.ANSWERED)
    (again,) = await take_n(broker, 1)
    assert 0.09 <= now() - began < 1.6 + storage.slack
    assert (again.body, again.number) == (message.body, 2)


async def test_requests_come_in_the_order_in_which_they_are_due(broker: Broker, storage: Storage) -> None:
    await submit(broker, "a", "b", "c")
    messages = {operation_of(message): message for message in await take_n(broker, 3)}
    # A stream delivers those that it finds due at once in the order in which they were stored.
    gap = 0.02 if storage.has_rows else 0.3
    for number, operation_id in enumerate("cab"):
        await broker.put_off(messages[operation_id], number * gap, ExchangeResult.ANSWERED)
    await asyncio.sleep(2.2 * gap)
    assert [operation_of(message) for message in await take_n(broker, 3)] == ["c", "a", "b"]


async def test_two_workers_never_have_one_request_at_once(opened: Opened, storage: Storage) -> None:
    first, second = await opened(), await opened()
    expected = {f"payment-{number}" for number in range(40)}
    await submit(first, *expected)
    taken: list[str] = []

    async def take_on(worker: Broker) -> None:
        while len(taken) <= len(expected):
            taken.extend(map(operation_of, await worker.take(5, PATIENCE)))

    async with asyncio.TaskGroup() as group:
        taking = [group.create_task(take_on(worker)) for worker in (first, first, second)]
        await until(lambda: {*taken} == expected)
        await asyncio.sleep(min(storage.quiet, LEASE / 2))
        for task in taking:
            task.cancel()
    assert sorted(taken) == sorted(expected)


async def test_what_a_worker_does_not_settle_comes_again_after_the_lease(opened: Opened, storage: Storage) -> None:
    first, second = await opened(SHORT_LEASE), await opened(SHORT_LEASE)
    await submit(first, "a")
    began = now()
    (message,) = await take_n(first, 1)
    (again,) = await take_n(second, 1)
    assert now() - began > SHORT_LEASE * 0.95
    async with storage.broker() as closed:
        await closed.prepare(lease=SHORT_LEASE, service="")
        (third,) = await take_n(closed, 1)
    (fourth,) = await take_n(second, 1)
    assert [each.number for each in (message, again, third, fourth)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("takes_begin_at_once")
async def test_a_take_that_is_cancelled_loses_nothing(broker: Broker) -> None:
    for number in range(20):
        taking = asyncio.create_task(broker.take(10, 5.0))
        await submit(broker, f"payment-{number}")
        for _ in range(2 * number):  # turns of the loop: no timer is fine enough to meet each step of a take
            await asyncio.sleep(0)
        taking.cancel()
        outcome = (await asyncio.gather(taking, return_exceptions=True))[0]
        if not isinstance(outcome, BaseException):
            await asyncio.gather(*(broker.put_off(message, 0.0, ExchangeResult.NONE) for message in outcome))
    taken = await take_all(broker, LEASE / 2, up_to=20)
    assert {operation_of(message) for message in taken} == {f"payment-{number}" for number in range(20)}


async def test_failures_in_a_row_are_counted_and_an_answer_clears_them(broker: Broker, storage: Storage) -> None:
    await submit(broker, "a")
    seen = []
    answered, failed, none = ExchangeResult.ANSWERED, ExchangeResult.FAILED, ExchangeResult.NONE
    for result in (failed, failed, none, answered, failed):
        (message,) = await take_n(broker, 1)
        seen.append(message.failures)
        await broker.put_off(message, 0.0, result)
    assert seen == [0, 1, 2, 2, 0]
    if storage.has_rows:
        assert (await take_n(broker, 1))[0].number == 5


@those(which=lambda storage: storage.has_rows)
async def test_an_earlier_delivery_does_not_put_off_a_later_one(opened: Opened, storage: Storage) -> None:
    first, second = await opened(SHORT_LEASE), await opened()
    await submit(first, "a")
    (late,) = await take_n(first, 1)
    (present,) = await take_n(second, 1)
    await first.put_off(late, 0.0, ExchangeResult.FAILED)
    assert not await take_all(first, min(storage.quiet, LEASE / 2))
    await second.put_off(present, 0.0, ExchangeResult.ANSWERED)
    await first.put_off(late, 190.0, ExchangeResult.FAILED)
    assert [message.failures for message in await take_all(first, LEASE / 2, up_to=1)] == [0]


async def deliver_in_turn(broker: Broker, *turns: dict[str, ExchangeResult]) -> None:
    """Have requests delivered and put off again."""
    for results in turns:
        for message in await take_n(broker, len(results)):
            await broker.put_off(message, 0.0, results[operation_of(message)])


@those(which=lambda storage: storage.has_rows)
async def test_while_requests_fail_those_that_were_answered_go_first(broker: Broker) -> None:
    await submit(broker, "answered", "created", "was-answered", "bad", "worse")
    await deliver_in_turn(
        broker,
        {
            "created": ExchangeResult.CREATED,
            "bad": ExchangeResult.FAILED,
            "worse": ExchangeResult.FAILED,
            "answered": ExchangeResult.ANSWERED,
            "was-answered": ExchangeResult.ANSWERED,
        },
        {
            "created": ExchangeResult.NONE,
            "bad": ExchangeResult.NONE,
            "worse": ExchangeResult.FAILED,
            "answered": ExchangeResult.CREATED,  # that it was answered is not forgotten
            "was-answered": ExchangeResult.FAILED,
        },
    )
    await submit(broker, "new", "newest")
    taken = [*await broker.take(1, PATIENCE, untried=0), *await broker.take(6, PATIENCE, untried=0)]
    order = ["answered", "created", "newest", "new", "was-answered", "bad", "worse"]
    assert [operation_of(message) for message in taken] == order


@those(which=lambda storage: storage.has_rows)
async def test_so_many_as_are_told_are_ones_that_were_never_tried(broker: Broker) -> None:
    results = {"answered": ExchangeResult.ANSWERED, "created": ExchangeResult.CREATED, "back": ExchangeResult.NONE}
    await submit(broker, *results)
    await deliver_in_turn(broker, results)
    await submit(broker, "a", "b", "c")
    taken = list(await broker.take(4, PATIENCE, untried=2))
    assert [operation_of(message) for message in taken] == ["c", "b", "answered", "created"]
    assert [message.is_untried for message in taken] == [True, True, False, False]
    assert [operation_of(message) for message in await broker.take(3, PATIENCE, untried=5)] == ["a", "back"]


async def test_those_whose_time_is_over_are_told_apart(broker: Broker, storage: Storage) -> None:
    old = broker.now() - timedelta(seconds=200)
    await broker.submit(new_request("over", created_at=old))
    await broker.submit(new_request("over-too", created_at=old))
    await broker.submit(new_request("in-its-grace", created_at=old, expires_in=195.0))
    await submit(broker, "young")
    taken: list[str] = []
    async with asyncio.timeout(PATIENCE):
        while not {"over", "over-too"} <= {*taken}:  # a stream delivers a moment after it was asked
            found = await broker.take_overdue(1, 30.0)
            assert len(found) <= 1
            taken += map(operation_of, found)
            await asyncio.sleep(0.05)
    if storage.has_rows:
        assert sorted(taken) == ["over", "over-too"]
        assert not await broker.take_overdue(10, 30.0)
        assert [operation_of(message) for message in await broker.take_overdue(10, 1.0)] == ["in-its-grace"]


@those(which=lambda storage: storage.lasts)
async def test_what_is_stored_is_there_for_the_next_process(storage: Storage) -> None:
    async with storage.broker() as broker:
        await broker.prepare(lease=LEASE, service="https://keyless.test")
        await submit(broker, "a")
        (message,) = await take_n(broker, 1)
        assert await broker.claim(message) is Claim.NEW
        await broker.put_off(message, 0.0, ExchangeResult.ANSWERED)
        await broker.aclose()  # and once more at the end of the block
    async with storage.broker() as broker:
        await broker.prepare(lease=LEASE, service="https://keyless.test")
        (again,) = await take_n(broker, 1)
        assert (operation_of(again), again.number) == ("a", 2)
        assert await broker.submit(new_request("a"))
        assert await broker.has_claim(again)


async def test_a_worker_of_another_service_is_refused_and_asks_nobody(storage: Storage) -> None:
    ours, theirs = "https://keyless.test", "https://staging.test"
    for service in ("", ours, "", ours):  # one that is prepared beforehand belongs to no service yet
        async with storage.broker() as broker:
            assert await broker.prepare(lease=LEASE, service=service) >= 3600.0  # the longest wait that it allows
    async with storage.broker() as broker:
        with pytest.raises(BrokerError, match=f"belongs to {ours}, and this worker to {theirs}: "):
            await broker.prepare(lease=LEASE, service=theirs)


async def test_the_fleet_is_told_how_it_fares(broker: Broker) -> None:
    began, nothing = now(), await broker.inspect()
    assert (nothing.waiting, nothing.backlog, nothing.oldest_age, nothing.problems) == (0, 0, 0, ())
    await submit(broker, "a", "b")
    (message,) = await take_n(broker, 1)
    await asyncio.sleep(0.1)
    inspection = await broker.inspect()
    assert (inspection.waiting, inspection.backlog) == (2, 1)
    assert 0.09 < inspection.oldest_age < now() - began + 0.05
    assert inspection.problems == ()
    await decide(broker, message)
    await is_waiting(broker, 1)


@those(which=lambda storage: storage.lasts)
async def test_a_broker_is_opened_once_and_closed_as_often_as_one_likes(storage: Storage) -> None:
    broker: Any = storage.broker()
    with pytest.raises(ConfigurationError, match="async with"):
        await broker.inspect()
    async with broker:
        with pytest.raises(ConfigurationError, match="open already"):
            await broker.open()
    await broker.aclose()
    async with broker:
        await broker.prepare(lease=LEASE, service="")
        await submit(broker, "a")


async def test_what_waits_when_the_broker_is_closed_ends_with_an_error(broker: Broker) -> None:
    waiting = [asyncio.create_task(call) for call in (broker.next_outcome("shop"), broker.take(1, 60.0))]
    await asyncio.sleep(0.1)
    await broker.aclose()
    for task in waiting:
        with pytest.raises((ConfigurationError, UnavailableError)):
            await asyncio.wait_for(task, PATIENCE)
