"""`TransactionVerifier`: where its keys come from, how often, and what it does while they are away."""

from __future__ import annotations

import asyncio
import importlib
import json
import math
import pickle
import sys
import time
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from raw_server import RawServer, answer, hang, reset
from signing import DATA, USER, claims, ec_jwk, ec_key, header, key_set, sign_es256, token
from strict_service import KEY, TENANT, StrictService

from aiokeyless import (
    ClientClosedError,
    ConfigurationError,
    KeylessClient,
    RequestTimeoutError,
    SignatureError,
    SignatureReason,
    StatusError,
    TransportError,
    signatures,
)
from aiokeyless.signatures import SignedTransaction, TransactionVerifier

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine

    from raw_server import Handler

pytestmark = pytest.mark.looptime

KEYS = [ec_jwk()]
GOOD = answer(json.dumps(key_set(*KEYS)).encode())
JWKS_PATH = f"/customers/{TENANT}/.well-known/jwks.json"


@pytest.fixture
async def service() -> AsyncGenerator[StrictService]:
    async with StrictService() as running:
        running.key_set = key_set(*KEYS)
        yield running
    assert running.complaints == []


@pytest.fixture
async def client(service: StrictService) -> AsyncGenerator[KeylessClient]:
    async with KeylessClient(KEY, base_url=service.url) as client:
        yield client


@pytest.fixture
def verifier(client: KeylessClient) -> TransactionVerifier:
    return TransactionVerifier(client, tenant=TENANT)


def verify(
    verifier: TransactionVerifier, text: str, *, user_id: str = USER, transaction_data: str = DATA, **more: str
) -> Coroutine[Any, Any, SignedTransaction]:
    return verifier.verify(text, user_id=user_id, transaction_data=transaction_data, **more)


async def reason_for(verifier: TransactionVerifier, text: str, **options: str) -> SignatureReason:
    with pytest.raises(SignatureError) as caught:
        await verify(verifier, text, **options)
    return caught.value.reason


# From end to end


async def test_a_right_token_is_accepted_for_a_user_id_in_either_case(verifier: TransactionVerifier) -> None:
    text = token()
    signed = await verify(verifier, text, user_id=USER.lower(), external_user_id="ann")
    assert signed == await verify(verifier, text)
    assert (signed.user_id, signed.transaction_data) == (USER, DATA)
    assert abs(datetime.now(UTC) - signed.issued_at) < timedelta(seconds=60)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("not a token", SignatureReason.MALFORMED),
        (token(head=header(alg="none")), SignatureReason.WRONG_ALGORITHM),
        (token(head=header(jku="https://evil.example/jwks.json")), SignatureReason.MALFORMED),
    ],
    ids=["no token", "none", "jku"],
)
async def test_what_needs_no_key_is_refused_before_any_is_fetched(
    service: StrictService, verifier: TransactionVerifier, text: str, reason: SignatureReason
) -> None:
    assert await reason_for(verifier, text) is reason
    assert service.requests == []


async def test_the_options_of_a_verifier_are_those_that_are_compared(client: KeylessClient) -> None:
    def verifier(**options: Any) -> TransactionVerifier:
        return TransactionVerifier(client, tenant=TENANT, **options)

    now = int(time.time())
    old, early = token(claims(iat=now - 600)), token(claims(iat=now + 600))
    assert await reason_for(verifier(), old) is SignatureReason.TOO_OLD
    await verify(verifier(max_age=700), old)
    assert await reason_for(verifier(leeway=0), early) is SignatureReason.NOT_YET_VALID
    await verify(verifier(leeway=700), early)
    text = token(claims(iss="keyless", aud="shop"))
    await verify(verifier(issuer="keyless", audience="shop"), text)
    assert await reason_for(verifier(issuer="another", audience="shop"), text) is SignatureReason.WRONG_ISSUER
    assert await reason_for(verifier(audience="another"), text) is SignatureReason.WRONG_AUDIENCE
    assert await reason_for(verifier(audience="shop"), text, user_id="BEEF") is SignatureReason.WRONG_USER
    assert await reason_for(verifier(audience="shop"), text, external_user_id="bob") is SignatureReason.WRONG_USER
    assert await reason_for(verifier(audience="shop"), text, transaction_data="") is SignatureReason.WRONG_DATA


@pytest.mark.parametrize(
    ("seconds", "reason"),
    [(-330, None), (-331, SignatureReason.TOO_OLD), (30, None), (31, SignatureReason.NOT_YET_VALID)],
)
async def test_without_options_a_token_may_be_five_minutes_old_and_a_clock_off_by_half_a_minute(
    verifier: TransactionVerifier, monkeypatch: pytest.MonkeyPatch, seconds: int, reason: SignatureReason | None
) -> None:
    now = int(time.time())
    text = token(claims(iat=now + seconds))
    monkeypatch.setattr(time, "time", lambda: now)
    if reason is None:
        await verify(verifier, text)
    else:
        assert await reason_for(verifier, text) is reason


# The keys


def unknown(number: int) -> str:
    return token(head=header(kid=f"random {number}"))


