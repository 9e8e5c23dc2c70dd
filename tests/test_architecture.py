"""What docs/architecture.md says to look at is there, and only a broker's own folder knows that broker."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from pkgutil import iter_modules

from shared_names import find_overridden, find_unshared

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
    assert len(places) > 15
    for file, name in places:
        text = (PACKAGE / file).read_text()
        for part in name.split("."):
            assert re.search(rf"^ *(?:(?:async )?def|class) {part}\b|^ *{part}: ", text, re.MULTILINE), (file, name)


def test_the_contract_that_only_their_folders_know_brokers_names_all_and_its_exceptions_are_the_look_up() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        contracts = tomllib.load(file)["tool"]["importlinter"]["contracts"]
    [contract] = [contract for contract in contracts if contract["name"] == "Only their folders know brokers"]
    modules = {(f"aiokeyless.worker.{module.name}", module.ispkg) for module in iter_modules(worker.__path__)}
    folders = {name for name, is_folder in modules if is_folder}
    assert folders <= {*contract["forbidden_modules"]}
    assert {name for name, is_folder in modules if not is_folder} <= {*contract["source_modules"]}
    # Import-linter refuses an exception that no import statement needs.
    assert {*contract["ignore_imports"]} == {f"aiokeyless.worker.broker -> {name}" for name in folders}


def test_of_what_brokers_share_nothing_is_for_one_broker_alone() -> None:
    assert find_unshared(PACKAGE) == {}


def test_what_one_broker_answers_in_its_own_way_another_one_does_too() -> None:
    overridden = find_overridden(PACKAGE)
    assert len(overridden) > 15
    assert {name: brokers for name, brokers in overridden.items() if len(brokers) == 1} == {}


def test_what_is_for_one_broker_alone_is_found(tmp_path: Path) -> None:
    files = {
        "_rules/order.py": "def choose(): _rank()\ndef _rank(): ...\ndef alternate(): ...",
        "worker/broker.py": "class Broker:\n    keeps_delays = True\n    def take(self): ...",
        "worker/serving.py": "from .broker import Broker\ndef serve(any: Broker): any.take(), any.keeps_delays",
        "worker/nats/__init__.py": "from ..broker import Broker\nfrom ..._rules.order import alternate, choose\n"
        "class NatsBroker(Broker):\n    keeps_delays = False\n    def take(self): choose(), alternate()",
        "worker/sqlite/__init__.py": "from ..broker import Broker\nfrom package._rules import order\n"
        "class SqliteBroker(Broker):\n    def take(self): order.alternate()",
        "cli.py": "from .worker.serving import serve\nserve(None)",
    }
    for name, text in files.items():
        file = tmp_path / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    names = ("package._rules.order.choose", "package._rules.order._rank")
    assert find_unshared(tmp_path / "package") == dict.fromkeys(names, "nats")
    assert find_overridden(tmp_path / "package") == {
        "package.worker.broker.Broker.keeps_delays": {"nats"},
        "package.worker.broker.Broker.take": {"nats", "sqlite"},
    }


def anchors(text: str) -> list[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    text = re.sub(r"^(```+).*?^\1|^<!-- site\n.*?^-->", "", text, flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE):
        shown = re.sub(r"\]\([^)]*\)", "", heading)  # a link's text
        found.append(re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-"))
    repeated = [found[:k].count(anchor) for k, anchor in enumerate(found)]
    return [f"{anchor}-{number}" if number else anchor for anchor, number in zip(found, repeated, strict=True)]


def test_anchors_are_githubs() -> None:
    text = "# The phone's half\n\n```sh\n# a comment\n```\n\n## `a_b`, [c](d.md#e)\n\n## Each\n\n## Each\n"
    assert anchors(text) == ["the-phones-half", "a_b-c", "each", "each-1"]


def test_each_link_of_the_pages_leads_somewhere() -> None:
    folders = ("docs", "examples", "benchmarks")
    pages = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    for page in pages:
        for target, anchor in re.findall(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)", page.read_text()):
            file = page.parent / target if target else page
            assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
            assert not anchor or anchor in anchors(file.read_text()), f"{page.relative_to(ROOT)}: {target}#{anchor}"
