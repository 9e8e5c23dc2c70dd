"""Writes into the pages what other files say, since GitHub shows no directive of Sphinx: ``nox -s pages``.

A comment, which GitHub hides, says what to write below it:

- ``<!-- examples/quickstart.py -->``: a file; of a program, what follows its docstring
- ``<!-- examples/agent/guard.py: Guard.guarded -->``: what it defines by this name
- ``<!-- examples/paid_once.py: USER ... pay -->``: from one name to another, or else to the end
- ``<!-- docs/index.md: Start ... -->``: text, from this heading on; ``<!-- end -->`` ends it
- ``<!-- signatures of aiokeyless.sync -->``: the public names of a module
- ``<!-- checks of aiokeyless doctor -->``: its table

Nothing is imported from the package, so this needs none of its extras.
"""

from __future__ import annotations

import argparse
import ast
import functools
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[1]
#: A comment of each kind, with what is written below it already.
CODE: Final = re.compile(
    r"^(<!-- (?:(?P<checks>checks of aiokeyless doctor)|signatures of (?P<module>[\w.]+)|"
    r"(?P<file>[\w./-]+\.(?!md)\w+)(?:: (?P<part>.+))?) -->\n)"
    r"(?:```\w+\n(?:(?!```).*\n)*```\n)?",
    re.MULTILINE,
)
TEXT: Final = re.compile(
    r"^(<!-- (?P<file>[\w./-]+\.md)(?:: (?P<heading>.+) \.\.\.)? -->\n)(?:(?:(?!<!-- ).*\n)*<!-- end -->\n)?",
    re.MULTILINE,
)
LANGUAGES: Final = {".py": "python", ".sql": "sql", ".yaml": "yaml"}
#: A line of the lists in docs/index.md, which name each page by its title.
LINK: Final = re.compile(r"^- \[.*\]\((.*\.md)\)$", re.MULTILINE)


def pages() -> Iterator[Path]:
    """Yield the files in which there may be such comments."""
    yield from ROOT.glob("*.md")
    yield from (ROOT / "docs").rglob("*.md")
    yield from (ROOT / "examples").rglob("*.md")
    yield ROOT / "docs" / "llms.txt"  # it repeats a page


def written(page: Path) -> str:
    """Return the text of a page, with what the other files say now."""
    text = CODE.sub(_code, read(page))
    if page == ROOT / "docs" / "index.md":
        return LINK.sub(_titled, text)
    return TEXT.sub(_text, text)


def read(path: Path) -> str:
    """Return the text of a file."""
    return path.read_text(encoding="utf-8")


def _code(found: re.Match[str]) -> str:
    path = ROOT / (found["file"] or "")
    if found["checks"]:
        language, code = "text", checks()
    elif found["module"]:
        language, code = "py", signatures(found["module"])
    elif path.suffix == ".py":
        language, code = "python", excerpt(path, found["part"])
    else:
        language, code = LANGUAGES.get(path.suffix, "text"), read(path)
    return f"{found[1]}```{language}\n{code.strip()}\n```\n"


def _text(found: re.Match[str]) -> str:
    text = written(ROOT / found["file"])
    if found["heading"]:
        text = text[text.index(f"## {found['heading']}\n") :]
    return f"{found[1]}{text.strip()}\n<!-- end -->\n"


def _titled(link: re.Match[str]) -> str:
    title, _, _ = read(ROOT / "docs" / link[1]).removeprefix("# ").partition("\n")
    return f"- [{title}]({link[1]})"


# -- programs


class Definition(NamedTuple):
    """What defines a name: a statement of a file, and the summary of its documentation."""

    path: Path
    statement: ast.stmt
    summary: str


@functools.cache
def parse(program: str) -> ast.Module:
    """Return the statements of a program."""
    return ast.parse(program)


def definitions(path: Path, body: list[ast.stmt]) -> dict[str, Definition]:
    """Return what the statements of a module or of a class define, by name."""
    found: dict[str, Definition] = {}
    for statement, following in zip(body, [*body[1:], ast.Pass()], strict=True):
        names, documentation = [], None
        match statement:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names, documentation = [statement.name], ast.get_docstring(statement)
            case ast.Assign(targets=[target]) | ast.AnnAssign(target=target):
                names = [node.id for node in ast.walk(target) if isinstance(node, ast.Name)]
                match following:
                    case ast.Expr(ast.Constant(str(text))):
                        documentation = text
            case ast.Import() | ast.ImportFrom():
                names = [alias.asname or alias.name for alias in statement.names]
            case ast.If():  # what only type checkers import, the others when it is used
                found = definitions(path, statement.body) | found
        summary = " ".join((documentation or "").partition("\n\n")[0].split())
        for name in names:
            found.setdefault(name, Definition(path, statement, summary))  # a property comes before its setter
    return found


