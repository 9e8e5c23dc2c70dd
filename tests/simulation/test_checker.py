"""The checker sees what is wrong: each promise is broken once, in a history that was right before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from .actors import USER, Actor, Leg, Process
from .checker import check
from .evidence import UNKNOWN, read
from .faults import Capacity, Failure, Outage, Standstill
from .history import Exchange, History
from .people import Person
from .story import Story, run

OUTAGE = Outage(100.0, 160.0, Failure("status", 500))
#: One wait is approved after 8 s, one times out after 5 s, six live through an outage, one is held for.
STORY = Story(
    seed=1,
    processes=(Process(poll_cost=0.3, max_in_flight=8),),
    actors=(
        Actor(1.0, "approved", 0, person=Person(8.0), legs=(Leg(2.0, 0, every=1.0),)),
        Actor(20.0, "late", 0, lifetime=5.0, person=Person(60.0), legs=(Leg(0.0, 0, every=2.0),)),
        *(Actor(90.0, f"down {n}", 0, lifetime=110.0, legs=(Leg(0.0, 0, every=1.0),)) for n in range(6)),
        Actor(500.0, "held", 0, person=Person(30.0), legs=(Leg(0.0, 0, how="hold", hold=5.0, every=2.0),)),
    ),
    faults=(OUTAGE,),
)

Tamper = Callable[[History], None]


@pytest.fixture(scope="module")
def told() -> History:
    return run(STORY)


@pytest.fixture
def history(told: History) -> History:
    return copy.deepcopy(told)


def test_a_history_that_is_right_breaks_no_promise(history: History) -> None:
    assert check(history, STORY.faults) == []
    assert [wait.outcome for wait in history.waits[:2]] == ["approved", "ApprovalTimeoutError"]


def _polls(history: History, name: str) -> list[Exchange]:
    ids = {stored.operation_id for stored in history.operations.values() if stored.payload == f"Pay 40 to {name}"}
    return [exchange for exchange in history.exchanges if exchange.is_poll and exchange.operation_id in ids]


def change(find: Callable[[History], object], **changed: object) -> Tamper:
    """Change something that was seen."""

    def tamper(history: History) -> None:
        found = find(history)
        for name, value in changed.items():
            setattr(found, name, value)

    return tamper


def wait(number: int, **changed: object) -> Tamper:
    return change(lambda history: history.waits[number], **changed)


def poll(actor: str, number: int, **changed: object) -> Tamper:
    return change(lambda history: _polls(history, actor)[number], **changed)


def stored(number: int, **changed: object) -> Tamper:
    """Change what the service has stored of the operation of a wait."""
    return change(lambda history: history.operations[history.waits[number].operation_id], **changed)


def create(**changed: object) -> Tamper:
    return change(lambda history: history.creates[0], **changed)


def _hold_too_short(history: History) -> None:
    next(wait for wait in history.waits if wait.hold is not None).ended_at -= 0.5


def _add(history: History, poll: Exchange, *, after: float, lasts: float = 0.1) -> None:
    begins = poll.sent_at + after
    added = replace(poll, sent_at=begins, ended_at=begins + lasts)
    history.exchanges.insert(history.exchanges.index(poll) + 1, added)


def _poll_too_late(history: History) -> None:
    for poll in _polls(history, "approved")[2:5]:
        history.exchanges.remove(poll)


def _poll_many_at_once(history: History) -> None:
    for _ in range(9):
        _add(history, _polls(history, "approved")[1], after=0.0)


def _poll_on_in_the_outage(history: History) -> None:
    first = next(poll for poll in history.exchanges if poll.is_poll and 130.0 < poll.sent_at < 150.0)
    for number in range(40):
        _add(history, first, after=0.01 * number, lasts=0.005)


def _have_no_key_at_first(history: History) -> None:
    _polls(history, "approved")[0].had_no_key = True
    history.exchanges = [exchange for exchange in history.exchanges if exchange.is_poll]


def _stay_away_after_the_outage(history: History) -> None:
    for poll in [poll for poll in _polls(history, "down 3") if 160.0 <= poll.sent_at < 180.0]:
        history.exchanges.remove(poll)


def _create_twice(history: History) -> None:
    post = next(exchange for exchange in history.exchanges if exchange.method == "POST")
    post.status, post.ended_at = 500, post.sent_at + 0.01
    again = replace(post, sent_at=post.sent_at + 0.02, status=200)
    history.exchanges.insert(1, again)


def _conflict(*, resumes: bool) -> Tamper:
    """Let a create find an operation that was there before, and do the opposite of what it should."""

    def tamper(history: History) -> None:
        post = next(exchange for exchange in history.exchanges if exchange.method == "POST")
        post.status = 409
        if not resumes:
            history.exchanges.insert(1, replace(post, method="GET"))
        create(id_is_new=False, resumes=resumes, outcome="ConflictStatusError")(history)

    return tamper


def _repeat_without_end(history: History) -> None:
    post = next(exchange for exchange in history.exchanges if exchange.method == "POST")
    history.exchanges += [replace(post, sent_at=OUTAGE.begins + 0.1 * number) for number in range(61)]


def _give_up_on_a_dead_connection(history: History) -> None:
    post = next(exchange for exchange in history.exchanges if exchange.method == "POST")
    post.status, post.was_dead = None, True
    history.creates[0].outcome = "TransportError"


BREAKAGES: list[tuple[Tamper, str]] = [
    (lambda history: (history.waits[0].approved or {}).update(user_id="FFFF"), "no wrong approval"),
    (wait(0, approved=None), "no wrong approval"),
    (stored(0, approved_at=1e9), "no wrong approval"),
    (wait(0, outcome="cancelled"), "right end"),
    (wait(1, ended_at=24.0), "right end"),
    *((wait(1, outcome=outcome), "right end") for outcome in ("ValueError", UNKNOWN, "ClientClosedError")),
    (_hold_too_short, "holds are leases"),
    *((wait(1, ended_at=ended_at), "ends in time") for ended_at in (28.5, float("inf"))),
    (stored(1, approved_at=22.0), "no approval lost"),
    (lambda history: history.exchanges.remove(_polls(history, "approved")[0]), "first poll at once"),
    (lambda history: history.exchanges.remove(_polls(history, "late")[-1]), "final poll at the deadline"),
    (poll("approved", -1, sent_at=209.0), "polls for somebody"),
    (lambda history: _add(history, _polls(history, "approved")[1], after=0.01), "single flight"),
    (_poll_many_at_once, "polls in flight"),
    (poll("down 2", -1, ended_at=230.0), "polls in flight"),
    (poll("late", -2, ended_at=26.5), "cut at the deadline"),
    (change(lambda history: history.clients["process 0.1"], rate=0.5), "rate of polls"),
    (lambda history: _add(history, _polls(history, "approved")[1], after=0.5), "not too soon"),
    (_poll_too_late, "not too late"),
    (poll("approved", 1, status=None, was_cut=True), "cut for nobody"),
    (_poll_on_in_the_outage, "few requests in an outage"),
    *((poll("approved", 1, status=status, retry_after=30.0), "pauses are kept") for status in (429, 503)),
    (poll("approved", 0, status=403), "right end"),
    (_have_no_key_at_first, "right end"),
    (_stay_away_after_the_outage, "polled after an outage"),
    (_create_twice, "created once"),
    *((_conflict(resumes=resumes), "resumed if asked") for resumes in (False, True)),
    (_repeat_without_end, "repetitions have a quota"),
    (_give_up_on_a_dead_connection, "created through dead connections"),
    (create(outcome="ServerError", operation_id=None), "exactly one"),
    (stored(0, payload="Pay 9 to Mallory"), "truth about creation"),
    (create(outcome="ConflictStatusError"), "truth about creation"),
    (create(outcome="InvalidIdentifierError"), "truth about creation"),
    (lambda history: history.problems.append("a task is left"), "nothing left behind"),
    (lambda history: history.clients["process 0.1"].leftovers.append("1 waiting"), "nothing left behind"),
]


@pytest.mark.parametrize(("tamper", "promise"), BREAKAGES, ids=[promise for _, promise in BREAKAGES])
def test_a_broken_promise_is_seen(history: History, tamper: Tamper, promise: str) -> None:
    tamper(history)
    assert promise in {violation.promise for violation in check(history, STORY.faults)}


@pytest.mark.parametrize("status", [302, 403, 404, 410])
def test_a_page_about_an_operation_that_was_seen_does_not_end_its_wait(history: History, status: int) -> None:
    _polls(history, "approved")[1].status = status
    assert check(history, STORY.faults) == []


def test_without_a_deadline_pages_for_a_minute_end_a_wait(history: History) -> None:
    wait, polls = history.waits[0], _polls(history, "approved")
    wait.timeout = float("inf")
    for number, poll in enumerate(polls[1:]):
        poll.sent_at, poll.ended_at, poll.status = 30.0 + 20.0 * number, 30.1 + 20.0 * number, 403
    wait.ended_at = polls[4].ended_at
    for outcome, is_right in (("PermissionDeniedError", True), ("ApprovalUnknownError", False)):
        wait.outcome = outcome
        assert ("right end" not in {violation.promise for violation in check(history, STORY.faults)}) == is_right


STANDSTILL = Standstill(508.0, 513.0)
#: Ten waits of a service that answers four requests a second, and whose loop stands still across a deadline.
TROUBLED = Story(
    seed=1,
    processes=(Process(),),
    actors=(
        *(Actor(20.0, f"queued {number}", 0, lifetime=300.0, legs=(Leg(0.0, 0, every=1.0),)) for number in range(10)),
        Actor(500.0, "unseen", 0, lifetime=10.0, person=Person(8.5), legs=(Leg(0.0, 0, every=8.0),)),
    ),
    faults=(Capacity(10.0, 200.0, 4.0), STANDSTILL),
)


@pytest.fixture(scope="module")
def told_in_trouble() -> History:
    return run(TROUBLED)


def test_a_loop_that_stood_still_sends_its_final_poll_then(told_in_trouble: History) -> None:
    history = copy.deepcopy(told_in_trouble)
    assert check(history, TROUBLED.faults) == []
    assert history.waits[-1].outcome == "approved"
    final = _polls(history, "unseen")[-1]
    assert final.sent_at == STANDSTILL.ends
    history.exchanges.remove(final)
    history.waits[-1].outcome = "ApprovalUnknownError"
    assert "final poll at the deadline" in {violation.promise for violation in check(history, TROUBLED.faults)}


def test_a_queue_whose_polls_are_cut_off_is_seen(told_in_trouble: History) -> None:
    history = copy.deepcopy(told_in_trouble)
    for poll in [exchange for exchange in history.exchanges if exchange.is_poll and exchange.sent_at < 200.0]:
        poll.status, poll.ended_at = None, poll.sent_at + 10.0
    assert "a queue stays short" in {violation.promise for violation in check(history, TROUBLED.faults)}


GOOD = b'{"operationId": "op", "userId": "AB", "state": "pending", "result": false}'


@pytest.mark.parametrize(
    ("status", "body", "kind", "error"),
    [
        (200, GOOD, "said", ""),
        (200, b"<html>", "failed", ""),
        (200, b'{"operationId": "op"}', "error", "DecodeError"),
        (200, b"[]", "error", "DecodeError"),
        (200, b'{"result": true, ' + GOOD[1:], "error", "DecodeError"),
        (404, b"", "missing", "NotFoundError"),
        (408, b"", "failed", ""),
        (429, b"", "failed", ""),
        (503, b"", "failed", ""),
        (401, b"", "failed", ""),
        (302, b"", "error", "StatusError"),
        (None, b"", "failed", ""),
    ],
)
def test_an_answer_is_read_by_the_rules(status: int | None, body: bytes, kind: str, error: str) -> None:
    exchange = Exchange(number=1, client="", method="GET", operation_id="op", is_poll=True, sent_at=0.0, ended_at=1.0)
    exchange.status, exchange.body = status, body
    reading = read(exchange, request_timeout=10.0)
    assert (reading.kind, reading.error) == (kind, error)


@pytest.mark.parametrize(("lasts", "kind"), [(1.0, "cut"), (10.0, "failed")])
def test_a_poll_that_is_given_up_is_a_failure_only_where_it_took_too_long(lasts: float, kind: str) -> None:
    exchange = Exchange(number=1, client="", method="GET", operation_id=USER, is_poll=True, sent_at=0.0, ended_at=lasts)
    exchange.was_cut = True
    assert read(exchange, request_timeout=10.0).kind == kind
