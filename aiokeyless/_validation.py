"""Checks of arguments and identifiers: each returns what is to be used, or raises with what is wrong and what is right.

Nothing here does I/O.
"""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Final

from .errors import ConfigurationError, InvalidIdentifierError

MAX_IDENTIFIER: Final = 512  # characters: long enough for any id in use, short enough for any gateway's URL limit


def check_operation_id(operation_id: str) -> str:
    """Return the operation id as it is, or say why it cannot travel as one path segment.

    Raises:
        InvalidIdentifierError: Not a string; empty, too long, ``.`` or ``..`` (a path would lose them); control
            characters or lone surrogates in it.
    """
    if not isinstance(operation_id, str):
        raise InvalidIdentifierError(
            f"operation_id must be a string, not {type(operation_id).__name__}", argument="operation_id"
        )
    if not 1 <= len(operation_id) <= MAX_IDENTIFIER:
        raise InvalidIdentifierError(
            f"operation_id must have 1 to {MAX_IDENTIFIER} characters, not {len(operation_id)}", argument="operation_id"
        )
    if operation_id in {".", ".."}:
        raise InvalidIdentifierError(
            f"operation_id must not be {operation_id!r}: a URL path cannot carry it", argument="operation_id"
        )
    # What is printable holds neither, and is told in far less time.
    if not operation_id.isprintable() and any(unicodedata.category(c) in {"Cc", "Cs"} for c in operation_id):
        raise InvalidIdentifierError(
            f"operation_id must not hold control characters or lone surrogates: {operation_id[:80]!r}",
            argument="operation_id",
        )
    return operation_id


_HEX: Final = re.compile(rf"[0-9A-Fa-f]{{1,{MAX_IDENTIFIER}}}", re.ASCII)


def check_user_id(user_id: str) -> str:
    """Return the user id in upper case, as the service wants it.

    Raises:
        InvalidIdentifierError: Not a string of 1 to 512 hex digits.
    """
    if not isinstance(user_id, str):
        raise InvalidIdentifierError(
            f"user_id must be a string of hex digits, not {type(user_id).__name__}", argument="user_id"
        )
    if _HEX.fullmatch(user_id) is None:
        raise InvalidIdentifierError(
            f"user_id must be 1 to {MAX_IDENTIFIER} hex digits, such as '0123456789ABCDEF', not {user_id[:80]!r}",
            argument="user_id",
        )
    return user_id.upper()


def check_text(text: str | None, name: str) -> str | None:
    """Return an optional text as it is, or say why JSON cannot carry it.

    Raises:
        ConfigurationError: Neither a string nor None; lone surrogates in it.
    """
    if text is None:
        return None
    if not isinstance(text, str):
        raise ConfigurationError(f"{name} must be a string or None, not {type(text).__name__}", argument=name)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigurationError(
            f"{name} must be text that UTF-8 can encode; it holds a lone surrogate", argument=name
        ) from None
    return text


def seconds(value: object, name: str, *, zero: bool = False) -> float:
    """Check an argument that is a number of seconds.

    Args:
        value: What the caller gave.
        name: The argument's name, for the message.
        zero: Whether 0 is allowed.

    Raises:
        ConfigurationError: It is not a number, is NaN, or is not positive.
    """
    try:
        number = float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan
    except OverflowError:
        raise ConfigurationError(
            f"{name} must be a number of seconds, not an integer beyond any float", argument=name
        ) from None
    if math.isnan(number):
        raise ConfigurationError(f"{name} must be a number of seconds, not {value!r}", argument=name)
    if number < 0 or (number == 0 and not zero):
        raise ConfigurationError(
            f"{name} must be {'at least 0' if zero else 'more than 0'} seconds, not {value!r}", argument=name
        )
    return number


def finite_seconds(value: object, name: str) -> float:
    """Check an argument that is a number of seconds and cannot be without end.

    Args:
        value: What the caller gave.
        name: The argument's name, for the message.

    Raises:
        ConfigurationError: It is not a number, is NaN or infinite, or is not positive.
    """
    number = seconds(value, name)
    if math.isinf(number):
        raise ConfigurationError(f"{name} must be a finite number of seconds, not {value!r}", argument=name)
    return number