def excerpt(path: Path, part: str | None) -> str:
    """Return a part of a program."""
    lines = read(path).splitlines()
    if part is None:
        tree = parse(read(path))
        return "\n".join(lines[tree.body[0].end_lineno if ast.get_docstring(tree) else 0 :])
    first, is_range, last = part.partition(" ...")
    begin, end = _lines(path, first)
    if is_range:
        end = _lines(path, last.strip())[1] if last else len(lines)
    return textwrap.dedent("\n".join(lines[begin:end]))


def _lines(path: Path, name: str) -> tuple[int, int]:
    """Return where a definition begins, with its decorators and the comment above it, and where it ends."""
    statement = _definition(path, parse(read(path)).body, name).statement
    lines = read(path).splitlines()
    begin = min(node.lineno for node in (statement, *getattr(statement, "decorator_list", []))) - 1
    while lines[begin - 1].lstrip().startswith("#"):
        begin -= 1
    return begin, statement.end_lineno or begin


def _definition(path: Path, body: list[ast.stmt], name: str) -> Definition:
    first, _, rest = name.partition(".")
    found = definitions(path, body).get(first)
    if found is None:
        raise LookupError(f"{path.relative_to(ROOT)} has no {name}: correct the comment in the page that shows it")
    return _definition(path, getattr(found.statement, "body", []), rest) if rest else found


# -- the checks of ``aiokeyless doctor``

SAYS: Final = {"yes": "documented by the vendor", "no": "assumed by aiokeyless", "-": "expected"}


def checks() -> str:
    """Return what each check sends and expects, and what to do if that differs, in the words of the command."""
    path = ROOT / "aiokeyless" / "cli" / "findings.py"
    table = ast.literal_eval(getattr(_definition(path, parse(read(path)).body, "TABLE").statement, "value"))  # noqa: B009
    blocks: list[str] = []
    for name, says, sent, expected, _, page, follows in (line.split(" | ") for line in table.splitlines()):
        lines = f"sent: {sent}", f"{SAYS[says]}: {expected}", f"{follows} See docs/{page}."
        wrapper = textwrap.TextWrapper(WIDTH, initial_indent="    ", subsequent_indent="    ", break_on_hyphens=False)
        blocks.append("\n".join([name, *map(wrapper.fill, lines)]))
    return "\n\n".join(blocks)


# -- signatures

#: The folder that has the package.
SOURCES: Final = ROOT
WIDTH: Final = 100
#: Their methods are for workers.
WITHOUT_METHODS: Final = {"Broker", "NatsBroker", "PostgresBroker", "PostgresConnection", "SqliteBroker"}


def signatures(module: str) -> str:
    """Return the public names of a module as a stub, without those that the package has too."""
    others = [] if module == "aiokeyless" else public("aiokeyless")
    return "\n\n\n".join(_stub(each) for each in public(module) if each not in others)


@functools.cache
def public(module: str) -> list[Definition]:
    """Return the public names of a module, exceptions last: those of ``__all__``, or else the fixtures."""
    path = _path(module)
    defined = definitions(path, parse(read(path)).body)
    match defined.get("__all__"):
        case Definition(statement=ast.Assign(value=value)):
            exported = {*ast.literal_eval(value)} - {"__version__"}
            names = sorted(exported, key=lambda name: (name.endswith("Error"), name))
        case _:
            fixtures = {name for name, each in defined.items() if "@pytest.fixture" in ast.unparse(each.statement)}
            names = [name for name in defined if name in fixtures and not name.startswith("_")]
    return [found for name in names if (found := find(path, name))]


def find(path: Path, name: str) -> Definition | None:
    """Return what defines a name of a module: there, or in the module of ours from which it is imported."""
    found = definitions(path, parse(read(path)).body).get(name)
    if found is None or not isinstance(found.statement, ast.ImportFrom):
        return found
    level, module = found.statement.level, found.statement.module or ""
    if level:
        module = ".".join([*path.parents[level - 1].relative_to(SOURCES).parts, module]).rstrip(".")
    [original] = (alias.name for alias in found.statement.names if name == (alias.asname or alias.name))
    return find(_path(module), original) if module.startswith("aiokeyless") else None


def _path(module: str) -> Path:
    path = SOURCES.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _stub(definition: Definition) -> str:
    path, statement, summary = definition
    match statement:
        case ast.ClassDef():
            code, body = _class(path, statement)
        case ast.FunctionDef(name, ast.arguments(vararg=ast.arg())) if path == _path("aiokeyless.sync"):
            return _without_loop(find(_path("aiokeyless.worker"), name), name)
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            code, body = _function(path, statement) + " ..." * (not summary), ""
        case ast.AnnAssign(ast.Name(name), value=ast.Call(args=[ast.Attribute(face, method)])) if name == method:
            return _without_loop(find(path, unparse(face)), method)
        case ast.AnnAssign(target, annotation, value):
            code, body = f"{unparse(target)}: {unparse(annotation)}{_default(path, value, ' = ')}", ""
            if len(code) > WIDTH + 20:
                code = code.replace(" = ", " = (\n    ").replace(" | ", "\n    | ") + "\n)"
        case _:
            code, body = unparse(statement), ""
    documentation = textwrap.fill(f'"""{summary}"""', WIDTH + 20) if summary else ""
    body = "\n\n".join(filter(None, [documentation, body]))
    return f"{code}\n{textwrap.indent(body, '    ' if code.endswith(':') else '')}".rstrip()


