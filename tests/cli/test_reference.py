"""The pages about the command line name each command, exit code and outcome, and each assumption of ``doctor``."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from aiokeyless.cli import wait
from aiokeyless.cli.app import Exit, app
from aiokeyless.cli.findings import CHECKS, Check

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
    shown = " ".join(ASSUMPTIONS.split())
    for check in CHECKS.values():
        who = {True: "documented by the vendor", False: "assumed by aiokeyless", None: "expected"}[check.documented]
        assert f"{check.id} sent: {check.sent} {who}: {check.expected} {check.consequence}" in shown


@pytest.mark.parametrize("check", CHECKS.values(), ids=list(CHECKS))
def test_each_check_names_a_page_that_is_there(check: Check) -> None:
    page = check.consequence.rpartition("See ")[2].removesuffix(".")
    assert (REFERENCE.parents[1] / page).is_file()


def test_each_check_needs_what_comes_before_it_or_what_is_given() -> None:
    known = {"-", "KEYLESS_SDK_KEY", "--user", "--phone-started", "--again", "time to approve", "Enter"}
    known |= {"a direct way", "a comparable answer", "answers to taken ids"}
    for check in CHECKS.values():
        assert known.issuperset(check.needs)
        known.add(check.id)
