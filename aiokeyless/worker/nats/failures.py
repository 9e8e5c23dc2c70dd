"""Errors of nats-py, translated to the one that the worker knows."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors

from aiokeyless.worker.broker import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


class NoStreamError(UnavailableError):
    """No stream took a message: there is none, or it has no leader during an election."""


@contextmanager
def broker_errors() -> Iterator[None]:
    """Raise nats-py's errors as an `UnavailableError`."""
    try:
        yield
    except nats.js.errors.APIError as error:
        raise RefusedError(reason(error)) from None
    except nats.js.errors.NoStreamResponseError as error:
        raise NoStreamError(reason(error)) from None
    except nats.errors.Error as error:
        raise UnavailableError(reason(error)) from None
    except OSError as error:
        raise UnavailableError(f"{type(error).__name__}: {error}") from None


def reason(error: nats.errors.Error) -> str:
    """Return what an error says, in words."""
    return getattr(error, "description", None) or str(error) or type(error).__name__