def _class(path: Path, statement: ast.ClassDef) -> tuple[str, str]:
    """Return the first line of a class, and what is in it."""
    bases, members = _members(path, statement)
    shown = {name: each for name, each in members.items() if name == "__init__" or not name.startswith("_")}
    if not any(base.endswith("Enum") for base in bases):  # of a subclass: its base says what that is
        shown = {name: each for name, each in shown.items() if not isinstance(each.statement, ast.Assign)}
    stubs = [_stub(each) for each in shown.values()]
    functions = [stub for stub in stubs if re.search("^(async )?def ", stub, re.MULTILINE)]
    fields = [stub for stub in stubs if stub not in functions]
    if statement.name in WITHOUT_METHODS:
        functions = functions[: "__init__" in members]
    first = f"class {statement.name}({', '.join(bases)}):" if bases else f"class {statement.name}:"
    return first, "\n\n".join(filter(None, ["\n".join(fields), *functions]))


def _members(path: Path, statement: ast.ClassDef) -> tuple[list[str], dict[str, Definition]]:
    """Return the public bases of a class, and what it defines. What a private base defines is its own."""
    bases: list[str] = []
    members = definitions(path, statement.body)
    for name in map(unparse, statement.bases):
        base = find(path, name)
        if base is None or base in public("aiokeyless") + public("aiokeyless.worker"):
            bases.append(name)
        else:
            assert isinstance(base.statement, ast.ClassDef)
            above, inherited = _members(base.path, base.statement)
            bases += above
            members |= {name: each for name, each in inherited.items() if name not in members}
    return bases, members


def _function(path: Path, statement: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    decorators = [f"@{name}\n" for name in map(unparse, statement.decorator_list) if not name.startswith("_")]
    word = "async def" if isinstance(statement, ast.AsyncFunctionDef) else "def"
    start, end = f"{word} {statement.name}(", f") -> {unparse(statement.returns)}:"
    parameters = _parameters(path, statement.args)
    line = f"{start}{', '.join(parameters)}{end}"
    if len(line) > WIDTH:
        line = "\n".join([start, *(f"    {each}," for each in parameters), end])
    return "".join([*decorators, line])


def _parameters(path: Path, given: ast.arguments) -> list[str]:
    positional = [*given.posonlyargs, *given.args]
    defaults: dict[ast.arg, ast.expr | None] = dict(zip(given.kwonlyargs, given.kw_defaults, strict=True))
    defaults |= zip(reversed(positional), reversed(given.defaults), strict=False)

    def show(argument: ast.arg) -> str:
        return unparse(argument) + _default(path, defaults.get(argument), " = " if argument.annotation else "=")

    parameters = [*map(show, positional)]
    if given.posonlyargs:
        parameters.insert(len(given.posonlyargs), "/")
    if given.vararg or given.kwonlyargs:
        parameters.append("*" + unparse(given.vararg))
    parameters += map(show, given.kwonlyargs)
    return [*parameters, "**" + unparse(given.kwarg)] if given.kwarg else parameters


def _without_loop(face: Definition | None, name: str) -> str:
    """Return a function or a method of `aiokeyless.sync` that is made of one of the other face, or of its class."""
    assert face is not None
    if isinstance(face.statement, ast.ClassDef):
        face = _members(face.path, face.statement)[1][name]
    path, method, summary = face
    assert isinstance(method, ast.FunctionDef | ast.AsyncFunctionDef)
    stub = _stub(Definition(path, ast.FunctionDef(name, method.args, method.body, [], method.returns), summary))
    return re.sub(r"AsyncGenerator\[(.*), None\]", r"Generator[\1, None, None]", stub)


def _default(path: Path, value: ast.expr | None, sign: str) -> str:
    """Return a default, with the value of a constant in place of its name."""
    match value:
        case None:
            return ""
        case ast.Name(name) if name.isupper():
            match find(path, name):
                case Definition(path, ast.Assign(value=constant) | ast.AnnAssign(value=constant)):
                    return _default(path, constant, sign)
    return sign + unparse(value)


def unparse(node: ast.AST | None) -> str:
    """Return code, with the quotes that are usual here."""
    return re.sub(r"'([^'\"]*)'", r'"\1"', ast.unparse(node)) if node else ""


def main() -> None:
    """Write the pages, or name those that would change."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a page would change")
    is_check = parser.parse_args().check
    stale = {page: text for page in pages() if (text := written(page)) != read(page)}
    if is_check and stale:
        sys.exit("\n".join(f"{page.relative_to(ROOT)} differs from what it shows: run nox -s pages" for page in stale))
    for page, text in stale.items():
        page.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
