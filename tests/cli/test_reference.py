"""docs/reference/command-line.md names each command, each exit code, and each outcome of a wait."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiokeyless.cli import wait
from aiokeyless.cli.app import Exit, app

PAGE = (Path(__file__).parents[2] / "docs" / "reference" / "command-line.md").read_text()


def test_the_page_names_each_command() -> None:
    named = set(re.findall(r"^\| `([a-z]+)` \|", PAGE, re.MULTILINE))
    assert named == {name for name in app if not name.startswith("-")}


@pytest.mark.parametrize("group", ["devices", "sandbox", "users"])
def test_the_page_names_each_command_of_a_group(group: str) -> None:
    rows = "".join(line for line in PAGE.splitlines() if line.startswith(f"| `{group}"))
    named = {word for words in re.findall(r"`([^`]+)`", rows) for word in words.split()}
    assert {name for name in app[group] if not name.startswith("-")} <= named


def test_the_page_names_each_exit_code() -> None:
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)} == set(Exit)


def test_the_page_names_each_outcome_of_a_wait() -> None:
    outcomes = set(re.findall(r"^\| \d+ \| `(\w+)` \|", PAGE, re.MULTILINE))
    assert outcomes == {"approved", "error", "interrupted", *(name for _, name in wait._OUTCOMES)}
