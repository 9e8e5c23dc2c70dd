"""No repr shows private data: not by itself, nor in a log line, nor as a local variable in an error report."""

from __future__ import annotations

import importlib
import io
import json
import pkgutil
import secrets
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import structlog
from error_reports import REPORTERS
from loguru import logger as loguru
from nats.aio.msg import Msg
from rich.pretty import pretty_repr

import aiokeyless
from aiokeyless import ApprovalTicket, models, reports
from aiokeyless._http.protocol import RawAnswer, create_operation
from aiokeyless._rules.order import Standing
from aiokeyless._token import Expectation, Token
from aiokeyless.cli.findings import CreatedOperation
from aiokeyless.models import Secret
from aiokeyless.worker import ApprovalEvent, ApprovalRequest, Outcome
from aiokeyless.worker.broker import NewRequest
from aiokeyless.worker.decisions import Decided, Redeliver
from aiokeyless.worker.messages import Delivery, Message, RequestHead, _Rest
from aiokeyless.worker.nats.intake import NatsMessage
from aiokeyless.worker.sqlite.store import Unread
from aiokeyless.worker.tables import Row, TableMessage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Made here, so that no line of source that a reporter quotes holds them.
HIDDEN = secrets.token_hex(32)
DATA = json.dumps(HIDDEN).encode()
NOW = datetime(2026, 1, 1, tzinfo=UTC)
WHO: dict[str, Any] = {"user_id": "C0FFEE", "operation_id": "txn-1", "external_user_id": HIDDEN}
ASKED: dict[str, Any] = {**WHO, "operation_payload": HIDDEN}
MESSAGE: dict[str, Any] = {"body": DATA, "stored_at": NOW, "number": 1, "is_untried": True}

TICKET = ApprovalTicket(
    user_id="C0FFEE",
    operation_id="txn-1",
    external_user_id=HIDDEN,
    payload_sha256=HIDDEN,
    created_at=NOW,
    expires_at=NOW,
)
OPERATION = models.Operation(**ASKED, api_key=Secret(HIDDEN), result=False, state="pending")
REQUEST = ApprovalRequest(version=1, **ASKED, context=msgspec.Raw(DATA))
EVENT = ApprovalEvent(
    version=1,
    outcome=Outcome.FAILED,
    user_id="C0FFEE",
    operation_id="txn-1",
    external_user_id=HIDDEN,
    payload_sha256=HIDDEN,
    context=msgspec.Raw(DATA),
    requested_at=NOW,
    decided_at=NOW,
    deliveries=1,
)
RAW = Msg(_client=None, subject="requests", data=DATA, headers={"Context": HIDDEN})  # type: ignore[arg-type]
ON_NATS = NatsMessage(**MESSAGE, id=1, raw=RAW, arrived_at=0.0, standing=Standing.ANSWERED, version=1)
IN_A_TABLE = TableMessage(**MESSAGE, row=Row(1, 2))
UPDATE: dict[str, Any] = {"error": None, "polls": 1, "elapsed": 0.1, "next_poll_in": None}
LINK: dict[str, Any] = {"user_id": "C0FFEE", "external_user_id": HIDDEN, "created_at": "", "updated_at": ""}
SIGNED: dict[str, Any] = {"user_id": "C0FFEE", "external_user_id": HIDDEN, "transaction_data": HIDDEN}

