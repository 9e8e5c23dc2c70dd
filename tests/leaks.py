"""What a test left behind: tasks and armed timers, found by what they are and not by a name or the text of a repr."""

from __future__ import annotations

import asyncio
from typing import Any

from aiohttp import web_protocol

SERVER = "aiokeyless.sandbox"  # lives in the loop of the test, too


def tasks_since(before: set[asyncio.Task[Any]]) -> set[asyncio.Task[Any]]:
    """Return the tasks made since then that are not done, except the connections of servers in this loop."""
    return {task for task in asyncio.all_tasks() - before if not _serves_a_connection(task)}


def _serves_a_connection(task: asyncio.Task[Any]) -> bool:
    code = getattr(task.get_coro(), "cr_code", None)
    return code is not None and code.co_filename == web_protocol.__file__


def armed_timers() -> list[asyncio.TimerHandle]:
    """Return the armed timers of this loop whose callbacks are the library's; the sandbox's are a server's."""
    handles: list[asyncio.TimerHandle] = asyncio.get_running_loop()._scheduled  # type: ignore[attr-defined]
    return [handle for handle in handles if not handle.cancelled() and _is_ours(handle)]


def _is_ours(handle: asyncio.TimerHandle) -> bool:
    module: str = handle._callback.__module__  # type: ignore[attr-defined]
    return module.startswith("aiokeyless.") and not module.startswith(SERVER)
