"""What the sandbox's phone signs, and the keys that it signs with, as a verifier sees them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aiokeyless import ConfigurationError, SignatureError, SignatureReason
from aiokeyless.signatures import TransactionVerifier

if TYPE_CHECKING:
    from aiokeyless import KeylessClient
    from aiokeyless.sandbox import Sandbox

USER = "C0FFEE"
TEXT = "Pay 40 EUR to J\u00f6rg"
KEY_SET = "/customers/sandbox/.well-known/jwks.json"


@pytest.fixture
def verifier(sandbox: Sandbox, client: KeylessClient) -> TransactionVerifier:
    return TransactionVerifier(client, tenant=sandbox.tenant)


async def reason_for(verifier: TransactionVerifier, token: str) -> SignatureReason:
    with pytest.raises(SignatureError) as caught:
        await verifier.verify(token, user_id=USER, transaction_data=TEXT)
    return caught.value.reason


async def test_an_approval_is_signed_with_what_was_approved(sandbox: Sandbox, verifier: TransactionVerifier) -> None:
    sandbox.approve("a", user_id=USER, operation_payload=TEXT, external_user_id="ann")
    token = sandbox.sign("a")
    signed = await verifier.verify(token, user_id=USER, transaction_data=TEXT, external_user_id="ann")
    assert (signed.key_id, signed.version) == ("sandbox-1", "1.1.0")
    again = await verifier.verify(sandbox.sign("a"), user_id=USER, transaction_data=TEXT)
    assert again.signed_sha256 == signed.signed_sha256, "it is signed once, at the approval"


async def test_a_linked_user_signs_with_their_external_id(sandbox: Sandbox, verifier: TransactionVerifier) -> None:
    sandbox.enroll(USER, external_user_id="ann")
    sandbox.approve("a", user_id=USER)
    signed = await verifier.verify(sandbox.sign("a"), user_id=USER, transaction_data="")
    assert signed.external_user_id == "ann"
    sandbox.approve("b", user_id="BEEF")
    assert (await verifier.verify(sandbox.sign("b"), user_id="BEEF", transaction_data="")).external_user_id is None


async def test_only_what_is_approved_is_signed(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id="a")
    for operation_id, message in (("a", "is not approved"), ("b", "there is no operation")):
        with pytest.raises(ConfigurationError, match=message) as caught:
            sandbox.sign(operation_id)
        assert caught.value.argument == "operation_id"
    sandbox.approve("a")
    assert sandbox.sign("a")
    sandbox.forget("a")
    with pytest.raises(ConfigurationError, match="there is no operation"):
        sandbox.sign("a")


async def test_a_tampered_token_is_refused(sandbox: Sandbox, verifier: TransactionVerifier) -> None:
    sandbox.approve("a", user_id=USER, operation_payload=TEXT)
    assert await reason_for(verifier, sandbox.sign("a", tampered=True)) is SignatureReason.BAD_SIGNATURE


@pytest.mark.parametrize(
    ("claims", "reason"),
    [
        ({"exp": 0}, SignatureReason.EXPIRED),
        ({"iat": 0}, SignatureReason.TOO_OLD),
        ({"sub": "BEEF"}, SignatureReason.WRONG_USER),
        ({"td": "Pay 9000"}, SignatureReason.WRONG_DATA),
        ({"aud": "another"}, SignatureReason.WRONG_AUDIENCE),
    ],
    ids=str,
)
async def test_other_claims_are_signed_as_they_are(
    sandbox: Sandbox, verifier: TransactionVerifier, claims: dict[str, object], reason: SignatureReason
) -> None:
    sandbox.approve("a", user_id=USER, operation_payload=TEXT)
    assert await reason_for(verifier, sandbox.sign("a", claims=claims)) is reason


async def test_after_a_rotation_both_keys_verify_until_one_is_retired(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.approve("old", user_id=USER, operation_payload=TEXT)
    assert sandbox.rotate_keys() == "sandbox-2"
    sandbox.approve("new", user_id=USER, operation_payload=TEXT)
    verifier = TransactionVerifier(client, tenant=sandbox.tenant)
    for operation_id, key_id in (("old", "sandbox-1"), ("new", "sandbox-2")):
        signed = await verifier.verify(sandbox.sign(operation_id), user_id=USER, transaction_data=TEXT)
        assert signed.key_id == key_id
    assert sandbox.rotate_keys(retire=True) == "sandbox-3"
    fresh = TransactionVerifier(client, tenant=sandbox.tenant)
    assert await reason_for(fresh, sandbox.sign("old")) is SignatureReason.UNKNOWN_KEY


async def test_the_keys_are_public_and_those_of_one_tenant(sandbox: Sandbox) -> None:
    async with aiohttp.ClientSession(sandbox.url) as session:
        async with session.get(KEY_SET) as response:
            assert (response.status, response.content_type) == (200, "application/json")
            [key] = (await response.json())["keys"]
        assert set(key) == {"kty", "crv", "x", "y", "kid", "use", "alg"}
        async with session.post(KEY_SET) as response:
            assert (response.status, response.headers["Allow"]) == (405, "GET")
        async with session.get("/customers/another/.well-known/jwks.json") as response:
            assert response.status == 401, "every other path needs the key"


async def test_without_the_extra_nothing_can_be_signed(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jwt", None)
    monkeypatch.delitem(sys.modules, "aiokeyless.sandbox.signing", raising=False)
    sandbox.approve("a", user_id=USER)
    with pytest.raises(ConfigurationError, match='install the extra "jwt"'):
        sandbox.sign("a")
    with pytest.raises(ConfigurationError, match='install the extra "jwt"'):
        sandbox.rotate_keys()
    async with aiohttp.ClientSession(sandbox.url) as session, session.get(KEY_SET) as response:
        assert response.status == 500
        assert "see its log" in json.loads(await response.read())["error"]
