"""Which modules of a package import which, also in functions and for type checkers alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from typing import TYPE_CHECKING

from shared_names import parse

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


def read_imports(package: Path) -> dict[str, set[str]]:
    """Return the modules of the package that each of its modules imports.

    ``from package import name`` counts for the module of that name; without one, for the package's ``__init__``, which
    defines the name. Python also runs the ``__init__`` of each package above an imported module. That does not count:
    the importing module uses nothing of it.
    """
    files = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    modules = {name.removesuffix(".__init__") for name in files}
    imports: dict[str, set[str]] = {}
    for name, file in files.items():
        found = {each if each in modules else each.rpartition(".")[0] for each in _imported(name, file)}
        imports[name.removesuffix(".__init__")] = found & modules
    return imports


def find_circle(imports: dict[str, set[str]]) -> list[str]:
    """Return a circle of modules each of which imports the next one, the first one again at the end; none: []."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        circle: list[str] = error.args[1]
        return circle[::-1]
    return []


def _imported(module: str, file: Path) -> Iterator[str]:
    """Return the full names of what a module imports: modules, and names in modules."""
    for node in ast.walk(parse(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            yield from (".".join([*above, *filter(None, [node.module]), alias.name]) for alias in node.names)
