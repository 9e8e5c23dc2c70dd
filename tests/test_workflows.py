"""The workflows on GitHub: what runs beside an identity that signs is pinned, and none of it is installed there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))  # none in the source archive


def jobs_of(workflow: Path) -> list[str]:
    _, _, text = workflow.read_text(encoding="utf-8").partition("\njobs:\n")
    _, *jobs = re.split(r"^  (?=\w+:$)", text, flags=re.MULTILINE)
    assert jobs
    return jobs


each_workflow = pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)


@each_workflow
def test_actions_of_others_are_pinned_by_hash(workflow: Path) -> None:
    used = re.findall(r"\buses: (\S+)", workflow.read_text(encoding="utf-8"))
    others = [action for action in used if not action.startswith("$/")]
    assert others
    assert [action for action in others if not re.fullmatch(r"[^@]+@[0-9a-f]{40}", action)] == []


@each_workflow
def test_a_job_that_may_sign_installs_nothing(workflow: Path) -> None:
    for job in jobs_of(workflow):
        assert not ("id-token: write" in job and re.search(r"\brun: ", job)), job


@each_workflow
def test_a_job_that_uploads_what_is_published_installs_only_what_is_pinned_by_hash(workflow: Path) -> None:
    for job in jobs_of(workflow):
        if re.search(r"upload-artifact@.*\n +with:\n +name: dist", job):
            installs = re.findall(r"\binstall (.*)", job)
            assert installs
            assert [options for options in installs if "--require-hashes" not in options] == []


def test_the_bill_of_materials_is_of_all_that_users_can_install() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        extras = set(tomllib.load(file)["project"]["optional-dependencies"]) - {"dev", "docs", "examples", "test"}
    for workflow in WORKFLOWS:
        for listed in re.findall(r"dist/\*\.whl\)\[(.*?)\]", workflow.read_text(encoding="utf-8")):
            assert set(listed.split(",")) == extras
