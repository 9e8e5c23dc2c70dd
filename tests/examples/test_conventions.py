"""The page about names: those of this package and of openai, as installed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2
import openai
import pytest

import aiokeyless
from aiokeyless import KeylessClient, StatusError

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "conventions.md"
ROWS = [line.strip("| ").split(" | ") for line in PAGE.read_text().splitlines() if line.startswith("| ")]
ANSWER = httpx2.Response(500, request=httpx2.Request("GET", "http://127.0.0.1/"))


@pytest.mark.parametrize(
    ("column", "callables", "error"),
    [
        (1, (KeylessClient, KeylessClient.create_operation), StatusError(status=500, method="GET", path="/")),
        (2, (openai.AsyncOpenAI, openai.OpenAI), openai.APIStatusError("", response=ANSWER, body=None)),
    ],
    ids=["aiokeyless", "openai"],
)
def test_a_name_of_the_table_is_one_of_the_client(
    column: int, callables: tuple[Callable[..., object], ...], error: object
) -> None:
    text = "\n".join(row[column] for row in ROWS)
    known = {name: value for each in callables for name, value in inspect.signature(each).parameters.items()}
    arguments = re.findall(r"`(\w+)=([\d.]*)", text)
    assert len(arguments) >= 6
    for name, default in arguments:
        assert name in known, name
        assert not default or float(default) == known[name].default, name
    attributes = re.findall(r"`\.(\w+)`", text)
    assert len(attributes) >= 2
    assert [name for name in attributes if not hasattr(error, name)] == []


def test_the_names_of_classes_exist() -> None:
    assert {"KeylessClient", "KeylessError"} <= {*aiokeyless.__all__}
    assert issubclass(openai.APIStatusError, openai.OpenAIError)
