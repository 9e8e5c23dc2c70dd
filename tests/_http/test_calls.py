"""The end of calls, without a network."""

from __future__ import annotations

import asyncio

import pytest

from aiokeyless._http.calls import Call, Calls


async def end_twice(calls: Calls) -> None:
    with Call(calls) as call:
        call.end(TimeoutError())
        calls.close()
        await asyncio.sleep(0)


async def test_the_first_end_of_a_call_counts() -> None:
    task = asyncio.create_task(end_twice(Calls()))
    with pytest.raises(TimeoutError):
        await task
    assert task.cancelling() == 0
