"""What docs/architecture.md names is there, no imports are circular, and no two classes share a name."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import Counter
from itertools import pairwise
from pathlib import Path
from pkgutil import iter_modules

import pytest
from import_graph import find_circle, read_imports
from shared_names import find_overridden, find_unshared

import aiokeyless
from aiokeyless import worker

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGE = Path(aiokeyless.__file__).parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]


def write_package(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        file = folder / "package" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)


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


def test_the_contract_that_only_their_folders_know_brokers_names_all_modules_but_the_look_up() -> None:
    [contract] = [contract for contract in CONTRACTS if contract["name"] == "Only their folders know brokers"]
    modules = {(f"aiokeyless.worker.{module.name}", module.ispkg) for module in iter_modules(worker.__path__)}
    folders = {name for name, is_folder in modules if is_folder}
    assert folders <= {*contract["forbidden_modules"]}
    others = {name for name, is_folder in modules if not is_folder}
    assert others - {*contract["source_modules"]} == {"aiokeyless.worker.brokers"}
    assert folders <= read_imports(PACKAGE)["aiokeyless.worker.brokers"]


def test_no_contract_has_exceptions() -> None:
    assert [contract["name"] for contract in CONTRACTS if "ignore_imports" in contract] == []


def test_no_files_import_each_other_in_a_circle() -> None:
    assert find_circle(read_imports(PACKAGE)) == []


@pytest.mark.parametrize(
    ("files", "circle"),
    [
        ({"a": "from . import b", "b": "def late():\n    from .a import x"}, ["a", "b"]),
        ({"a": "from package.b import x", "b": "if TYPE_CHECKING:\n    import package.a"}, ["a", "b"]),
        ({"a": "from .b import x", "b": "from .c.d import x", "c/d": "from ..a import x"}, ["a", "b", "c.d"]),
        ({"c/__init__": "from .d import x", "c/d": "from package.c import x"}, ["c", "c.d"]),
        ({"c/__init__": "from .d import x", "c/d": "from . import e", "c/e": "import os"}, []),
        ({"__init__": "from .a import x", "a": "from package import b", "b": ""}, []),
    ],
)
def test_a_circle_is_found(tmp_path: Path, files: dict[str, str], circle: list[str]) -> None:
    write_package(tmp_path, {f"{name}.py": text for name, text in files.items()})
    found = find_circle(imports := read_imports(tmp_path / "package"))
    assert sorted({*found}) == [f"package.{name}" for name in circle]
    assert all(imported in imports[module] for module, imported in pairwise(found))


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
    write_package(tmp_path, files)
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


def test_no_two_classes_share_a_name_and_no_type_variable_has_that_of_a_class() -> None:
    nodes = [node for file in PACKAGE.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))]
    classes = Counter(node.name for node in nodes if isinstance(node, ast.ClassDef))
    calls = [node for node in nodes if isinstance(node, ast.Call) and ast.unparse(node.func) == "TypeVar"]
    variables = {ast.literal_eval(call.args[0]) for call in calls}
    assert {name for name, count in classes.items() if count > 1} == {
        "Adapter",  # each family of drivers has one, under the name by which it is imported
        "KeylessClient",  # the async one, and its twin in `aiokeyless.sync`
    }
    assert len(variables) > 5
    assert classes.keys().isdisjoint(variables)
