"""The README's example as a file: run as a user runs it, against a sandbox."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from factors import ApprovingSandbox

from aiokeyless.sandbox import Sandbox

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
PUSHED = "push to the phone of 0123456789ABCDEF\n"


async def run(script: Path, sandbox: Sandbox) -> tuple[int | None, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-W",
        "error",
        str(script),
        env=os.environ | {"KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    return process.returncode, output.decode(), errors.decode()


async def test_an_approval_is_reported() -> None:
    async with Sandbox(auto_approve=0.2) as sandbox:
        assert await run(QUICKSTART, sandbox) == (0, f"{PUSHED}Approved (biom): pay.\n", "")
        [operation] = sandbox.operations.values()
        assert operation.is_approved


async def test_a_pin_does_not_pay() -> None:
    async with ApprovingSandbox("pin") as sandbox:
        code, output, errors = await run(QUICKSTART, sandbox)
        assert (code, output) == (1, PUSHED)
        assert "it must be 'biom', and the answer has 'pin'" in errors


async def test_a_timeout_is_reported(tmp_path: Path) -> None:
    hasty = tmp_path / "quickstart.py"
    text = QUICKSTART.read_text()
    assert text.count("expires_in=60") == 1
    hasty.write_text(text.replace("expires_in=60", "expires_in=0.2"))  # the same program, with less patience
    async with Sandbox() as sandbox:
        code, output, errors = await run(hasty, sandbox)
        assert (code, errors) == (0, "")
        assert output == f"{PUSHED}Not paid, and a later approval pays for nothing.\n"
