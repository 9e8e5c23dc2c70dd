"""What a ticket promises: it survives the way through JSON, holds no secret, and a wrong one is refused by name."""

from __future__ import annotations

import hashlib
import json
import math
import pickle
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.pretty import pretty_repr

from aiokeyless.errors import ConfigurationError
from aiokeyless.models import AuthType
from aiokeyless.ticket import ApprovalTicket, payload_digest

KEY = "sdk-key-0123456789"
PAYLOAD = "Approve wire transfer of $500"
EMPTY_SHA256 = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
TICKET: dict[str, Any] = {
    "operation_id": "txn-1",
    "user_id": "0123456789ABCDEF",
    "external_user_id": None,
    "payload_sha256": payload_digest(PAYLOAD),
    "created_at": "2026-11-24T12:00:00Z",
    "expires_at": "2026-11-24T12:02:00Z",
    "require_auth_type": None,
    "started_by": "backend",
    "reconciled": False,
    "traceparent": None,
    "version": 1,
}


def ticket(**changed: Any) -> ApprovalTicket:
    return ApprovalTicket.from_json(json.dumps(TICKET | changed))


def test_the_form_of_a_ticket_is_this_one() -> None:
    assert json.loads(ticket().to_json()) == TICKET
    assert "\n" not in ticket().to_json()


def test_a_trace_is_kept() -> None:
    parent = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01"
    assert ApprovalTicket.from_json(ticket(traceparent=parent).to_json()).traceparent == parent


instants = st.datetimes(timezones=st.just(UTC))
texts = st.text(st.characters(exclude_categories=["Cs"]))


tickets = st.builds(
    ApprovalTicket,
    operation_id=st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=3, max_size=512),
    user_id=st.text("0123456789abcdefABCDEF", min_size=1, max_size=512),
    external_user_id=st.none() | texts,
    payload_sha256=st.builds(payload_digest, st.none() | st.text()),
    created_at=instants,
    expires_at=instants,
    require_auth_type=st.sampled_from([None, "biom", "pin"]),
    started_by=st.sampled_from(["backend", "phone"]),
    reconciled=st.booleans(),
)


@given(tickets)
def test_a_ticket_survives_the_way_through_json_and_pickle(before: ApprovalTicket) -> None:
    assert ApprovalTicket.from_json(before.to_json()) == before
    assert ApprovalTicket.from_json(before.to_json().encode()) == before
    assert pickle.loads(pickle.dumps(before)) == before  # noqa: S301


def test_a_ticket_holds_neither_payload_nor_key() -> None:
    shown = f"{ticket()!r} {ticket().to_json()} {pretty_repr(ticket())}"
    assert PAYLOAD not in shown
    assert "key" not in shown.lower()
    assert set(ApprovalTicket.__struct_fields__) == set(TICKET)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "{", "null", "1", "[]", '""', "{}", "<html>", '{"version": 1}', '{"version": 1e999}', b"\xff", b""),
        *("[" * 100_000, '{"x":' * 100_000, "\ud800"),
        *(json.dumps(TICKET) + "x", json.dumps(TICKET)[:-1], "\ufeff" + json.dumps(TICKET)),
        json.dumps(TICKET).replace("txn", "\ud800"),
        json.dumps(TICKET).replace("txn", "\\ud800"),
        json.dumps(TICKET).replace('"version": 1', '"version": ' + "1" * 5000),
    ],
)
def test_a_text_that_is_not_a_ticket_is_refused_in_one_line(text: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"^not a valid approval ticket \(.*to_json\(\) returned$") as caught:
        ApprovalTicket.from_json(text)
    assert str(caught.value).isprintable()
    assert caught.value.argument == "text"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("value", [None, 1, ["text"], TICKET, ticket()], ids=lambda value: type(value).__name__)
