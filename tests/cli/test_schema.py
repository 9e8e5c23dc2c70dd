"""``aiokeyless schema``: what it prints."""

from __future__ import annotations

import json

import pytest

from aiokeyless.cli import run
from aiokeyless.worker import ApprovalEvent, ApprovalRequest
from aiokeyless.worker.schema import message_schema


@pytest.mark.parametrize(("name", "message"), [("request", ApprovalRequest), ("event", ApprovalEvent)])
def test_it_prints_the_schema_of_a_message(
    name: str, message: type[ApprovalRequest | ApprovalEvent], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["schema", name]) == 0
    assert json.loads(capsys.readouterr().out) == message_schema(message)
