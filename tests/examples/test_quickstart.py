"""The README's example as a file: run as a user runs it, against a sandbox."""

from __future__ import annotations

from pathlib import Path

from example_process import example_process
from factors import ApprovingSandbox

from aiokeyless.sandbox import Sandbox

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart.py"
PUSHED = "push to the phone of 0123456789ABCDEF\n"


async def run(script: Path, sandbox: Sandbox) -> tuple[int | None, str]:
    command = ("-W", "error", str(script))
    async with example_process(*command, folder=script.parent, sandbox=sandbox) as process:
        output, _ = await process.communicate()
    return process.returncode, output.decode()


async def test_an_approval_is_reported() -> None:
    async with Sandbox(auto_approve=0.2) as sandbox:
        assert await run(QUICKSTART, sandbox) == (0, f"{PUSHED}Approved (biom): pay.\n")
        [operation] = sandbox.operations.values()
        assert operation.is_approved


async def test_a_pin_does_not_pay() -> None:
    async with ApprovingSandbox("pin") as sandbox:
        code, output = await run(QUICKSTART, sandbox)
    assert (code, output.startswith(f"{PUSHED}Traceback")) == (1, True), output
    assert "it must be 'biom', and the answer has 'pin'" in output


async def test_a_timeout_is_reported(tmp_path: Path) -> None:
    hasty = tmp_path / "quickstart.py"
    text = QUICKSTART.read_text()
    assert text.count("expires_in=60") == 1
    hasty.write_text(text.replace("expires_in=60", "expires_in=0.2"))  # the same program, with less patience
    async with Sandbox() as sandbox:
        assert await run(hasty, sandbox) == (0, f"{PUSHED}Not paid, and a later approval pays for nothing.\n")
