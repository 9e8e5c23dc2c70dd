from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from aiokeyless.worker.broker import Claim, ExchangeResult
from aiokeyless.worker.messages import ApprovalEvent, Outcome

from .brokers import FILE, MEMORY, POSTGRES, SHORT_LEASE, decide, is_waiting, submit, take_n

if TYPE_CHECKING:
    from aiokeyless.worker.broker import Broker

    from .brokers import Opened


async def test_the_first_of_two_decisions_is_kept_whichever_delivery_it_is_of(opened: Opened) -> None:
    first, second = await opened(SHORT_LEASE), await opened(SHORT_LEASE)
    await submit(first, "a")
    (late,) = await take_n(first, 1)
    (present,) = await take_n(second, 1)
    assert await decide(first, late, Outcome.EXPIRED)
    assert not await decide(second, present, Outcome.APPROVED)
    outcome = await first.next_outcome("shop")
    assert msgspec.json.decode(outcome.data, type=ApprovalEvent).outcome is Outcome.EXPIRED
    await outcome.mark_handled()
    await is_waiting(second, 0)


async def test_a_claim_is_new_once_and_then_held(opened: Opened) -> None:
    worker, other = await opened(), await opened()
    await submit(worker, "a")
    (message,) = await take_n(worker, 1)
    assert not await worker.has_claim(message)
    assert await worker.claim(message) is Claim.NEW
    assert await other.has_claim(message)
    await worker.put_off(message, 0.0, ExchangeResult.ANSWERED)
    (again,) = await take_n(other, 1)
    assert await other.claim(again) is Claim.HELD


# NATS keeps claims on operation ids, for longer than their requests.
@pytest.mark.parametrize("storage", [MEMORY, FILE, POSTGRES], indirect=True)
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
    seen = set()
    for _ in expected:
        outcome = await second.next_outcome("shop")
        seen.add(msgspec.json.decode(outcome.data, type=ApprovalEvent).operation_id)
        await outcome.mark_handled()
    assert seen == expected
