"""The newest update of a wait, for a caller who may be slower than the polls."""

from __future__ import annotations

import asyncio

from aiokeyless import ApprovalUpdate
from aiokeyless._waits.updates import NewestUpdate


def update(polls: int) -> ApprovalUpdate:
    return ApprovalUpdate(operation=None, error=None, polls=polls, elapsed=0.0, next_poll_in=None)


async def test_a_slow_reader_gets_the_newest_update_and_the_last_one() -> None:
    updates = NewestUpdate()
    taken = []
    for polls in (1, 2):
        updates.send_nowait(update(polls))
    async for one in updates:
        taken.append(one.polls)
        if one.polls == 2:
            for polls in (3, 4, 5):
                updates.send_nowait(update(polls))
            updates.close()
    assert taken == [2, 5]


async def test_a_quick_reader_gets_each_of_them() -> None:
    updates = NewestUpdate()
    taken = []

    async def read() -> None:
        taken.extend([one.polls async for one in updates])

    reader = asyncio.create_task(read())
    for polls in (1, 2, 3):
        updates.send_nowait(update(polls))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    updates.close()
    await reader
    assert taken == [1, 2, 3]
