"""Errors of asyncpg, translated to those that workers and applications know."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import asyncpg

from aiokeyless.errors import BrokerError, InvalidRequestError
from aiokeyless.worker.broker import RefusedError, UnavailableError

from .refusals import first_line, missing_schema

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
        raise RefusedError(first_line(error)) from None
    except _MISSING:
        raise missing_schema(schema) from None
    except asyncpg.PostgresError as error:
        if (error.sqlstate or "")[:2] in _LASTING:
            raise BrokerError(first_line(error)) from None
        raise UnavailableError(first_line(error)) from None
    except (asyncpg.InterfaceError, asyncpg.InternalClientError, OSError, TimeoutError) as error:
        raise UnavailableError(first_line(error)) from None


@contextmanager
def request_errors() -> Iterator[None]:
    """Raise errors about a request as an `InvalidRequestError`."""
    try:
        yield
    except _WRONG as error:
        raise InvalidRequestError(first_line(error)) from None
