"""Each public name and method can be asked for its help, its signature and its types, as REPLs and editors do."""

from __future__ import annotations

import inspect
import pydoc
import re
from importlib import import_module
from typing import TYPE_CHECKING, get_type_hints

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CLIENT = "aiokeyless errors events models otel pytest_plugin reports sandbox schedule shutdown signatures sync ticket"
MODULES = [
    *(name if name == "aiokeyless" else f"aiokeyless.{name}" for name in CLIENT.split()),
    *(f"aiokeyless.worker{broker}" for broker in ("", ".messages", ".nats", ".postgres", ".sqlite")),
]
PLAIN = pydoc._PlainTextDoc()  # type: ignore[attr-defined]


def functions_of(value: object) -> Iterator[Callable[..., object]]:
    """Yield the functions of a public name: itself, or the methods of a class and what computes its properties."""
    if inspect.isfunction(value):
        yield value
    elif inspect.isclass(value):
        for name, member in inspect.getmembers_static(value):
            function = member.fget if isinstance(member, property) else getattr(value, name, None)
            is_public = name == "__init__" or not name.startswith("_")
            if is_public and callable(function) and str(getattr(function, "__module__", "")).startswith("aiokeyless"):
                yield function


@pytest.mark.parametrize("name", MODULES)
def test_each_public_name_has_help_and_its_functions_a_signature_and_types(name: str) -> None:
    module = import_module(name)
    names = set(getattr(module, "__all__", filter(re.compile("keyless_").match, vars(module)))) - {"__version__"}
    assert names
    assert pydoc.render_doc(module, renderer=PLAIN)
    for public in names:
        value = getattr(module, public)
        assert pydoc.render_doc(value, renderer=PLAIN)
        for function in functions_of(value):
            arguments = inspect.signature(function).parameters.keys() - {"self"}
            assert get_type_hints(function).keys() >= arguments, function
