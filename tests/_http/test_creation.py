"""A creation whose answer is lost: it is found, or sent again, or refused, and never made twice."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from raw_server import RawServer, answer, failure, hang, now, operation, refused, reset
from waiting import spin_until

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalTicket,
    AuthenticationError,
    ClientClosedError,
    ConfigurationError,
    ConflictError,
    ConflictStatusError,
    DecodeError,
    InconsistentOperationError,
    KeylessClient,
    KeylessError,
    NotJsonError,
    OperationMismatchError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    StatusError,
    TransportError,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

USER = "C0FFEE"
CREATED = answer(b'{"success": true}')
CONFLICT = answer(b"taken", status=b"409 Conflict")
MISSING = answer(b"", status=b"404 Not Found")
BUSY = answer(b"", status=b"503 Busy")
LIMITED = answer(b"", status=b"429 Slow")


def sent(sandbox: Sandbox) -> list[str]:
    """The methods of all requests that came, in order."""
    return [record.method for record in sandbox.requests]


async def outcome_of(creation: Awaitable[ApprovalTicket]) -> type[KeylessError] | bool:
    """Return the type of the error, which names the operation, or whether the ticket is reconciled."""
    try:
        ticket = await creation
    except KeylessError as error:
        return getattr(error, "operation_id", None) == "a" and type(error)
    assert ticket.operation_id == "a"
    return ticket.reconciled


class Talk:
    """A creation of "a" against a server that answers this and then that."""

    def __init__(self, *answers: Any, **options: Any) -> None:
        self.server = RawServer(*answers)
        self.options = options

    async def create(self, *, operation_id: str | None = "a", **fields: Any) -> ApprovalTicket:
        async with self.server as server, KeylessClient("key", base_url=server.url, **self.options) as client:
            return await client.create_operation(USER, operation_id=operation_id, **fields)


# What may have taken effect


def fail(status: int, body: bytes = b"") -> Callable[[Sandbox, bool], None]:
    return lambda sandbox, stored: sandbox.fail_next(status, stored=stored, body=body)


LOST: dict[str, Callable[[Sandbox, bool], None]] = {
    "dropped": lambda sandbox, stored: sandbox.drop_next(stored=stored),
    **{f"{status}": fail(status) for status in (408, 500, 503, 504)},
    "a page": fail(200, b"<html>"),
    "nothing": fail(204),
    "another shape": fail(200, b"{}"),
    "no success": fail(200, b'{"success": false}'),
}
lost = pytest.mark.parametrize("lose", LOST.values(), ids=LOST.keys())


@lost
@pytest.mark.parametrize(
    ("stored", "attempts", "requests"),
    [(True, 3, ["POST", "GET"]), (True, 1, ["POST", "GET"]), (False, 3, ["POST", "GET", "POST"])],
    ids=["found", "found after the last attempt", "sent again"],
)
async def test_lost_creation_is_found_or_sent_again(
    sandbox: Sandbox, lose: Callable[[Sandbox, bool], None], stored: bool, attempts: int, requests: list[str]
) -> None:
    lose(sandbox, stored)
    async with sandbox.client(max_attempts=attempts) as client:
        ticket = await client.create_operation(USER, operation_payload="Pay", external_user_id="ann")
    assert list(sandbox.operations) == [ticket.operation_id]
    assert sent(sandbox) == requests


@pytest.mark.parametrize(
    ("lose", "kind"),
    [
        ("dropped", TransportError),
        ("500", ServerError),
        ("408", StatusError),
        ("a page", NotJsonError),
        ("no success", DecodeError),
    ],
)
async def test_creation_that_never_arrives_fails_with_the_last_failure(
    sandbox: Sandbox, lose: str, kind: type[KeylessError]
) -> None:
    for _ in range(3):
        LOST[lose](sandbox, False)  # noqa: FBT003  # not stored
        sandbox.fail_next(404, method="GET")
    async with sandbox.client() as client:
        assert type(await failure(client.create_operation(USER))) is kind
    assert sent(sandbox) == ["POST", "GET"] * 3
    assert sandbox.operations == {}


async def test_creation_is_checked_at_once(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.fail_next(503, stored=True, retry_after=3600)
    started = now()
    await client.create_operation(USER)
    assert now() == pytest.approx(started, abs=1e-3)


async def test_long_pause_is_for_the_caller_to_decide(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.fail_next(503, retry_after=3600)
    error = await failure(client.create_operation(USER))
    assert isinstance(error, ServerError)
    assert error.retry_after == 3600
    assert sent(sandbox) == ["POST", "GET"]


# What did not take effect


async def test_refused_connection_is_tried_again_without_a_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda _low, high: high)
    async with KeylessClient("key", base_url=refused()) as client:
        started = now()
        error = await failure(client.create_operation(USER))
        assert now() - started == pytest.approx(0.75, abs=1e-3)  # the pauses of three attempts, and none of a check
    assert isinstance(error, TransportError)
    assert not error.sent


# Conflicts


async def test_conflict_with_nothing_is_checked_for_5_seconds_and_then_sent_again() -> None:
    """A replica that lags: the id is taken, and nothing is there yet."""
    talk = Talk(BUSY, MISSING, CONFLICT, *[MISSING] * 7, CREATED)
    started = now()
    assert (await talk.create()).operation_id == "a"
    assert now() - started == pytest.approx(5, abs=1)
    assert talk.server.methods == ["POST", "GET", "POST", *["GET"] * 7, "POST"]


NO = answer(b"", status=b"401 No")
FOUND = answer(operation())
#: What is answered, the error or whether the ticket is reconciled, and the methods of the requests.
TALKS: dict[str, tuple[list[bytes], type[KeylessError] | bool, str]] = {
    "a confirmation": ([CREATED], False, "POST"),
    "a confirmation of the second attempt": ([BUSY, MISSING, CREATED], False, "POST GET POST"),
    "a conflict of the first attempt": ([CONFLICT], ConflictStatusError, "POST"),
    "a refusal": ([NO], AuthenticationError, "POST"),
    "a refusal after a failure that was resolved": ([BUSY, MISSING, NO], AuthenticationError, "POST GET POST"),
    "a status above the successes, which has no effect": ([answer(b"", status=b"300 Choose")], StatusError, "POST"),
    "a 429 of the last attempt": ([LIMITED], RateLimitError, "POST POST POST"),
    "a 503 of the last attempt": ([BUSY, MISSING] * 3, ServerError, "POST GET POST GET POST GET"),
    "a conflict after a 429, which had no effect": ([LIMITED, CONFLICT], ConflictStatusError, "POST POST"),
    "and after a 425": ([answer(b"", status=b"425 Early"), CONFLICT], ConflictStatusError, "POST POST"),
    "a conflict with our own lost creation": ([BUSY, MISSING, CONFLICT, FOUND], True, "POST GET POST GET"),
    "and long after it": ([BUSY, MISSING, LIMITED, CONFLICT, FOUND], True, "POST GET POST POST GET"),
    "a conflict with the operation of another caller after an ambiguous failure": (
        *([BUSY, MISSING, CONFLICT, answer(operation(userId="BAD"))], ConflictStatusError, "POST GET POST GET"),
    ),
    "a conflict with what a replica does not know yet": (
        *([BUSY, MISSING, CONFLICT, MISSING, MISSING, FOUND], True, "POST GET POST GET GET GET"),
    ),
}


@pytest.mark.parametrize(("answers", "outcome", "requests"), TALKS.values(), ids=TALKS.keys())
async def test_creation_succeeds_or_fails_after(
    answers: list[bytes], outcome: type[KeylessError] | bool, requests: str
) -> None:
    talk = Talk(*answers)
    assert await outcome_of(talk.create()) == outcome
    assert talk.server.methods == requests.split()


async def test_conflict_with_nothing_is_raised_when_the_attempts_are_used_up() -> None:
    talk = Talk(BUSY, MISSING, CONFLICT, MISSING, max_attempts=2)
    assert type(await failure(talk.create())) is ConflictStatusError
    assert talk.server.methods == ["POST", "GET", "POST", *["GET"] * 7]


MINE = {"operation_payload": "Pay 5", "external_user_id": "ann"}


@pytest.mark.parametrize(
    "other",
    [
        *({"userId": "BAD"}, {"operationPayload": "Pay 6"}, {"operationPayload": ""}, {"operationPayload": None}),
        *({"operationPayload": "pay 5"}, {"externalUserId": "bob"}, {"externalUserId": None}),
    ],
)
@pytest.mark.parametrize("attempts", [1, 3])
async def test_operation_that_is_not_ours_conflicts(other: dict[str, object], attempts: int) -> None:
    there = operation(**({"operationPayload": "Pay 5", "externalUserId": "ann"} | other))
    talk = Talk(BUSY, answer(there), max_attempts=attempts)
    assert type(await failure(talk.create(**MINE))) is ConflictStatusError
    assert talk.server.methods == ["POST", "GET"]


@pytest.mark.parametrize(("there", "mine"), [("caf\u00e9", "cafe\u0301"), ("cafe\u0301", "caf\u00e9"), ("\uff15", "5")])
async def test_texts_that_only_unicode_calls_equal_conflict(there: str, mine: str) -> None:
    for fields, created in (
        ({"operationId": there}, {"operation_id": mine}),
        ({"operationPayload": there}, {"operation_payload": mine}),
        ({"externalUserId": there}, {"external_user_id": mine}),
    ):
        talk = Talk(CONFLICT, answer(operation(**fields)))
        assert type(await failure(talk.create(**created, if_exists="resume"))) is ConflictStatusError


# One approval must not count twice


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that makes the id itself makes "a"."""
    monkeypatch.setattr("aiokeyless.client.uuid.uuid4", lambda: "a")


