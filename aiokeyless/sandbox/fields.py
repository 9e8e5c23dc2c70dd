"""The service's formats: how it writes a time, and what it accepts as a user id or a text."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

from aiokeyless.errors import ConfigurationError

_HEX: Final = re.compile(r"[0-9A-F]+")
_SECOND: Final = 1_000_000_000

MOST_DIGITS: Final = 9
"""Digits after the point of the most precise timestamps in the documentation."""


def timestamp(nanoseconds: int, digits: int = MOST_DIGITS) -> str:
    """Format nanoseconds since the epoch as the service does: UTC, no zone, `digits` digits after the point."""
    seconds, fraction = divmod(nanoseconds, _SECOND)
    whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{f'{fraction:09}'[:digits]}"


def is_user_id(text: str) -> bool:
    """Return whether the service accepts the text as a user id: hex in upper case."""
    return _HEX.fullmatch(text) is not None


def check_user_id(text: object) -> str:
    """Return a user id in upper case.

    Raises:
        ConfigurationError: It is not hex.
    """
    if not isinstance(text, str) or not is_user_id(text.upper()):
        raise ConfigurationError(f"user_id must be a hex string, not {text!r}", argument="user_id")
    return text.upper()


def check_text(value: object, name: str, *, empty: bool = False) -> str:
    """Return a text that JSON can carry.

    Raises:
        ConfigurationError: It is not a string, it contains a lone surrogate, or it is empty and `empty` is False.
    """
    if not isinstance(value, str) or (not value and not empty):
        raise ConfigurationError(f"{name} must be a {'string' if empty else 'string that is not empty'}", argument=name)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(f"{name} contains a lone surrogate, which JSON cannot carry", argument=name) from None
    return value
