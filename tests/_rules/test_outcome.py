"""The table of cases against the pure function, and the table against what is written about it."""

from __future__ import annotations

import itertools
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest
from fuzz.mutations import mutate
from multidict import CIMultiDict
from outcome_cases import (
    AUTH_TYPE,
    CASES,
    EXTERNAL_USER_ID,
    OPERATION_ID,
    PAYLOAD,
    RESULTS,
    USER_ID,
    OutcomeCase,
    Result,
)

from aiokeyless import (
    ApprovalTicket,
    BadRequestError,
    CachedAnswerError,
    KeylessError,
    NotFoundError,
    Operation,
    Secret,
    ServerError,
    StatusError,
)
from aiokeyless._http import protocol
from aiokeyless._http.redaction import Redaction
from aiokeyless._rules.approval import Rejection, Verdict
from aiokeyless._rules.outcome import is_service_well, poll_result, poll_verdict
from aiokeyless.events import PollResult
from aiokeyless.ticket import payload_digest
from benchmarks.approval_times import seeded_random

NOON: Final = datetime(2026, 11, 24, 12, tzinfo=UTC)
TICKET: Final = ApprovalTicket(
    operation_id=OPERATION_ID,
    user_id=USER_ID,
    external_user_id=EXTERNAL_USER_ID,
    payload_sha256=payload_digest(PAYLOAD),
    created_at=NOON,
    expires_at=NOON + timedelta(minutes=2),
    require_auth_type=AUTH_TYPE,
)
RULES: Final = (Path(__file__).parents[2] / "docs" / "rules.md").read_text(encoding="utf-8")

each_case = pytest.mark.parametrize("case", CASES, ids=str)


#: The verdict of a result.
VERDICTS: Final = {
    Result.APPROVED: Verdict.APPROVED,
    Result.PENDING: Verdict.PENDING,
    Result.TIMED_OUT: Verdict.PENDING,
    Result.TRANSIENT: Verdict.TRANSIENT,
    Result.UNANSWERED: Verdict.TRANSIENT,
    Result.FAILED: Verdict.FAILED,
}


def verdict(case: OutcomeCase, **facts: Any) -> Verdict | Rejection:
    known: dict[str, Any] = {
        "ticket": msgspec.structs.replace(TICKET, started_by=case.started_by),
        "may_be_missing": case.is_young or case.if_missing == "wait",
        "was_seen": case.was_seen,
    }
    return poll_verdict(case.answer, OPERATION_ID, **{**known, **facts})


def expected(case: OutcomeCase) -> Verdict | Rejection:
    return case.rejection or VERDICTS[case.before]


@each_case
def test_a_poll_means_what_the_table_says(case: OutcomeCase) -> None:
    assert verdict(case) is expected(case)


@each_case
def test_the_final_poll_has_the_same_verdict_under_another_name(case: OutcomeCase) -> None:
    if case.rejection is None:
        assert VERDICTS[case.final] is VERDICTS[case.before]
    else:
        assert case.final is case.before is Result.REJECTED


@pytest.mark.parametrize("case", [case for case in CASES if case.rule in {"O1", "O2", "O3", "O4"}], ids=str)
def test_an_answer_about_the_operation_and_a_transient_failure_mean_the_same_in_all_waits(case: OutcomeCase) -> None:
    for may_be_missing, was_seen in itertools.product((False, True), repeat=2):
        assert verdict(case, may_be_missing=may_be_missing, was_seen=was_seen) is expected(case)


@pytest.mark.parametrize("case", [case for case in CASES if not isinstance(case.answer, NotFoundError)], ids=str)
def test_only_a_404_depends_on_whether_the_operation_may_be_missing(case: OutcomeCase) -> None:
    for may_be_missing in (False, True):
        assert verdict(case, may_be_missing=may_be_missing) is expected(case)


def test_an_operation_that_was_seen_is_never_missing_even_where_it_may_be() -> None:
    for case in CASES:
        if case.rule == "O5":
            assert verdict(case, may_be_missing=True) is Verdict.TRANSIENT


@pytest.mark.parametrize("case", [case for case in CASES if isinstance(case.answer, Operation)], ids=str)
def test_a_bare_id_is_bound_to_no_user_and_no_payload(case: OutcomeCase) -> None:
    assert isinstance(case.answer, Operation)
    is_about_the_operation = case.answer.operation_id == OPERATION_ID
    if is_about_the_operation and case.rejection is not None and case.rejection.is_mismatch:
        assert verdict(case, ticket=None) is (Verdict.APPROVED if case.answer.is_approved else Verdict.PENDING)
    else:
        assert verdict(case, ticket=None) is expected(case)


