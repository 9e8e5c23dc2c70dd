"""What the README says runs, runs, and it stays short."""

from __future__ import annotations

import asyncio
import os
import re
import sys
from pathlib import Path

import pytest

from aiokeyless.sandbox import Sandbox

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
async def test_a_program_of_the_readme_runs_and_runs_again(block: str, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(block)
    async with Sandbox(auto_approve=0.1) as sandbox:
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-W", "error", "program.py"),
                cwd=tmp_path,
                env=os.environ | {"KEYLESS_API_KEY": sandbox.api_key, "KEYLESS_BASE_URL": sandbox.url},
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            output, _ = await process.communicate()
            assert process.returncode == 0, output.decode()
            assert output


def test_the_two_commands_stand_there_as_agreed() -> None:
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[cli]" && .venv/bin/aiokeyless demo\n' in README
    assert 'python3 -m venv .venv && .venv/bin/pip install -q -e ".[test]" && .venv/bin/pytest\n' in README


def test_the_whole_program_is_the_quickstart() -> None:
    quickstart = (ROOT / "examples" / "quickstart.py").read_text()
    assert quickstart.endswith(BLOCKS[1])


def test_no_program_pays_for_a_pin() -> None:
    for block in BLOCKS:
        assert "pay." not in block or 'require_auth_type="biom"' in block


def test_it_takes_two_minutes() -> None:
    assert len(README.split()) <= 700


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_a_link_leads_somewhere(link: str) -> None:
    if not link.startswith("https://"):
        assert (ROOT / link).exists()
