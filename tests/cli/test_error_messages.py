"""Messages name options, parameters and variables, and not the library's arguments and methods."""

from __future__ import annotations

import re
import subprocess

import pytest

from aiokeyless import (
    ApprovalError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    AuthenticationError,
    BadRequestError,
    CachedAnswerError,
    ConfigurationError,
    ConflictStatusError,
    DecodeError,
    KeylessError,
    NotFoundError,
    NotJsonError,
    Operation,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
)
from aiokeyless.cli.error_messages import describe, quote, quote_operation_id


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            BadRequestError(status=400, method="POST", path="/v2/x", detail="no such field"),
            ["POST /v2/x answered 400", "malformed (no such field)"],
        ),
        (BadRequestError(status=400, method="POST", path="/v2/x"), ["answered 400", "malformed"]),
        (AuthenticationError(status=401, method="GET", path="/v2/x"), ["answered 401", "check", "KEYLESS_API_KEY"]),
        (NotFoundError(status=404, method="GET", path="/v2/x"), ["answered 404", "check the id", "--if-missing wait"]),
        (ConflictStatusError(status=409, method="POST", path="/v2/x"), ["answered 409", "--if-exists resume"]),
        (NotFoundError(status=404, method="GET", path="/v2/users/AB/devices"), ["answered 404: no such user"]),
        (RateLimitError(status=429, method="GET", path="/v2/x", detail="x"), ["answered 429", "try again later"]),
        (ServerError(status=503, method="GET", path="/v2/x"), ["answered 503", "try again later"]),
        (TransportError("GET /v2/x got no answer", method="GET", path="/v2/x"), ["GET /v2/x got no answer"]),
        (
            ApprovalUnknownError("", operation_id="a", polls=2, elapsed=2, last_error=KeylessError("it is down")),
            ["2.0 s and 2 polls", "outcome is unknown", "aiokeyless get a", "it is down"],
        ),
        (ApprovalUnknownError("", operation_id="a"), ["0 polls", "outcome is unknown"]),
        (
            ApprovalTimeoutError("", operation_id="a b", polls=1, elapsed=2),
            [
                "still missing after 2.0 s and 1 poll; ",
                "not a denial: it can still be approved",
                "aiokeyless get 'a b'",
            ],
        ),
        (
            ApprovalUnknownError(
                "", operation_id="a", last_error=RateLimitError(status=429, method="GET", path="/v2/x")
            ),
            ["last failure: GET /v2/x answered 429: too many requests; try again later"],
        ),
        (
            StatusError(status=302, method="GET", path="/v2/x", advice="check base_url"),
            ["GET /v2/x answered 302: a redirect, which is not followed; check KEYLESS_BASE_URL"],
        ),
        (
            StatusError(status=418, method="GET", path="/v2/x"),
            ["GET /v2/x answered 418: not documented by the API; check KEYLESS_BASE_URL"],
        ),
        (StatusError(status=408, method="GET", path="/v2/x", advice="not now"), ["answered 408: not now"]),
        (
            StatusError(status=409, method="POST", path="/v2/x"),
            ["answered 409: a proxy may have sent the create twice"],
        ),
        (
            DecodeError("JSON of another shape; check base_url", status=200, method="GET", path="/v2/x"),
            ["GET /v2/x answered 200 with JSON that the API does not document; check KEYLESS_BASE_URL"],
        ),
        (NotJsonError("a page of a gateway", status=200, method="GET", path="/v2/x"), ["a page of a gateway"]),
        (CachedAnswerError("from a cache", method="GET", path="/v2/x"), ["from a cache"]),
        (ConfigurationError("another loop"), ["another loop"]),
        (ConfigurationError("expires_in must end", argument="expires_in"), ["--expires-in must end"]),
        (ConfigurationError("operation_payload must be text", argument="operation_payload"), ["--payload must be"]),
    ],
)
def test_errors_are_described_without_the_librarys_names(error: KeylessError, parts: list[str]) -> None:
    message = describe(error)
    assert [part for part in parts if part not in message] == []
    assert not re.search(
        r"get_operation|if_missing|operation_id|retry_after|\.detail|base_url|expires_in|api_key", message
    )


def test_an_error_that_does_not_begin_with_its_argument_is_told_as_it_is() -> None:
    assert describe(ConfigurationError("the broker is full", argument="broker")) == "the broker is full"


