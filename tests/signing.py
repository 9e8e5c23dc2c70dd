"""Keys and tokens for the tests of signatures, made without PyJWT, which would refuse to write most of them."""

from __future__ import annotations

import base64
import functools
import hashlib
import hmac
import json
import time
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

if TYPE_CHECKING:
    from collections.abc import Callable

USER = "C0FFEE"
DATA = "Pay 40 EUR to Alice"
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of the curve P-256


def encoded(content: bytes) -> str:
    return base64.urlsafe_b64encode(content).rstrip(b"=").decode()


def decoded(part: str) -> bytes:
    return base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))


def number(value: int, size: int | None = None) -> str:
    return encoded(value.to_bytes(size or (value.bit_length() + 7) // 8, "big"))


@functools.cache
def ec_key(_name: str = "") -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@functools.cache
def rsa_key(bits: int = 2048, _name: str = "") -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=bits)


def ec_jwk(key: ec.EllipticCurvePrivateKey | None = None, **changes: Any) -> dict[str, Any]:
    numbers = (key or ec_key()).public_key().public_numbers()
    jwk = {"kty": "EC", "crv": "P-256", "x": number(numbers.x, 32), "y": number(numbers.y, 32), "kid": "k1"}
    return with_changes({**jwk, "use": "sig", "alg": "ES256"}, changes)


def rsa_jwk(key: rsa.RSAPrivateKey | None = None, **changes: Any) -> dict[str, Any]:
    numbers = (key or rsa_key()).public_key().public_numbers()
    jwk = {"kty": "RSA", "n": number(numbers.n), "e": number(numbers.e), "kid": "r1", "use": "sig", "alg": "RS256"}
    return with_changes(jwk, changes)


def with_changes(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return the fields with others in their place; those that are `...` are left out."""
    return {name: value for name, value in {**fields, **changes}.items() if value is not ...}


def sign_es256(message: bytes, key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    r, s = decode_dss_signature((key or ec_key()).sign(message, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32, "big") + s.to_bytes(32, "big")


def sign_rs256(message: bytes, key: rsa.RSAPrivateKey | None = None) -> bytes:
    return (key or rsa_key()).sign(message, padding.PKCS1v15(), hashes.SHA256())


def sign_hs256_by_public_key(message: bytes) -> bytes:
    pem = (
        ec_key().public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return hmac.digest(pem, message, hashlib.sha256)


def claims(**changes: Any) -> dict[str, Any]:
    plain = {"iat": int(time.time()), "td": DATA, "version": "1.1.0", "sub": USER, "external_user_id": "ann"}
    return with_changes(plain, changes)


def header(**changes: Any) -> dict[str, Any]:
    return with_changes({"alg": "ES256", "typ": "JWT", "kid": "k1"}, changes)


def token(
    claimed: dict[str, Any] | bytes | None = None,
    head: dict[str, Any] | bytes | None = None,
    sign: Callable[[bytes], bytes] = sign_es256,
) -> str:
    """Sign any claims under any header; the signature is right for them."""
    parts = (header() if head is None else head, claims() if claimed is None else claimed)
    texts = [encoded(part if isinstance(part, bytes) else json.dumps(part).encode()) for part in parts]
    message = ".".join(texts)
    return f"{message}.{encoded(sign(message.encode()))}"


def key_set(*keys: dict[str, Any]) -> dict[str, Any]:
    return {"keys": list(keys)}
