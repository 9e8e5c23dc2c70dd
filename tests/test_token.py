"""What a signed transaction proves, and the attacks that a careless verifier would fall for, each with its reason."""

from __future__ import annotations

import hashlib
import json
import math
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import signing
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from signing import (
    DATA,
    ORDER,
    USER,
    decoded,
    ec_jwk,
    ec_key,
    encoded,
    header,
    number,
    rsa_jwk,
    rsa_key,
    sign_es256,
    sign_hs256_by_public_key,
    sign_rs256,
)

from aiokeyless import SignatureError, SignatureReason
from aiokeyless._token import Expectation, KeySet, read_token, verify
from aiokeyless.signatures import SignedTransaction

if TYPE_CHECKING:
    from collections.abc import Callable

NOW = 1_900_000_000
claims = partial(signing.claims, iat=NOW)


def token(
    claimed: dict[str, Any] | bytes | None = None,
    head: dict[str, Any] | bytes | None = None,
    sign: Callable[[bytes], bytes] = sign_es256,
) -> str:
    return signing.token(claims() if claimed is None else claimed, head, sign)


def accept(text: str, keys: list[Any] | None = None, **changes: Any) -> SignedTransaction:
    """Verify a token as the verifier does, with a key set at hand."""
    expected = {
        "user_id": USER,
        "transaction_data": DATA,
        "external_user_id": None,
        "issuer": None,
        "audience": None,
        "max_age": 300.0,
        "leeway": 30.0,
    }
    parsed = read_token(text)
    key_set = KeySet(json.dumps({"keys": [ec_jwk(), rsa_jwk()] if keys is None else keys}).encode())
    key = key_set.find(parsed.key_id)
    assert key_set.find(parsed.key_id) is key, "a key is checked once"
    if key is None:
        raise SignatureError(SignatureReason.UNKNOWN_KEY)
    return verify(parsed, key, Expectation(**{**expected, **changes}), NOW)


def reason_for(text: str, **options: Any) -> SignatureReason:
    with pytest.raises(SignatureError) as caught:
        accept(text, **options)
    return caught.value.reason


# What is accepted


def test_a_right_token_proves_who_signed_what_and_when() -> None:
    text = token()
    signed = accept(text, external_user_id="ann")
    assert signed == SignedTransaction(
        user_id=USER,
        external_user_id="ann",
        transaction_data=DATA,
        issued_at=datetime.fromtimestamp(NOW, UTC),
        key_id="k1",
        version="1.1.0",
        signed_sha256=hashlib.sha256(text.rpartition(".")[0].encode()).hexdigest(),
    )
    assert json.loads(json.dumps(signed.to_dict()))["issued_at"] == signed.issued_at.isoformat()
    assert DATA not in repr(signed)
    assert "ann" not in repr(signed)


def test_an_rsa_key_signs_too() -> None:
    assert accept(token(head=header(alg="RS256", kid="r1"), sign=sign_rs256)).key_id == "r1"


@pytest.mark.parametrize(
    "changes",
    [
        {"external_user_id": ..., "version": ...},
        {"external_user_id": None, "version": None},
        {"sub": USER.lower()},
        {"exp": 4_000_000_000, "nbf": 1, "iss": "anyone", "jti": "1", "more": {"any": [1.5, None]}},
    ],
    ids=["only what is demanded", "null", "lower case", "more than is demanded"],
)
def test_other_right_claims_are_accepted(changes: dict[str, Any]) -> None:
    assert accept(token(claims(**changes))).user_id == USER


@pytest.mark.parametrize("data", ["", "Zahle 5 \u20ac an J\u00f6rg", "\u202eevil", "a\0b\n", "\U0001f600" * 1000])
def test_any_text_can_be_signed(data: str) -> None:
    assert accept(token(claims(td=data)), transaction_data=data).transaction_data == data


