"""The service's formats: how it writes a time, and what it accepts as a user id."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Final

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
