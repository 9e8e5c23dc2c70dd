"""Errors of the drivers of PostgreSQL, translated to those that workers and applications know. It imports no driver."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from aiokeyless.errors import BrokerError
from aiokeyless.worker.broker import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Classes of SQL states that do not change by themselves: authorization, names, syntax and rights. 0A is not one of
#: them: a standby has no unlogged table until it takes over.
_LASTING: Final = ("0L", "0P", "28", "3D", "3F", "42")
_DENIED: Final = "42501"
_MISSING: Final = ("3F000", "42883", "42P01")
_DISK_FULL: Final = "53100"


@contextmanager
def broker_errors(schema: str, errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Raise a driver's errors as the broker's."""
    try:
        yield
    except errors as error:
        if (lasting := lasting_error(schema, error)) is not None:
            raise lasting from None
        is_refused = state_of(error) == _DISK_FULL or isinstance(error, TimeoutError)
        raise (RefusedError if is_refused else UnavailableError)(first_line(error)) from None


def lasting_error(schema: str, error: Exception) -> BrokerError | None:
    """Return what to raise for an error that does not change by itself; None for any other."""
    state, reason = state_of(error), first_line(error)
    if state in _MISSING:
        return BrokerError(
            f"the schema {schema!r} is missing, or older than this library: run aiokeyless worker --prepare as a user "
            "that may create it"
        )
    if state == _DENIED:
        return BrokerError(f"{reason}; check which roles this login has")
    return BrokerError(reason) if state.startswith(_LASTING) else None


def state_of(error: Exception) -> str:
    """Return the SQL state of an error; empty if it has none."""
    return _state(_unwrap(error))


def first_line(error: Exception) -> str:
    """Return the message of a driver's error, without the values that details and contexts quote."""
    error = _unwrap(error)
    return str(error).partition("\n")[0] or type(error).__name__


def _unwrap(error: Exception) -> Exception:
    """Return the driver's own error, if SQLAlchemy or Django has wrapped it."""
    own, cause = error, error.__cause__
    while isinstance(cause, Exception):
        if _state(cause):
            own = cause
        cause = cause.__cause__
    return own


def _state(error: Exception) -> str:
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or ""  # psycopg2 has the latter