THERE = {"operationPayload": "Pay 5", "externalUserId": "ann"}
PENDING = answer(operation(**THERE))
APPROVED = answer(operation(**THERE, state="approved", result=True, userId="c0ffee"))
OTHER = answer(operation(**THERE | {"operationPayload": "Pay 6"}))
AMBIGUOUS: dict[str, Any] = {
    "no answer": hang,
    "dropped": reset,
    "cut off": answer(b"{", length=9),
    "500": answer(b"", status=b"500 Oh"),
    "503": BUSY,
    "504": answer(b"", status=b"504 Slow"),
    "408": answer(b"", status=b"408 Slow"),
    "a page": answer(b"<html>"),
    "204": answer(b"", status=b"204 Nothing"),
    "202": answer(b'{"success": true}', status=b"202 Later"),
    "another shape": answer(b"{}"),
    "no success": answer(b'{"success": false}'),
    "both": answer(b'{"success": false, "success": true}'),
}
#: Each ambiguous failure, alone and with a 409 after it: the id is taken, perhaps by the ambiguous attempt itself.
AMBIGUOUS_ATTEMPTS: dict[str, list[Any]] = {
    **{name: [failed] for name, failed in AMBIGUOUS.items()},
    "409 after 503": [BUSY, MISSING, CONFLICT],
    "409 after a reset": [reset, MISSING, CONFLICT],
}
ambiguous_failures = pytest.mark.parametrize("failures", AMBIGUOUS_ATTEMPTS.values(), ids=AMBIGUOUS_ATTEMPTS.keys())


