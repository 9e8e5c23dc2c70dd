"""The end of calls, without a network."""

from __future__ import annotations

import asyncio
from typing import Any

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


@pytest.mark.looptime
async def test_all_calls_have_one_timer_which_ends_with_the_last_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    loop, timers = asyncio.get_running_loop(), list[asyncio.TimerHandle]()
    call_at = loop.call_at

    def record(*arguments: Any, **options: Any) -> asyncio.TimerHandle:
        timers.append(call_at(*arguments, **options))
        return timers[-1]

    monkeypatch.setattr(loop, "call_at", record)
    calls = Calls()
    with Call(calls, loop.time() + 5), Call(calls, loop.time() + 6):
        [timer] = timers
        assert not timer.cancelled()
    assert timer.cancelled()
