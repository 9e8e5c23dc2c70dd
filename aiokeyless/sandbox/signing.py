"""The tenant's keys, and the tokens that phones sign with them on an approval. Needs the extra "jwt".

Source: Keyless documentation, "Mobile SDK JWT signing".
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric import ec

if TYPE_CHECKING:
    from collections.abc import Mapping

_VERSION: Final = "1.1.0"
_COORDINATE_BYTES: Final = 32


class _Key(NamedTuple):
    """A key of the tenant. It signs approvals from `since` on, in nanoseconds since the epoch."""

    key_id: str
    since: int
    private: ec.EllipticCurvePrivateKey


class Signer:
    """The keys of one sandbox's tenant; it starts with one key."""

    def __init__(self) -> None:
        self._keys: list[_Key] = []
        self._published: list[_Key] = []
        self.rotate(0, retire=False)

    def rotate(self, now: int, *, retire: bool) -> str:
        """Sign with a new key from now on, and return its ``kid``; with `retire`, only that one is published."""
        key = _Key(f"sandbox-{len(self._keys) + 1}", now, ec.generate_private_key(ec.SECP256R1()))
        self._keys.append(key)
        self._published = [*([] if retire else self._published), key]
        return key.key_id

    def key_set_json(self) -> bytes:
        """Return the body of ``GET /customers/{tenant}/.well-known/jwks.json``."""
        return json.dumps({"keys": [_export_public(key) for key in self._published]}).encode()

    def sign(
        self, user_id: str, transaction_data: str, external_user_id: str | None, at: int, claims: Mapping[str, object]
    ) -> str:
        """Return the token that the phone of a user makes.

        Args:
            user_id: The user.
            transaction_data: The text to sign.
            external_user_id: The customer's own id of the user, or None.
            at: When the user signs, in nanoseconds since the epoch.
            claims: Claims to add, or to put in place of the usual ones.
        """
        key = next(key for key in reversed(self._keys) if key.since <= at)
        usual: dict[str, Any] = {
            "iat": at // 1_000_000_000,
            "td": transaction_data,
            "version": _VERSION,
            "sub": user_id,
        }
        if external_user_id is not None:
            usual["external_user_id"] = external_user_id
        return jwt.encode({**usual, **claims}, key.private, "ES256", {"kid": key.key_id})

    @staticmethod
    def tamper(token: str) -> str:
        """Return a token whose transaction data was changed after it was signed."""
        header, _, signature = token.split(".")
        claims = jwt.decode(token, options={"verify_signature": False})
        changed = {**claims, "td": f"{claims['td']} (tampered)"}
        return f"{header}.{_encode_base64url(json.dumps(changed).encode())}.{signature}"


def _export_public(key: _Key) -> dict[str, str]:
    numbers = key.private.public_key().public_numbers()
    x, y = (_encode_base64url(number.to_bytes(_COORDINATE_BYTES, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": key.key_id, "use": "sig", "alg": "ES256"}


def _encode_base64url(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