@ambiguous_failures
@pytest.mark.parametrize(
    ("operation_id", "found", "outcome"),
    [
        *(("a", PENDING, True), ("a", APPROVED, AlreadyApprovedError), ("a", OTHER, ConflictStatusError)),
        *((None, PENDING, True), (None, APPROVED, True)),
    ],
    ids=["the caller's, pending", "approved", "with other content", "this call's, pending", "approved"],
)
@pytest.mark.usefixtures("made")
async def test_what_is_found_after_an_ambiguous_failure_is_ours_or_a_conflict(
    failures: list[Any], operation_id: str | None, found: bytes, outcome: type[KeylessError] | bool
) -> None:
    """An approval counts only under an id that this call made: under the caller's, it may be an earlier one."""
    talk = Talk(*failures, found)
    assert await outcome_of(talk.create(operation_id=operation_id, **MINE)) == outcome
    assert talk.server.methods.count("POST") == len(failures) - failures.count(MISSING)


@pytest.mark.parametrize(
    "other",
    [{"userId": "DECAF"}, {"operationPayload": "Pay 4000"}, {"externalUserId": "bob"}],
    ids=["user", "payload", "external user id"],
)
async def test_an_approval_of_other_content_is_said_not_to_be_for_this_request(other: dict[str, str]) -> None:
    found = answer(operation(**THERE | other, state="approved", result=True))
    error = await failure(Talk(CONFLICT, found).create(if_exists="resume", **MINE))
    assert "of another user, or with another payload or external user id: its approval is not for this request" in str(
        error
    )
    assert not hasattr(error, "ticket")


# The ticket of an approval that is found


async def already_approved(client: KeylessClient, **fields: Any) -> AlreadyApprovedError:
    """Create what exists and is approved."""
    error = await failure(client.create_operation(USER, operation_id="a", if_exists="resume", **fields))
    assert isinstance(error, AlreadyApprovedError)
    return error


