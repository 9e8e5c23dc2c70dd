"""The verdict on one signed transaction: its form, its key, its signature, its claims. Pure; needs the extra "jwt".

A token comes from a phone, so it may be forged. PyJWT checks only the signature here. It is lax about
base64, duplicate names, types and headers, so this module checks all of these.

Source: Keyless documentation, "Mobile SDK JWT signing" and "JWT verification best practice"; RFC 8725.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from datetime import UTC, datetime
from typing import Any, Final, NamedTuple

import jwt
import jwt.types
import msgspec
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

from ._rules.approval import is_same_user
from .errors import SignatureError, SignatureReason
from .models import Private, SignedTransaction

#: Characters of a token, at most.
MAX_TOKEN: Final = 16_384
_LEAST_RSA_BITS: Final = 2048


class _Kind(NamedTuple):
    """A kind of key that is accepted, its one algorithm, and the members of its public JWK."""

    kty: str
    crv: str | None
    algorithm: str
    members: tuple[str, ...]


_KINDS: Final = (
    _Kind("EC", "P-256", "ES256", ("kty", "crv", "x", "y")),
    _Kind("RSA", None, "RS256", ("kty", "n", "e")),
)
_ALGORITHMS: Final = frozenset(kind.algorithm for kind in _KINDS)
_SEGMENT: Final = re.compile("[A-Za-z0-9_-]+")
#: The end of the year 9999, the last of a datetime, in seconds since the epoch.
_END_OF_TIME: Final = 253_402_300_800

#: Headers that change the signed content or the source of the key.
_REFUSED_HEADERS: Final = frozenset({"b64", "crit", "jku", "jwk", "x5c", "x5u", "zip"})
#: Members of a JWK that a public key does not have.
_PRIVATE: Final = frozenset({"d", "dp", "dq", "k", "oth", "p", "q", "qi"})

#: `jwt.decode` checks only the signature. This module checks the claims, with their types.
_SIGNATURE_ONLY: Final[jwt.types.Options] = {
    "verify_signature": True,
    "verify_aud": False,
    "verify_exp": False,
    "verify_iat": False,
    "verify_iss": False,
    "verify_jti": False,
    "verify_nbf": False,
    "verify_sub": False,
}


class Token(Private, msgspec.Struct, frozen=True):
    """A token whose form is right. Nothing in it is verified."""

    text: str
    key_id: str
    algorithm: str
    claims: dict[str, Any]


class Expectation(Private, msgspec.Struct, frozen=True):
    """The expected claims of a token, as `TransactionVerifier` describes them; the user is in upper case."""

    user_id: str
    transaction_data: str
    external_user_id: str | None
    issuer: str | None
    audience: str | None
    max_age: float
    leeway: float


class KeySet:
    """The keys of one tenant, by ``kid``. `find` checks a key when it is first needed.

    Args:
        body: A JSON Web Key Set.

    Raises:
        ValueError: The body is not one. The message does not quote it.
    """

    def __init__(self, body: bytes) -> None:
        document = _read_object(body)
        keys = document.get("keys") if document is not None else None
        if not isinstance(keys, list):
            raise ValueError("the key set is not JSON with a list of keys")  # noqa: TRY004  # a body, no argument
        # None: several keys have this kid.
        self._raw: dict[str, dict[str, Any] | None] = {}
        self._checked: dict[str, jwt.PyJWK | None] = {}
        for key in keys:
            if isinstance(key, dict) and isinstance(key_id := key.get("kid"), str):
                self._raw[key_id] = None if key_id in self._raw else key

    def find(self, key_id: str) -> jwt.PyJWK | None:
        """Return the key with a ``kid``; None if there is none, there are several, or it must not verify a token."""
        raw = self._raw.get(key_id)
        if raw is None:
            return None
        if key_id not in self._checked:
            self._checked[key_id] = _make_key(raw)
        return self._checked[key_id]


def read_token(text: str) -> Token:
    """Read a token without trusting it.

    Raises:
        SignatureError: Its form is wrong, or its algorithm is not accepted.
    """
    if len(text) > MAX_TOKEN or not text.isascii():
        raise SignatureError(SignatureReason.MALFORMED)
    parts = text.split(".")
    if len(parts) != 3:
        raise SignatureError(SignatureReason.MALFORMED)
    header, claims, signature = map(_decode, parts)
    fields, claimed = _read_object(header), _read_object(claims)
    if fields is None or claimed is None or signature is None or _REFUSED_HEADERS & fields.keys():
        raise SignatureError(SignatureReason.MALFORMED)
    key_id, algorithm = fields.get("kid"), fields.get("alg")
    if not isinstance(key_id, str) or not isinstance(algorithm, str):
        raise SignatureError(SignatureReason.MALFORMED)
    if algorithm not in _ALGORITHMS:
        raise SignatureError(SignatureReason.WRONG_ALGORITHM)
    return Token(text, key_id, algorithm, claimed)


def verify(token: Token, key: jwt.PyJWK, expected: Expectation, now: float) -> SignedTransaction:
    """Verify a token by the key with its ``kid``, and return the transaction that it proves.

    Raises:
        SignatureError: The token is refused.
    """
    if token.algorithm != key.algorithm_name:
        raise SignatureError(SignatureReason.WRONG_ALGORITHM)
    try:
        jwt.decode(token.text, key, algorithms=[key.algorithm_name], options=_SIGNATURE_ONLY)
    except jwt.PyJWTError:
        raise SignatureError(SignatureReason.BAD_SIGNATURE) from None
    reason = _check_claims(token.claims, expected, now)
    if reason is not None:
        raise SignatureError(reason)
    return SignedTransaction(
        user_id=expected.user_id,
        external_user_id=token.claims.get("external_user_id"),
        transaction_data=expected.transaction_data,
        issued_at=datetime.fromtimestamp(token.claims["iat"], UTC),
        key_id=token.key_id,
        version=token.claims.get("version"),
        signed_sha256=hashlib.sha256(token.text.rpartition(".")[0].encode()).hexdigest(),
    )


def _check_claims(claims: dict[str, Any], expected: Expectation, now: float) -> SignatureReason | None:
    """Return the first reason to refuse claims whose signature is right; None if there is none."""
    if not _are_typed(claims):
        return SignatureReason.MALFORMED
    return _check_times(claims, expected, now) or _check_parties(claims, expected)


def _are_typed(claims: dict[str, Any]) -> bool:
    """Return whether ``iat``, ``sub`` and ``td`` exist, and each claim that is read has its type."""
    times = [claims.get("iat"), claims.get("exp", 0), claims.get("nbf", 0)]
    texts = [claims.get("sub"), claims.get("td")]
    optional = [claims.get("external_user_id"), claims.get("version")]
    return (
        # Not isinstance, since a bool is an int too.
        all(type(time) is int and 0 <= time < _END_OF_TIME for time in times)
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in optional)
    )


def _check_times(claims: dict[str, Any], expected: Expectation, now: float) -> SignatureReason | None:
    if max(claims["iat"], claims.get("nbf", 0)) > now + expected.leeway:
        return SignatureReason.NOT_YET_VALID
    if claims["iat"] < now - expected.max_age - expected.leeway:
        return SignatureReason.TOO_OLD
    if "exp" in claims and claims["exp"] <= now - expected.leeway:
        return SignatureReason.EXPIRED
    return None


def _check_parties(claims: dict[str, Any], expected: Expectation) -> SignatureReason | None:
    if expected.issuer is not None and claims.get("iss") != expected.issuer:
        return SignatureReason.WRONG_ISSUER
    if not _is_meant_for(claims, expected.audience):
        return SignatureReason.WRONG_AUDIENCE
    if not is_same_user(claims["sub"], expected.user_id):
        return SignatureReason.WRONG_USER
    if expected.external_user_id is not None and claims.get("external_user_id") != expected.external_user_id:
        return SignatureReason.WRONG_USER
    # Texts that look the same but differ in Unicode's normal form are different.
    return None if claims["td"] == expected.transaction_data else SignatureReason.WRONG_DATA


def _is_meant_for(claims: dict[str, Any], audience: str | None) -> bool:
    if audience is None or "aud" not in claims:
        return audience is None and "aud" not in claims
    named = claims["aud"]
    return audience in (named if isinstance(named, list) else [named])


def _make_key(raw: dict[str, Any]) -> jwt.PyJWK | None:
    """Return the key of a JWK; None if it is not a strong enough public key for signatures, of an accepted kind."""
    kind = next((kind for kind in _KINDS if (raw.get("kty"), raw.get("crv")) == (kind.kty, kind.crv)), None)
    if kind is None or raw.get("alg", kind.algorithm) != kind.algorithm:
        return None
    if raw.get("use", "sig") != "sig" or raw.get("key_ops", ["verify"]) != ["verify"] or _PRIVATE & raw.keys():
        return None
    try:
        key = jwt.PyJWK({name: raw.get(name) for name in kind.members}, kind.algorithm)
    # Not reported, since the message shows the key.
    except (jwt.PyJWTError, ValueError, TypeError, OverflowError):
        return None
    if isinstance(key.key, RSAPublicKey) and key.key.key_size < _LEAST_RSA_BITS:
        return None
    return key


def _decode(part: str) -> bytes | None:
    """Decode base64url. Return None if it is padded or not canonical, since one signature would have several texts."""
    if _SEGMENT.fullmatch(part) is None:
        return None
    try:
        content = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except binascii.Error:
        return None
    return content if base64.urlsafe_b64encode(content).rstrip(b"=") == part.encode() else None


def _read_object(body: bytes | None) -> dict[str, Any] | None:
    """Return a JSON object; None if it is not one, or has a duplicate name or a lone surrogate at any depth."""
    if body is None:
        return None
    try:
        document = json.loads(body.decode(), object_pairs_hook=_refuse_duplicates)
        json.dumps(document, ensure_ascii=False).encode()
    # Invalid UTF-8, a lone surrogate, and a number with too many digits, are a ValueError too.
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document = dict(pairs)
    if len(document) < len(pairs):
        raise ValueError
    return document
