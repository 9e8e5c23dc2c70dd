"""Decides whether a failed request may have taken effect. Pure; the client and the worker use it for creates.

The answer is "no" only if that is certain, since a wrong "no" asks a user twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from aiokeyless.errors import ConfigurationError, ConflictError, StatusError, TransportError

if TYPE_CHECKING:
    from aiokeyless.errors import KeylessError

_REQUEST_TIMEOUT: Final = 408
_CONFLICT: Final = 409


def may_have_taken_effect(error: KeylessError) -> bool:
    """Return whether a request that failed so may have taken effect, by the table of docs/rules.md."""
    if isinstance(error, TransportError):
        return error.sent
    if isinstance(error, ConflictError):
        return False
    if isinstance(error, StatusError):
        # A 409 that is no conflict: only its own call can have caused it.
        is_odd = error.status in {_REQUEST_TIMEOUT, _CONFLICT}
        return is_odd or 200 <= error.status < 300 or 500 <= error.status < 600
    return not isinstance(error, ConfigurationError)
