from __future__ import annotations

import asyncio
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING

from aiokeyless.worker.broker import Claim, ExchangeResult, UnavailableError
from aiokeyless.worker.messages import Outcome, read_event

from .brokers import SHORT_LEASE, decide, is_waiting, new_request, none_comes, read, submit, take_all, take_n, those

if TYPE_CHECKING:
    from aiokeyless.worker.broker import Broker

    from .brokers import Opened, Storage


async def test_the_first_of_two_decisions_is_kept_whichever_delivery_it_is_of(opened: Opened, storage: Storage) -> None:
    first, second = await opened(SHORT_LEASE), await opened(SHORT_LEASE)
    await submit(first, "a")
    (late,) = await take_n(first, 1)
    (present,) = await take_n(second, 1)
    assert await decide(first, late, Outcome.EXPIRED)
    assert not await decide(second, present, Outcome.APPROVED)
    outcome = await first.next_outcome("shop")
    assert read_event(outcome.data).outcome is Outcome.EXPIRED
    await outcome.mark_handled()
    assert await none_comes(second, "shop", storage.quiet)
    await is_waiting(second, 0)


async def test_a_request_that_is_decided_asks_nobody_again(opened: Opened, storage: Storage) -> None:
    broker = await opened(SHORT_LEASE)
    assert not await broker.submit(new_request("a", created_at=broker.now() - timedelta(seconds=200)))
    (message,) = await take_n(broker, 1)
    assert await decide(broker, message)
    with suppress(UnavailableError):  # a worker that does not know it goes on
        await broker.put_off(message, 0.0, ExchangeResult.ANSWERED)
    assert await broker.submit(new_request("a"))
    assert not await take_all(broker, SHORT_LEASE + storage.quiet)
    assert not await broker.take_overdue(1, 0.0)


async def test_a_claim_is_new_once_and_then_held(opened: Opened) -> None:
    worker, other = await opened(), await opened()
    await submit(worker, "a")
    (message,) = await take_n(worker, 1)
    assert not await worker.has_claim(message)
    assert await worker.claim(message) is Claim.NEW
    assert await worker.submit(new_request("a"))
    assert await other.has_claim(message)
    await worker.put_off(message, 0.0, ExchangeResult.ANSWERED)
    (again,) = await take_n(other, 1)
    assert await other.claim(again) is Claim.HELD


@those(which=lambda storage: storage.has_rows)  # others do not know at a claim what is decided
async def test_nobody_is_asked_for_a_request_that_is_decided(broker: Broker) -> None:
    await submit(broker, "a", "b")
    decided, other = await take_n(broker, 2)
    assert await decide(broker, decided)
    claims = await asyncio.gather(broker.claim(decided), broker.claim(other))
    assert [*claims] == [Claim.ANOTHERS, Claim.NEW]
    assert not await broker.has_claim(decided)


async def test_a_claim_is_given_back_by_the_delivery_that_made_it_last(broker: Broker) -> None:
    await submit(broker, "a")
    (message,) = await take_n(broker, 1)
    await broker.claim(message)
    await broker.put_off(message, 0.0, ExchangeResult.FAILED)
    (again,) = await take_n(broker, 1)
    await broker.claim(again)
    assert not await broker.unclaim(message)
    assert await broker.has_claim(message)
    assert await broker.unclaim(again)
    assert not await broker.has_claim(message)
    assert await broker.claim(again) is Claim.NEW


async def test_many_decisions_at_once_are_each_stored_once(opened: Opened) -> None:
    first, second = await opened(), await opened()
    expected = {f"payment-{number}" for number in range(30)}
    await submit(first, *expected)
    messages = await take_n(first, 30)
    assert all(await asyncio.gather(*(decide(first, message) for message in messages)))
    assert await read(second, "shop", 30) == expected
