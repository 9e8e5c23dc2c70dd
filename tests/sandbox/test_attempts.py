"""The attempts of a sandbox's users: what is remembered, for how long, and who is locked out."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from aiokeyless.errors import ConfigurationError
from aiokeyless.sandbox.attempts import LOCKOUT, MEMORY
from aiokeyless.sandbox.store import OperationStore

if TYPE_CHECKING:
    from aiokeyless.models import Authentication

USER = "C0FFEE"
OTHER = "BADA55"


class Phone:
    """A store whose time stands still unless a test moves it, and the attempts that it reported."""

    def __init__(self) -> None:
        self.seconds = 1000.0
        self.reported: list[tuple[str, Authentication]] = []
        self.store = OperationStore(
            clock=lambda: 1_577_934_245_242_194_378,
            timer=lambda: self.seconds,
            on_attempt=lambda user, attempt: self.reported.append((user, attempt)),
        )

    def telemetry(self, user: str = USER, operation_id: str | None = None) -> Any:
        answer = self.store.authentications_json(user, operation_id)
        return None if answer is None else json.loads(answer)

    def codes(self, user: str = USER, operation_id: str | None = None) -> list[int]:
        """Return the error codes on Telemetry's first page, newest first."""
        return [each["errorCode"] for each in self.telemetry(user, operation_id)["content"][0]["authentications"]]


@pytest.fixture
def phone() -> Phone:
    phone = Phone()
    phone.store.create(USER, "a", operation_payload="Pay 5", external_user_id="ann@example.com")
    phone.store.create(OTHER, "b")
    return phone


# What Telemetry tells


def test_failed_attempt_shows_exactly_the_documented_fields(phone: Phone) -> None:
    phone.store.fail("a", error_code=30003, auth_type="pin")
    assert phone.telemetry() == {
        "page": {"number": 0, "size": 20, "totalElements": 1, "totalPages": 1},
        "content": [
            {
                "userId": USER,
                "authentications": [
                    {
                        "createdAt": "2020-01-02T03:04:05.242194378",
                        "result": "FAILED",
                        "errorCode": 30003,
                        "operationId": "a",
                        "deviceId": "sandbox-phone",
                        "authType": "pin",
                    }
                ],
            }
        ],
    }


def test_approval_is_an_attempt_too_and_counts_once(phone: Phone) -> None:
    phone.store.approve("a", auth_type="pin")
    phone.store.approve("a")
    [shown] = phone.telemetry()["content"][0]["authentications"]
    assert (shown["result"], shown["errorCode"], shown["authType"]) == ("APPROVED", 0, "pin")


def test_attempts_are_of_one_user_newest_first_and_of_one_operation_if_asked(phone: Phone) -> None:
    phone.store.create(USER, "c")
    phone.store.fail("a", error_code=30000)
    phone.store.fail("c", error_code=30003)
    phone.store.fail("b", error_code=30008)
    assert phone.codes() == [30003, 30000]
    assert phone.codes(operation_id="a") == [30000]
    assert phone.codes(operation_id="unknown") == []
    assert [each.error_code for each in phone.store.authentications] == [30000, 30003, 30008]


def test_user_who_made_no_attempt_has_none_and_an_unknown_one_does_not_exist(phone: Phone) -> None:
    assert phone.telemetry(OTHER)["page"] == {"number": 0, "size": 20, "totalElements": 0, "totalPages": 0}
    assert phone.codes(OTHER) == []
    assert phone.telemetry("F00") is None
    assert phone.store.external_authentications_json("Ann@example.com", None) is None


def test_first_page_has_the_newest_twenty_and_counts_the_others(phone: Phone) -> None:
    for code in range(1, 42):
        phone.store.fail("a", error_code=code)
    assert phone.telemetry()["page"] == {"number": 0, "size": 20, "totalElements": 41, "totalPages": 3}
    assert phone.codes() == list(range(41, 21, -1))


def test_attempts_are_remembered_for_ten_minutes(phone: Phone) -> None:
    phone.store.fail("a", error_code=30003)
    phone.seconds += 1
    phone.store.fail("b", error_code=30008)
    phone.seconds += MEMORY - 1
    assert phone.codes() == [30003]
    phone.seconds += 0.5
    assert phone.codes() == []
    assert phone.codes(OTHER) == [30008]
    assert [each.error_code for each in phone.store.authentications] == [30008]
    phone.seconds += 1
    assert phone.store.authentications == []
    assert phone.store.external_authentications_json("ann@example.com", None) is not None


def test_each_attempt_is_reported_with_its_user(phone: Phone) -> None:
    failed = phone.store.fail("b")
    phone.store.approve("a")
    assert phone.reported == [(OTHER, failed), (USER, phone.store.authentications[-1])]


# Operations that the phone itself creates


def test_phone_fails_at_an_operation_that_it_would_have_created(phone: Phone) -> None:
    phone.store.fail("new", user_id="f00", external_user_id="bob")
    assert "new" not in phone.store.operations
    assert phone.codes("F00", "new") == [30004]
    assert phone.store.external_authentications_json("bob", "new") is not None


