"""Each public name can be asked for its help, its signature and its types, and its docstring leaves out nothing."""

from __future__ import annotations

import inspect
import pydoc
import re
from importlib import import_module
from typing import TYPE_CHECKING, get_type_hints

import msgspec
import pytest

from aiokeyless import InconsistentOperationError, KeylessClient, OperationMismatchError, sync, worker
from aiokeyless._rules.approval import Rejection
from aiokeyless.events import PollResult, WaitOutcome
from aiokeyless.worker import FailureReason, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from enum import Enum

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


def public_values(name: str) -> list[object]:
    """Return the public values of a module, or the functions of pytest's plugin."""
    module = import_module(name)
    names = set(getattr(module, "__all__", filter(re.compile("keyless_").match, vars(module)))) - {"__version__"}
    return [getattr(module, public) for public in names]


def described(value: object, heading: str) -> list[str]:
    """Return what a docstring names under a heading."""
    _, _, section = (inspect.getdoc(value) or "").partition(f"{heading}:\n")
    return re.findall(r"^    \**(\w+): ", section.partition("\n\n")[0], re.MULTILINE)


@pytest.mark.parametrize("name", MODULES)
def test_each_public_name_has_help_and_its_functions_a_signature_and_types(name: str) -> None:
    assert pydoc.render_doc(import_module(name), renderer=PLAIN)
    values = public_values(name)
    assert values
    for value in values:
        assert pydoc.render_doc(value, renderer=PLAIN)
        for function in functions_of(value):
            arguments = inspect.signature(function).parameters.keys() - {"self"}
            assert get_type_hints(function).keys() >= arguments, function


@pytest.mark.parametrize("name", MODULES)
def test_a_docstring_describes_each_field_and_all_arguments_or_none(name: str) -> None:
    for value in public_values(name):
        if isinstance(value, type) and issubclass(value, msgspec.Struct):
            inherited = [field for base in value.__bases__ for field in described(base, "Attributes")]
            assert described(value, "Attributes") == [name for name in value.__struct_fields__ if name not in inherited]
        for function in functions_of(value):
            shown = described(value if function.__name__ == "__init__" else function, "Args")
            arguments = [argument for argument in inspect.signature(function).parameters if argument != "self"]
            assert shown in ([], [argument for argument in arguments if not argument.startswith("_")]), function


CREATING = inspect.signature(KeylessClient.create_operation).parameters.keys() - {"self"}


@pytest.mark.parametrize(
    ("asking", "left_out"),
    [
        (KeylessClient.request_approval, set()),
        (sync.KeylessClient.create_operation, set()),
        (sync.KeylessClient.request_approval, set()),
        (worker.submit_approval, {"if_exists"}),
        (sync.submit_approval, {"if_exists"}),
    ],
)
def test_whatever_asks_for_an_approval_has_and_describes_the_arguments_of_create_operation(
    asking: Callable[..., object], left_out: set[str]
) -> None:
    assert inspect.signature(asking).parameters.keys() & CREATING == CREATING - left_out
    assert {*described(asking, "Args")} & CREATING == CREATING - left_out


def test_a_request_at_a_broker_has_the_arguments_of_submit_approval() -> None:
    """Its docstrings are tried above: `request_to_json` refers to those of `submit_approval`."""
    _, *arguments = inspect.signature(worker.submit_approval).parameters.values()
    assert [*inspect.signature(worker.request_to_json).parameters.values()] == arguments
    assert worker.ApprovalRequest.__struct_fields__ == ("version", *(argument.name for argument in arguments))


@pytest.mark.parametrize("kind", [FailureReason, Outcome, PollResult, WaitOutcome])
def test_the_reference_describes_each_outcome_and_each_reason(kind: type[Enum]) -> None:
    assert re.findall(r'^    (\w+) = .*\n    """', inspect.getsource(kind), re.MULTILINE) == [*kind.__members__]


@pytest.mark.parametrize("rejection", Rejection)
def test_the_reference_names_what_may_be_wrong_in_an_answer(rejection: Rejection) -> None:
    error = OperationMismatchError if rejection.is_mismatch else InconsistentOperationError
    words = rejection.name.lower().removeprefix("other_").split("_")
    assert {*words} <= {*re.findall("[a-z]+", str(error.__doc__))}
