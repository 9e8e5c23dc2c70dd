"""The pages about the command line name each command, exit code and outcome, and each assumption of ``doctor``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiokeyless.cli import wait
from aiokeyless.cli.app import Exit, app
from aiokeyless.cli.doctor.table import CHECKS, Check

REFERENCE = Path(__file__).parents[2] / "docs" / "reference"
PAGE = (REFERENCE / "command-line.md").read_text()
ASSUMPTIONS = (REFERENCE / "assumptions.md").read_text()


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


def test_the_page_of_assumptions_is_the_table_of_doctor() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.+) \[More\]\((.+)\) \|$", ASSUMPTIONS, re.MULTILINE)
    documented = {"yes": True, "no": False, "-": None}
    of_page = [
        Check(name, documented[says], CHECKS[name].needs, expected, f"{follows} See {docs_of(page)}.")
        for name, says, expected, follows, page in rows
    ]
    assert of_page == list(CHECKS.values())


def docs_of(page: str) -> Path:
    return (REFERENCE / page).resolve().relative_to(REFERENCE.parents[1])


def test_each_check_needs_what_comes_before_it_or_what_is_given() -> None:
    known = {"-", "Date", "Enter", "refusals", "KEYLESS_SDK_KEY", "--user", "--phone-started", "--again"}
    for check in CHECKS.values():
        assert known.issuperset(check.needs)
        known.add(check.id)
