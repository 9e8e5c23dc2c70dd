"""Claims: an operation id belongs to one request at a time, whatever workers do at once, and to none once released."""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import TYPE_CHECKING

import pytest
from nats_server import CLAIMS, jetstream
from waiting import PATIENCE

from aiokeyless.worker.broker import Claim, UnavailableError
from aiokeyless.worker.nats import EventKeys
from aiokeyless.worker.nats.claims import NatsClaims
from aiokeyless.worker.nats.event_keys import CLAIM, EVENT, SIGNATURE
from aiokeyless.worker.nats.fleet import KEYLESS

if TYPE_CHECKING:
    from nats.aio.client import Client
    from nats.js import JetStreamContext


ID = "txn 1 \u00e9 > *"
OURS, THEIRS = "request-1", "request-2"
OLD, NEW = "old-" * 8, "new-" * 8
KEYS = EventKeys(OLD)
SUBJECT = KEYLESS.claim_subject(sha256(ID.encode()).hexdigest())


@pytest.fixture(params=[None, KEYS], ids=["no keys", "keys"])
async def claims(stream: JetStreamContext, request: pytest.FixtureRequest) -> NatsClaims:
    return NatsClaims(stream, KEYLESS, request.param)


async def test_of_many_at_once_one_holds_it(claims: NatsClaims) -> None:
    taken = await asyncio.gather(*(claims.claim(ID, f"request-{number}") for number in range(20)))
    assert sorted(claim.name for claim, _ in taken) == ["ANOTHERS"] * 19 + ["NEW"]


async def test_a_claim_that_cannot_be_stored_is_none(claims: NatsClaims, connection: Client) -> None:
    stream = jetstream(connection)
    await stream.update_stream((await stream.stream_info(CLAIMS)).config.evolve(sealed=True))
    with pytest.raises(UnavailableError, match="sealed"):
        await claims.claim(ID, OURS)


async def test_of_claims_that_are_gone_nothing_is_known(claims: NatsClaims, connection: Client) -> None:
    """That a request does not hold its id would make an approval an older one."""
    await claims.claim(ID, OURS)
    await jetstream(connection).delete_stream(CLAIMS)
    with pytest.raises(UnavailableError, match="stream not found"):
        await claims.holds(ID, OURS)


async def test_a_stream_of_others_is_not_asked_for_claims_again_and_again(
    claims: NatsClaims, connection: Client
) -> None:
    stream = jetstream(connection)
    await stream.delete_stream(CLAIMS)
    await stream.add_stream(name="THEIRS", subjects=[KEYLESS.claim_subject("*")])
    with pytest.raises(UnavailableError, match="expected stream does not match"):
        await asyncio.wait_for(claims.claim(ID, OURS), PATIENCE)


# -- signatures


@pytest.fixture
async def signed(stream: JetStreamContext) -> NatsClaims:
    return NatsClaims(stream, KEYLESS, KEYS)


async def is_ours(claims: NatsClaims) -> bool:
    """Return whether the id is believed to be ours, when it is asked about as well as when it is taken."""
    is_held = await claims.holds(ID, OURS)
    assert (await claims.claim(ID, OURS))[0] is (Claim.HELD if is_held else Claim.ANOTHERS)
    return is_held


async def test_a_claim_without_a_signature_is_anothers(
    signed: NatsClaims, stream: JetStreamContext, caplog: pytest.LogCaptureFixture
) -> None:
    await NatsClaims(stream, KEYLESS, None).claim(ID, OURS)
    assert not await is_ours(signed)
    assert "claim.unsigned sequence=1 count=1" in caplog.text


def signature(keys: EventKeys, subject: str, request: str, *, fleet: str = "keyless", kind: str = CLAIM) -> str:
    return keys.sign(f"{subject}\0{request}".encode(), fleet=fleet, kind=kind)


@pytest.mark.parametrize(
    ("header", "is_genuine"),
    [
        (signature(KEYS, SUBJECT, OURS), True),
        (signature(KEYS, SUBJECT, THEIRS), False),
        (signature(KEYS, KEYLESS.claim_subject("another"), OURS), False),
        (signature(KEYS, SUBJECT, OURS, fleet="staging"), False),
        (signature(KEYS, SUBJECT, OURS, kind=EVENT), False),
        (signature(EventKeys(NEW), SUBJECT, OURS), False),
    ],
    ids=["genuine", "of a request", "of an operation", "of a fleet", "of an event", "under another key"],
)
async def test_the_signature_of_another_claim_is_none(
    signed: NatsClaims, stream: JetStreamContext, header: str, *, is_genuine: bool
) -> None:
    await stream.publish(SUBJECT, OURS.encode(), headers={SIGNATURE: header})
    assert await is_ours(signed) is is_genuine


async def test_nobody_else_gives_an_id_back(signed: NatsClaims, stream: JetStreamContext) -> None:
    await signed.claim(ID, OURS)
    await stream.publish(SUBJECT, b"")
    assert (await signed.claim(ID, THEIRS))[0] is Claim.ANOTHERS


async def test_while_keys_are_rotated_the_claims_of_either_key_are_believed(stream: JetStreamContext) -> None:
    await NatsClaims(stream, KEYLESS, EventKeys(OLD, NEW)).claim(ID, OURS)
    rotated = NatsClaims(stream, KEYLESS, EventKeys(NEW, OLD))
    assert await is_ours(rotated)  # which stores it again, under the new key
    assert await is_ours(NatsClaims(stream, KEYLESS, EventKeys(NEW)))
