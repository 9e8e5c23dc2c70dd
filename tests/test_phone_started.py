"""Approvals whose operation the app starts: nothing is posted, and what the app sends must be what it was given."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_fixed

from aiokeyless import (
    AlreadyApprovedError,
    ApprovalTicket,
    ApprovalTimeoutError,
    ConfigurationError,
    ConflictError,
    ConflictStatusError,
    OperationMismatchError,
    ServerError,
)
from aiokeyless.events import Event, OperationCreated, WaitEnded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from aiokeyless import KeylessClient, Operation
    from aiokeyless.sandbox import Sandbox

USER = "0123456789ABCDEF"
OPERATION = "order-7"
CONTENT: dict[str, Any] = {"operation_payload": "Pay 40 to Alice", "external_user_id": "ann"}
pytestmark = pytest.mark.looptime


def request(client: KeylessClient, **arguments: Any) -> Awaitable[Operation]:
    return client.request_approval(USER, **{"operation_id": OPERATION, "started_by": "phone", **CONTENT, **arguments})


def sent(sandbox: Sandbox) -> list[str]:
    return [record.method for record in sandbox.requests]


@pytest.fixture
def authenticate(sandbox: Sandbox) -> Callable[[ApprovalTicket], None]:
    """An app that authenticates under the id that it gets, with what its backend gave it."""

    def authenticate(ticket: ApprovalTicket, **made_up: Any) -> None:
        sandbox.approve(ticket.operation_id, **{"user_id": USER, **CONTENT, **made_up})

    return authenticate


async def test_nothing_is_posted_and_a_404_means_not_yet(
    sandbox: Sandbox, client: KeylessClient, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    handed: list[ApprovalTicket] = []

    def hand_out(ticket: ApprovalTicket) -> None:
        handed.append(ticket)
        asyncio.get_running_loop().call_later(30, authenticate, ticket)

    operation = await request(client, on_created=hand_out)
    assert operation.is_approved
    assert [(ticket.operation_id, ticket.started_by, ticket.reconciled) for ticket in handed] == [
        (OPERATION, "phone", False)
    ]
    assert {*sent(sandbox)} == {"GET"}


async def test_an_id_of_this_call_is_not_read_before_it_is_handed_out(
    sandbox: Sandbox, client: KeylessClient, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    """Nobody else can have used it. So what is approved at the first poll is this request's."""
    operation = await request(client, operation_id=None, on_created=authenticate)
    assert operation.is_approved
    assert sent(sandbox) == ["GET"]


