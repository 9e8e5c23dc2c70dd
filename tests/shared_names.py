"""What brokers share, and which of it is for one of them alone, as the package's source says.

An attribute counts as used wherever one of its name is. So a name may be missed, and none is reported wrongly.
"""

from __future__ import annotations

import ast
import functools
import gc
from collections import defaultdict
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Module(NamedTuple):
    """A module.

    Attributes:
        name: Its name, with its packages.
        broker: The broker whose folder it is in; None if it is in none.
        is_shared: Whether it is in the package of workers and in no broker's folder, or is one of the rules.
        body: Its statements.
        known: What the names in it refer to.
    """

    name: str
    broker: str | None
    is_shared: bool
    body: list[ast.stmt]
    known: dict[str, str]


@functools.cache
def read_modules(package: Path) -> list[Module]:
    """Read all modules of the package."""
    modules = []
    brokers = {path.parent.name for path in package.glob("worker/*/__init__.py")}
    for path in package.rglob("*.py"):
        parts = path.relative_to(package.parent).with_suffix("").parts
        name, tree = ".".join(parts), parse(path)
        known = {own: f"{name}.{own}" for own in _definitions(tree.body)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                package_of = parts[: -node.level] if node.level else ()
                source = ".".join([*package_of, *filter(None, [node.module])])
                known |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
        broker = parts[2] if parts[1] == "worker" and parts[2] in brokers else None
        is_shared = broker is None and parts[1] in {"worker", "_rules"}
        modules.append(Module(name, broker, is_shared, tree.body, known))
    return modules


def find_unshared(package: Path) -> dict[str, str]:
    """Return the names in shared modules that nothing would use without a certain broker, and that broker."""
    mentions: dict[str, str] = {}  # how a shared name is mentioned
    users: defaultdict[str, set[tuple[str, str | None]]] = defaultdict(set)  # what mentions it so, of which broker
    for module in read_modules(package):
        for node in module.body:
            user = module.name
            for name in _definitions([node]) if module.is_shared else ():
                user = f"{module.name}.{name}"
                mentions |= {user: user, **{f"{user}.{member}": f".{member}" for member in _members(node)}}
            for mention in _mentions(node, module.known):
                if mention != user:
                    users[mention].add((user, module.broker))
    unshared: dict[str, str] = {}
    while True:  # what only such names use is for the broker alone, too
        before = len(unshared)
        for name, mention in mentions.items():
            brokers = {unshared.get(user, broker) for user, broker in users[mention]}
            if len(brokers) == 1 and (broker := brokers.pop()) is not None:
                unshared[name] = broker
        if len(unshared) == before:
            return unshared


def find_overridden(package: Path) -> dict[str, set[str]]:
    """Return the members of shared classes that brokers' classes define as well, and these brokers."""
    classes = {
        f"{module.name}.{node.name}": (module, node)
        for module in read_modules(package)
        for node in module.body
        if isinstance(node, ast.ClassDef)
    }

    def shared_bases(name: str) -> Iterator[str]:
        module, node = classes[name]
        for base in (module.known.get(each.id, "") for each in node.bases if isinstance(each, ast.Name)):
            if base in classes and classes[base][0].is_shared:
                yield base
                yield from shared_bases(base)

    overridden: defaultdict[str, set[str]] = defaultdict(set)
    for name, (module, node) in classes.items():
        for base in shared_bases(name) if module.broker is not None else ():
            for member in {*_members(node)}.intersection(_members(classes[base][1])):
                overridden[f"{base}.{member}"].add(module.broker or "")
    return overridden


def parse(path: Path) -> ast.Module:
    """Parse a file."""
    # If garbage is collected meanwhile, its finalizers run, and CPython 3.11 may lose count of its own recursion.
    gc.disable()
    try:
        return ast.parse(path.read_text())
    finally:
        gc.enable()


def _definitions(body: list[ast.stmt]) -> Iterator[str]:
    """Return the names of functions, classes and variables, but for those that Python itself calls."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        else:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        yield from (name for name in names if not name.startswith("__"))


def _members(node: ast.stmt) -> Iterator[str]:
    return _definitions(node.body if isinstance(node, ast.ClassDef) else [])


def _mentions(node: ast.stmt, known: dict[str, str]) -> Iterator[str]:
    """Return what a statement mentions: names with their modules, and attributes with a dot."""
    for each in ast.walk(node):
        if isinstance(each, ast.Attribute):
            yield f".{each.attr}"
            if isinstance(each.value, ast.Name):  # perhaps a module
                yield f"{known.get(each.value.id)}.{each.attr}"
        elif isinstance(each, ast.keyword):
            yield f".{each.arg}"
        elif isinstance(each, ast.Name):
            yield known.get(each.id, "")
        elif isinstance(each, ast.Constant):  # perhaps in __all__
            yield known.get(str(each.value), "")
