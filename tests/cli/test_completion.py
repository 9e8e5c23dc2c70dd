"""``aiokeyless --install-completion``: with what it writes, bash completes. cyclopts writes it for each shell."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aiokeyless.cli import run

if TYPE_CHECKING:
    from pathlib import Path

#: Asks the function that the script registers, as bash does when Tab is pressed.
COMPLETE = """
. "$1"; shift
[[ $(complete -p aiokeyless) =~ -F\\ ([^ ]+) ]]
COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
"${BASH_REMATCH[1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")
def test_bash_completes_commands_options_and_choices(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # its own files are those of another home
    script = str(tmp_path / "script")
    assert run(["--install-completion", "--shell", "bash", "--output", script]) == 0
    for words, found in (
        (("sandb",), ["sandbox"]),
        (("sandbox", "app"), ["approve"]),
        (("create", "--pay"), ["--payload"]),
        (("wait", "x", "--if-missing", ""), ["raise", "wait"]),
        (("wait", "--ticket", __file__[:-4]), [__file__]),
    ):
        command = ("bash", "-c", COMPLETE, "bash", script, "aiokeyless", *words)
        assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == found
