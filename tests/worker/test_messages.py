"""What travels through the broker: the hostile is refused with a reason, and a context comes back byte for byte."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import msgspec
import pytest
from tenacity import wait_fixed

from aiokeyless.errors import InvalidRequestError, ServerError
from aiokeyless.ticket import payload_digest
from aiokeyless.worker import messages
from aiokeyless.worker.decisions import Decided, Pacing, after_poll, fail_unreadable
from aiokeyless.worker.messages import (
    MAX_CONTEXT,
    MAX_DEPTH,
    ApprovalEvent,
    ApprovalRequest,
    Delivery,
    NewerVersionError,
    RequestHead,
    read_event,
    read_newer,
    read_request,
    read_rest,
    request_name,
)

from .reading import EXTREME_NUMBERS, MODERATE_NUMBERS, a_message

STORED_AT = datetime(2026, 11, 24, 12, tzinfo=UTC)
LONGEST = 86400.0
LARGEST = 1 << 20


def read(data: bytes, *, longest: float = LONGEST, largest: int = LARGEST, **changed: Any) -> Delivery:
    message = a_message(data, **{"stored_at": STORED_AT, **changed})
    return read_request(message, longest_wait=longest, largest_request=largest)


def request(**fields: object) -> bytes:
    return json.dumps({"version": 1, "user_id": "c0ffee", "operation_id": "txn-1", **fields}).encode()


def with_field(name: str, value: bytes) -> bytes:
    """Return a request with a field as it is written."""
    return request()[:-1] + f', "{name}": '.encode() + value + b"}"


def with_context(context: bytes) -> bytes:
    return with_field("context", context)


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


# -- what is refused


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "truncated"),
        (b"\xff\xfe", "utf-8"),
        (b"null", "Expected `object`"),
        (b"[]", "Expected `object`"),
        (b"<html>", "malformed"),
        (b"\xef\xbb\xbf" + request(), "malformed"),
        (request() + b"{}", "trailing characters"),
        (request()[:-1], "truncated"),
        (with_context(b'"\xff\xfe"'), "utf-8"),
        (with_context(b'"a\nb"'), "malformed"),
        (with_context(b'{"a": 1,}'), "malformed"),
        (with_context(b"NaN"), "malformed"),
        (with_context(b'"\\ud800"'), "no request"),
        (with_context(nested(100_000)), "recursion|at most 65536"),  # Python 3.14 reads so many brackets
        (nested(100_000), "Expected `object`"),
        (b'{"version": ' + b"1" * 5000 + b', "user_id": "c0ffee", "operation_id": "txn-1"}', "out of range"),
        (with_field("expires_in", b"NaN"), "malformed"),
        (with_field("expires_in", b"Infinity"), "malformed"),
        (with_field("expires_in", b"1e400"), "out of range"),
        (with_field("expires_in", b"9" * 400), "out of range"),
        (with_field("expires_in", b"1e-400"), "expires_in must be a number of seconds above 0"),
    ],
)
def test_bytes_that_are_no_request_are_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason):
        read(data)


#: A field, the reason, and the values that are refused for it.
WRONG: tuple[tuple[Any, ...], ...] = (
    ("version", "version 2 is not known here, only up to 1: upgrade", 2),
    ("version", "version 0", 0),
    ("version", "Expected `int`", True, None, "1"),
    ("operation_paylod", "unknown field `operation_paylod`", "Pay 40"),
    ("userId", "unknown field `userId`", "c0ffee"),
    ("operation_id", "operation_id must not contain / or", "a/b", "a\\b"),
    ("user_id", "Expected `str`", None, 12),
    ("user_id", "user_id must be 1 to 512 hex digits", "", "xyz", "c0ffee\n", "a" * 513),
    ("operation_id", "Expected `str`", None),
    ("operation_id", "operation_id must have 1 to 512", "", "a" * 513),
    ("operation_id", "must not be '.'", "."),
    ("operation_id", "must not be '..'", ".."),
    ("operation_id", "control characters", "a\x00", "a\r\nX: y"),
    ("operation_id", "no request", "\ud800"),
    ("operation_payload", "no request", "\ud800"),
    ("operation_payload", "Expected `str | null`", 40),
    ("external_user_id", "no request", "\udfff"),
    ("external_user_id", "Expected `str | null`", []),
    ("started_by", "Invalid enum value 'web'", "web"),
    ("require_auth_type", "require_auth_type must be 'biom' for a face, 'pin'", "face"),
    ("expires_in", "expires_in must be a number of seconds above 0", 0, -1),
    ("expires_in", "Expected `float`", True, "120", None),
    ("created_at", "created_at has no zone", "2026-11-24T12:00:00"),
    ("created_at", "RFC3339", "yesterday", "99999-01-01T00:00:00Z"),
    ("created_at", "Expected `datetime | null`", 1764000000),
    ("created_at", "created_at must be in the years 1 to 9999", "0001-01-01T00:00:00+14:00"),
    ("context", "context is nested more than 64 deep", json.loads(nested(MAX_DEPTH + 1))),
    ("context", f"context is {MAX_CONTEXT + 2} bytes of JSON; at most {MAX_CONTEXT}", "x" * MAX_CONTEXT),
)


@pytest.mark.parametrize(
    ("field", "reason", "value"), [(field, reason, value) for field, reason, *values in WRONG for value in values]
)
def test_a_field_that_is_wrong_is_refused_with_a_reason(field: str, reason: str, value: object) -> None:
    with pytest.raises(InvalidRequestError, match=re.escape(reason)):
        read(request(**{field: value}))


LATER: dict[str, Any] = {"version": 2, "user_id": ["c0ffee"], "expires_in": "PT2M", "urgent": True}
HEAD = ("operation_id", "created_at", "context")


def head_of(data: bytes) -> RequestHead | None:
    return read_newer(a_message(data, stored_at=STORED_AT), largest_request=LARGEST)


def test_a_request_of_a_later_version_is_one_whatever_its_other_fields_are() -> None:
    head = head_of(request(**LATER, started_by={"app": "kiosk"}))
    assert head is not None
    assert (head.version, head.operation_id) == (2, "txn-1")


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: value} for name, _, *values in WRONG for value in values if name in HEAD),
        *({"version": version} for version in (-1, 1, 2.0)),
        {"operation_payload": "x" * LARGEST},
    ],
)
def test_it_is_none_if_what_each_version_has_is_wrong_or_too_large(wrong: dict[str, Any]) -> None:
    assert head_of(request(**LATER | wrong)) is None


def test_after_a_release_messages_of_earlier_versions_are_read_and_those_of_later_ones_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    event = an_event()
    for name in ("REQUEST_VERSION", "EVENT_VERSION"):
        monkeypatch.setattr(messages, name, 2)
    for version in (1, 2):
        assert read(request(version=version)).ticket.operation_id == "txn-1"
        assert read_event(msgspec.json.encode(msgspec.structs.replace(event, version=version))).version == version
        assert head_of(request(**LATER)) is None
    assert head_of(request(**LATER | {"version": 3})) is not None
    with pytest.raises(NewerVersionError):
        read_event(b'{"version": 3}')


@pytest.mark.parametrize("number", EXTREME_NUMBERS)
def test_a_number_that_is_long_or_extreme_is_refused_wherever_it_is_in_the_context(number: str) -> None:
    with pytest.raises(InvalidRequestError, match="numbers in context must have at most 400 characters"):
        read(with_context(f'{{"a": [true, {{"b": {number}}}]}}'.encode()))


def test_other_numbers_are_handed_on_as_they_are_written() -> None:
    context = f'{{"a": [{", ".join(MODERATE_NUMBERS)}], "1e9999": "1e9999"}}'.encode()
    assert bytes(read(with_context(context)).request.context) == context


def test_a_request_that_waits_too_long_for_one_worker_has_the_same_name_and_ids_at_all_of_them() -> None:
    """Workers with different graces allow different waits: an outcome of each would be two outcomes of one request."""
    data = request(operation_id="txn-1", expires_in=LONGEST, operation_payload="Pay 40")
    refused, accepted = read(data, longest=LONGEST - 1), read(data)
    assert refused.refusal == f"expires_in is {LONGEST:g} s; this broker allows {LONGEST - 1:g} s"
    assert accepted.refusal is None
    assert accepted.ticket.expires_at - refused.ticket.expires_at == timedelta(seconds=1)
    assert refused.request.context == accepted.request.context
    assert refused.ticket.payload_sha256 == accepted.ticket.payload_sha256
    assert (refused.ticket.operation_id, refused.ticket.user_id) == ("txn-1", "C0FFEE")


@pytest.mark.parametrize("missing", ["version", "user_id", "operation_id"])
def test_a_field_that_is_missing_is_refused_by_name(missing: str) -> None:
    fields = json.loads(request())
    del fields[missing]
    with pytest.raises(InvalidRequestError, match=f"missing required field `{missing}`"):
        read(json.dumps(fields).encode())


def test_a_message_whose_event_might_not_fit_is_refused_unread() -> None:
    with pytest.raises(InvalidRequestError, match="the request has 101 bytes, more than 100"):
        read(b"\xff" * 101, largest=100)
    assert read(request(), largest=len(request())).ticket.user_id == "C0FFEE"


def test_reasons_of_a_hostile_length_are_cut() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        read(request(**{"x" * 10_000: 1}))
    assert len(str(caught.value)) < 300


# -- what is read


def test_a_request_with_nothing_but_a_user_and_an_id_has_two_minutes() -> None:
    delivery = read(request(), number=3)
    ticket = delivery.ticket
    assert (ticket.user_id, ticket.operation_id) == ("C0FFEE", "txn-1")
    assert (ticket.created_at, ticket.expires_at) == (STORED_AT, STORED_AT + timedelta(seconds=120))
    assert (ticket.external_user_id, ticket.payload_sha256) == (None, payload_digest(None))
    assert (delivery.request.operation_payload, delivery.message.number) == (None, 3)
    assert bytes(delivery.request.context) == b"null"


def test_a_request_with_everything_is_read_whole() -> None:
    delivery = read(
        request(
            operation_id="txn/1 \u00e9",
            operation_payload="Pay 40",
            external_user_id="eve@example.com",
            expires_in=30,
            created_at="2026-11-24T13:59:50+02:00",
            context={"order": 7},
            require_auth_type="biom",
            started_by="phone",
        )
    )
    ticket = delivery.ticket
    assert (ticket.operation_id, ticket.external_user_id) == ("txn/1 \u00e9", "eve@example.com")
    assert ticket.created_at == STORED_AT - timedelta(seconds=10)
    assert ticket.expires_at == STORED_AT + timedelta(seconds=20)
    assert ticket.payload_sha256 == payload_digest("Pay 40")
    assert (ticket.require_auth_type, ticket.started_by) == ("biom", "phone")
    assert delivery.request.operation_payload == "Pay 40"
    assert bytes(delivery.request.context) == b'{"order": 7}'


def test_a_clock_that_is_ahead_prolongs_no_wait() -> None:
    assert read(request(created_at="9999-12-31T23:59:59-14:00")).ticket.created_at == STORED_AT


def test_times_are_utc_whatever_the_zone_they_were_written_in() -> None:
    stored_at = STORED_AT.astimezone(timezone(timedelta(hours=5)))
    assert read(request(), stored_at=stored_at).ticket.created_at.utcoffset() == timedelta(0)


# -- names


CONTENT: dict[str, Any] = {
    "version": 1,
    "operation_id": "txn-1",
    "user_id": "C0FFEE",
    "operation_payload": "Pay 40",
    "external_user_id": "eve",
    "expires_in": 120.0,
    "context": msgspec.Raw(b"[1]"),
    "require_auth_type": "biom",
}


def named(**changed: Any) -> str:
    return request_name(ApprovalRequest(**CONTENT | changed))


def test_a_request_is_named_by_all_that_is_in_it() -> None:
    others = {"expires_in": 121.0, "context": msgspec.Raw(b"[2]")}
    changed = {field: named(**{field: others.get(field, "other")}) for field in ApprovalRequest.__struct_fields__}
    assert named() == changed.pop("version") == changed.pop("created_at")
    assert len({named(), *changed.values()}) == 1 + len(changed)


def test_a_name_is_short_plain_ascii_and_never_changes_from_release_to_release() -> None:
    least = ApprovalRequest(version=1, user_id="C0FFEE", operation_id="txn-1")
    assert request_name(least) == "request-2d29c14c84e11bdb1b4840af56544c554ccfd523ad9a3e502e5b9526d0cbd031"
    assert named() == "request-f0164fc0396f0da04f4f87562c78e5e00cb7e2907bde055d1f1081e25f283934"


def test_defaults_times_and_spellings_change_no_name() -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(ApprovalRequest) if not field.required}
    same = [
        request(),
        request(**json.loads(msgspec.json.encode(defaults))),
        request(expires_in=120),
        request(operation_payload="", external_user_id=""),
        request(user_id="C0FFEE", created_at="2026-11-24T11:59:00Z"),
    ]
    assert len({request_name(read(text).request) for text in same}) == 1
    assert named(expires_in=121) == named(expires_in=121.0)


# -- the context


@pytest.mark.parametrize(
    "context",
    [
        b"1234567890123456789012345678901234567890",
        b"0.1000000000000000000000000000000000000001e-0300",
        b'{"b": 1, "a": 2, "b": 3}',
        rb'"\u00e9\/\u0041\t"',
        '"\u00e9\U0001f600"'.encode(),
        b"-0",
        b"[ 1 ,\n\t2 ]",
        b'{"outcome": "approved", "version": 2}',
        nested(MAX_DEPTH),
        b'"' + b"[" * 1000 + b'"',
        rb'["\"[[[\\", "' + b"{" * 1000 + b'"]',
    ],
)
def test_a_context_comes_back_byte_for_byte(context: bytes) -> None:
    delivery = read(with_context(context))
    decision = after_poll(
        delivery,
        ServerError(status=503, method="GET", path="/v2/x"),
        polled_at=delivery.ticket.expires_at,
        now=delivery.ticket.expires_at,
        pacing=Pacing(wait_fixed(1), failures=1, paused_for=0.0, closed_for=0.0, grace=0.0),
        was_created=False,
        grace_left=0.0,
    )
    assert isinstance(decision, Decided)
    event = msgspec.json.decode(msgspec.json.encode(decision.event), type=ApprovalEvent)
    assert bytes(event.context) == context
    assert bytes(read_rest(with_context(context))[1]) == context


def test_the_largest_context_is_handed_on() -> None:
    context = b'"' + b"x" * (MAX_CONTEXT - 2) + b'"'
    assert bytes(read(with_context(context)).request.context) == context
    assert bytes(read_rest(with_context(context))[1]) == context


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", b"[]", b"{}", with_context(b'"\xff"')),
        with_context(b'"' + b"x" * MAX_CONTEXT + b'"'),
        with_context(nested(MAX_DEPTH + 1)),
        with_context(b"[" + b"[]," * MAX_DEPTH + nested(MAX_DEPTH) + b"]"),
        with_context(nested(100_000)),
    ],
)
def test_a_context_that_cannot_be_found_or_handed_on_is_null(data: bytes) -> None:
    assert bytes(read_rest(data)[1]) == b"null"


def test_a_context_is_found_in_a_request_that_is_refused() -> None:
    data = request(version=2, user_id="xyz", context={"order": 7})
    with pytest.raises(InvalidRequestError):
        read(data)
    assert bytes(read_rest(data)[1]) == b'{"order": 7}'
    assert read_rest(b'{"operation_id": "a", "created_at": 1e999}')[0] == "a"  # whatever the other fields are


def test_a_context_of_another_type_than_asked_for_is_an_error_of_the_reader() -> None:
    event = an_event(b'{"order": "7"}')
    assert event.read_context(dict[str, str]) == {"order": "7"}
    with pytest.raises(msgspec.ValidationError):
        event.read_context(dict[str, int])


# -- what is published


def an_event(context: bytes = b"null") -> ApprovalEvent:
    reason = InvalidRequestError("it is none")
    return fail_unreadable(a_message(with_context(context), stored_at=STORED_AT), reason, now=STORED_AT).event


def test_an_event_is_json_with_no_more_in_it_than_there_is_to_say() -> None:
    assert json.loads(msgspec.json.encode(an_event())) == {
        "version": 1,
        "outcome": "failed",
        "operation_id": "txn-1",
        "reason": "invalid_request",
        "detail": "it is none",
        "requested_at": "2026-11-24T12:00:00Z",
        "decided_at": "2026-11-24T12:00:00Z",
        "deliveries": 1,
        "context": None,
    }


def test_an_event_of_a_later_version_says_so() -> None:
    with pytest.raises(NewerVersionError, match="version 2"):
        read_event(b'{"version": 2, "verdict": "yes"}')


def test_what_a_worker_publishes_is_read_also_with_fields_and_reasons_of_later_releases() -> None:
    encoded = msgspec.json.encode(an_event())
    assert read_event(encoded) == read_event(encoded.decode()) == an_event()
    later = json.loads(encoded) | {"reason": "revoked", "more": 1}
    assert read_event(json.dumps(later)).reason == "revoked"


def event_with(context: bytes) -> bytes:
    return msgspec.json.encode(an_event()).removesuffix(b"null}") + context + b"}"


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\xff", "\ud800", b"{}", b'{"version": 0}'),
        *(b'{"version": 1, "outcome": "revoked"}', b'{"version": 1, "outcome": "\xff"}', event_with(b'"\xff"')),
        *(event_with(nested(depth)) for depth in (MAX_DEPTH + 1, 930, 100_000)),
        b'{"more": ' + nested(100_000) + b"}",
    ],
)
def test_what_is_no_event_is_one_kind_of_error(data: bytes | str) -> None:
    with pytest.raises(msgspec.DecodeError) as caught:
        read_event(data)
    assert not isinstance(caught.value, NewerVersionError)


def test_the_deepest_context_is_read_by_every_reader() -> None:
    context = json.loads(nested(MAX_DEPTH))
    assert read_event(event_with(nested(MAX_DEPTH))).read_context(list) == context