@pytest.mark.parametrize(
    ("state", "ticket", "reason"),
    [
        (
            "pending",
            ApprovalTicket.for_operation("-a", user_id="BAD", operation_payload="Pay 40 to Alice"),
            ": it belongs to another user than the ticket; ",
        ),
        ("denied", None, ": its state is not documented; "),
        ("pending", None, "; "),  # not an error of this library's
    ],
)
def test_a_rejected_answer_is_described_by_what_is_wrong_with_it(
    state: str, ticket: ApprovalTicket | None, reason: str
) -> None:
    answer = Operation(
        id=1, timestamp="", node_id="", user_id="C0FFEE", api_key=None, operation_id="-a", result=False, state=state
    )
    assert describe(ApprovalError("see .last_operation", operation_id="-a", ticket=ticket, last_operation=answer)) == (
        f"the answer for operation -a was rejected{reason}do not act on it, and check the proxies between you and "
        "Keyless; to see the answer: aiokeyless get -- -a"
    )


@pytest.mark.parametrize(
    ("error", "in_doubt"),
    [
        (TransportError("cut off", method="POST", path="/v2/x"), True),
        (TransportError("refused", method="POST", path="/v2/x", sent=False), False),
        (DecodeError("odd", status=200, method="POST", path="/v2/x"), True),
        (ServerError(status=503, method="POST", path="/v2/x"), True),
        (StatusError(status=408, method="POST", path="/v2/x"), True),
        (StatusError(status=204, method="POST", path="/v2/x"), True),
        (StatusError(status=409, method="POST", path="/v2/x"), True),
        (BadRequestError(status=400, method="POST", path="/v2/x"), False),
    ],
)
def test_a_failed_create_says_how_to_check_only_where_it_may_have_taken_effect(
    error: TransportError | DecodeError | StatusError, in_doubt: bool
) -> None:
    assert "aiokeyless get" not in describe(error), "not of a create"
    error.operation_id = "txn-1"
    assert describe(error).endswith("to check: aiokeyless get txn-1") is in_doubt


@pytest.mark.parametrize(
    ("variable", "value", "advice"),
    [
        ("KEYLESS_REGION", "", r"check the network to https://\S*api\.keyless\.io \(KEYLESS_REGION is eu\)"),
        ("KEYLESS_REGION", "sg", r"check the network to https://\S*sg\.keyless\.technology \(KEYLESS_REGION is sg\)"),
        ("KEYLESS_BASE_URL", "http://[::1]:1", r"check that KEYLESS_BASE_URL \(http://\[::1\]:1\) is right and .*runs"),
    ],
)
def test_an_error_without_an_answer_names_the_address_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, advice: str
) -> None:
    for name in ("KEYLESS_BASE_URL", "KEYLESS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, value)
    slow = RequestTimeoutError("it took longer than request_timeout=10 s", method="GET", path="/v2/x")
    assert re.fullmatch(f"GET /v2/x got no answer in time; {advice}", describe(slow))
    refused = TransportError("GET /v2/x got no answer", method="GET", path="/v2/x")
    assert re.fullmatch(f"GET /v2/x got no answer; {advice}", describe(refused))


@pytest.mark.parametrize(
    "text",
    ["txn-1", "a b", "it's", "$HOME `id` \\n", "\u00e9ve \u20ac", "Pay\u202e 40\u200b'\\\U000e0001", "\x1b[2J\n"],
)
def test_a_quoted_text_is_one_printable_word_of_a_shell(text: str) -> None:
    word = quote(text)
    assert word.isprintable()
    command = ["bash", "-c", f"printf %s {word}"]
    for locale in ("C", "C.UTF-8"):
        assert subprocess.check_output(command, env={"LC_ALL": locale}).decode() == text


@pytest.mark.parametrize(
    ("operation_id", "argument"),
    [
        ("txn-1", "txn-1"),
        ("a b", "'a b'"),
        ("-5", "-- -5"),
        ("--json", "-- --json"),
        ("-\u200b", r"-- $'-\342\200\213'"),
    ],
)
def test_any_operation_id_can_be_the_argument_of_a_command(operation_id: str, argument: str) -> None:
    assert quote_operation_id(operation_id) == argument
