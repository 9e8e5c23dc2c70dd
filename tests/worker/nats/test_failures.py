"""What becomes of the errors of nats-py, and of the cancellations that it loses."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import nats.errors
import pytest

from aiokeyless.worker.broker import RefusedError, UnavailableError
from aiokeyless.worker.nats.failures import broker_errors


async def lose_a_cancellation(error: Exception | None) -> str:
    """Do as `asyncio.wait_for` does on Python 3.11, if its result comes at the same moment."""
    with broker_errors():
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        await asyncio.sleep(0)  # Python 3.11 traces no line after a cancellation, until the task is resumed without one
        if error is not None:
            raise error
    return "the cancellation is lost"


@pytest.mark.parametrize("error", [None, nats.errors.ConnectionClosedError(), LookupError()])
async def test_a_cancellation_that_nats_py_loses_is_raised_nevertheless(error: Exception | None) -> None:
    losing = asyncio.create_task(lose_a_cancellation(error))
    await asyncio.sleep(0)
    losing.cancel()
    await asyncio.wait({losing})
    assert losing.cancelled()


async def test_a_broker_that_does_not_answer_in_time_may_have_a_full_disk() -> None:
    with pytest.raises(RefusedError, match="or its disk is full"), broker_errors():
        raise nats.errors.TimeoutError


async def test_a_clean_up_after_a_cancellation_is_not_cancelled_again() -> None:
    async def clean_up() -> str:
        with suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        with broker_errors():
            await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="connection closed"), broker_errors():
            raise nats.errors.ConnectionClosedError
        return "it is clean"

    cleaning = asyncio.create_task(clean_up())
    await asyncio.sleep(0)
    cleaning.cancel()
    assert await cleaning == "it is clean"
