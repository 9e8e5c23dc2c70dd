"""What the README says runs, runs: its Python blocks, and the names that its tables promise."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from nats_server import until

import aiokeyless
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalWorker

if TYPE_CHECKING:
    from collections.abc import Mapping

    from nats_server import NatsServer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
TESTS = [block for block in BLOCKS if "def test_" in block]
APPLICATIONS = [block for block in BLOCKS if "aiokeyless.worker" in block]
PROGRAMS = [block for block in BLOCKS if block not in TESTS + APPLICATIONS]


async def run(*arguments: str, cwd: Path, environment: Mapping[str, str]) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        *arguments,
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0, output.decode()
    return output.decode()


@pytest.mark.parametrize("block", PROGRAMS, ids=range(len(PROGRAMS)))
async def test_a_program_of_the_readme_runs(block: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(block)
    async with Sandbox(auto_approve=0.1) as sandbox:
        environment = {"KEYLESS_API_KEY": sandbox.api_key, "KEYLESS_BASE_URL": sandbox.url}
        assert await run("program.py", cwd=tmp_path, environment=environment)


@pytest.mark.parametrize("block", APPLICATIONS, ids=range(len(APPLICATIONS)))
async def test_an_application_of_the_readme_gets_its_outcome_from_a_worker(
    block: str, tmp_path: Path, broker: NatsServer
) -> None:
    (tmp_path / "program.py").write_text(block)
    async with Sandbox(auto_approve=0.1) as sandbox, sandbox.client(max_attempts=1) as client:
        worker = ApprovalWorker(client, broker.url)
        working = asyncio.create_task(worker.run())
        await until(lambda: worker.statistics.is_ready)
        output = await run("program.py", cwd=tmp_path, environment={"NATS_URL": broker.url})
        worker.stop()
        await working
    assert output.startswith("approved ")
    assert output.endswith("{'order': 7}\n")


@pytest.mark.parametrize("block", TESTS, ids=range(len(TESTS)))
async def test_a_test_of_the_readme_passes(block: str, tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(block)
    scope = "asyncio_default_fixture_loop_scope=function"
    options = ("-q", "-o", "asyncio_mode=auto", "-o", scope, "-p", "no:cacheprovider")
    output = await run("-m", "pytest", *options, "test_it.py", cwd=tmp_path, environment={})
    assert f"{block.count('def test_')} passed" in output


ROWS = {
    "a poll of a wait": "aiokeyless, a poll of a wait",
    "`get_operation`": "aiokeyless",
    "aiohttp + pydantic": "aiohttp + pydantic",
    "niquests + msgspec": "niquests + msgspec",
    "httpx + msgspec": "httpx + msgspec",
    "written and parsed by hand: the limit": "parsed by hand + msgspec: the limit",
}


@pytest.mark.parametrize(("column", "loop"), [(0, "asyncio's loop"), (1, "uvloop")])
def test_the_figures_of_the_table_are_those_of_the_committed_run(column: int, loop: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "results.json").read_text())["benchmarks"]["request"]
    [table] = [table for table in results["tables"] if table["title"] == f"{loop}, 16 in flight"]
    measured = {name: float(ratio.split()[0]) for name, _, ratio, _ in table["rows"]}
    for row, name in ROWS.items():
        shown = re.findall(rf"^\| {re.escape(row)} \| (.*) \| (.*) \|$", README, re.MULTILINE)[0][column]
        decimals = len(shown.partition(".")[2])
        assert float(shown) == round(measured[name], decimals), (row, loop)


def test_every_exception_stands_in_the_table() -> None:
    table = README.partition("## When it fails")[2].partition("```")[0]
    roots = {"KeylessError", "ApprovalError"}
    for name in aiokeyless.__all__:
        if name.endswith("Error") and name not in roots:
            assert f"`{name}`" in table, name


def test_the_two_commands_stand_there_as_agreed() -> None:
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[cli]" && .venv/bin/aiokeyless demo\n' in README
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[dev]" && .venv/bin/pytest\n' in README


def test_the_first_program_is_the_quickstart() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert quickstart.endswith(BLOCKS[0])
