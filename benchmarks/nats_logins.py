"""Logins of NATS that expire: an operator, its accounts, and users whose credentials are in a file."""

from __future__ import annotations

import base64
import json
import os
import time
from typing import TYPE_CHECKING, Any, Final

import nkeys  # type: ignore[import-untyped]  # it has no types

if TYPE_CHECKING:
    from pathlib import Path

_UNLIMITED: Final = dict.fromkeys(("subs", "conn", "leaf", "imports", "exports", "data", "payload"), -1)
_JETSTREAM: Final = dict.fromkeys(("mem_storage", "disk_storage", "streams", "consumer"), -1)


class Operator:
    """An operator with one account, whose users it signs.

    Attributes:
        configuration: What a server needs to believe it.
    """

    def __init__(self) -> None:
        operator, system = _key(nkeys.PREFIX_BYTE_OPERATOR), _key(nkeys.PREFIX_BYTE_ACCOUNT)
        self._account = _key(nkeys.PREFIX_BYTE_ACCOUNT)
        itself = _signed(operator, operator, {"type": "operator", "system_account": _name(system)})
        accounts = {
            _name(key): _signed(operator, key, {"type": "account", "limits": {**_UNLIMITED, **more}})
            for key, more in ((system, {}), (self._account, _JETSTREAM))
        }
        self.configuration: str = "\n".join(
            (
                f"operator: {itself}",
                f"system_account: {_name(system)}",
                "resolver: MEMORY",
                f"resolver_preload: {json.dumps(accounts)}",
            )
        )

    def write_login(self, file: Path, *, lasts: float) -> None:
        """Write the credentials of a new user, which expire after so many seconds."""
        user = _key(nkeys.PREFIX_BYTE_USER)
        facts = {"type": "user", "subs": -1, "data": -1, "payload": -1}
        values = {
            "NATS USER JWT": _signed(self._account, user, facts, exp=int(time.time() + lasts)),
            "USER NKEY SEED": bytes(user.seed).decode(),
        }
        lines = (f"-----BEGIN {kind}-----\n{value}\n------END {kind}------\n" for kind, value in values.items())
        new = file.with_suffix(".new")
        new.write_text("".join(lines))
        new.replace(file)


def _key(kind: int) -> Any:
    return nkeys.from_seed(bytearray(nkeys.encode_seed(os.urandom(32), kind)))


def _name(key: Any) -> str:
    return bytes(key.public_key).decode()


def _signed(issuer: Any, subject: Any, facts: dict[str, Any], **claims: Any) -> str:
    about = {
        "iat": int(time.time()),
        "iss": _name(issuer),
        "sub": _name(subject),
        "nats": {"version": 2, **facts},
        **claims,
    }
    text = ".".join(_encoded(json.dumps(part).encode()) for part in ({"typ": "JWT", "alg": "ed25519-nkey"}, about))
    return f"{text}.{_encoded(issuer.sign(text.encode()))}"


def _encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