def test_what_is_no_text_is_refused_with_what_to_pass(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(ConfigurationError, match=rf"to_json\(\) returned, not {kind}; .*json\.dumps") as caught:
        ApprovalTicket.from_json(value)
    assert caught.value.argument == "text"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("operation_id", value) for value in (None, "", "..")),
        *(("user_id", value) for value in (1, "", "ann")),
        ("external_user_id", []),
        *(("require_auth_type", value) for value in ("face", 1)),
        *(("started_by", value) for value in ("web", None)),
        ("reconciled", 1),
        *(("payload_sha256", value) for value in ("0" * 63, "0" * 65, "A" * 64, "0" * 64 + "\n", "\u0660" * 64, None)),
        *(("created_at", value) for value in ("2026-11-24T12:00:00", 1, "2026-02-31T12:00:00Z")),
        ("created_at", "0001-01-01T00:00:00+14:00"),
        *(("expires_at", value) for value in ("2026-11-24T12:00:00", "9999-12-31T23:59:59-14:00")),
        *(("traceparent", value) for value in ("", 1, "00-0123456789abcdef0123456789abcdef-0123456789abcdef-01\n")),
        ("traceparent", "00-0123456789ABCDEF0123456789abcdef-0123456789abcdef-01"),
        *(("version", value) for value in (True, "1", 1.5, None)),
    ],
)
def test_a_ticket_with_a_wrong_field_is_refused_by_name(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=field) as caught:
        ticket(**{field: value})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("version", [2, 0, -1])
def test_a_ticket_of_an_unknown_version_is_refused(version: int) -> None:
    with pytest.raises(ConfigurationError, match=f"version {version} is unknown"):
        ticket(version=version)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"operation_id": ""}, "operation_id"),
        ({"user_id": "ann"}, "user_id"),
        ({"external_user_id": 7}, "external_user_id"),
        ({"payload_sha256": None}, "^payload_sha256 of a ticket must be 64 lower-case hex digits$"),
        ({"created_at": "2026-11-24T12:00:00Z"}, "created_at of a ticket must be a datetime, not str"),
        ({"created_at": datetime(2026, 11, 24, tzinfo=None)}, "created_at"),  # noqa: DTZ001  # naive is what is refused
        ({"created_at": datetime(1, 1, 1, tzinfo=timezone(timedelta(hours=14)))}, "created_at .* the years 1 to 9999"),
        ({"expires_at": None}, "expires_at"),
        ({"traceparent": 1}, "^traceparent of a ticket must be one of W3C Trace Context, or None$"),
    ],
)
def test_a_ticket_made_by_hand_checks_itself(changed: dict[str, Any], message: str) -> None:
    fields: dict[str, Any] = {name: getattr(ticket(), name) for name in ApprovalTicket.__struct_fields__}
    with pytest.raises(ConfigurationError, match=message) as caught:
        ApprovalTicket(**(fields | changed))
    assert [caught.value.argument] == list(changed)


def test_a_ticket_made_by_hand_is_as_one_that_was_read() -> None:
    zone = timezone(timedelta(hours=2))
    made = ApprovalTicket(
        operation_id="txn-1",
        user_id="0123456789abcdef",
        payload_sha256=payload_digest(PAYLOAD),
        created_at=datetime(2026, 11, 24, 14, tzinfo=zone),
        expires_at=datetime(2026, 11, 24, 14, 2, tzinfo=zone),
    )
    assert made == ticket()
    assert made.created_at.tzinfo is UTC


def test_a_ticket_for_an_operation_binds_user_payload_and_external_id() -> None:
    made = ApprovalTicket.for_operation(
        "txn-1",
        user_id="c0ffee",
        operation_payload=PAYLOAD,
        external_user_id="ann",
        created_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        expires_in=60,
        require_auth_type=AuthType.BIOMETRIC,
        started_by="phone",
    )
    assert made == ApprovalTicket(
        operation_id="txn-1",
        user_id="C0FFEE",
        external_user_id="ann",
        payload_sha256=payload_digest(PAYLOAD),
        created_at=datetime(2026, 11, 24, 12, tzinfo=UTC),
        expires_at=datetime(2026, 11, 24, 12, 1, tzinfo=UTC),
        require_auth_type="biom",
        started_by="phone",
    )
    assert type(made.require_auth_type) is str


