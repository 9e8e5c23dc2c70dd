"""Our sides of the benchmark `request` and the bare one, and the instructions that they take.

This module imports nothing else: valgrind makes imports, too, some forty times slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import re
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from tenacity import wait_fixed

from aiokeyless import KeylessClient

from .baselines import BARE, OURS, BareClient, bare_session
from .process import loop_factory
from .server import API_KEY, Server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

#: Makes so many calls or more, and returns the CPU seconds of one, and how many it made.
Side = Callable[[int], Awaitable[tuple[float, int]]]

IN_FLIGHT: Final = 16
_WAITS: Final = 24 * IN_FLIGHT  # each is due again after 20 ms, the least: so many keep all slots busy
WHOLE_POLL: Final = f"{OURS}, a whole poll of a wait"
EXCHANGE: Final = f"{OURS}, a poll's exchange alone"
_VALGRIND: Final = shutil.which("valgrind")
#: The sides whose instructions `count` can count here.
COUNTED: Final = [BARE, OURS, EXCHANGE, WHOLE_POLL] if _VALGRIND else []


@contextlib.asynccontextmanager
async def open_sides(server: Server) -> AsyncIterator[dict[str, Side]]:
    """Open the clients of the sides."""
    async with KeylessClient(API_KEY, base_url=server.base_url) as client, bare_session() as bare:
        yield {
            WHOLE_POLL: partial(_make_whole_polls, server),
            # There is no public method for a single poll.
            EXCHANGE: partial(make_calls, client._open().transport.poll),  # noqa: SLF001
            OURS: partial(make_calls, client.get_operation),
            BARE: partial(make_calls, BareClient(bare, server).get_operation),
        }


async def make_calls(get: Callable[[str], Awaitable[object]], count: int) -> tuple[float, int]:
    """Make so many calls, some at a time."""
    todo = iter([str(uuid.uuid4()) for _ in range(count)])

    async def worker() -> None:
        for operation_id in todo:
            await get(operation_id)

    gc.collect()
    before = time.process_time()
    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(worker())
    return (time.process_time() - before) / count, count


async def _make_whole_polls(server: Server, count: int) -> tuple[float, int]:
    """Make so many polls of real waits, of which some are always due.

    The CPU seconds of starting and ending the waits do not count.
    """

    async def until(polls: int) -> None:
        while client.statistics.polls < polls:  # noqa: ASYNC110  # no event tells that without costing each poll
            await asyncio.sleep(0.25)

    options: dict[str, Any] = {"max_polls_per_second": None, "schedule": wait_fixed(0.0)}
    async with KeylessClient(API_KEY, base_url=server.base_url, max_in_flight=IN_FLIGHT, **options) as client:
        waiting = [asyncio.create_task(client.wait_for_approval(str(uuid.uuid4()))) for _ in range(_WAITS)]
        await until(_WAITS)
        gc.collect()
        before, polls = time.process_time(), client.statistics.polls
        await until(polls + count)
        made = client.statistics.polls
        seconds = (time.process_time() - before) / (made - polls)
    await asyncio.gather(*waiting, return_exceptions=True)
    return seconds, made


def count_instructions(server: Server, name: str, calls: int, *, uvloop: bool) -> tuple[int, int]:
    """Return the instructions of a process that makes so many calls or more, and how many it made."""
    valgrind = [str(_VALGRIND), "--tool=cachegrind", "--cache-sim=no", f"--cachegrind-out-file={os.devnull}"]
    program = "import sys; from benchmarks.sides import run; run(*sys.argv[1:])"
    made = subprocess.run(  # noqa: S603
        [*valgrind, sys.executable, "-c", program, f"{server.port}", name, f"{calls}", *(["uvloop"] if uvloop else [])],
        env=os.environ | {"PYTHONHASHSEED": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    [instructions] = re.findall(r"I +refs: +([\d,]+)", made.stderr)
    return int(instructions.replace(",", "")), int(made.stdout)


def run(port: str, name: str, calls: str, *loop: str) -> None:
    """Make so many calls or more, and print how many."""

    async def main() -> int:
        async with open_sides(Server(int(port))) as sides:
            _, made = await sides[name](int(calls))
            return made

    with asyncio.Runner(loop_factory=loop_factory(uvloop=bool(loop))) as runner:
        print(runner.run(main()))
