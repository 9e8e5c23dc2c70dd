"""Claims: an operation id belongs to one request at a time, whatever workers do at once, and to none once released."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from nats_server import CLAIMS, PATIENCE, prepare

from aiokeyless.worker import StreamSettings
from aiokeyless.worker.engine import Claim, EngineError
from aiokeyless.worker.nats.claims import NatsClaims
from aiokeyless.worker.nats.fleet import KEYLESS

if TYPE_CHECKING:
    from nats.aio.client import Client

ID = "txn 1 \u00e9 > *"
OURS, THEIRS = "request-1", "request-2"


@pytest.fixture
async def claims(connection: Client) -> NatsClaims:
    await prepare(connection.jetstream(), StreamSettings(), ack_wait=30)
    return NatsClaims(connection.jetstream(), KEYLESS)


async def test_the_first_one_holds_the_id_and_no_other_one_gets_it(claims: NatsClaims) -> None:
    assert (await claims.take(ID, OURS)).claim is Claim.NEW
    assert (await claims.take(ID, THEIRS)).claim is Claim.ANOTHERS
    assert (await claims.take(ID, OURS)).claim is Claim.HELD
    assert (await claims.is_held(ID, OURS), await claims.is_held(ID, THEIRS)) == (True, False)


async def test_of_many_at_once_one_holds_it(claims: NatsClaims) -> None:
    taken = await asyncio.gather(*(claims.take(ID, f"request-{number}") for number in range(20)))
    assert sorted(claim.name for claim, _ in taken) == ["ANOTHERS"] * 19 + ["NEW"]


async def test_an_id_that_was_never_taken_is_not_held(claims: NatsClaims) -> None:
    assert not await claims.is_held(ID, OURS)


async def test_ids_are_taken_one_by_one(claims: NatsClaims) -> None:
    assert (await claims.take(ID, OURS)).claim is Claim.NEW
    assert (await claims.take("txn 2", THEIRS)).claim is Claim.NEW


async def test_what_is_released_can_be_taken_by_another_one(claims: NatsClaims) -> None:
    _, token = await claims.take(ID, OURS)
    assert await claims.release(ID, OURS, token)
    assert not await claims.is_held(ID, OURS)
    assert (await claims.take(ID, THEIRS)).claim is Claim.NEW
    assert (await claims.take(ID, OURS)).claim is Claim.ANOTHERS


async def test_an_id_that_another_delivery_took_meanwhile_is_not_given_back(claims: NatsClaims) -> None:
    _, token = await claims.take(ID, OURS)
    _, later = await claims.take(ID, OURS)
    assert not await claims.release(ID, OURS, token)
    assert await claims.is_held(ID, OURS)
    assert await claims.release(ID, OURS, later)


async def test_a_claim_that_cannot_be_stored_is_none(claims: NatsClaims, connection: Client) -> None:
    stream = connection.jetstream()
    await stream.update_stream((await stream.stream_info(CLAIMS)).config.evolve(sealed=True))
    with pytest.raises(EngineError, match="sealed"):
        await claims.take(ID, OURS)


async def test_of_claims_that_are_gone_nothing_is_known(claims: NatsClaims, connection: Client) -> None:
    """That a request does not hold its id would make an approval an older one."""
    await claims.take(ID, OURS)
    await connection.jetstream().delete_stream(CLAIMS)
    with pytest.raises(EngineError, match="stream not found"):
        await claims.is_held(ID, OURS)


async def test_a_stream_of_others_is_not_asked_for_claims_again_and_again(
    claims: NatsClaims, connection: Client
) -> None:
    stream = connection.jetstream()
    await stream.delete_stream(CLAIMS)
    await stream.add_stream(name="THEIRS", subjects=[KEYLESS.claim_subject("*")])
    with pytest.raises(EngineError, match="expected stream does not match"):
        await asyncio.wait_for(claims.take(ID, OURS), PATIENCE)
