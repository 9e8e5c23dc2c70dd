"""Errors of nats-py, translated to the one that the worker knows, and the cancellations that it loses."""

from __future__ import annotations

import asyncio
from contextlib import contextmanager
from typing import TYPE_CHECKING

import nats.errors
import nats.js.errors

from aiokeyless.worker.broker import RefusedError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator


class NoStreamError(RefusedError):
    """No stream took a message: there is none, or it has no leader during an election."""


@contextmanager
def broker_errors() -> Iterator[None]:
    """Raise nats-py's errors as an `UnavailableError`, and a cancellation that it loses."""
    with raise_lost_cancellations():
        try:
            yield
        except nats.js.errors.APIError as error:
            raise RefusedError(reason(error)) from None
        except nats.js.errors.NoStreamResponseError as error:
            raise NoStreamError(reason(error)) from None
        except nats.errors.TimeoutError:  # a server whose disk is full answers other requests, but stores nothing
            raise RefusedError("no answer in time: the broker is away, or its disk is full") from None
        except nats.errors.Error as error:
            raise UnavailableError(reason(error)) from None
        except OSError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from None


@contextmanager
def raise_lost_cancellations() -> Iterator[None]:
    """Raise a cancellation that came in the block, and that nats-py lost.

    It waits with `asyncio.wait_for`. On Python 3.11, that returns a result which comes at the same moment as a
    cancellation, and drops the cancellation.
    """
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  # the block awaits
    before = task.cancelling()
    try:
        yield
    except Exception:
        if task.cancelling() <= before:
            raise
    if task.cancelling() > before:
        raise asyncio.CancelledError


def reason(error: nats.errors.Error) -> str:
    """Return what an error says, in words."""
    if isinstance(error, nats.js.errors.APIError):
        return error.description or "JetStream does not answer: it is off, or not for this account"
    return str(error) or type(error).__name__
