"""What the pages of docs/ say runs, runs, and prints what they show."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import looptime
import pytest

import aiokeyless.sandbox
import aiokeyless.worker
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Coroutine

DOCS = Path(__file__).parents[1] / "docs"
FENCE = re.compile(r"^```python\n(?P<code>.*?)^```\n(?:\s*^```text\n(?P<output>.*?)^```$)?", re.DOTALL | re.MULTILINE)
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))


class Block(NamedTuple):
    page: str
    code: str
    output: str | None

    def __str__(self) -> str:
        """Return the page, for the name of a test."""
        return self.page


def blocks(page: str) -> list[Block]:
    """Return the Python blocks of a page, each with the output that is shown below it."""
    return [Block(page, found["code"], found["output"]) for found in FENCE.finditer((DOCS / page).read_text())]


LOOP, *FAILURES = blocks("why-not-a-loop.md")
SITE, SITE_TESTS = blocks("tutorial.md")
OTHERS = [block for page in PAGES if page not in {LOOP.page, SITE.page} for block in blocks(page)]
TESTS = [block for block in OTHERS if "def test_" in block.code]
#: The programs of the examples have tests of their own.
EXAMPLES = [program.read_text() for program in (DOCS.parent / "examples").rglob("*.py")]
EXCERPTS = [block for block in OTHERS if any(block.code in program for program in EXAMPLES)]
PROGRAMS = [block for block in OTHERS if block not in TESTS + EXCERPTS]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Let `asyncio.run` run on a clock that moves by itself, beside a service whose users approve after two seconds."""

    async def beside_a_service(program: Coroutine[object, object, object]) -> None:
        async with Sandbox(auto_approve=2) as sandbox:
            monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
            monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)
            await program

    def run(program: Coroutine[object, object, object]) -> None:
        with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
            runner.run(beside_a_service(program))

    monkeypatch.setattr(asyncio, "run", run)
    monkeypatch.chdir(tmp_path)


def execute(code: str) -> None:
    exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})  # noqa: S102  # our own pages


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("block", PROGRAMS, ids=str)
def test_a_program_of_the_docs_runs(block: Block, capsys: pytest.CaptureFixture[str]) -> None:
    execute(block.code)
    assert block.output is None or capsys.readouterr().out == block.output


@pytest.mark.usefixtures("service")
@pytest.mark.parametrize("block", FAILURES, ids=range(len(FAILURES)))
def test_a_loop_fails_as_said_and_a_wait_does_not(
    block: Block, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = ModuleType("loop")
    exec(LOOP.code, vars(loop))  # noqa: S102
    monkeypatch.setitem(sys.modules, "loop", loop)
    execute(block.code)
    assert capsys.readouterr().out == block.output


def run_tests(folder: Path, mode: str = "strict") -> str:
    """Run the tests in a folder as a user would, and return what pytest prints."""
    options = ("-q", "-o", f"asyncio_mode={mode}", "-p", "no:cacheprovider", "-W", "error")
    command = (sys.executable, "-m", "pytest", *options, "-o", "asyncio_default_fixture_loop_scope=function")
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout
    return ended.stdout


@pytest.mark.parametrize("mode", ["strict", "auto"])
def test_the_tests_of_the_docs_pass(tmp_path: Path, mode: str) -> None:
    for number, block in enumerate(TESTS):
        (tmp_path / f"test_{number}.py").write_text(block.code)
    assert f"{sum(block.code.count('def test_') for block in TESTS)} passed" in run_tests(tmp_path, mode)


def test_the_site_of_the_tutorial_passes_its_tests(tmp_path: Path) -> None:
    (tmp_path / "login.py").write_text(SITE.code)
    (tmp_path / "test_login.py").write_text(SITE_TESTS.code)
    assert "5 passed" in run_tests(tmp_path)


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (DOCS / "index.md").read_text()
    missing = [page for page in PAGES if page != "index.md" and not re.search(rf"^{page[:-3]}$", index, re.MULTILINE)]
    assert not missing


def test_every_public_name_is_in_the_reference() -> None:
    reference = "".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    errors = {name for name in aiokeyless.__all__ if name.endswith("Error")}  # one directive for their whole module
    named = set(re.findall(r"^\.\. auto\w+:: (?:[\w.]+\.)?(\w+)$", reference, re.MULTILINE))
    public = {*aiokeyless.__all__, *aiokeyless.worker.__all__, *aiokeyless.sandbox.__all__} - errors - {"__version__"}
    assert public - named - {"BrokerError", "InvalidRequestError"} == set()