THINGS: list[object] = [
    *(TICKET, OPERATION, REQUEST, EVENT, ON_NATS, IN_A_TABLE, Message(**MESSAGE)),
    *(Delivery(message=message, request=REQUEST, ticket=TICKET) for message in (ON_NATS, IN_A_TABLE)),
    models.PendingOperation(operation_id="txn-1", operation_payload=HIDDEN, external_user_id=HIDDEN),
    models.ExternalUser(**LINK),
    models.NewExternalUser(external_user_id=HIDDEN),
    models.NewOperation(operation_id="txn-1", operation_payload=HIDDEN, external_user_id=HIDDEN),
    models.SignedTransaction(**SIGNED, issued_at=NOW, key_id="k", version=None, signed_sha256=HIDDEN),
    reports.ApprovalUpdate(operation=OPERATION, **UPDATE),
    reports.Approved(operation_id="txn-1", operation=OPERATION),
    Token(HIDDEN, "k", "ES256", {"td": HIDDEN}),
    Expectation(**SIGNED, issuer=None, audience=None, max_age=1.0, leeway=1.0),
    create_operation("C0FFEE", models.NewOperation(operation_id="txn-1", operation_payload=HIDDEN)),
    RawAnswer(200, {}, DATA),
    CreatedOperation("txn-1", HIDDEN),
    NewRequest(REQUEST, DATA, HIDDEN, None),
    Unread("shop", Row(1, 2), 1, DATA),
    Redeliver(1.0, created=REQUEST),
    Decided(EVENT),
    RequestHead(version=2, operation_id="txn-1", context=msgspec.Raw(DATA)),
    _Rest("txn-1", msgspec.Raw(DATA)),
]
every_thing = pytest.mark.parametrize("thing", THINGS, ids=lambda thing: type(thing).__name__)


def shown_in_a_line(thing: object) -> str:
    """What loggers write of a value."""
    line = structlog.processors.JSONRenderer()(None, "info", {"event": "e", "thing": thing})
    console = structlog.dev.ConsoleRenderer(colors=False)(None, "info", {"event": "e", "thing": thing})
    sink = io.StringIO()
    handler = loguru.add(sink, serialize=True)
    loguru.bind(thing=thing).info("{}", thing)
    loguru.remove(handler)
    return f"{line!s} {console} {sink.getvalue()} %s %r" % (thing, [thing])


@every_thing
@pytest.mark.parametrize("show", [repr, str, format, pretty_repr, shown_in_a_line])
def test_no_repr_shows_private_data(thing: object, show: Callable[[object], str]) -> None:
    shown = show(thing)
    assert type(thing).__name__ in shown
    assert HIDDEN not in shown


def failing(_thing: object) -> None:
    raise RuntimeError("a bug")


@every_thing
def test_no_error_report_shows_private_data_of_a_local_variable(thing: object) -> None:
    with pytest.raises(RuntimeError) as caught:
        failing(thing)
    inner = caught.value.__traceback__.tb_next  # type: ignore[union-attr]  # this frame, and that of pytest, know more
    for name, report in REPORTERS.items():
        text = report(caught.value.with_traceback(inner))
        assert type(caught.value).__name__ in text
        assert HIDDEN not in text, name


def private_classes() -> Iterator[type]:
    """All classes that have a field for something private; not those of the sandbox, whose users are made up."""
    for found in pkgutil.walk_packages(aiokeyless.__path__, "aiokeyless."):
        if found.name.startswith("aiokeyless.sandbox") or found.name.endswith("__main__"):
            continue
        for kind in vars(importlib.import_module(found.name)).values():
            if isinstance(kind, type) and kind.__module__ == found.name:
                fields = getattr(kind, "__struct_fields__", getattr(kind, "_fields", ()))
                if models._PRIVATE.intersection(fields):
                    yield kind


def test_each_class_with_private_data_is_among_the_things() -> None:
    assert set(private_classes()) <= {type(thing) for thing in THINGS}


def test_a_repr_says_all_the_rest() -> None:
    assert repr(TICKET) == (
        "ApprovalTicket(operation_id='txn-1', user_id='C0FFEE', external_user_id=<64 characters>, "
        f"payload_sha256=<64 characters>, created_at={NOW!r}, expires_at={NOW!r}, require_auth_type=None, "
        "started_by='backend', reconciled=False, traceparent=None, version=1)"
    )
    assert ", context=<66 bytes>, " in repr(EVENT)