async def test_an_app_that_is_faster_than_the_wait_is_found_by_the_first_poll(
    sandbox: Sandbox, client: KeylessClient, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    async def hand_out(ticket: ApprovalTicket) -> None:
        authenticate(ticket)
        await asyncio.sleep(5)

    assert (await request(client, on_created=hand_out)).is_approved
    assert sent(sandbox) == ["GET", "GET"]  # before the id was handed out, and the poll


async def test_an_approval_from_before_the_hand_out_counts_for_nothing(sandbox: Sandbox, client: KeylessClient) -> None:
    """One tap must never pay twice, and the app need not be asked for an id that is used."""
    sandbox.approve(OPERATION, user_id=USER, **CONTENT)
    handed: list[ApprovalTicket] = []
    with pytest.raises(AlreadyApprovedError, match=f"^GET /v2/operations/{OPERATION} answered 409: ") as refused:
        await request(client, on_created=handed.append, require_auth_type="biom")
    ticket = refused.value.ticket
    assert (refused.value.operation_id, ticket.started_by, ticket.require_auth_type) == (OPERATION, "phone", "biom")
    assert not handed
    assert (await client.wait_for_approval(ticket)).is_approved


@pytest.mark.parametrize(
    "other", [{"user_id": "BAD"}, {"operation_payload": "Pay 1"}, {"external_user_id": "bob"}], ids=str
)
async def test_an_id_of_other_content_is_no_id(sandbox: Sandbox, client: KeylessClient, other: dict[str, str]) -> None:
    sandbox.approve(OPERATION, **{"user_id": USER, **CONTENT, **other})
    handed: list[ApprovalTicket] = []
    with pytest.raises(ConflictError, match="of another user, or with another payload or external user id") as refused:
        await request(client, on_created=handed.append)
    assert type(refused.value) is ConflictStatusError
    assert not handed


async def test_an_id_under_which_the_same_is_pending_is_handed_out(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id=OPERATION, **CONTENT)
    handed: list[ApprovalTicket] = []

    def hand_out(ticket: ApprovalTicket) -> None:
        handed.append(ticket)
        sandbox.approve(OPERATION)

    assert (await request(client, on_created=hand_out)).is_approved
    assert handed[0].reconciled


async def test_two_calls_at_once_under_one_id_both_return_its_one_approval(
    client: KeylessClient, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    """A limit, and why an application pays by its own record: no create refuses the second one."""
    ticket = ApprovalTicket.for_operation(OPERATION, user_id=USER)
    asyncio.get_running_loop().call_later(5, authenticate, ticket)
    assert [operation.is_approved for operation in await asyncio.gather(request(client), request(client))] == [True] * 2


async def test_an_answer_about_another_operation_hands_no_id_out(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id=OPERATION, **CONTENT)
    sandbox.tamper(OPERATION, operation_id="another")
    handed: list[ApprovalTicket] = []
    with pytest.raises(ConflictError):
        await request(client, on_created=handed.append)
    assert not handed


async def test_an_id_that_cannot_be_read_is_not_handed_out(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.fail_next(500, times=None)
    handed: list[ApprovalTicket] = []
    with pytest.raises(ServerError) as failed:
        await request(client, on_created=handed.append)
    assert failed.value.operation_id == OPERATION
    assert not handed


@pytest.mark.parametrize(
    "made_up",
    [{"user_id": "BAD"}, {"operation_payload": "Pay 1"}, {"external_user_id": "bob"}, {"auth_type": "pin"}],
    ids=str,
)
async def test_what_the_app_sends_must_be_what_it_was_given(
    client: KeylessClient, authenticate: Callable[..., None], made_up: dict[str, str]
) -> None:
    with pytest.raises(OperationMismatchError):
        await request(client, require_auth_type="biom", on_created=lambda ticket: authenticate(ticket, **made_up))


async def test_nobody_who_authenticates_is_a_timeout(client: KeylessClient) -> None:
    with pytest.raises(ApprovalTimeoutError, match="was still missing after 60") as ended:
        await request(client, expires_in=60)
    assert type(ended.value) is ApprovalTimeoutError


async def test_the_time_begins_when_the_id_can_be_handed_out(sandbox: Sandbox, client: KeylessClient) -> None:
    sandbox.latency = 5.0
    began = asyncio.get_running_loop().time()

    def hand_out(_ticket: ApprovalTicket) -> None:
        sandbox.latency = 0.0

    with pytest.raises(ApprovalTimeoutError):
        await request(client, expires_in=60, schedule=wait_fixed(10), on_created=hand_out)
    assert asyncio.get_running_loop().time() - began == pytest.approx(65, abs=0.5)


async def test_a_ticket_waits_for_the_phone_also_in_another_process_and_in_a_hold(
    sandbox: Sandbox, client: KeylessClient, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    ticket = ApprovalTicket.for_operation(OPERATION, user_id=USER, started_by="phone", **CONTENT)
    assert await client.hold_for_approval(ticket, seconds=10) is None
    asyncio.get_running_loop().call_later(8, authenticate, ticket)
    async with sandbox.client() as other:
        assert (await other.wait_for_approval(ApprovalTicket.from_json(ticket.to_json()))).is_approved


async def test_listeners_hear_of_the_wait_and_of_no_create(
    sandbox: Sandbox, authenticate: Callable[[ApprovalTicket], None]
) -> None:
    events: list[Event] = []
    async with sandbox.client(listeners=[events.append]) as client:
        await request(client, on_created=authenticate)
    kinds = {type(event) for event in events}
    assert WaitEnded in kinds
    assert OperationCreated not in kinds


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"if_exists": "resume"}, "if_exists must be 'raise' if the phone starts the operation"),
        ({"started_by": "web"}, "started_by must be 'backend' or 'phone', not 'web'"),
        ({"started_by": None}, "started_by must be 'backend' or 'phone', not None"),
        ({"if_exists": "wait"}, "if_exists must be 'raise' or 'resume'"),
        ({"operation_payload": 7}, "operation_payload"),
    ],
    ids=str,
)
async def test_a_wrong_argument_is_named_before_anything_is_sent(
    sandbox: Sandbox, client: KeylessClient, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigurationError, match=f"^{message}") as wrong:
        await request(client, **arguments)
    assert [wrong.value.argument] == list(arguments)
    assert not sandbox.requests


# -- the program of docs/howto/resuming.md


PAGE = (Path(__file__).parents[1] / "docs" / "howto" / "resuming.md").read_text()
PROGRAM = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[-1]


@pytest.fixture
def run(sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Awaitable[None]]:
    """The page's program, with an app that authenticates with what it makes up in place of what it is given."""
    monkeypatch.setenv("KEYLESS_BASE_URL", sandbox.url)
    monkeypatch.setenv("KEYLESS_API_KEY", sandbox.api_key)

    async def run(**made_up: Any) -> None:
        def hand_out(ticket: ApprovalTicket) -> None:
            content = {"user_id": USER, "operation_payload": "Pay 40 to Alice", **made_up}
            asyncio.get_running_loop().call_later(8, lambda: sandbox.approve(ticket.operation_id, **content))

        names: dict[str, Any] = {"__name__": "program"}
        exec(PROGRAM.rpartition("asyncio.run(")[0], names)  # noqa: S102  # our own page
        names["hand_out"] = hand_out
        await names["main"]()

    return run


async def test_the_face_of_the_user_on_this_payload_pays(
    run: Callable[..., Awaitable[None]], capsys: pytest.CaptureFixture[str]
) -> None:
    await run()
    assert capsys.readouterr().out == "approved: pay\n"


@pytest.mark.parametrize(
    "made_up",
    [
        {"auth_type": "pin"},
        {"user_id": "BAD"},
        {"user_id": "BAD", "external_user_id": "alice"},
        {"operation_payload": "Pay 1 to Alice"},
        {"operation_payload": None},
    ],
    ids=str,
)
async def test_what_an_app_makes_up_pays_nothing(
    sandbox: Sandbox,
    run: Callable[..., Awaitable[None]],
    capsys: pytest.CaptureFixture[str],
    made_up: dict[str, str | None],
) -> None:
    sandbox.enroll("BAD")  # an enrolment can carry the operation, too
    with pytest.raises(OperationMismatchError):
        await run(**made_up)
    assert not capsys.readouterr().out