async def test_keys_are_fetched_once_without_the_api_key(
    service: StrictService, client: KeylessClient, verifier: TransactionVerifier
) -> None:
    assert service.complaints == []
    await asyncio.gather(*(verify(verifier, token()) for _ in range(50)))
    await verify(verifier, token())
    assert service.requests == [f"GET {JWKS_PATH}"]
    await client.aclose()
    await verify(verifier, token())  # known keys need no client


async def test_a_borrowed_session_fetches_them_without_the_api_key(service: StrictService) -> None:
    async with (
        aiohttp.ClientSession(headers={"X-Proxy": "yes"}) as session,
        KeylessClient(KEY, base_url=service.url, session=session) as client,
    ):
        await verify(TransactionVerifier(client, tenant=TENANT), token())


async def test_many_unknown_kids_cause_one_more_fetch_in_five_minutes(
    service: StrictService, verifier: TransactionVerifier
) -> None:
    texts = [unknown(number) for number in range(20)]
    reasons = await asyncio.gather(*(reason_for(verifier, text) for text in texts))
    assert set(reasons) == {SignatureReason.UNKNOWN_KEY}
    assert len(service.requests) == 2
    await verify(verifier, token())
    await asyncio.sleep(299)
    await reason_for(verifier, texts[0])
    assert len(service.requests) == 2
    await asyncio.sleep(1)
    for text in texts:
        await reason_for(verifier, text)
    assert len(service.requests) == 3


async def test_a_rotation_among_many_costs_one_fetch(service: StrictService, verifier: TransactionVerifier) -> None:
    await verify(verifier, token())
    service.key_set = key_set(ec_jwk(ec_key("new"), kid="k2"))
    fresh = token(head=header(kid="k2"), sign=lambda message: sign_es256(message, ec_key("new")))
    signed = await asyncio.gather(*(verify(verifier, fresh) for _ in range(50)))
    assert {each.key_id for each in signed} == {"k2"}
    assert len(service.requests) == 2
    # The old key is gone. But that fetch was before this token.
    assert await reason_for(verifier, token()) is SignatureReason.KEYS_UNAVAILABLE
    assert len(service.requests) == 2
    await asyncio.sleep(300)
    assert await reason_for(verifier, token()) is SignatureReason.UNKNOWN_KEY


async def test_an_attacker_with_unknown_kids_makes_no_token_of_a_new_key_refused_for_good(
    service: StrictService, verifier: TransactionVerifier
) -> None:
    await verify(verifier, token())
    await reason_for(verifier, unknown(0))
    service.key_set = key_set(ec_jwk(ec_key("new"), kid="k2"))
    fresh = token(head=header(kid="k2"), sign=lambda message: sign_es256(message, ec_key("new")))
    with pytest.raises(SignatureError) as refused:
        await verify(verifier, fresh)
    assert refused.value.is_transient
    await asyncio.sleep(300)
    assert (await verify(verifier, fresh)).key_id == "k2"


async def test_keys_are_fetched_again_after_a_day(service: StrictService, verifier: TransactionVerifier) -> None:
    await verify(verifier, token())
    await asyncio.sleep(24 * 3600 - 1)
    await verify(verifier, token())
    assert len(service.requests) == 1
    service.key_set = key_set()
    await asyncio.sleep(1)
    assert await reason_for(verifier, token()) is SignatureReason.UNKNOWN_KEY
    assert len(service.requests) == 2


BODIES: dict[str, bytes] = {
    "no JSON": answer(b"<html>"),
    "nested without end": answer(b"[" * 100_000),
    "over a megabyte": answer(json.dumps(key_set(*KEYS, {"more": "m" * (1 << 20)})).encode()),
    "a redirect": answer(b"", b"Location: http://127.0.0.1:1/keys", status=b"302 Found"),
    "no such tenant": answer(b"", status=b"404 Not Found"),
    "a failure": answer(b"", status=b"503 Busy"),
    "a right one with another status": answer(json.dumps(key_set(*KEYS)).encode(), status=b"203 Other"),
}


@asynccontextmanager
async def served(*answers: bytes | Handler, **options: Any) -> AsyncGenerator[tuple[RawServer, TransactionVerifier]]:
    async with RawServer(*answers) as server, KeylessClient(KEY, base_url=server.url, **options) as client:
        yield server, TransactionVerifier(client, tenant=TENANT)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES.keys())
async def test_without_a_key_set_nothing_is_accepted_and_it_is_fetched_again_after_ten_seconds(body: bytes) -> None:
    async with served(body, GOOD, max_attempts=1) as (server, verifier):
        reasons = await asyncio.gather(*(reason_for(verifier, token()) for _ in range(20)))
        assert set(reasons) == {SignatureReason.KEYS_UNAVAILABLE}
        assert len(server.heads) == 1
        await asyncio.sleep(10)
        await verify(verifier, token())
        assert all(b"X-Api-Key" not in head and KEY.encode() not in head for head in server.heads)


