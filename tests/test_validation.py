"""What the checks of arguments refuse, and how they name it."""

from __future__ import annotations

import json
import math
from datetime import timedelta
from decimal import Decimal

import pytest

from aiokeyless._validation import check_operation_id, seconds
from aiokeyless.errors import ConfigurationError, InvalidIdentifierError
from aiokeyless.ticket import ApprovalTicket

TICKET = ApprovalTicket.for_operation("txn-1", user_id="AB", operation_payload="Pay 40 to Alice").to_json()


@pytest.mark.parametrize(
    "text",
    [
        TICKET,
        f" {TICKET}\n",
        json.dumps(json.loads(TICKET), indent=2),
        ApprovalTicket.for_operation("x" * 512, user_id="AB").to_json(),
    ],
    ids=["as stored", "in blanks", "indented", "longer than an id"],
)
def test_the_text_of_a_ticket_is_no_operation_id_and_the_error_says_how_to_read_it(text: str) -> None:
    with pytest.raises(InvalidIdentifierError, match=r"ApprovalTicket\.from_json\(\.\.\.\)") as caught:
        check_operation_id(text)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("operation_id", ['{"order": 7}', "payload_sha256", '"payload_sha256":7', "{payload_sha256}"])
def test_an_operation_id_may_resemble_a_ticket(operation_id: str) -> None:
    assert check_operation_id(operation_id) == operation_id


@pytest.mark.parametrize(
    "value",
    [None, "1", True, False, math.nan, 1j, Decimal(1), timedelta(seconds=1), [1.0], pytest.param(10**5000, id="huge")],
)
def test_what_is_no_number_of_seconds_is_refused_by_name(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds, at least 0, not .+") as caught:
        seconds(value, "timeout", zero=True)
    assert str(caught.value).isprintable()


def test_seconds_are_more_than_nothing() -> None:
    for value in (0, 0.0, -0.0, -1, -math.inf):
        with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds above 0, not "):
            seconds(value, "timeout")
    with pytest.raises(ConfigurationError, match=r"^timeout must be a number of seconds, at least 0, not -1$"):
        seconds(-1, "timeout", zero=True)


@pytest.mark.parametrize("value", [1, 0.5, 5e-324, 1e308, math.inf])
def test_seconds_come_back_as_a_float(value: float) -> None:
    got = seconds(value, "timeout")
    assert (got, type(got)) == (value, float)
    assert seconds(0, "timeout", zero=True) == 0.0
