"""The end of calls, without a network."""

from __future__ import annotations

import asyncio

import pytest

from aiokeyless._http.calls import Call, Calls


async def test_the_first_end_of_a_call_counts() -> None:
    calls, task = Calls(), asyncio.current_task()
    with pytest.raises(TimeoutError), Call(calls) as call:
        call.end(TimeoutError())
        calls.close()
        await asyncio.sleep(0)
    assert task is not None
    assert task.cancelling() == 0