def test_a_ticket_for_an_operation_begins_now_and_lasts_two_minutes() -> None:
    before = datetime.now(UTC)
    made = ApprovalTicket.for_operation("txn-1", user_id="C0FFEE")
    assert before <= made.created_at <= datetime.now(UTC)
    assert made.expires_at - made.created_at == timedelta(seconds=120)
    assert (made.payload_sha256, made.external_user_id, made.reconciled) == (EMPTY_SHA256, None, False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"operation_id": ""}, "operation_id"),
        ({"user_id": "ann"}, "user_id"),
        *(({"operation_payload": value}, "operation_payload") for value in (7, "\ud800")),
        ({"external_user_id": 7}, "external_user_id"),
        ({"created_at": datetime(2026, 11, 24)}, "created_at"),  # noqa: DTZ001  # naive is what is refused
        ({"created_at": "now"}, "created_at"),
        ({"require_auth_type": ""}, "must be 'biom' for a face, 'pin', or None for any, not ''"),
        ({"require_auth_type": "face"}, "not 'face'"),
        ({"require_auth_type": "BIOM"}, "not 'BIOM'"),
        ({"require_auth_type": ["biom"]}, "not "),
        ({"require_auth_type": b"biom"}, "not b'biom'"),
        *(({"expires_in": value}, "expires_in") for value in (0, -1, math.nan, math.inf)),
        ({"expires_in": 1e12}, "expires_in must end before the year 10000"),
        ({"started_by": ["phone"]}, "started_by must be 'backend' or 'phone', not "),
    ],
)
def test_a_ticket_for_an_operation_says_what_is_wrong(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        ApprovalTicket.for_operation(**({"operation_id": "txn-1", "user_id": "C0FFEE"} | arguments))
    assert [caught.value.argument] == list(arguments)


OPTIONAL = {"external_user_id", "require_auth_type", "started_by", "reconciled", "traceparent"}


@pytest.mark.parametrize("field", sorted(TICKET.keys() - OPTIONAL))
def test_a_ticket_lacking_a_field_is_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigurationError, match=field):
        ApprovalTicket.from_json(json.dumps({name: value for name, value in TICKET.items() if name != field}))


def test_a_newer_ticket_is_refused_for_its_version_in_any_form() -> None:
    with pytest.raises(ConfigurationError, match=r"^ticket version 2 .* upgrade this one$") as caught:
        ApprovalTicket.from_json('{"version": 2, "operations": ["a", "b"], "created_at": 5}')
    assert caught.value.argument == "text"


def test_a_ticket_of_this_version_with_more_in_it_is_read() -> None:
    assert ticket(note="for me") == ticket()


fields_of_tickets = st.fixed_dictionaries(
    {},
    optional={
        name: st.just(value) | st.none() | st.integers() | st.text(max_size=5) | st.booleans() | st.floats()
        for name, value in TICKET.items()
    },
)
zoned = st.datetimes(timezones=st.timezones()).map(lambda moment: moment.isoformat())


@given(
    st.text()
    | st.binary()
    | st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5).map(json.dumps)
    | fields_of_tickets.map(json.dumps)
    | st.builds(lambda made, end: json.dumps(TICKET | {"created_at": made, "expires_at": end}), zoned, zoned)
)
def test_any_text_is_a_ticket_or_a_configuration_error(text: str | bytes) -> None:
    try:
        got = ApprovalTicket.from_json(text)
    except ConfigurationError as error:
        assert str(error).isprintable()  # noqa: PT017  # both outcomes are fine
    else:
        assert got.created_at.tzinfo is UTC
        assert got.expires_at.tzinfo is UTC
        assert got.version == 1


def test_remaining_counts_down_to_nothing_and_not_below() -> None:
    now = datetime(2026, 11, 24, 12, 1, 59, 500000, tzinfo=UTC)
    assert ticket().remaining(now) == 0.5
    assert ticket().remaining(now.astimezone(timezone(timedelta(hours=5)))) == 0.5
    assert ticket().remaining(now + timedelta(days=1)) == 0.0
    assert ticket().remaining(datetime(2026, 11, 24, 12, tzinfo=UTC)) == 120.0


def test_remaining_counts_from_this_machines_clock_by_default() -> None:
    assert ticket(expires_at="2001-01-01T00:00:00Z").remaining() == 0.0
    soon = datetime.now(UTC) + timedelta(hours=1)
    assert 3500 < ticket(expires_at=soon.isoformat()).remaining() <= 3600


def test_remaining_refuses_a_naive_now() -> None:
    with pytest.raises(
        ConfigurationError, match=r"^now must be an aware datetime, such as datetime\.now\(UTC\)"
    ) as caught:
        ticket().remaining(datetime(2026, 11, 24, 12))  # noqa: DTZ001
    assert caught.value.argument == "now"


def test_an_absent_payload_and_an_empty_one_have_the_same_digest() -> None:
    assert payload_digest(None) == payload_digest("") == EMPTY_SHA256
    assert payload_digest("é") == "4a99557e4033c3539de2eb65472017cad5f9557f7a0625a09f1c3f6e2ba69c4c"
    assert payload_digest("e\u0301") == hashlib.sha256(b"e\xcc\x81").hexdigest()  # é in another form is another text
    assert len(payload_digest("\ud800")) == 64
