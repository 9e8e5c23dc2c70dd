"""``aiokeyless demo``: what it prints."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from aiokeyless.cli import scenes
from aiokeyless.cli.demo import describe_outage, describe_people
from aiokeyless.cli.scenes import Side

from .terminal import ESCAPE, drawn_by, output_of

if TYPE_CHECKING:
    from collections.abc import Sequence

pytestmark = pytest.mark.looptime

#: The parts of the transcript, and the lines of each. Numbers are the machine's, and so is which of the two is better.
TRANSCRIPT = [
    [
        r"aiokeyless demo",
        r"30 people are asked, and for each of them wait at the same time: aiokeyless, and",
        r"a loop that polls once a second and survives errors\. Real HTTP; the service is a",
        r"sandbox, the people are simulated, and every number is measured now\. Late is the",
        r"time from the approval, or the end of the outage, until the wait returned\.",
    ],
    [
        r"1\. All approve within 10 s, at random",
        r" +requests +late on average +late at worst",
        r"  aiokeyless +\d+ +SECONDS +SECONDS",
        r"  the loop +\d+ +SECONDS +SECONDS",
        r"  Sooner on average: NAME, by SECONDS",
        r"  Fewer requests: NAME, by \d+",
        r"  For slow people and those who never approve, see docs/explanation/schedule\.md\.",
    ],
    [
        r"2\. The service answers 503 for 8 s, and all approve meanwhile",
        r" +requests during it +last one late by",
        r"  aiokeyless +\d+ +SECONDS",
        r"  the loop +\d+ +SECONDS",
        r"  Fewer requests during it: NAME, by \d+",
        r"  Back sooner: NAME, by SECONDS",
    ],
    [
        r'3\. Asked about "Pay 40 to Alice", it answers "Pay 4000 to Mallory: approved"',
        r" +pay +refuse",
        r"  aiokeyless +0 +5",
        r"  the loop +5 +0",
    ],
    [
        r"Next",
        r"  aiokeyless sandbox  a Keyless service for your own code, with a phone",
        r"  aiokeyless --help   what else there is; README\.md has the code of a wait",
    ],
]


@pytest.fixture(autouse=True)
def few_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five people instead of thirty, which takes less computing."""
    monkeypatch.setattr(scenes, "PEOPLE", 5)


def assert_is_the_transcript(text: str) -> None:
    parts = [part.splitlines() for part in text.strip("\n").split("\n\n")]
    assert [len(lines) for lines in parts] == [len(patterns) for patterns in TRANSCRIPT], text
    for lines, patterns in zip(parts, TRANSCRIPT, strict=True):
        for line, pattern in zip(lines, patterns, strict=True):
            exact = pattern.replace("SECONDS", r"\d+\.\d\d s").replace("NAME", "(?:aiokeyless|the loop|both)")
            assert re.fullmatch(exact, line)
    assert max(map(len, text.splitlines())) <= 80


async def test_the_transcript_has_what_was_measured_in_less_than_25_seconds() -> None:
    loop = asyncio.get_running_loop()
    began = loop.time()
    text = await output_of("demo")
    assert loop.time() - began < 25
    assert ESCAPE not in text
    assert_is_the_transcript(text)


async def test_on_a_terminal_the_same_transcript_stays_above_a_line_with_the_progress() -> None:
    drawn = await drawn_by("demo")
    assert re.search(r" \d\.\d s\S*   aiokeyless: \d+ requests   the loop: \d+ requests\W", drawn)
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


def side(requests: int, lateness: Sequence[float]) -> Side:
    made = Side(lambda: requests, dict.fromkeys(map(str, range(len(lateness))), 0.0))
    made.approved_at.update(zip(map(str, range(len(lateness))), lateness, strict=True))
    made.requests_in_outage = requests
    return made


def test_the_better_one_is_named() -> None:
    played: Any = SimpleNamespace(aiokeyless=side(400, [0.5, 1.5]), loop=side(200, [0.5, 1.0]))
    assert "Sooner on average: the loop, by 0.25 s" in describe_people(played)
    assert "Fewer requests: the loop, by 200" in describe_people(played)
    assert "Fewer requests during it: the loop, by 200" in describe_outage(played)
    assert "Back sooner: the loop, by 0.50 s" in describe_outage(played)
    played = SimpleNamespace(aiokeyless=side(10, [0.1, 0.3]), loop=side(200, [0.5, 1.0]))
    assert "Sooner on average: aiokeyless, by 0.55 s" in describe_people(played)
    assert "Back sooner: aiokeyless, by 0.70 s" in describe_outage(played)


@pytest.mark.parametrize(("ours", "line"), [(0.104, "aiokeyless, by 0.11 s"), (0.206, "both, by 0.00 s")])
def test_a_difference_is_that_of_the_printed_numbers(ours: float, line: str) -> None:
    played: Any = SimpleNamespace(aiokeyless=side(10, [ours]), loop=side(10, [0.2051]))
    assert f"Sooner on average: {line}" in describe_people(played)
    assert "Fewer requests: both, by 0" in describe_people(played)
