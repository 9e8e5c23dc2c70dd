"""Claims: an operation id belongs to one request at a time, whatever workers do at once, and to none once released."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import msgspec
import nats.js.errors
import pytest

from aiokeyless.ticket import ApprovalTicket, payload_digest
from aiokeyless.worker import StreamSettings
from aiokeyless.worker.claims import Claim, Claims
from aiokeyless.worker.messages import Delivery
from aiokeyless.worker.streams import CLAIMS, prepare

if TYPE_CHECKING:
    from nats.aio.client import Client

NOW = datetime(2026, 11, 24, 12, tzinfo=UTC)


def delivery(name: str, operation_id: str = "txn 1 \u00e9 > *") -> Delivery:
    ticket = ApprovalTicket(
        operation_id=operation_id,
        user_id="C0FFEE",
        payload_sha256=payload_digest(None),
        created_at=NOW,
        expires_at=NOW + timedelta(seconds=60),
    )
    return Delivery(ticket=ticket, payload=None, number=1, name=name, context=msgspec.Raw(b"null"))


OURS, THEIRS = delivery("request-1"), delivery("request-2")


@pytest.fixture
async def claims(connection: Client) -> Claims:
    await prepare(connection.jetstream(), StreamSettings(), ack_wait=30)
    return Claims(connection.jetstream())


async def test_the_first_one_holds_the_id_and_no_other_one_gets_it(claims: Claims) -> None:
    assert await claims.take(OURS) is Claim.NEW
    assert await claims.take(THEIRS) is Claim.ANOTHERS
    assert await claims.take(OURS) is Claim.HELD
    assert (await claims.is_held(OURS), await claims.is_held(THEIRS)) == (True, False)


async def test_of_many_at_once_one_holds_it(claims: Claims) -> None:
    taken = await asyncio.gather(*(claims.take(delivery(f"request-{number}")) for number in range(20)))
    assert sorted(claim.name for claim in taken) == ["ANOTHERS"] * 19 + ["NEW"]


async def test_an_id_that_was_never_taken_is_not_held(claims: Claims) -> None:
    assert not await claims.is_held(OURS)


async def test_ids_are_taken_one_by_one(claims: Claims) -> None:
    assert await claims.take(OURS) is Claim.NEW
    assert await claims.take(delivery("request-2", "txn 2")) is Claim.NEW


async def test_what_is_released_can_be_taken_by_another_one(claims: Claims) -> None:
    await claims.take(OURS)
    await claims.release(OURS)
    assert not await claims.is_held(OURS)
    assert await claims.take(THEIRS) is Claim.NEW
    assert await claims.take(OURS) is Claim.ANOTHERS


async def test_only_the_holder_releases_an_id(claims: Claims) -> None:
    await claims.release(OURS)
    await claims.take(OURS)
    await claims.release(THEIRS)
    assert await claims.is_held(OURS)


async def test_a_claim_that_cannot_be_stored_is_none(claims: Claims, connection: Client) -> None:
    stream = connection.jetstream()
    await stream.update_stream((await stream.stream_info(CLAIMS)).config.evolve(sealed=True))
    with pytest.raises(nats.js.errors.APIError, match="sealed"):
        await claims.take(OURS)
