"""Errors of asyncpg, translated to those that workers and applications know."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import asyncpg

from aiokeyless.errors import BrokerError, InvalidRequestError
from aiokeyless.worker.broker import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Errors after which a transaction is retried. Nothing of it was done, and the next attempt may succeed.
PASSING: Final = (asyncpg.DeadlockDetectedError, asyncpg.LockNotAvailableError, asyncpg.SerializationError)
#: Classes of SQL states that do not change by themselves: authorization, names, syntax and rights. 0A is not one of
#: them: a standby has no unlogged table until it takes over.
_LASTING: Final = frozenset({"0L", "0P", "28", "3D", "3F", "42"})
_MISSING: Final = (asyncpg.InvalidSchemaNameError, asyncpg.UndefinedFunctionError, asyncpg.UndefinedTableError)
#: Errors of `submit` about the request: its text is no JSON or too deep, a value is wrong, or another request has its
#: operation id.
_WRONG: Final = (asyncpg.DataError, asyncpg.StatementTooComplexError, asyncpg.UniqueViolationError)


@contextmanager
def broker_errors(schema: str) -> Iterator[None]:
    """Raise asyncpg's errors as the broker's.

    Args:
        schema: The broker's schema, for the message.
    """
    try:
        yield
    except asyncpg.DiskFullError as error:
        raise RefusedError(_text(error)) from None
    except _MISSING:
        raise BrokerError(
            f"the schema {schema!r} is missing, or older than this library: run aiokeyless worker --prepare as a user "
            "that may create it"
        ) from None
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in _LASTING:
            raise BrokerError(_text(error)) from None
        raise UnavailableError(_text(error)) from None
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError) as error:
        raise UnavailableError(_text(error)) from None


@contextmanager
def request_errors() -> Iterator[None]:
    """Raise errors about a request as an `InvalidRequestError`."""
    try:
        yield
    except _WRONG as error:
        raise InvalidRequestError(_text(error)) from None


def _text(error: Exception) -> str:
    """Return the message in one line, without the values that details and contexts quote."""
    return str(error).partition("\n")[0] or type(error).__name__
