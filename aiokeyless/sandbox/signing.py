"""The tenant's keys, and what a phone signs with them when its user approves. Needs the extra "jwt".

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
_COORDINATE: Final = 32  # bytes


class _Key(NamedTuple):
    """A key of the tenant; it signs what is approved from `since` on, in nanoseconds since the epoch."""

    key_id: str
    since: int
    private: ec.EllipticCurvePrivateKey


class Signer:
    """The keys of one sandbox's tenant; the first one is made with it."""

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
        return json.dumps({"keys": [_public(key) for key in self._published]}).encode()

    def sign(
        self, user_id: str, transaction_data: str, external_user_id: str | None, at: int, claims: Mapping[str, object]
    ) -> str:
        """Return the token that a phone makes at a time, in nanoseconds since the epoch.

        Args:
            user_id: The user.
            transaction_data: What the user signs.
            external_user_id: The customer's own id of the user, or None.
            at: When the user signs.
            claims: Claims in place of those, or beside them.
        """
        key = next(key for key in reversed(self._keys) if key.since <= at)
        signed: dict[str, Any] = {
            "iat": at // 1_000_000_000,
            "td": transaction_data,
            "version": _VERSION,
            "sub": user_id,
        }
        if external_user_id is not None:
            signed["external_user_id"] = external_user_id
        return jwt.encode({**signed, **claims}, key.private, "ES256", {"kid": key.key_id})

    @staticmethod
    def tampered(token: str) -> str:
        """Return a token whose transaction data was changed after it was signed."""
        header, _, signature = token.split(".")
        claims = jwt.decode(token, options={"verify_signature": False})
        changed = {**claims, "td": f"{claims['td']} (tampered)"}
        return f"{header}.{_encoded(json.dumps(changed).encode())}.{signature}"


def _public(key: _Key) -> dict[str, str]:
    numbers = key.private.public_key().public_numbers()
    x, y = (_encoded(number.to_bytes(_COORDINATE, "big")) for number in (numbers.x, numbers.y))
    return {"kty": "EC", "crv": "P-256", "x": x, "y": y, "kid": key.key_id, "use": "sig", "alg": "ES256"}


def _encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()