def test_no_mutated_answer_is_an_approval_unless_all_in_it_says_so() -> None:
    source = seeded_random(1)
    answers = [msgspec.json.encode(case.answer) for case in CASES if isinstance(case.answer, Operation)]
    pages = (b"{}", b'{"message": "denied"}', b"<html></html>", b"", b"null", b"[]")
    approved = 0
    for _ in range(20_000):
        body = mutate(source.choice((*answers, *pages)), source)
        status = source.choice((200, 200, 200, 201, 202, 204, 302, 400, 403, 404, 410, 503))
        try:
            answer: Operation | KeylessError = protocol.read(
                protocol.GET_OPERATION,
                "/",
                protocol.RawAnswer(status, CIMultiDict(), body),
                Redaction(Secret("k" * 36)),
            )
        except KeylessError as error:
            answer = error
        for was_seen in (False, True):
            found = poll_verdict(answer, OPERATION_ID, TICKET, may_be_missing=False, was_seen=was_seen)
            if found is Verdict.APPROVED:
                approved += 1
                fields = json.loads(body)
                assert (status, fields["state"], fields["result"]) == (200, "approved", True)
                assert (fields["operationId"], fields["userId"].upper()) == (OPERATION_ID, USER_ID)
                assert (fields["operationPayload"], fields["externalUserId"]) == (PAYLOAD, EXTERNAL_USER_ID)
                assert fields["authType"] == AUTH_TYPE
    assert approved > 10  # of answers with a change that says nothing about it


@each_case
def test_listeners_are_told_what_a_poll_brought_whatever_it_means(case: OutcomeCase) -> None:
    if isinstance(case.answer, NotFoundError):
        result = PollResult.MISSING
    elif not isinstance(case.answer, Operation):
        result = PollResult.FAILED
    elif case.answer.state == "pending":
        result = PollResult.PENDING
    else:
        result = PollResult.APPROVED if case.answer.is_approved else PollResult.INVALID
    assert poll_result(case.answer) == (result, type(case.answer).__name__ if result is PollResult.FAILED else None)


def test_listeners_are_told_of_a_poll_that_was_cut_off() -> None:
    assert poll_result(None) == (PollResult.CUT_OFF, None)


# -- what is written about it


def rows(table: str) -> list[list[str]]:
    """Return the cells of the rows of the one Markdown table in a text, without its head."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def section(title: str) -> str:
    return RULES.partition(f"## {title}\n")[2].partition("\n## ")[0]


def _name(cell: str) -> str:
    """Return the name of a result as a cell writes it: "timed out", or "pending: the schedule sets the next poll"."""
    return cell.partition(":")[0].upper().replace(" ", "_")


def written(case: str, before: str, final: str) -> tuple[str, tuple[Result, Result]]:
    return case, (Result[_name(before)], Result[_name(final)])


def test_the_rules_say_what_the_table_says() -> None:
    found = [written(case, before, final) for case, _, before, final in rows(section("What a poll's result means"))]
    assert found == list(RESULTS.items())


def test_each_case_of_the_rules_is_tested() -> None:
    assert {case.rule for case in CASES} == RESULTS.keys()


def test_where_the_worker_differs_the_rules_say_why() -> None:
    reasons = {row[0] for row in rows(section("Where the engines differ"))}
    assert {case.worker.row for case in CASES if case.worker is not None} <= reasons


@pytest.mark.parametrize(
    ("kind", "before", "once_seen"),
    [(NotFoundError, True, False), (BadRequestError, None, False), (ServerError, False, False)],
)
def test_what_an_error_says_about_the_service_depends_on_whether_the_operation_was_seen(
    kind: type[StatusError], before: bool | None, once_seen: bool
) -> None:
    error = kind(status={NotFoundError: 404, BadRequestError: 400, ServerError: 503}[kind], method="GET", path="/")
    assert (is_service_well(error, was_seen=False), is_service_well(error, was_seen=True)) == (before, once_seen)


def test_an_answer_from_a_cache_says_nothing_about_the_service() -> None:
    error = CachedAnswerError("stored", method="GET", path="/")
    assert [is_service_well(error, was_seen=was_seen) for was_seen in (False, True)] == [None, None]