# Refusals


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        *(("error_code", value, "error_code must be a whole number, at least 1") for value in (0, -1, True, "30004")),
        ("auth_type", "iris", "auth_type must be 'biom' or 'pin'"),
        ("user_id", OTHER, "has another user_id"),
        ("external_user_id", "mallory", "has another external_user_id"),
    ],
)
def test_wrong_argument_is_refused_and_leaves_nothing(phone: Phone, argument: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        phone.store.fail("a", **{argument: value})  # type: ignore[arg-type]  # that is what must fail
    assert phone.store.authentications == []


def test_an_attempt_without_an_operation_is_its_users_and_of_no_operation(phone: Phone) -> None:
    failed = phone.store.fail(user_id=USER.lower(), external_user_id="ann@example.com")
    assert (failed.operation_id, failed.error_code) == (None, 30004)
    [shown] = phone.telemetry()["content"][0]["authentications"]
    assert "operationId" not in shown
    assert phone.codes(operation_id="a") == []
    answer = phone.store.external_authentications_json("ann@example.com", None)
    assert answer is not None
    assert json.loads(answer)["page"]["totalElements"] == 1


def test_an_attempt_without_an_operation_needs_a_user_who_has_a_device(phone: Phone) -> None:
    with pytest.raises(ConfigurationError, match="operation_id or user_id must be given"):
        phone.store.fail()
    phone.store.users.enroll(USER, None)
    phone.store.users.delete(USER)
    with pytest.raises(ConfigurationError, match="has no device"):
        phone.store.fail(user_id=USER)
    assert phone.store.authentications == []


def test_attempts_without_an_operation_lock_a_user_out_too(phone: Phone) -> None:
    for _ in range(5):
        phone.store.fail(user_id=USER)
    assert phone.store.locked_for(USER) == LOCKOUT


def test_approved_operation_cannot_fail_any_more(phone: Phone) -> None:
    phone.store.approve("a")
    with pytest.raises(ConfigurationError, match="operation 'a' is approved already"):
        phone.store.fail("a")
    assert phone.codes() == [0]


# The lockout


def lock_out(phone: Phone) -> None:
    for _ in range(5):
        phone.store.fail("a")


def test_fifth_failure_in_a_row_locks_the_user_out_for_ten_minutes(phone: Phone) -> None:
    for _ in range(4):
        phone.store.fail("a")
    assert phone.store.locked_for(USER) == 0.0
    phone.store.fail("a")
    assert phone.store.locked_for(USER) == LOCKOUT
    assert phone.store.locked_for(OTHER) == 0.0
    phone.seconds += LOCKOUT - 1
    assert phone.store.locked_for(USER) == 1.0
    phone.seconds += 1
    assert phone.store.locked_for(USER) == 0.0
    assert phone.store.approve("a").is_approved


def test_nothing_is_approved_during_a_lockout_and_the_attempt_shows(phone: Phone) -> None:
    lock_out(phone)
    phone.seconds += 60
    with pytest.raises(ConfigurationError, match=r"user C0FFEE is locked out for 540 s more"):
        phone.store.approve("a")
    with pytest.raises(ConfigurationError, match="is locked out"):
        phone.store.approve("new", user_id=USER)
    assert not phone.store.operations["a"].is_approved
    assert "new" not in phone.store.operations
    assert list(phone.store.pending(USER)) == ["a"]
    assert phone.codes()[:3] == [30007, 30007, 30004]
    assert phone.store.approve("b").is_approved


def test_attempts_during_a_lockout_fail_with_its_code_and_do_not_prolong_it(phone: Phone) -> None:
    lock_out(phone)
    for _ in range(6):
        phone.store.fail("a", error_code=30008)
    assert phone.codes(operation_id="a") == [30007] * 6 + [30004] * 5
    phone.seconds += LOCKOUT
    assert phone.store.locked_for(USER) == 0.0


def test_user_can_cancel_during_a_lockout(phone: Phone) -> None:
    lock_out(phone)
    assert phone.store.fail("a", error_code=30003).error_code == 30003


@pytest.mark.parametrize("code", [30003, 534, 535, 1131, 20001])
def test_cancelled_attempts_and_errors_that_are_not_the_users_lock_nobody_out(phone: Phone, code: int) -> None:
    for _ in range(9):
        phone.store.fail("a", error_code=code)
    assert phone.store.approve("a").is_approved


def test_success_ends_the_row_of_failures(phone: Phone) -> None:
    phone.store.create(USER, "c")
    for _ in range(4):
        phone.store.fail("a")
    phone.store.approve("c")
    for _ in range(4):
        phone.store.fail("a")
    assert phone.store.locked_for(USER) == 0.0


def test_after_a_lockout_the_row_starts_again(phone: Phone) -> None:
    lock_out(phone)
    phone.seconds += LOCKOUT
    for _ in range(4):
        phone.store.fail("a")
    assert phone.store.locked_for(USER) == 0.0
