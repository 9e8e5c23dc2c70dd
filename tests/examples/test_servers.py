"""`aiokeyless.sync` in the servers that it is for, and in one that it is not for."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import aiohttp
import pytest
from example_process import ADDRESS, example_process, printed, stopped
from waiting import until

from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

FOLDER = Path(__file__).parent / "servers"
REQUESTS = 6


@pytest.fixture
async def approving() -> AsyncGenerator[Sandbox]:
    """A service whose users approve at once."""
    async with Sandbox(auto_approve=0.2) as sandbox:
        yield sandbox


async def get(url: str) -> str:
    async with aiohttp.ClientSession() as session, session.get(url) as answer:
        return await answer.text()


@pytest.mark.parametrize(
    ("options", "calls"),
    [(["-k", "sync"], {}), (["-k", "gthread", "--threads", "4", "--preload"], {"CALL_AT_IMPORT": "1"})],
    ids=["each for itself", "preload"],
)
async def test_gunicorn_asks_for_approvals_in_the_processes_that_it_forks(
    approving: Sandbox, options: list[str], calls: dict[str, str]
) -> None:
    command = ["-m", "gunicorn", "-w", "1", "-b", "127.0.0.1:0", *options, "approving:wsgi"]
    async with example_process(*command, folder=FOLDER, sandbox=approving, **calls) as process:
        url = (await printed(process, ADDRESS))[1]
        answers = await asyncio.gather(*(get(url) for _ in range(REQUESTS)))
        states, processes = zip(*(answer.split() for answer in answers), strict=True)
        assert set(states) == {"approved"}
        assert str(process.pid) not in processes  # but in one that it has forked
        output = await stopped(process)
    assert process.returncode == 0, output
    assert "Traceback" not in output


async def test_uvicorn_is_told_to_use_the_other_client_and_its_threads_may_use_this_one(approving: Sandbox) -> None:
    async with example_process(
        "-m", "uvicorn", "--port", "0", "--lifespan", "off", "approving:asgi", folder=FOLDER, sandbox=approving
    ) as process:
        refused, _, state = (await get((await printed(process, ADDRESS))[1])).partition(" / ")
    assert "use aiokeyless.KeylessClient" in refused
    assert state == "approved"


async def test_celery_asks_for_approvals_in_the_processes_of_its_pool(approving: Sandbox) -> None:
    command = ["-m", "celery", "-A", "approving_task", "worker", "-P", "prefork", "-c", "2", "-l", "info"]
    alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    async with example_process(*command, *alone, folder=FOLDER, sandbox=approving, CALL_AT_IMPORT="1") as process:
        processes = [(await printed(process, r"succeeded in .*'approved (\d+)'"))[1] for _ in range(6)]
        assert str(process.pid) not in processes
        output = await stopped(process)
    assert process.returncode == 0, output


async def test_the_task_of_a_killed_process_runs_again(sandbox: Sandbox, tmp_path: Path) -> None:
    command = ["-m", "celery", "-A", "settling", "worker", "-P", "prefork", "-c", "1", "-l", "info"]
    alone = ["--without-gossip", "--without-mingle", "--without-heartbeat"]
    path = os.pathsep.join([str(FOLDER.parents[2] / "examples" / "sync"), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": path, "PAYMENTS_DB": str(tmp_path / "payments.sqlite3")}
    async with example_process(*command, *alone, folder=FOLDER, sandbox=sandbox, **environment) as process:
        await printed(process, "settle.* received")
        await until(lambda: any(request.method == "GET" for request in sandbox.requests))
        os.kill(only_child_of(process.pid), signal.SIGKILL)
        sandbox.approve(*sandbox.operations)
        await printed(process, r"succeeded in .*'paid'")
        await stopped(process)


def only_child_of(process: int) -> int:
    """Return the number of the process that this one has forked."""
    [child] = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return int(child)
