"""The commands of the pages, as they are written; the ports excepted, which may be taken."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import aiohttp
import pytest
from example_process import output_of, serving

from aiokeyless.cli.app import app
from aiokeyless.cli.sandbox import DEFAULT_PORT
from aiokeyless.sandbox import Sandbox

EXAMPLES = Path(__file__).parents[2] / "examples"
DOCS = EXAMPLES.parent / "docs"
#: As of a reader who has installed the package.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
SHELL = re.compile(r"^```sh\n(?P<lines>.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALL = re.compile(r"\.venv/bin/pip install -q -e \"\.\[[a-z,]+\]\" (?P<packages>.*)$", re.MULTILINE)


class Page(NamedTuple):
    example: str
    port: str  # the variable that sets it
    path: str


PAGES = [Page("login", "LOGIN_PORT", "/"), Page("checkout", "CHECKOUT_PORT", "/"), Page("agent", "AGENT_PORT", "/mcp")]


def make_checkout(folder: Path) -> None:
    """Make a checkout with an environment, by the names that the pages use."""
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "examples").symlink_to(EXAMPLES)


@pytest.mark.parametrize("page", PAGES, ids=[page.example for page in PAGES])
async def test_two_terminals_are_enough(page: Page, tmp_path: Path) -> None:
    blocks = SHELL.findall((EXAMPLES / page.example / "README.md").read_text())
    sandbox, program = blocks[1].splitlines()
    make_checkout(tmp_path)
    environment = ENVIRONMENT | {page.port: "0"}
    async with serving(f"{sandbox} --port 0", folder=tmp_path, environment=environment) as keyless:
        program = program.replace("http://127.0.0.1:3223", keyless)
        async with (
            serving(program, folder=tmp_path, environment=environment) as url,
            aiohttp.ClientSession() as session,
            session.get(url + page.path) as answer,
        ):
            assert answer.status not in {404, 500}  # MCP refuses a plain GET, by one status or another


async def test_the_quickstart_is_approved(tmp_path: Path) -> None:
    [block] = SHELL.findall((EXAMPLES / "README.md").read_text())
    _, sandbox, program = block.splitlines()
    make_checkout(tmp_path)
    command = f"{sandbox.partition('#')[0]} --port 0"
    async with serving(command, folder=tmp_path, environment=ENVIRONMENT) as keyless:
        program = program.replace("http://127.0.0.1:3223", keyless)
        assert "Approved (biom): pay." in await output_of(program, folder=tmp_path, environment=ENVIRONMENT)


SHOP = """
import asyncio, os, urllib.request
from aiokeyless.cli.app import app
from aiokeyless.cli.sandbox import DEFAULT_PORT
from aiokeyless.sandbox import Sandbox

async def main():
    async with Sandbox(auto_approve=0.1) as sandbox, sandbox.client() as client:
        await client.request_approval("C0FFEE")
    port = os.environ["OTEL_EXPORTER_PROMETHEUS_PORT"]
    print(urllib.request.urlopen(f"http://localhost:{port}/metrics").read().decode())

asyncio.run(main())
"""


async def test_prometheus_gets_metrics(tmp_path: Path, unused_tcp_port: int) -> None:
    [command] = SHELL.findall((DOCS / "howto" / "observability.md").read_text())
    (tmp_path / "shop.py").write_text(SHOP)
    environment = ENVIRONMENT | {"OTEL_EXPORTER_PROMETHEUS_PORT": str(unused_tcp_port)}
    output = await output_of(command, folder=tmp_path, environment=environment)
    assert "aiokeyless_polls_total{" in output
    assert 'aiokeyless_wait_duration_seconds_bucket{aiokeyless_wait_outcome="approved"' in output


def test_every_example_is_in_the_list() -> None:
    listed = (EXAMPLES / "README.md").read_text()
    names = [path.name for path in EXAMPLES.iterdir() if not path.name.startswith(("_", "."))]
    missing = [name for name in names if f"({name})" not in listed]
    assert sorted(missing) == ["README.md", "screenshots"]


async def test_an_operation_is_created_and_waited_for_at_a_terminal(tmp_path: Path) -> None:
    block, *_ = SHELL.findall((DOCS / "reference" / "command-line.md").read_text())
    sandbox, commands = block.split("\n", 1)
    command = f"{sandbox.partition('#')[0]} --port 0 --auto-approve 1"  # in place of the person with the phone
    async with serving(command, folder=tmp_path, environment=ENVIRONMENT) as url:
        commands = commands.replace("http://127.0.0.1:3223", url)
        assert "Approved" in await output_of(commands, folder=tmp_path, environment=ENVIRONMENT)


async def test_a_script_may_run_twice(tmp_path: Path) -> None:
    *_, block = SHELL.findall((DOCS / "reference" / "command-line.md").read_text())
    create, wait = block.replace("\\\n", "").splitlines()
    async with Sandbox() as sandbox:
        environment = ENVIRONMENT | {"KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key}
        await output_of(create, folder=tmp_path, environment=environment)
        await output_of(create, folder=tmp_path, environment=environment)
        [operation_id] = sandbox.operations
        sandbox.approve(operation_id)
        assert "Approved" in await output_of(wait, folder=tmp_path, environment=environment)


async def test_a_sandbox_is_driven_by_commands_by_curl_and_by_a_script(tmp_path: Path) -> None:
    _, commands, _ = SHELL.findall((DOCS / "reference" / "command-line.md").read_text())
    [lines] = SHELL.findall((DOCS / "reference" / "sandbox-api.md").read_text())
    lines = lines.replace("curl ", "curl -sS --fail-with-body ")  # an error ends the block
    script = (EXAMPLES / "sandbox" / "drive.sh").read_text()
    assert script.count("\n") == 10
    async with Sandbox() as sandbox:
        environment = ENVIRONMENT | {"KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key}
        for block in (script, commands, lines):
            await output_of(block, folder=tmp_path, environment=environment)
            sandbox.recover()
        assert [operation.is_approved for operation in sandbox.operations.values()] == [True] * 3
        assert [*sandbox.operations][1:] == ["order-8", "order-7"]


def test_the_container_runs_a_command_and_names_no_package_of_an_index() -> None:
    lines = (EXAMPLES / "sandbox" / "Dockerfile").read_text().splitlines()
    steps = dict(line.split(" ", 1) for line in lines if not line.startswith("#"))
    program, *arguments = json.loads(steps["ENTRYPOINT"]) + json.loads(steps["CMD"])
    assert program == "aiokeyless"
    command, bound, _ = app.parse_args(arguments, exit_on_error=False, print_error=False)
    assert (command.__name__, bound.arguments) == ("serve", {"host": "0.0.0.0"})  # noqa: S104  # of the container
    assert int(steps["EXPOSE"]) == DEFAULT_PORT
    copied, target = steps["COPY"].split()
    assert f"$(ls {target}{Path(copied).name})[" in steps["RUN"]


@pytest.mark.parametrize("readme", sorted(EXAMPLES.glob("*/README.md")), ids=lambda readme: readme.parent.name)
def test_what_a_page_installs_is_what_the_tests_have(readme: Path) -> None:
    [install] = INSTALL.finditer(readme.read_text())
    project = (EXAMPLES.parent / "pyproject.toml").read_text()
    for package in install["packages"].replace('"', "").split():
        assert f'"{package.partition(">")[0]}' in project
