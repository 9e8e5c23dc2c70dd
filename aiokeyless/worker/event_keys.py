"""Event keys: an event that a worker signed can be told from one that anybody else published.

A broker's permissions are for subjects, and do not keep every user from every subject: NATS checks neither the reply
subject of a publish nor that of a pull, so that a user who is denied the outcomes can have a stream publish there. What
bears a signature under a key that only workers and readers have, a worker wrote.
"""

from __future__ import annotations

import hmac
import os
from hashlib import sha256
from typing import TYPE_CHECKING, Final, NoReturn, Self

from aiokeyless.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

#: The header of an event that holds its signature.
SIGNATURE: Final = "Keyless-Signature"
VARIABLE: Final = "KEYLESS_EVENT_KEY"
_SHORTEST: Final = 32  # characters
_LONGEST_FILE: Final = 64 << 10  # bytes
_FORM: Final = "v1"
_KEY_ID: Final = 16  # characters of the digest by which a key is named


class EventKeys:
    """The keys of a fleet's events: the first one signs, each of them is accepted.

    To rotate: add the new key as the last one everywhere, then make it the first one at the workers, and remove the old
    one when no event is left that it signed.

    Args:
        keys: Each a secret text of 32 printable ASCII characters or more without blanks, as ``openssl rand -hex 32``
            makes it.

    Raises:
        ConfigurationError: There is none, or one is too short to be a secret.
    """

    def __init__(self, *keys: str) -> None:
        self._keys: dict[str, bytes] = {}  # by their ids, the first one signs
        parsed = _parsed(keys)
        del keys  # before anything is raised: error reporters print local variables
        if isinstance(parsed, ConfigurationError):
            raise parsed
        self._keys = parsed

    @classmethod
    def from_files(cls, *paths: Path | str) -> Self:
        """Read keys from files, each with one key a line; empty lines do not count.

        Args:
            paths: The files, that with the key that signs first.

        Raises:
            ConfigurationError: A file cannot be read, which the message names; or a key is not valid, or there is none.
        """
        keys: list[str] = []
        for path in paths:
            try:
                with open(path, "rb") as file:  # noqa: PTH123  # as many bytes as a key file has, also of a device
                    keys += file.read(_LONGEST_FILE).decode("ascii").split()
            except (OSError, UnicodeError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not ASCII text"
                keys.clear()
                raise ConfigurationError(f"no event key can be read from {path}: {reason}", argument="paths") from None
        return cls._of(keys)

    @classmethod
    def from_environment(cls) -> Self | None:
        """Read keys from ``KEYLESS_EVENT_KEY``, separated by blanks; None where it is empty or not set.

        Raises:
            ConfigurationError: A key is not valid.
        """
        keys = os.environ.get(VARIABLE, "").split()
        return cls._of(keys) if keys else None

    @classmethod
    def _of(cls, keys: list[str]) -> Self:
        """Make them, or forget the texts."""
        if isinstance(parsed := _parsed(keys), ConfigurationError):
            keys.clear()
            raise parsed
        return cls(*keys)

    def __repr__(self) -> str:
        return f"<EventKeys {' '.join(self._keys)}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError("event keys cannot be pickled or copied: read them where they are used")

    def sign(self, data: bytes, *, fleet: str) -> str:
        """Return the signature of an event.

        Args:
            data: The event as it is published.
            fleet: Name of the fleet: an event of one fleet is none of another with the same key.
        """
        key_id, key = next(iter(self._keys.items()))
        return f"{_FORM} {key_id} {_digest(key, data, fleet)}"

    def are_of(self, data: bytes, signature: str | None, *, fleet: str) -> bool:
        """Return whether one of these keys signed an event.

        Args:
            data: The event as it was published.
            signature: The header ``Keyless-Signature``, or None where it has none.
            fleet: Name of the fleet.
        """
        form, _, rest = (signature or "").partition(" ")
        key_id, _, digest = rest.partition(" ")
        key = self._keys.get(key_id)
        if form != _FORM or key is None or not digest.isascii():
            return False
        return hmac.compare_digest(digest, _digest(key, data, fleet))


def _parsed(keys: Sequence[str]) -> dict[str, bytes] | ConfigurationError:
    """Return keys by their ids, or the error that the caller raises once it holds none of them."""
    if not keys:
        return ConfigurationError("there is no event key", argument="keys")
    for number, key in enumerate(keys, 1):
        if len(key) < _SHORTEST or not _is_printable(key):
            return ConfigurationError(
                f"event key {number} must be {_SHORTEST} or more printable ASCII characters without blanks: make one "
                "with openssl rand -hex 32",
                argument="keys",
            )
    return {_key_id(key): key.encode() for key in keys}


def _is_printable(key: str) -> bool:
    return key.isascii() and key.isprintable() and " " not in key


def _key_id(key: str) -> str:
    return sha256(b"aiokeyless event key id\0" + key.encode()).hexdigest()[:_KEY_ID]


def _digest(key: bytes, data: bytes, fleet: str) -> str:
    return hmac.new(key, b"aiokeyless event\0" + fleet.encode() + b"\0" + data, sha256).hexdigest()