async def test_an_approval_that_is_found_comes_with_the_ticket_that_the_create_would_have_returned(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    fields: dict[str, Any] = {**MINE, "require_auth_type": "biom", "expires_in": 40.0}
    await client.create_operation(USER, operation_id="a", operation_payload="Pay 5", external_user_id="ann")
    resumed = await client.create_operation(USER, operation_id="a", if_exists="resume", **fields)
    sandbox.approve("a")
    ticket = (await already_approved(client, **fields)).ticket
    assert resumed.created_at <= ticket.created_at <= datetime.now(UTC)
    assert ticket.expires_at - ticket.created_at == timedelta(seconds=40)
    dates = {"created_at": ticket.created_at, "expires_at": ticket.expires_at}
    assert ticket == msgspec.structs.replace(resumed, **dates)
    assert ticket.require_auth_type == "biom"


@pytest.mark.parametrize("expires_in", [1e-6, 120.0], ids=["over", "not over"])
async def test_a_wait_for_that_ticket_returns_the_approval_however_old_it_is(
    sandbox: Sandbox, client: KeylessClient, expires_in: float
) -> None:
    await client.create_operation(USER, operation_id="a", expires_in=0.01)
    sandbox.approve("a")
    await asyncio.sleep(3 * 24 * 3600)
    error = await already_approved(client, expires_in=expires_in)
    assert (await client.wait_for_approval(error.ticket)).is_approved


async def test_a_wait_for_that_ticket_outlasts_a_replica_that_lags() -> None:
    server = RawServer(CONFLICT, APPROVED, PENDING, MISSING, APPROVED)
    async with server, KeylessClient("key", base_url=server.url) as client:
        error = await already_approved(client, **MINE)
        assert (await client.wait_for_approval(error.ticket)).is_approved
    assert server.methods == ["POST", "GET", "GET", "GET", "GET"]


@pytest.mark.parametrize(
    "other",
    [{"userId": "DECAF"}, {"operationPayload": "Pay 4000"}, {"externalUserId": "bob"}, {"authType": "pin"}],
    ids=["user", "payload", "external user id", "factor"],
)
async def test_a_wait_for_that_ticket_accepts_the_approval_of_this_request_only(other: dict[str, str]) -> None:
    approved = answer(operation(**THERE | other, state="approved", result=True))
    async with RawServer(CONFLICT, APPROVED, approved) as server, KeylessClient("key", base_url=server.url) as client:
        error = await already_approved(client, **MINE, require_auth_type="biom")
        assert isinstance(await failure(client.wait_for_approval(error.ticket)), OperationMismatchError)


async def test_a_wait_for_the_ticket_of_a_contradictory_approval_is_refused() -> None:
    torn = answer(operation(**THERE, state="approved", result=False))
    async with RawServer(CONFLICT, torn, torn) as server, KeylessClient("key", base_url=server.url) as client:
        error = await already_approved(client, **MINE)
        assert isinstance(await failure(client.wait_for_approval(error.ticket)), InconsistentOperationError)


async def test_what_a_pin_approved_pays_for_nobody_who_wants_a_face_and_lost_the_answer(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    await client.create_operation(USER, operation_id="a")
    sandbox.approve("a", auth_type="pin")
    sandbox.drop_next(stored=True)
    error = await failure(client.request_approval(USER, operation_id="a", require_auth_type="biom"))
    assert isinstance(error, AlreadyApprovedError)
    assert isinstance(await failure(client.wait_for_approval(error.ticket)), OperationMismatchError)
    assert (await client.wait_for_approval((await already_approved(client)).ticket)).auth_type == "pin"


@pytest.mark.usefixtures("made")
async def test_a_conflict_after_an_ambiguous_failure_is_this_calls_own_where_it_made_the_id() -> None:
    """Nobody else can have the id, so nothing is checked: a replica that lags would only confuse."""
    talk = Talk(BUSY, MISSING, CONFLICT)
    assert (await talk.create(operation_id=None)).reconciled
    assert talk.server.methods == ["POST", "GET", "POST"]


# A gateway that sends a create twice, and one that is away for a while


def limited(seconds: int) -> bytes:
    return answer(b"", b"Retry-After: %d" % seconds, status=b"429 Slow")


RESUME = {"if_exists": "resume"}
ONCE = {"max_attempts": 1}
Case = tuple[list[Any], dict[str, Any], dict[str, Any], type[KeylessError] | bool, str]
#: A call's answers, arguments and client; its error, or whether the ticket is reconciled; its requests.
CALLS: dict[str, Case] = {
    "our id is taken: the same content": ([CONFLICT, PENDING], {}, {}, True, "POST GET"),
    "the same content, approved": ([CONFLICT, APPROVED], {}, {}, True, "POST GET"),
    "the same content, resuming": ([CONFLICT, APPROVED], RESUME, {}, True, "POST GET"),
    "the same content, once": ([CONFLICT, PENDING], {}, ONCE, True, "POST GET"),
    "the same content, after a refusal": ([LIMITED, CONFLICT, PENDING], {}, {}, True, "POST POST GET"),
    "the same content on a replica that lags": (
        [CONFLICT, MISSING, MISSING, PENDING],
        {},
        {},
        True,
        "POST GET GET GET",
    ),
    "other content": ([CONFLICT, OTHER], {}, {}, ConflictStatusError, "POST GET"),
    "nothing": ([CONFLICT, MISSING], {}, {}, StatusError, "POST" + " GET" * 7),
    "nothing, resuming": ([CONFLICT, MISSING], RESUME, {}, StatusError, "POST" + " GET" * 7),
    "nothing, once": ([CONFLICT, MISSING], {}, ONCE, StatusError, "POST" + " GET" * 7),
    "a GET that fails, once": ([CONFLICT, BUSY], {}, ONCE, StatusError, "POST GET"),
    "a GET that is refused": ([CONFLICT, NO], {}, {}, StatusError, "POST GET"),
    "a GET about another": ([CONFLICT, answer(operation(operationId="b"))], {}, {}, StatusError, "POST GET"),
    "the caller's id is taken": ([CONFLICT], {"operation_id": "a"}, {}, ConflictStatusError, "POST"),
    "the caller's, resuming": (
        [CONFLICT, APPROVED],
        {"operation_id": "a"} | RESUME,
        {},
        AlreadyApprovedError,
        "POST GET",
    ),
    "a pause of a minute": ([limited(60)], {}, {}, RateLimitError, "POST"),
    "a refusal, once": ([LIMITED], {}, ONCE, RateLimitError, "POST"),
}
SHORT = {"expires_in": 16.0}
#: The same of `create_operation` alone, and of `request_approval`, which goes on for a while.
SINGLE: dict[str, Case] = {
    "a GET that fails": ([CONFLICT, BUSY], {}, {}, StatusError, "POST GET GET GET"),
    "an outage": ([BUSY], {}, {}, ServerError, "POST GET GET GET"),
    "refusals": ([LIMITED], SHORT, {}, RateLimitError, "POST POST POST"),
    "a pause within what is left": ([limited(5), CREATED], SHORT, {}, False, "POST POST"),
}
LASTING: dict[str, Case] = {
    "a GET that fails": ([CONFLICT, BUSY], {}, {}, StatusError, "POST" + " GET" * 7),
    "a GET that fails and then finds the same content": (
        [CONFLICT, BUSY, BUSY, PENDING],
        {},
        {},
        True,
        "POST GET GET GET",
    ),
    "and then nothing": ([CONFLICT, BUSY, MISSING], {}, {}, StatusError, "POST GET" + " GET" * 7),
    "and then other content": ([CONFLICT, BUSY, OTHER], {}, {}, ConflictStatusError, "POST GET GET"),
    "and then is refused": ([CONFLICT, BUSY, NO], {}, {}, StatusError, "POST GET GET"),
    "an outage": ([BUSY], {}, {}, ServerError, "POST" + " GET" * 7),
    "an outage that ends": ([*[BUSY] * 7, MISSING, CREATED], {}, {}, False, "POST" + " GET" * 7 + " POST"),
    "an outage, of the caller's id": (
        *([*[reset] * 5, APPROVED], {"operation_id": "a"}, {}, AlreadyApprovedError, "POST" + " GET" * 5),
    ),
    "an outage, resuming": (
        *([CONFLICT, BUSY, CONFLICT, PENDING], {"operation_id": "a"} | RESUME, {}, True, "POST GET POST GET"),
    ),
    "a doubt before a refusal": (
        *([BUSY, MISSING, LIMITED, MISSING, CREATED], {}, {}, False, "POST GET POST GET POST"),
    ),
    "refusals": ([LIMITED], {}, {}, RateLimitError, "POST" + " POST" * 6),
    "refusals of a short request": ([LIMITED], SHORT, {}, RateLimitError, "POST" + " POST" * 5),
    "pauses of five seconds": ([limited(5)], {}, {}, RateLimitError, "POST POST POST"),
    "a pause within what is left": ([limited(5), CREATED], {}, {}, False, "POST POST"),
    "a pause beyond what is left": ([limited(5), CREATED], SHORT, {}, RateLimitError, "POST"),
    "a pause that a check is asked for": ([BUSY, limited(60)], {}, {}, ServerError, "POST GET"),
}


class ToldError(Exception):
    """The phone was told, and the test needs no wait."""


async def begin(client: KeylessClient, **fields: Any) -> ApprovalTicket:
    """Return the ticket with which `request_approval` calls `on_created`, once."""
    tickets: list[ApprovalTicket] = []

    def tell(ticket: ApprovalTicket) -> None:
        tickets.append(ticket)
        raise ToldError

    with contextlib.suppress(ToldError):
        await client.request_approval(USER, on_created=tell, **fields)
    (ticket,) = tickets
    return ticket


async def create(client: KeylessClient, **fields: Any) -> ApprovalTicket:
    return await client.create_operation(USER, **fields)


@pytest.mark.parametrize(
    ("call", "case"),
    [
        *(pytest.param(create, case, id=f"create, {name}") for name, case in (CALLS | SINGLE).items()),
        *(pytest.param(begin, case, id=f"request, {name}") for name, case in (CALLS | LASTING).items()),
    ],
)
@pytest.mark.usefixtures("made")
async def test_a_gateway_in_the_way_of_a_create(
    call: Callable[..., Awaitable[ApprovalTicket]], case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda _low, high: high)
    answers, fields, options, outcome, requests = case
    started = now()
    async with RawServer(*answers) as server, KeylessClient("key", base_url=server.url, **options) as client:
        assert await outcome_of(call(client, **MINE, **fields)) == outcome
    assert server.methods == requests.split()
    assert now() - started <= 10.001


@pytest.mark.parametrize("check", [NO, MISSING], ids=["fails", "finds nothing"])
@pytest.mark.usefixtures("made")
async def test_a_taken_id_of_our_own_leaves_the_create_in_doubt_if_the_check(check: bytes) -> None:
    error = await failure(
        Talk(answer(b"taken", b"X-Request-Id: r", status=b"409 Taken"), check).create(operation_id=None)
    )
    assert isinstance(error, StatusError)
    assert (error.status, error.operation_id, error.request_id) == (409, "a", "r")
    assert str(error).endswith(
        "answered 409: the create may have taken effect, as if a proxy sent it twice; repeat it with operation_id='a' "
        'and if_exists="resume"'
    )


async def test_an_outage_that_outlasts_a_request_is_one_failure_with_the_last_check_as_its_cause() -> None:
    server = RawServer(BUSY, answer(b"", status=b"502 Oh"))
    async with server, KeylessClient("key", base_url=server.url) as client:
        error = await failure(client.request_approval(USER))
    assert isinstance(error, ServerError)
    assert isinstance(error.__cause__, ServerError)
    assert (error.status, error.failures, error.__cause__.status) == (503, (), 502)


@pytest.mark.parametrize("fault", ["502", "dropped", "stored"])
async def test_a_second_without_a_gateway_costs_no_request(
    sandbox: Sandbox, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten requests a second, of which ten meet it."""
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda _low, high: high / 2)
    told: list[str] = []

    async def approve(ticket: ApprovalTicket) -> None:
        told.append(ticket.operation_id)
        sandbox.approve(ticket.operation_id)

    async with sandbox.client() as client, asyncio.TaskGroup() as group:
        for number in range(40):
            group.create_task(client.request_approval(USER, on_created=approve))
            await asyncio.sleep(0.1)
            if number == 9:
                if fault == "dropped":
                    sandbox.drop_next(times=None)
                else:
                    sandbox.fail_next(502, times=None, stored=fault == "stored")
            elif number == 19:
                sandbox.recover()
    assert sorted(told) == sorted(sandbox.operations)
    assert len(set(told)) == 40


@lost
async def test_one_tap_pays_once_for_every_answer_that_is_lost(
    sandbox: Sandbox, client: KeylessClient, lose: Callable[[Sandbox, bool], None]
) -> None:
    """The shop that relies on ConflictError: the third call, whose answer was lost, must not pay again."""

    async def pay() -> bool:
        try:
            await client.request_approval(USER, operation_id="order-1", operation_payload="Pay")
        except ConflictError:
            return False
        return True

    first = asyncio.create_task(pay())
    await spin_until(lambda: sandbox.operations)
    sandbox.approve("order-1")
    assert await first
    assert not await pay()
    lose(sandbox, True)  # noqa: FBT003  # the service sees it
    assert not await pay()
    lose(sandbox, False)  # noqa: FBT003  # a gateway answers in its place
    assert not await pay()


async def test_an_answer_out_of_a_cache_makes_an_old_approval_under_a_reused_id_count(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    """A limit, and why an operation id is never reused: nothing in the answers gives the gateway away."""
    await client.create_operation(USER, operation_id="rent")
    sandbox.approve("rent")
    sandbox.fail_next(200, body=b'{"success": true}', method="POST")
    assert (await client.request_approval(USER, operation_id="rent")).is_approved


async def test_two_at_once_under_one_id_are_one_and_a_conflict(sandbox: Sandbox, client: KeylessClient) -> None:
    calls = [client.create_operation(USER, operation_id="a") for _ in range(2)]
    got = await asyncio.gather(*calls, return_exceptions=True)
    assert sorted(type(each).__name__ for each in got) == ["ApprovalTicket", "ConflictStatusError"]
    assert list(sandbox.operations) == ["a"]


@lost
async def test_two_calls_with_one_id_at_once_are_distinguished_when_one_is_ambiguous(
    sandbox: Sandbox, client: KeylessClient, lose: Callable[[Sandbox, bool], None]
) -> None:
    lose(sandbox, False)  # noqa: FBT003  # the first of them does not arrive
    calls = [client.create_operation(USER, operation_id="a") for _ in range(2)]
    tickets = await asyncio.gather(*calls)
    assert sorted(ticket.reconciled for ticket in tickets) == [False, True]
    assert list(sandbox.operations) == ["a"]


# What exists, where the caller wants to go on with it


async def test_taken_id_is_resumed(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id="a", operation_payload="Pay")
    ticket = await client.create_operation(USER, operation_id="a", operation_payload="Pay", if_exists="resume")
    assert ticket.reconciled
    sandbox.approve("a")
    assert (await client.wait_for_approval(ticket)).is_approved
    assert sent(sandbox) == ["POST", "POST", "GET", "GET"]


async def test_resumed_request_waits_for_what_is_there(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id="a")
    call = asyncio.create_task(client.request_approval(USER, operation_id="a", if_exists="resume"))
    await spin_until(lambda: sent(sandbox)[-1] == "GET")
    sandbox.approve("a")
    assert (await call).is_approved


async def test_what_a_pin_approved_is_resumed_for_nobody_who_wants_a_face(
    sandbox: Sandbox, client: KeylessClient
) -> None:
    face: dict[str, Any] = {"operation_id": "a", "if_exists": "resume", "require_auth_type": "biom"}
    ticket = await client.create_operation(USER, operation_id="a")
    resumed = await client.create_operation(USER, **face)
    assert (ticket.require_auth_type, resumed.require_auth_type) == (None, "biom")
    sandbox.approve("a", auth_type="pin")
    assert (await client.wait_for_approval(ticket)).auth_type == "pin"
    assert isinstance(await failure(client.wait_for_approval(resumed)), OperationMismatchError)
    assert type(await failure(client.create_operation(USER, **face))) is AlreadyApprovedError


@pytest.mark.parametrize("method", [KeylessClient.create_operation, KeylessClient.request_approval])
async def test_a_factor_that_cannot_be_is_refused_before_anything_is_sent(
    sandbox: Sandbox, client: KeylessClient, method: Callable[..., Awaitable[object]]
) -> None:
    refusal = await failure(method(client, USER, require_auth_type="face"))
    assert str(refusal) == "require_auth_type must be 'biom' for a face, 'pin', or None for any, not 'face'"
    assert not sandbox.requests


async def test_new_id_is_created_where_it_might_have_been_resumed(client: KeylessClient) -> None:
    assert not (await client.create_operation(USER, operation_id="a", if_exists="resume")).reconciled


@pytest.mark.parametrize(
    ("found", "kind"),
    [
        (APPROVED, AlreadyApprovedError),
        (OTHER, ConflictStatusError),
        (answer(operation(operationId="b")), ConflictStatusError),
    ],
    ids=["approved", "other content", "another operation"],
)
async def test_taken_id_is_not_resumed(found: bytes, kind: type[KeylessError]) -> None:
    error = await failure(Talk(CONFLICT, found).create(if_exists="resume", **MINE))
    assert isinstance(error, ConflictStatusError)
    assert type(error) is kind
    assert (error.status, error.method, error.path) == (409, "POST", f"/v2/users/{USER}/operations")
    assert error.operation_id == "a"


async def test_taken_id_that_a_replica_does_not_know_yet_is_resumed() -> None:
    talk = Talk(CONFLICT, MISSING, PENDING)
    assert (await talk.create(if_exists="resume", **MINE)).reconciled
    assert talk.server.methods == ["POST", "GET", "GET"]


async def test_a_failed_check_is_raised_where_no_failure_was_ambiguous() -> None:
    talk = Talk(CONFLICT, answer(b"", status=b"401 No"))
    error = await failure(talk.create(if_exists="resume"))
    assert isinstance(error, AuthenticationError)
    assert error.operation_id == "a"
    assert talk.server.methods == ["POST", "GET"]


async def test_if_exists_says_what_it_takes(sandbox: Sandbox, client: KeylessClient) -> None:
    call = client.create_operation(USER, if_exists="ignore")  # type: ignore[arg-type]  # is what is refused
    assert str(await failure(call)) == "if_exists must be 'raise' or 'resume', not 'ignore'"
    assert sandbox.requests == []


async def test_an_error_that_was_not_sent_after_an_ambiguous_one_may_have_taken_effect() -> None:
    async def gone(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(MISSING)
        await talk.server.stop_listening()

    talk = Talk(BUSY, gone)
    error = await failure(talk.create())
    assert isinstance(error, TransportError)
    assert error.sent


async def test_a_missing_key_after_an_ambiguous_failure_keeps_that_failure(sandbox: Sandbox) -> None:
    keys = [sandbox.api_key, sandbox.api_key]  # of the create and of the search
    sandbox.fail_next(500, stored=False)
    async with KeylessClient(keys.pop, base_url=sandbox.url) as client:
        error = await failure(client.create_operation(USER, operation_id="a"))
    assert isinstance(error, ServerError)
    assert error.operation_id == "a"
    assert isinstance(error.__cause__, ConfigurationError)
    assert sent(sandbox) == ["POST", "GET"]


# What an error says


async def test_an_answer_without_success_is_described() -> None:
    error = await failure(Talk(answer(b'{"success": false}'), MISSING, max_attempts=1).create())
    assert isinstance(error, DecodeError)
    path = f"/v2/users/{USER}/operations"
    assert (error.status, error.method, error.path) == (200, "POST", path)
    assert str(error).startswith(f"POST {path} answered without success")


async def test_error_of_another_call_names_none(client: KeylessClient) -> None:
    error = await failure(client.get_operation("a"))
    assert error.operation_id is None  # type: ignore[attr-defined]


async def test_last_error_carries_the_earlier_ones() -> None:
    answers = [LIMITED, BUSY, MISSING, answer(b"", status=b"500 Oh"), MISSING]
    error = await failure(Talk(*answers).create())
    assert isinstance(error, ServerError)
    assert error.status == 500
    assert [type(earlier) for earlier in error.failures] == [RateLimitError, ServerError]
    assert [earlier.__traceback__ for earlier in error.failures] == [None, None]
    assert not error.failures[0].failures  # type: ignore[attr-defined]


@pytest.mark.parametrize("mine", [None, ""])
@pytest.mark.parametrize("theirs", [None, ""])
async def test_absent_text_is_an_empty_one(mine: str | None, theirs: str | None) -> None:
    there = operation(operationPayload=theirs, externalUserId=theirs)
    ticket = await Talk(BUSY, answer(there)).create(operation_payload=mine, external_user_id=mine)
    assert ticket.payload_sha256 == hashlib.sha256(b"").hexdigest()


# Where it cannot be told


@pytest.mark.parametrize(
    "check",
    [
        *(BUSY, LIMITED, reset, answer(b"", status=b"401 No"), answer(b"", status=b"302 Found"), answer(b"<html>")),
        *(answer(b"{}"), answer(b"{", length=9), answer(operation(operationId="b"))),
    ],
)
@pytest.mark.parametrize("attempts", [1, 3])
async def test_a_failed_check_raises_the_ambiguous_failure(check: Any, attempts: int) -> None:
    talk = Talk(answer(b"", b"X-Request-Id: first", status=b"504 Slow"), check, max_attempts=attempts)
    error = await failure(talk.create())
    assert isinstance(error, ServerError)
    assert (error.status, error.method, error.request_id) == (504, "POST", "first")
    assert talk.server.methods[:2] == ["POST", "GET"]
    assert "POST" not in talk.server.methods[1:]


async def test_a_failed_check_after_a_conflict_raises_the_ambiguous_failure() -> None:
    talk = Talk(answer(b"", status=b"504 Slow"), MISSING, CONFLICT, answer(b"", status=b"401 No"))
    error = await failure(talk.create())
    assert isinstance(error, ServerError)
    assert error.status == 504
    assert isinstance(error.__cause__, AuthenticationError)


async def test_a_check_is_tried_again(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.drop_next(stored=True, method="POST")
    sandbox.fail_next(503, times=2, method="GET")
    await client.create_operation(USER)
    assert sent(sandbox) == ["POST", "GET", "GET", "GET"]


async def test_a_check_that_hangs_ends(sandbox: Sandbox) -> None:
    sandbox.latency = 3600
    async with sandbox.client(request_timeout=2, max_attempts=1) as client:
        started = now()
        error = await failure(client.create_operation(USER))
        assert now() - started == pytest.approx(4, abs=1e-3)
    assert isinstance(error, RequestTimeoutError)
    assert error.method == "POST"
    assert len(sandbox.operations) == 1


@pytest.mark.parametrize("seed", range(40))
async def test_there_are_never_two(sandbox: Sandbox, client: KeylessClient, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311  # of faults, not of secrets
    for _ in range(chance.randint(1, 6)):
        LOST[chance.choice(list(LOST))](sandbox, chance.random() < 0.5)
    try:
        ticket = await client.create_operation(USER)
    except ConflictError:
        raise  # no other caller uses this id
    except KeylessError:
        assert len(sandbox.operations) <= 1
    else:
        assert list(sandbox.operations) == [ticket.operation_id]


# The end of a creation that is under way


@pytest.mark.parametrize("closing", [False, True], ids=["cancelled", "closed"])
@pytest.mark.parametrize(
    ("answers", "heads"),
    [([hang], 1), ([BUSY, hang], 2), ([BUSY, MISSING, hang], 3), ([LIMITED], 1), ([BUSY, BUSY], 2)],
    ids=["sending", "checking", "sending again", "pausing", "pausing before the next check"],
)
async def test_ended_creation_leaves_nothing(
    answers: list[Any], heads: int, closing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenacity.wait.random.uniform", lambda _low, high: high)
    async with RawServer(*answers) as server:
        before = asyncio.all_tasks()
        client = KeylessClient("key", base_url=server.url)
        call = asyncio.create_task(client.create_operation(USER))
        await server.asked(heads)
        await asyncio.sleep(0.1)
        started = now()
        if closing:
            await client.aclose()
            error = await failure(call)
            assert type(error) is ClientClosedError
            assert error.operation_id
        else:
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
        assert now() == started
        await spin_until(lambda: not server.connections)
        assert asyncio.all_tasks() <= before
        await asyncio.sleep(60)
        assert len(server.heads) == heads
        await client.aclose()


# The ticket


async def test_the_ticket_says_what_was_created(sandbox: Sandbox, client: KeylessClient) -> None:
    before = datetime.now(UTC)
    ticket = await client.create_operation(
        "c0ffee", operation_id="a", operation_payload="Pay 5 €", external_user_id="ann", expires_in=90.5
    )
    assert before <= ticket.created_at <= datetime.now(UTC)
    assert ticket == ApprovalTicket(
        operation_id="a",
        user_id=USER,
        external_user_id="ann",
        payload_sha256=hashlib.sha256("Pay 5 €".encode()).hexdigest(),
        created_at=ticket.created_at,
        expires_at=ticket.created_at + timedelta(seconds=90.5),
    )
    assert ticket.created_at.tzinfo is ticket.expires_at.tzinfo is UTC
    created = sandbox.operations["a"]
    assert (created.user_id, created.operation_payload, created.external_user_id) == (USER, "Pay 5 €", "ann")


async def test_id_is_a_fresh_uuid4_by_default(client: KeylessClient) -> None:
    ids = {(await client.create_operation(USER)).operation_id for _ in range(3)}
    assert len(ids) == 3
    assert all(uuid.UUID(made).version == 4 and str(uuid.UUID(made)) == made for made in ids)


async def test_id_is_the_same_in_every_attempt() -> None:
    talk = Talk(LIMITED, BUSY, MISSING, CREATED)
    await talk.create()
    bodies = [body for body in talk.server.bodies if body]
    assert len(bodies) == 3
    assert len(set(bodies)) == 1
