"""``aiokeyless --install-completion``: what it writes for each shell, and that bash completes with it."""

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


@pytest.fixture
def script(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "script"
    assert run(["--install-completion", "--shell", request.param, "--output", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shell's own files are those of another home."""
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no bash")
@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("sandb",), ["sandbox"]),
        (("sandbox", "app"), ["approve"]),
        (("create", "--pay"), ["--payload"]),
        (("wait", "x", "--if-missing", ""), ["raise", "wait"]),
        (("wait", "--ticket", __file__[:-4]), [__file__]),
    ],
    ids=" ".join,
)
def test_bash_completes_commands_options_and_choices(script: Path, words: tuple[str, ...], found: list[str]) -> None:
    command = ("bash", "-c", COMPLETE, "bash", str(script), "aiokeyless", *words)
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.split() == found


@pytest.mark.parametrize("script", ["zsh", "fish"], indirect=True)
def test_the_scripts_of_other_shells_name_the_commands(script: Path) -> None:
    text = script.read_text()
    assert [
        name for name in ("approve", "attempts", "devices", "--payload", "verify") if name.strip("-") not in text
    ] == []