def test_the_longest_token_has_16_384_characters() -> None:
    text = token(claims(more="m" * (3 * (16_384 - len(token(claims(more="")))) // 4)))
    assert len(text) == 16_384
    accept(text)


@pytest.mark.parametrize(
    "changes",
    [{"use": ..., "alg": ...}, {"key_ops": ["verify"]}, {"more": 1}],
    ids=["no use, no alg", "to verify", "more members"],
)
def test_a_key_may_say_less_or_more(changes: dict[str, Any]) -> None:
    accept(token(), keys=[ec_jwk(**changes)])


# Attacks on the form


def duplicated(fields: dict[str, Any], name: str, value: str) -> bytes:
    """Write a name twice: parsers take the last one, or the first."""
    text = json.dumps(fields)
    return f'{{"{name}": {value}, {text[1:]}'.encode()


def sign_nothing(_message: bytes) -> bytes:
    return b"\0" * 64


def other_text_of_the_signature(text: str) -> str:
    """Change the bits of the last character that lax base64 ignores."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return text[:-1] + alphabet[alphabet.index(text[-1]) ^ 1]


MALFORMED: dict[str, Callable[[], str]] = {
    "nothing": lambda: "",
    "two parts": lambda: token().rpartition(".")[0],
    "four parts": lambda: f"{token()}.{encoded(b'more')}",
    "five parts, as of an encrypted one": lambda: f"{token()}.a.a",
    "an empty signature": lambda: token().rpartition(".")[0] + ".",
    "padding": lambda: f"{token()}==",
    "padding in the header": lambda: token().replace(".", "==.", 1),
    "another text of the same signature": lambda: other_text_of_the_signature(token()),
    "a blank": lambda: f"{token()} ",
    "a line break": lambda: f"{token()}\n",
    "base64 of the other alphabet": lambda: token().replace(".", "+.", 1),
    "a part of a length that base64 has not": lambda: f"{encoded(b'{}')}.AAAAA.{encoded(b'a')}",
    "not ASCII": lambda: token() + "\u212a",
    "digits that are no ASCII": lambda: token().replace(".", "\u0661.", 1),
    "a lone surrogate": lambda: token() + "\ud800",
    "a lone surrogate as the text": lambda: token(claims(td="\ud800")),
    "a lone surrogate as the external user id": lambda: token(claims(external_user_id="\ud800")),
    "a lone surrogate deep inside": lambda: token(claims(more=[{"a": "\ud800"}])),
    "a lone surrogate in the header": lambda: token(head=header(kid="\udfff")),
    "a megabyte": lambda: token(claims(more="m" * (1 << 20))),
    "one character too many": lambda: "a" * 16_385,
    "a header that is no JSON": lambda: token(head=b"{"),
    "a header that is no UTF-8": lambda: token(head=b'{"alg": "ES256", "kid": "k1", "a": "\xff"}'),
    "a header that is a list": lambda: token(head=b'["alg", "ES256"]'),
    "claims that are no JSON": lambda: token(b"claims"),
    "claims nested without end": lambda: token(b"[" * 10_000),
    "a number of too many digits": lambda: token(b'{"iat": ' + b"9" * 10_000 + b"}"),
    "a header's name twice": lambda: token(head=duplicated(header(), "alg", '"none"')),
    "a claim twice": lambda: token(duplicated(claims(), "td", '"Pay 9000 EUR to Mallory"')),
    "a claim twice, deep inside": lambda: token(b'{"a": [{"td": 1, "td": 2}], ' + json.dumps(claims()).encode()[1:]),
    "no kid": lambda: token(head=header(kid=...)),
    "a kid that is no text": lambda: token(head=header(kid=["k1"])),
    "no alg": lambda: token(head=header(alg=...)),
    "an alg that is no text": lambda: token(head=header(alg=["ES256"])),
    **{
        f"the header {name}": partial(token, head=header(**{name: value}))
        for name, value in {
            "crit": ["exp"],
            "b64": False,
            "jku": "https://evil.example/jwks.json",
            "jwk": ec_jwk(),
            "x5u": "https://evil.example/key.pem",
            "x5c": ["MII"],
            "zip": "DEF",
        }.items()
    },
}


@pytest.mark.parametrize("make", MALFORMED.values(), ids=MALFORMED.keys())
def test_another_form_is_refused(make: Callable[[], str]) -> None:
    assert reason_for(make()) is SignatureReason.MALFORMED


@pytest.mark.parametrize(
    "changes",
    [
        *({"iat": value} for value in (..., None, "1720519812", 1720519812.0, True, -1, 10**18, [1], math.nan)),
        *({"exp": value} for value in (None, "4000000000", 4e9, True, math.inf)),
        *({"nbf": value} for value in (None, "1", 1.0, False)),
        *({"td": value} for value in (..., None, 40, [DATA], {"text": DATA})),
        *({"sub": value} for value in (..., None, 12, [USER])),
        {"external_user_id": 1},
        {"version": 1.1},
    ],
    ids=str,
)
def test_a_claim_of_another_type_is_refused(changes: dict[str, Any]) -> None:
    assert reason_for(token(claims(**changes))) is SignatureReason.MALFORMED


# Attacks on the algorithm and the key


@pytest.mark.parametrize("algorithm", ["none", "None", "HS256", "ES384", "PS256", "EdDSA", "es256", ""])
def test_an_algorithm_that_is_not_accepted_is_refused(algorithm: str) -> None:
    text = token(head=header(alg=algorithm), sign=sign_hs256_by_public_key)
    assert reason_for(text) is SignatureReason.WRONG_ALGORITHM


@pytest.mark.parametrize(
    ("head", "sign"),
    [(header(alg="RS256"), sign_es256), (header(kid="r1"), sign_rs256)],
    ids=["RS256 for a curve", "ES256 for RSA"],
)
def test_the_key_decides_the_algorithm_and_not_the_header(head: dict[str, Any], sign: Callable[[bytes], bytes]) -> None:
    assert reason_for(token(head=head, sign=sign)) is SignatureReason.WRONG_ALGORITHM


SIGNATURES: dict[str, Callable[[bytes], bytes]] = {
    "of another key": lambda message: sign_es256(message, ec_key("another")),
    "of other claims": lambda _message: sign_es256(b"another message"),
    "zeros": sign_nothing,
    "too short": lambda message: sign_es256(message)[:63],
    "too long": lambda message: sign_es256(message) + b"\0",
    "as DER": lambda message: ec_key().sign(message, ec.ECDSA(hashes.SHA256())),
    "of RSA": sign_rs256,
    "of a secret that is the public key": sign_hs256_by_public_key,
}


@pytest.mark.parametrize("sign", SIGNATURES.values(), ids=SIGNATURES.keys())
def test_a_wrong_signature_is_refused(sign: Callable[[bytes], bytes]) -> None:
    assert reason_for(token(sign=sign)) is SignatureReason.BAD_SIGNATURE


def test_claims_that_were_changed_after_signing_are_refused() -> None:
    head, _, signature = token(claims(td="Pay 1 EUR")).split(".")
    forged = f"{head}.{encoded(json.dumps(claims()).encode())}.{signature}"
    assert reason_for(forged) is SignatureReason.BAD_SIGNATURE


def test_the_second_form_of_a_signature_has_the_same_digest() -> None:
    text = token()
    message, _, signature = text.rpartition(".")
    r, s = decoded(signature)[:32], int.from_bytes(decoded(signature)[32:], "big")
    second = f"{message}.{encoded(r + (ORDER - s).to_bytes(32, 'big'))}"
    assert second != text
    first, again = accept(text), accept(second)
    assert first == again, "a unique index on the digest accepts it once"


UNUSABLE: dict[str, Callable[[], dict[str, Any]]] = {
    "for encryption": lambda: ec_jwk(use="enc"),
    "of no use that is known": lambda: ec_jwk(use=["sig"]),
    "to sign with": lambda: ec_jwk(key_ops=["sign"]),
    "to verify and to encrypt with": lambda: ec_jwk(key_ops=["verify", "encrypt"]),
    "for no operation": lambda: ec_jwk(key_ops=[]),
    "for operations that are no list": lambda: ec_jwk(key_ops="verify"),
    "for another algorithm": lambda: ec_jwk(alg="ES384"),
    "for no algorithm that is known": lambda: ec_jwk(alg=None),
    "on another curve": lambda: ec_jwk(crv="P-384"),
    "on a curve that is a list": lambda: ec_jwk(crv=["P-256"]),
    "not on its curve": lambda: ec_jwk(x=number(1, 32)),
    "without a half": lambda: ec_jwk(y=...),
    "of a wrong type inside": lambda: ec_jwk(x=5),
    "with a private part": lambda: ec_jwk(d=number(ec_key().private_numbers().private_value, 32)),
    "symmetric": lambda: {"kty": "oct", "k": encoded(b"secret"), "kid": "k1"},
    "of no type": lambda: ec_jwk(kty=...),
    "of a type that is a list": lambda: ec_jwk(kty=["EC"]),
    "RSA of 1024 bits": lambda: rsa_jwk(rsa_key(1024), kid="k1"),
    "RSA of 2040 bits": lambda: rsa_jwk(rsa_key(2040), kid="k1"),
    "RSA for another padding": lambda: rsa_jwk(kid="k1", alg="PS256"),
    "RSA with a private part": lambda: rsa_jwk(kid="k1", p=number(rsa_key().private_numbers().p)),
    "RSA with an even exponent": lambda: rsa_jwk(kid="k1", e=number(4)),
    "RSA on a curve": lambda: rsa_jwk(kid="k1", crv="P-256"),
}


@pytest.mark.parametrize("make", UNUSABLE.values(), ids=UNUSABLE.keys())
def test_a_key_that_must_not_verify_is_no_key(make: Callable[[], dict[str, Any]]) -> None:
    keys = [make(), ec_jwk(ec_key("good"), kid="good")]
    rsa_token = token(head=header(alg="RS256"), sign=lambda message: sign_rs256(message, rsa_key(2048)))
    for text in (token(), rsa_token):
        assert reason_for(text, keys=keys) is SignatureReason.UNKNOWN_KEY
    text = token(head=header(kid="good"), sign=lambda message: sign_es256(message, ec_key("good")))
    accept(text, keys=keys)  # the others are still there


def test_two_keys_of_one_kid_are_none() -> None:
    for second in (ec_jwk(ec_key("another")), ec_jwk(), ec_jwk(use="enc"), rsa_jwk(kid="k1")):
        assert reason_for(token(), keys=[ec_jwk(), second, ec_jwk()]) is SignatureReason.UNKNOWN_KEY


@pytest.mark.parametrize(
    "body",
    [b"", b"<html>", b"[]", b"{}", b'{"keys": {}}', b'{"keys": [], "keys": []}', b'{"keys": ["\xff"]}'],
)
def test_a_body_that_is_no_key_set_is_refused_without_a_word_of_it(body: bytes) -> None:
    with pytest.raises(ValueError, match=r"^the key set is not JSON with a list of keys$"):
        KeySet(body)


def test_what_is_no_key_in_a_key_set_is_passed_over() -> None:
    accept(token(), keys=[1, None, "k1", ["kid", "k1"], {}, {"kid": 1}, ec_jwk(kid=...), ec_jwk()])


# Attacks on the claims


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        *(({"iat": seconds}, SignatureReason.TOO_OLD) for seconds in (-331, -NOW)),
        *(({name: 31}, SignatureReason.NOT_YET_VALID) for name in ("iat", "nbf")),
        *(({"exp": seconds}, SignatureReason.EXPIRED) for seconds in (-30, -NOW)),
        *((right, None) for right in ({"iat": -330}, {"iat": 30}, {"nbf": 30}, {"nbf": -NOW}, {"exp": -29})),
    ],
    ids=str,
)
def test_times_are_checked_within_the_leeway(changes: dict[str, int], reason: SignatureReason | None) -> None:
    text = token(claims(**{name: NOW + seconds for name, seconds in changes.items()}))
    if reason is None:
        accept(text)
    else:
        assert reason_for(text) is reason


def test_the_age_and_the_leeway_can_be_chosen() -> None:
    accept(token(claims(iat=NOW - 7200)), max_age=7200, leeway=0)
    accept(token(claims(iat=NOW)), max_age=7200, leeway=0)
    assert reason_for(token(claims(iat=NOW - 7201)), max_age=7200, leeway=0) is SignatureReason.TOO_OLD
    assert reason_for(token(claims(iat=NOW + 1)), max_age=7200, leeway=0) is SignatureReason.NOT_YET_VALID


@pytest.mark.parametrize(
    "options",
    [{"user_id": "BEEF"}, {"user_id": f"{USER}0"}, {"external_user_id": "Ann"}, {"external_user_id": ""}],
    ids=str,
)
def test_another_user_is_refused(options: dict[str, str]) -> None:
    assert reason_for(token(), **options) is SignatureReason.WRONG_USER


@pytest.mark.parametrize("sub", ["", "\uff23\uff10FFEE", "C0\ufb00EE", f" {USER}"])
def test_a_subject_that_is_not_the_user_is_refused(sub: str) -> None:
    assert reason_for(token(claims(sub=sub))) is SignatureReason.WRONG_USER


def test_a_token_without_the_external_id_that_is_expected_is_refused() -> None:
    text = token(claims(external_user_id=...))
    assert reason_for(text, external_user_id="ann") is SignatureReason.WRONG_USER


@pytest.mark.parametrize(
    ("signed", "expected"),
    [
        ("Pay 9000 EUR to Mallory", DATA),
        ("Pay 40 EUR to J\u00f6rg", "Pay 40 EUR to Jo\u0308rg"),
        ("Pay 40 EUR to \u212bsa", "Pay 40 EUR to \u00c5sa"),
        (f"{DATA} ", DATA),
        (DATA.lower(), DATA),
        ("", DATA),
    ],
)
def test_another_text_is_refused(signed: str, expected: str) -> None:
    text = token(claims(td=signed))
    assert reason_for(text, transaction_data=expected) is SignatureReason.WRONG_DATA


@pytest.mark.parametrize(
    ("audience", "claimed", "accepted"),
    [
        (None, ..., True),
        *((None, claimed, False) for claimed in ("shop", None, [None])),
        *(("shop", claimed, True) for claimed in ("shop", ["bank", "shop"])),
        *(("shop", claimed, False) for claimed in (..., "bank", ["bank"], "a shop", {"shop": 1})),
    ],
)
def test_an_audience_is_expected_or_refused(audience: str | None, claimed: object, accepted: bool) -> None:
    text = token(claims(aud=claimed))
    if accepted:
        accept(text, audience=audience)
    else:
        assert reason_for(text, audience=audience) is SignatureReason.WRONG_AUDIENCE


@pytest.mark.parametrize("claimed", [..., None, "another", ["keyless"], ""])
def test_another_issuer_than_the_expected_one_is_refused(claimed: object) -> None:
    assert reason_for(token(claims(iss=claimed)), issuer="keyless") is SignatureReason.WRONG_ISSUER
    accept(token(claims(iss="keyless")), issuer="keyless")
