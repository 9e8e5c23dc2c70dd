"""The script that writes programs, tables, titles and signatures into the pages."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import aiokeyless

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[1]
SIGNATURES = ROOT / "docs" / "reference" / "signatures.md"
MODULES = re.findall(r"^<!-- signatures of (\S+) -->$", SIGNATURES.read_text(), re.MULTILINE)

PROGRAM = '''"""What it does."""

import asyncio

A, B = 1, 2


class Shop:
    # Once.
    @property
    async def pay(self) -> int:
        """Pay."""
        return A


#: The last.
LAST = {
    "a": B,
}
'''
METHOD = '''# Once.
@property
async def pay(self) -> int:
    """Pay."""
    return A
'''
LAST = '#: The last.\nLAST = {\n    "a": B,\n}\n'


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """The script, which remembers what it has parsed."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "docs" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module)["SOURCES"] = Path(aiokeyless.__file__).parents[1]  # elsewhere, if a wheel is tested
    return module


def test_each_page_has_what_the_other_files_say(pages: ModuleType) -> None:
    stale = [page for page in pages.pages() if pages.written(page) != page.read_text(encoding="utf-8")]
    assert stale == [], "run nox -s pages"


@pytest.fixture
def page(pages: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page of another project, which has a program too."""
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    for folder in ("docs", "examples"):
        (tmp_path / folder).mkdir()
    (tmp_path / "examples" / "shop.py").write_text(PROGRAM)
    (tmp_path / "examples" / "shop.conf").write_text("port: 80\n")
    (tmp_path / "docs" / "llms.txt").write_text("")
    (tmp_path / "docs" / "results.md").write_text("# Results\n\n## Polls\n\n| a |\n|---|\n\n## Waits\n\n| b |\n|---|\n")
    return tmp_path / "docs" / "page.md"


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("examples/shop.py", f"```python\n{PROGRAM.partition(chr(10) * 2)[2]}```\n"),
        ("examples/shop.py: Shop.pay", f"```python\n{METHOD}```\n"),
        ("examples/shop.py: LAST", f"```python\n{LAST}```\n"),
        ("examples/shop.py: A", "```python\nA, B = 1, 2\n```\n"),
        ("examples/shop.py: asyncio ... B", "```python\nimport asyncio\n\nA, B = 1, 2\n```\n"),
        ("examples/shop.py: LAST ...", f"```python\n{LAST}```\n"),
        ("examples/shop.conf", "```text\nport: 80\n```\n"),
        ("docs/results.md: Waits ...", "## Waits\n\n| b |\n|---|\n<!-- end -->\n"),
    ],
)
def test_what_a_comment_names_is_written_and_again(pages: ModuleType, page: Path, named: str, written: str) -> None:
    before, after = "Text.\n\n", "\nMore.\n\n```python\nprint(1)\n```\n"
    page.write_text(f"{before}<!-- {named} -->\n{after}")
    for _ in range(2):
        page.write_text(pages.written(page))
        assert page.read_text() == f"{before}<!-- {named} -->\n{written}{after}"


def test_the_first_page_lists_the_others_by_their_titles(pages: ModuleType, page: Path) -> None:
    (page.parent / "index.md").write_text("# All\n\n- [](results.md)\n- [old](page.md)\n")
    page.write_text("# A page\n")
    assert pages.written(page.parent / "index.md") == "# All\n\n- [Results](results.md)\n- [A page](page.md)\n"


def test_a_check_names_each_page_that_is_not_up_to_date_and_how_to_write_it(
    pages: ModuleType, page: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page.write_text("<!-- examples/shop.conf -->\n```text\nport: 8080\n```\n")
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    with pytest.raises(SystemExit, match=r"^docs/page\.md differs from what it shows: run nox -s pages$"):
        pages.main()
    monkeypatch.setattr(sys, "argv", ["pages.py"])
    pages.main()
    assert page.read_text() == "<!-- examples/shop.conf -->\n```text\nport: 80\n```\n"
    monkeypatch.setattr(sys, "argv", ["pages.py", "--check"])
    pages.main()


def test_a_name_that_a_program_has_no_more_is_an_error_that_says_so(pages: ModuleType, page: Path) -> None:
    page.write_text("<!-- examples/shop.py: Shop.refund -->\n")
    with pytest.raises(LookupError, match=r"^examples/shop\.py has no refund: correct the comment in the page"):
        pages.written(page)


# -- signatures


def functions(pages: ModuleType, module: str) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef, Any]]:
    """Yield the functions that the page shows of a module, each with that of the module."""
    code = importlib.import_module(module)
    for node in ast.parse(pages.signatures(module)).body:
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node, getattr(code, name)
            case ast.ClassDef(name=name, body=body):
                methods = (each for each in body if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef))
                for method in methods:
                    found = inspect.getattr_static(getattr(code, name), method.name)
                    of = found.fget if isinstance(found, property) else getattr(getattr(code, name), method.name)
                    yield f"{name}.{method.name}", method, of


@pytest.mark.parametrize("module", MODULES)
def test_the_signatures_of_a_module_are_those_that_it_has(pages: ModuleType, module: str) -> None:
    for name, shown, function in functions(pages, module):
        given = shown.args
        by_name = filter(None, (given.vararg, *given.kwonlyargs, given.kwarg))
        parameters = [each.arg for each in (*given.posonlyargs, *given.args, *by_name) if each.arg != "cls"]
        assert parameters == [*inspect.signature(function).parameters], name
        is_async = inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(inspect.unwrap(function))
        assert isinstance(shown, ast.AsyncFunctionDef) == is_async, name


@pytest.mark.parametrize("module", MODULES)
def test_each_public_name_of_a_module_has_its_signature(pages: ModuleType, module: str) -> None:
    code = importlib.import_module(module)
    stubs = "\n".join(map(pages.signatures, {module, "aiokeyless"}))
    shown = re.findall(r"^(?:class |def |async def |)(\w+)(?=[(:])", stubs, re.MULTILINE)
    fixtures = [name for name in vars(code) if name.startswith("keyless_")]
    assert {*getattr(code, "__all__", fixtures)} - {*shown} <= {"__version__"}


def test_each_module_of_the_reference_has_its_signatures() -> None:
    reference = "".join(page.read_text() for page in SIGNATURES.parent.glob("*.md"))
    named = re.findall(r"^\.\. currentmodule:: (.+)$", reference, re.MULTILINE)
    named += re.findall(r"^\.\. auto\w+:: (aiokeyless[\w.]*)\.\w+$", reference, re.MULTILINE)
    assert {*named} - {*MODULES} == set()