async def test_known_keys_serve_while_the_address_is_away() -> None:
    async with served(GOOD, answer(b"", status=b"503 Busy"), max_attempts=1) as (server, verifier):
        await verify(verifier, token())
        await asyncio.sleep(24 * 3600)
        for _ in range(20):
            await verify(verifier, token())
        assert await reason_for(verifier, unknown(1)) is SignatureReason.KEYS_UNAVAILABLE
        await asyncio.sleep(299)
        await verify(verifier, token())
        assert len(server.heads) == 2
        await asyncio.sleep(1)
        await verify(verifier, token())
        assert len(server.heads) == 3


async def test_a_known_key_does_not_wait_for_an_address_that_hangs() -> None:
    async with served(GOOD, hang) as (server, verifier):
        loop = asyncio.get_running_loop()
        await verify(verifier, token())
        await asyncio.sleep(24 * 3600)
        began = loop.time()
        await asyncio.gather(*(verify(verifier, token()) for _ in range(20)))
        assert loop.time() - began == pytest.approx(1.0), "a second, in which a key that was revoked is noticed"
        began = loop.time()
        for _ in range(20):
            await verify(verifier, token())
        assert loop.time() == pytest.approx(began), "the fetch goes on, and nobody waits for it"
        assert len(server.heads) == 2
        assert await reason_for(verifier, unknown(1)) is SignatureReason.KEYS_UNAVAILABLE, "who needs it waits"
        began = loop.time()
        await verify(verifier, token())
        assert loop.time() == pytest.approx(began), "nor is there another one for five minutes"


async def test_a_fetch_goes_on_though_its_first_caller_is_cancelled(
    service: StrictService, verifier: TransactionVerifier
) -> None:
    await verify(verifier, token())
    await asyncio.sleep(24 * 3600)
    first = asyncio.create_task(verify(verifier, token()))
    await asyncio.sleep(0)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    await verify(verifier, token())
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("response", "cause"),
    [
        *((answer(b"", status=status), StatusError) for status in (b"503 Busy", b"302 Found")),
        *((hang, RequestTimeoutError), (reset, TransportError)),
    ],
    ids=["503", "302", "no answer", "a reset"],
)
async def test_an_error_says_why_the_keys_are_unavailable(response: bytes | Handler, cause: type[Exception]) -> None:
    async with served(response, max_attempts=1) as (_server, verifier):
        with pytest.raises(SignatureError) as caught:
            await verify(verifier, token())
    assert isinstance(caught.value.__cause__, cause)


async def test_a_verification_that_is_cancelled_takes_nothing_from_the_others() -> None:
    async with served(hang, GOOD) as (server, verifier):
        first = asyncio.create_task(verify(verifier, token()))
        second = asyncio.create_task(verify(verifier, token()))
        await server.asked(1)
        first.cancel()
        await second
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_a_closed_client_is_no_refusal(client: KeylessClient, verifier: TransactionVerifier) -> None:
    await client.aclose()
    with pytest.raises(ClientClosedError):
        await verify(verifier, token())


# Messages and arguments


def test_without_pyjwt_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    monkeypatch.delitem(sys.modules, "aiokeyless._token")
    with pytest.raises(ModuleNotFoundError, match='needs jwt: install the extra "jwt"'):
        importlib.reload(signatures)


async def test_no_message_shows_the_token_or_a_key(verifier: TransactionVerifier) -> None:
    head, body, signature = token(claims(td="another")).split(".")
    text = f"{head}.{body}.{signature}"
    with pytest.raises(SignatureError) as caught:
        await verify(verifier, text)
    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert not [part for part in (head, body, signature, DATA, KEYS[0]["x"]) if part in shown]
    again = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  # our own bytes
    assert (again.reason, str(again)) == (caught.value.reason, str(caught.value))


wrong: Any = object()


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("tenant", value) for value in ("", "..", wrong)),
        *(("max_age", value) for value in (0, math.inf)),
        *(("leeway", value) for value in (-1, math.inf)),
        *(("issuer", wrong), ("audience", wrong)),
    ],
)
def test_a_wrong_option_of_a_verifier_is_named(argument: str, value: Any) -> None:
    client = KeylessClient(KEY, base_url="http://localhost:9")
    with pytest.raises(ConfigurationError) as caught:
        TransactionVerifier(client, **{"tenant": TENANT, argument: value})
    assert caught.value.argument == argument


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("token", wrong), ("token", b"bytes"), ("user_id", "xyz"), ("external_user_id", wrong)),
        *(("transaction_data", None), ("transaction_data", "\ud800")),
    ],
)
async def test_a_wrong_argument_is_named(verifier: TransactionVerifier, argument: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await verifier.verify(**{"token": token(), "user_id": USER, "transaction_data": DATA, argument: value})
    assert caught.value.argument == argument


async def test_a_tenant_is_one_segment_of_the_address() -> None:
    async with served(GOOD) as (server, _verifier):
        async with KeylessClient(KEY, base_url=server.url) as client:
            await verify(TransactionVerifier(client, tenant="a/b c"), token())
        assert server.heads[0].startswith(b"GET /customers/a%2Fb%20c/.well-known/jwks.json ")
