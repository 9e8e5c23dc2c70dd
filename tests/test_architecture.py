"""What docs/architecture.md says to look at is there, and a contract names each broker and each other module."""

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


def test_what_the_page_says_to_look_at_is_there() -> None:
    section = PAGE.read_text().partition("## Where to look first")[2].partition("\n## ")[0]
    places = [
        (file, name)
        for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", section)
        for name in re.findall(r"`([\w.]+)`", names)
    ]
    assert len(places) > 20
    for file, name in places:
        text = (PACKAGE / file).read_text()
        for part in name.split("."):
            assert re.search(rf"^ *(?:(?:async )?def|class) {part}\b|^ *{part}: ", text, re.MULTILINE), (file, name)


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
