"""``aiokeyless demo``: what it prints."""

from __future__ import annotations

import asyncio
import io
import json
import re
import sys
from typing import TYPE_CHECKING

import aiohttp
import pytest

from aiokeyless.cli.app import Exit, app

from .terminal import ESCAPE, Pipe, Terminal, lines_of_json, output_of

if TYPE_CHECKING:
    from collections.abc import Mapping

pytestmark = pytest.mark.looptime

#: The parts of the transcript, and the lines of each. Numbers, and which of the two comes first, are the machine's.
TRANSCRIPT = [
    [
        r"aiokeyless demo",
        r"The real client over real HTTP; the service is a sandbox, the user is simulated\.",
        r"At the same time, for the same operation, a plain loop runs: GET, raise for an",
        r"error, compare the state, sleep one second\.",
    ],
    [
        r"1\. The user approves after 3\.5 s",
        r"SECONDS  the user     approves",
        r"SECONDS  aiokeyless   returns \d+\.\d\d s after the approval, \d+ polls?",
        r"SECONDS  the loop     returns \d+\.\d\d s after the approval, \d+ polls?",
    ],
    [
        r"2\. The service fails, and the user approves meanwhile",
        r"SECONDS  the service  answers 503 to everything",
        r"SECONDS  the loop     ends with an error: 503 Service Unavailable, \d+ polls?",
        r"SECONDS  the user     approves",
        r"SECONDS  the service  answers again",
        r"SECONDS  aiokeyless   returns \d+\.\d\d s after that, \d+ polls?, \d+ failed",
    ],
    [
        r'3\. Asked about "Pay 40 to Alice", the service answers about another payment',
        r'SECONDS  the service  answers with an approval of "Pay 4000 to Mallory"',
        r"SECONDS  aiokeyless   refuses: OperationMismatchError, \d+ polls?",
        r"SECONDS  the loop     returns it as the approval, \d+ polls?",
    ],
    [
        r"Next",
        r"  aiokeyless demo --phone  be the user: approve in your browser",
        r"  aiokeyless sandbox       a Keyless service for your own code, with a phone",
        r"  aiokeyless --help        what else there is; README\.md has the code of a wait",
    ],
]


def assert_is_the_transcript(text: str) -> None:
    parts = [part.splitlines() for part in text.strip("\n").split("\n\n")]
    assert [len(lines) for lines in parts] == [len(patterns) for patterns in TRANSCRIPT], text
    for lines, patterns in zip(parts, TRANSCRIPT, strict=True):
        for pattern in patterns:
            [_] = [line for line in lines if re.fullmatch(pattern.replace("SECONDS", r" +\d+\.\d\d s"), line)]
    assert max(map(len, text.splitlines())) <= 80


async def test_the_transcript_has_what_happened_and_what_both_made_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "demo")
    assert ESCAPE not in text
    assert_is_the_transcript(text)


async def test_by_default_the_demo_takes_about_15_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    await output_of(monkeypatch, io.StringIO(), "demo")
    assert loop.time() - began < 40, "the pauses after an error are random"


async def test_on_a_terminal_the_same_transcript_stays_above_a_line_with_the_progress(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    drawn = await output_of(monkeypatch, Terminal(), "demo")
    assert re.search(r" \d\.\d s\S*  aiokeyless: \d+ polls?   the loop: \d+ polls?\W", drawn)
    assert re.search(r"the loop: \d+ polls?, ended", drawn)
    assert drawn.rindex("\x1b[?25h") > drawn.rindex("\x1b[?25l"), "the cursor is back"
    assert max(len(line) for line in re.split(r"[\r\n]", re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", drawn))) <= 80
    assert_is_the_transcript(what_stays(drawn))


def what_stays(drawn: str) -> str:
    """Return what a terminal shows in the end, of the few control sequences that are used here."""
    lines = [""]
    for part in re.findall(r"\x1b\[[?\d;]*[a-zA-Z]|\r\n|[\r\n]|[^\x1b\r\n]+", drawn):
        if part == "\x1b[2K":
            lines[-1] = ""
        elif part == "\x1b[1A":
            lines.pop()
        elif part.endswith("\n"):
            lines.append("")
        elif not part.startswith(ESCAPE) and part != "\r":
            lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


async def test_json_is_one_object_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    text = await output_of(monkeypatch, io.StringIO(), "demo", "--json", "--after", "3")
    assert text.count("\n") == 1
    result = json.loads(text)
    assert list(result) == ["loop_interval", "approval", "outage", "mismatch"]
    assert result["loop_interval"] == 1.0
    assert result["approval"] == {
        "operation_id": result["approval"]["operation_id"],
        "approved_after": pytest.approx(3, abs=2),
        "outage_after": None,
        "recovered_after": None,
        "aiokeyless": {**result["approval"]["aiokeyless"], "outcome": "approved", "error": None, "failed_polls": 0},
        "loop": {**result["approval"]["loop"], "outcome": "approved", "error": None, "failed_polls": 0},
    }
    assert outcomes(result["outage"]) == ("approved", "failed")
    assert outcomes(result["mismatch"]) == ("refused", "approved")


def outcomes(scene: Mapping[str, Mapping[str, str]]) -> tuple[str, str]:
    return scene["aiokeyless"]["outcome"], scene["loop"]["outcome"]


async def test_with_the_phone_the_demo_prints_its_url_and_waits_for_a_click(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Pipe()
    monkeypatch.setattr(sys, "stdout", stdout)
    command = asyncio.create_task(app.run_async(["demo", "--phone"]))
    url = (await stdout.until(r"Phone +(http://127\.0\.0\.1:\d+)/\n"))[1]
    await asyncio.sleep(5)
    assert not command.done()
    await click(url)
    assert await command == Exit.DONE
    text = stdout.getvalue()
    assert "the user is you" in text
    assert "\n1. You approve\n" in text
    assert re.search(r"\n +\d+\.\d\d s  the user     approves\n", text)
    assert re.search(r"\n +\d+\.\d\d s  aiokeyless   returns \d+\.\d\d s after the approval, \d+ polls?\n", text)
    assert "\n3. " in text, "the other scenes follow, with a simulated user"
    assert "demo --phone" not in text, "they know"


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
    assert outcomes(result["approval"]) == ("approved", "approved")


async def click(url: str) -> None:
    """Approve the first operation that the phone shows, as its button does."""
    async with aiohttp.ClientSession(url, headers={"Origin": url}) as page:
        async with page.get("/sandbox/page/events") as events:
            await events.content.readuntil(b"data: ")
            [phone] = json.loads(await events.content.readline())["phones"]
        approval = {"user": phone["user"], "key": phone["pending"][0]["key"], "authType": "biom"}
        async with page.post("/sandbox/page/approve", json=approval) as response:
            assert response.status == 200
