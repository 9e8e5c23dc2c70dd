"""What the pages of docs/ say runs, runs, and prints what they show."""

from __future__ import annotations

import asyncio
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import looptime
import pytest

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    code: str
    output: str | None


def blocks(page: str) -> list[Block]:
    return [Block(found["code"], found["output"]) for found in FENCE.finditer((DOCS / page).read_text())]


def run(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a program in this process, on a clock that moves by itself."""

    def run_main(main: object) -> object:
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            return runner.run(main)  # type: ignore[arg-type]  # what the program gives to asyncio.run

    monkeypatch.setattr(asyncio, "run", run_main)
    exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102  # our own pages


# Why not a while loop

LOOP, *FAILURES = blocks("why-not-a-loop.md")


@pytest.mark.parametrize("block", FAILURES, ids=range(len(FAILURES)))
@pytest.mark.filterwarnings("ignore::looptime.TimeWarning")
def test_loop_fails_as_said_and_a_wait_does_not(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = ModuleType("loop")
    exec(LOOP.code, vars(loop))  # noqa: S102
    monkeypatch.setitem(sys.modules, "loop", loop)
    run(block.code, monkeypatch)
    assert capsys.readouterr().out == block.output
