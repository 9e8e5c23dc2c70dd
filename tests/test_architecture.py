"""docs/architecture.md names each file of the package once, and none that is not there; so does a contract."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from pkgutil import iter_modules

import aiokeyless
from aiokeyless import worker

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = Path(aiokeyless.__file__).parent


def test_each_file_is_named_once() -> None:
    named = re.findall(r"^\| `([\w./]+)` \|", PAGE.read_text(), re.MULTILINE)
    files = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sorted(named) == sorted(files)


def test_the_contract_that_only_their_folders_know_brokers_names_all_folders_and_all_other_modules() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [contract] = [contract for contract in contracts if contract["name"] == "Only their folders know brokers"]
    modules = {(f"aiokeyless.worker.{module.name}", module.ispkg) for module in iter_modules(worker.__path__)}
    assert {name for name, is_folder in modules if is_folder} <= {*contract["forbidden_modules"]}
    assert {name for name, is_folder in modules if not is_folder} <= {*contract["source_modules"]}


def test_each_link_of_the_pages_leads_somewhere() -> None:
    folders = ("docs", "examples", "benchmarks")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    for page in pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)\s#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
