"""Event keys: workers sign events and claims with them, so that forged ones are refused.

A broker's permissions are for subjects, and do not keep every user from every subject. NATS checks neither the reply
subject of a publish nor that of a pull. So a user without permission for the outcomes can have a stream publish there.
Only workers and readers have the keys, so a valid signature shows that a worker wrote the message.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Sequence
from hashlib import sha256
from itertools import chain
from operator import attrgetter
from pathlib import Path
from typing import Final, NoReturn, Self

import msgspec

from aiokeyless.errors import ConfigurationError
from aiokeyless.models import Secret
from aiokeyless.worker.messages import ApprovalEvent, NewerVersionError, read_event

MESSAGE_ID: Final = "Nats-Msg-Id"  # the header by which a stream recognizes a duplicate
TRACEPARENT: Final = "traceparent"  # the header of W3C Trace Context, of requests and events
#: The header of an event or a claim that holds its signature.
SIGNATURE: Final = "Keyless-Signature"
VARIABLE: Final = "KEYLESS_EVENT_KEY"
#: Kinds of signed data. A signature of one kind is not valid for another.
EVENT: Final = "event"
CLAIM: Final = "claim"
_SHORTEST: Final = 32  # characters
_LONGEST_FILE: Final = 64 << 10  # bytes
_FORM: Final = "v1"
_KEY_ID: Final = 16  # characters of the digest that names a key
#: What an event says of its request.
_SUBJECT: Final = attrgetter("operation_id", "user_id", "external_user_id", "payload_sha256", "context")


class EventKeys:
    """The keys of a fleet's events and claims. The first one signs, and each of them is accepted.

    Args:
        keys: Secret texts, each of 32 or more printable ASCII characters without blanks, such as the output of
            ``openssl rand -hex 32``.

    Raises:
        ConfigurationError: There is no key, or one is too short to be a secret.
    """

    def __init__(self, *keys: str) -> None:
        self._keys: dict[str, Secret] = {}  # by their ids, the first one signs
        parsed = _parse(keys)
        del keys  # before anything is raised: error reporters print local variables
        if isinstance(parsed, ConfigurationError):
            raise parsed
        self._keys = parsed

    @classmethod
    def from_files(cls, *paths: Path | str) -> Self:
        """Read keys from files, each with one key a line; empty lines do not count.

        Args:
            paths: The files; the first key of the first file signs.

        Raises:
            ConfigurationError: A file cannot be read (the message names it), a key is not valid, or there is none.
        """
        return cls(*chain.from_iterable(map(_read, paths)))  # no variable holds them, see below

    @classmethod
    def from_environment(cls) -> Self | None:
        """Read keys from ``KEYLESS_EVENT_KEY``, separated by blanks; None if it is empty or not set.

        Raises:
            ConfigurationError: A key is not valid.
        """
        # No variable holds a key, because the traceback of an error contains this frame.
        return cls(*os.environ[VARIABLE].split()) if os.environ.get(VARIABLE, "").strip() else None

    def __repr__(self) -> str:
        return f"<EventKeys {' '.join(self._keys)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("event keys cannot be pickled or copied: read them where they are used")

    def sign(self, data: bytes, *, fleet: str, kind: str = EVENT) -> str:
        """Return the signature of an event.

        Args:
            data: The event as it is published.
            fleet: Name of the fleet. The signature is not valid for another fleet with the same key.
            kind: The kind of the data, if it is no event.
        """
        key_id, key = next(iter(self._keys.items()))
        return f"{_FORM} {key_id} {_digest(key, data, fleet, kind)}"

    def verify(self, data: bytes, signature: str | None, *, fleet: str, kind: str = EVENT) -> bool:
        """Return whether one of these keys signed an event.

        Args:
            data: The event as it was published.
            signature: The header ``Keyless-Signature``, or None if there is none.
            fleet: Name of the fleet.
            kind: The kind of the data, if it is no event.
        """
        form, _, rest = (signature or "").partition(" ")
        key_id, _, digest = rest.partition(" ")
        key = self._keys.get(key_id)
        if form != _FORM or key is None or not digest.isascii():
            return False
        return hmac.compare_digest(digest, _digest(key, data, fleet, kind))


def is_about(data: bytes, event: ApprovalEvent) -> bool:
    """Return whether a worker's message, perhaps of a later version, is about the request that an event is about."""
    try:
        return _SUBJECT(read_event(data)) == _SUBJECT(event)
    except NewerVersionError:
        return True
    except msgspec.DecodeError:
        return False


def _read(path: Path | str) -> list[str]:
    """Return the keys in a file."""
    try:
        with open(os.fspath(path), "rb") as file:  # noqa: PTH123  # as many bytes as a key file has, also of a device
            return file.read(_LONGEST_FILE).decode("ascii", "replace").split()
    except (OSError, ValueError, TypeError) as error:  # a zero byte in the name, or no path
        reason = getattr(error, "strerror", None) or str(error)
    raise ConfigurationError(f"no event key can be read from {path!s:.200}: {reason}", argument="paths")


def _parse(keys: Sequence[object]) -> dict[str, Secret] | ConfigurationError:
    """Return keys by their ids, or the error that the caller raises once it holds none of them."""
    if not keys:
        return ConfigurationError("there is no event key", argument="keys")
    parsed: dict[str, Secret] = {}
    for number, key in enumerate(keys, 1):
        if not isinstance(key, str):
            return ConfigurationError(f"event key {number} must be text, not {type(key).__name__}", argument="keys")
        if len(key) < _SHORTEST or not (key.isascii() and key.isprintable()) or " " in key:
            return ConfigurationError(
                f"event key {number} must be {_SHORTEST} or more printable ASCII characters without blanks: make one "
                "with openssl rand -hex 32",
                argument="keys",
            )
        parsed[_key_id(key)] = Secret(key)
    return parsed


def _key_id(key: str) -> str:
    return sha256(b"aiokeyless event key id\0" + key.encode()).hexdigest()[:_KEY_ID]


def _digest(key: Secret, data: bytes, fleet: str, kind: str) -> str:
    # Joined first, so that arguments of a wrong type fail here and not in a frame that holds the key.
    signed = b"\0".join((b"aiokeyless " + kind.encode(), fleet.encode(), data))
    return hmac.new(key.reveal().encode(), signed, sha256).hexdigest()
