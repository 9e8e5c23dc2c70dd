"""``aiokeyless demo``: what it measures and what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import re
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aiokeyless import ApprovalTimeoutError
from aiokeyless.cli import demo
from aiokeyless.cli.app import Exit, app
from aiokeyless.cli.render import Display
from aiokeyless.sandbox import Sandbox

from .terminal import ESCAPE, Pipe, Terminal, later, lines_of_json, output_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable


@pytest.mark.looptime
async def test_the_demo_measures_from_the_approval_by_the_loops_clock() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    result = await demo.run_demo(7.5, Display())
    assert result.approved_after == pytest.approx(7.5, abs=0.05)
    assert result.approved_after + result.lateness == pytest.approx(loop.time() - began, abs=0.3)
    assert result.operation.is_approved
    assert result.requests == result.polls + 1


@pytest.mark.looptime
async def test_by_default_the_demo_takes_well_under_20_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await output_of(monkeypatch, io.StringIO(), "demo")
    assert loop.time() - began < 16


@pytest.mark.looptime
@pytest.mark.parametrize("after", [0.0, 3600.0])
async def test_the_user_approves_after_any_allowed_time(after: float) -> None:
    result = await demo.run_demo(after, Display())
    assert result.approved_after == pytest.approx(after, abs=0.05)


@pytest.mark.looptime
async def test_a_demo_that_is_cancelled_leaves_no_task() -> None:
    task = asyncio.create_task(demo.run_demo(7.5, Display()))
    await asyncio.sleep(5)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()
    await asyncio.sleep(0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


@pytest.mark.looptime
@pytest.mark.parametrize(
    ("approved_after", "polls", "lateness"),
    [(0.0, 1, 0.0), (0.001, 2, 0.999), (1.0, 2, 0.0), (7.5, 9, 0.5), (8.001, 10, 0.999)],
)
async def test_the_fixed_loop_polls_every_second_from_the_creation_on(
    approved_after: float, polls: int, lateness: float
) -> None:
    async with Sandbox() as sandbox:
        operation = sandbox.approve("txn-1", user_id="C0FFEE")
    result = demo.DemoResult(operation=operation, requests=4, polls=3, approved_after=approved_after, lateness=1.0)
    assert result.fixed_polls == polls
    assert result.fixed_requests == polls + 1
    assert result.fixed_lateness == pytest.approx(lateness)


@pytest.mark.looptime
async def test_without_a_terminal_each_poll_is_a_plain_line(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "demo")
    assert ESCAPE not in text
    assert "\r" not in text
    assert max(map(len, text.splitlines())) <= 80
    assert re.search(r"\n +\d\.\d\d s  poll 1: pending, next in \d\.\d\d s\n", text)
    assert re.search(r"\n +7\.5\d s  the user approves\n +\d+\.\d\d s  poll \d+: approved\n\n", text)


@pytest.mark.looptime
async def test_the_summary_names_operation_payload_requests_lateness_and_the_fixed_loop(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "demo")
    assert re.search(r"Operation +[0-9a-f-]{36}\n", text)
    assert re.search(r"Payload +Approve wire transfer of \$500 to account 1234\n", text)
    assert re.search(r"Approved +7\.5\d s after it was created\n", text)
    assert re.search(r"Noticed +\d\.\d\d s after the approval\n", text)
    assert re.search(r"Requests +\d+: 1 to create it, \d+ polls\n", text)
    assert "would have made about 10 requests\n  and noticed about 0.5" in text


@pytest.mark.looptime
async def test_on_a_terminal_one_line_shows_elapsed_polls_and_next_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await output_of(monkeypatch, Terminal(), "demo")
    assert re.search(r"Waiting for the user\W.*0\.\d s.*0 polls", text)
    assert re.search(r"Waiting for the user\W.*\d\.\d s.*1 poll\W.*next in \d\.\d s", text)
    assert re.search(r"Approved, not noticed\W.*\d+\.\d s.*polls", text)
    assert "poll 1: pending" not in text
    assert text.rindex("\x1b[?25h") > text.rindex("\x1b[?25l"), "the cursor is back"


@pytest.mark.looptime
async def test_json_is_one_object_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "demo", "--json", "--after", "7.5")
    assert text.count("\n") == 1
    result = json.loads(text)
    assert result == {
        "operation_id": result["operation_id"],
        "operation_payload": "Approve wire transfer of $500 to account 1234",
        "user_id": "C0FFEE",
        "auth_type": "biom",
        "approved_after": pytest.approx(7.5, abs=0.05),
        "lateness": pytest.approx(3, abs=3),
        "requests": result["polls"] + 1,
        "polls": result["polls"],
        "fixed_loop": {"interval": 1.0, "lateness": pytest.approx(0.5, abs=0.05), "requests": 10, "polls": 9},
    }


@pytest.mark.looptime
async def test_with_the_phone_the_demo_prints_its_url_and_waits_for_a_click(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Pipe()
    monkeypatch.setattr(sys, "stdout", stdout)
    command = asyncio.create_task(app.run_async(["demo", "--phone"]))
    url = (await stdout.until(r"Phone +(http://127\.0\.0\.1:\d+)/\n"))[1]
    await asyncio.sleep(5)
    assert not command.done()
    await click(url)
    assert await command == Exit.DONE
    assert "the user is you" in stdout.getvalue()
    assert re.search(r"\n +[56]\.\d\d s  the user approves\n", stdout.getvalue())
    assert re.search(r"Approved +[56]\.\d\d s after it was created\n", stdout.getvalue())
    requests = re.search(r"Requests +(\d+): 1 to create it, (\d+) polls\n", stdout.getvalue())
    assert requests is not None
    assert int(requests[1]) == int(requests[2]) + 1, "the phone's own requests are not the client's"


@pytest.mark.looptime
async def test_with_the_phone_json_on_stdout_has_the_url_on_stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stderr = Pipe()
    monkeypatch.setattr(sys, "stderr", stderr)
    command = asyncio.create_task(app.run_async(["demo", "--phone", "--json"]))
    url = (await stderr.until(r"^aiokeyless: open (http://\S+)/ and approve\n$"))[1]
    await click(url)
    assert await command == Exit.DONE
    [result] = lines_of_json(capsys.readouterr().out)
    assert result["requests"] == result["polls"] + 1


@pytest.mark.looptime
async def test_a_person_has_ten_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "_CHECK_INTERVAL", 30)
    loop = asyncio.get_running_loop()
    began = loop.time()
    with pytest.raises(ApprovalTimeoutError):
        await demo.run_demo(None, Display())
    assert loop.time() - began == pytest.approx(600, abs=1)


@pytest.mark.looptime
async def test_an_approval_that_is_noticed_before_the_next_check_of_the_phone_counts_as_noticed_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo, "_CHECK_INTERVAL", 1e6)
    monkeypatch.setattr(Sandbox, "start", started_with_an_approval(Sandbox.start))
    result = await demo.run_demo(None, Display())
    assert result.lateness == 0.0


def started_with_an_approval(start: Callable[[Sandbox], Awaitable[None]]) -> Callable[[Sandbox], Awaitable[None]]:
    async def started(self: Sandbox) -> None:
        await start(self)
        later(3, lambda: self.approve(next(iter(self.operations))))

    return started


async def click(url: str) -> None:
    """Approve the first operation that the phone shows, as its button does."""
    async with aiohttp.ClientSession(url, headers={"Origin": url}) as page:
        async with page.get("/sandbox/events") as events:
            await events.content.readuntil(b"data: ")
            [phone] = json.loads(await events.content.readline())["phones"]
        approval = {"user": phone["user"], "key": phone["pending"][0]["key"], "authType": "biom"}
        async with page.post("/sandbox/approve", json=approval) as response:
            assert response.status == 200
