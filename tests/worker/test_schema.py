"""The JSON Schemas of requests and events: what is real is valid, and what is not valid a worker refuses too."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from jsonschema import Draft202012Validator, FormatChecker
from jsonschema.exceptions import ValidationError

from aiokeyless.errors import InvalidRequestError
from aiokeyless.worker import ApprovalEvent, ApprovalRequest, Outcome, submit_approval
from aiokeyless.worker.messages import read_request
from aiokeyless.worker.nats import EventKeys
from aiokeyless.worker.schema import message_schema

from .conformance.brokers import new_request
from .reading import a_message, working
from .reading import read as read_events

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

PAGE = Path(__file__).parents[2] / "docs" / "reference" / "messages.md"
REQUEST = Draft202012Validator(message_schema(ApprovalRequest), format_checker=FormatChecker())
EVENT = Draft202012Validator(message_schema(ApprovalEvent), format_checker=FormatChecker())
NOW = datetime(2026, 11, 27, 6, tzinfo=UTC)


def read(request: dict[str, Any]) -> None:
    """Read a request as a worker does."""
    read_request(a_message(msgspec.json.encode(request), stored_at=NOW), longest_wait=3600, largest_request=1 << 30)


def test_they_are_schemas() -> None:
    for schema in (message_schema(ApprovalRequest), message_schema(ApprovalEvent)):
        Draft202012Validator.check_schema(schema)
        assert schema["$schema"] == Draft202012Validator.META_SCHEMA["$id"]


@pytest.mark.parametrize("message", [ApprovalRequest, ApprovalEvent])
def test_each_field_is_described_as_in_the_docstring(message: type[ApprovalRequest | ApprovalEvent]) -> None:
    properties = message_schema(message)["$defs"][message.__name__]["properties"]
    assert list(properties) == [field.encode_name for field in msgspec.structs.fields(message)]
    told = " ".join((message.__doc__ or "").replace("``", "`").split())
    descriptions = [schema["description"] for schema in properties.values()]
    assert [text for text in descriptions if not (text.endswith(".") and text in told)] == []


@pytest.mark.parametrize(
    "request_",
    [
        ApprovalRequest(version=1, user_id="c0ffee", operation_id="txn-1"),
        ApprovalRequest(
            version=1,
            user_id="C0FFEE",
            operation_id="é" * 512,
            operation_payload="",
            external_user_id="alice@example.com",
            expires_in=0.5,
            created_at=NOW,
            context=msgspec.Raw(b"[1, null]"),
            require_auth_type="biom",
            started_by="phone",
        ),
    ],
    ids=["the shortest", "everything"],
)
def test_a_request_is_valid(request_: ApprovalRequest) -> None:
    REQUEST.validate(json.loads(msgspec.json.encode(request_)))


WRONG: dict[str, tuple[object, ...]] = {
    "version": (2, "1"),
    "user_id": ("", "not hex", None),
    "operation_id": (None, "", "x" * 513),
    "operation_payload": (7,),
    "expires_in": (0, -1, None),
    "created_at": (7,),
    "require_auth_type": ("face",),
    "started_by": ("web", None),
    "operationPayload": ("a misspelt name",),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in WRONG.items() for value in values])
def test_what_is_not_valid_a_worker_refuses_too(field: str, value: object) -> None:
    request = {"version": 1, "user_id": "C0FFEE", "operation_id": "txn-1", field: value}
    with pytest.raises(ValidationError):
        REQUEST.validate(request)
    with pytest.raises(InvalidRequestError):
        read(request)


@pytest.mark.looptime
async def test_what_goes_over_a_broker_is_valid(sandbox: Sandbox) -> None:
    sandbox.approve("txn-1", user_id="C0FFEE")
    seen: dict[str, Outcome] = {}
    async with working(sandbox) as (_, broker):
        await submit_approval(broker, "C0FFEE", operation_id="txn-1", operation_payload="x", context={"order": 7})
        await submit_approval(broker, "C0FFEE", operation_id="txn-2", external_user_id="alice", expires_in=1)
        await submit_approval(broker, "C0FFEE", operation_id="txn-3", operation_payload="Pay 40")
        await broker.submit(msgspec.structs.replace(new_request("txn-4"), body=b'{"version": 1}'))
        for number in range(4):
            if number == 3:
                sandbox.approve("txn-3")
            [event] = await read_events(broker)
            EVENT.validate(json.loads(msgspec.json.encode(event)))
            seen[str(event.operation_id)] = event.outcome
    assert seen == {
        "txn-1": Outcome.FAILED,
        "None": Outcome.FAILED,
        "txn-2": Outcome.EXPIRED,
        "txn-3": Outcome.APPROVED,
    }


# -- the page


def test_the_examples_of_the_page_are_valid() -> None:
    request, event = (json.loads(block) for block in re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL))
    REQUEST.validate(request)
    read(request)
    EVENT.validate(event)


def test_the_page_checks_a_signature_as_a_reader_does() -> None:
    [code] = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    program: dict[str, Any] = {}
    exec(code, program)  # noqa: S102  # our own page
    key = "a-key-of-the-workers-and-readers-only"
    signature = EventKeys(key).sign(b"{}", fleet="keyless")
    assert program["is_signed"](b"{}", signature, key.encode())
    assert not program["is_signed"](b"{ }", signature, key.encode())
