"""Requests whose operation the app starts: what goes wrong between the claim, the polls and the tap, in memory."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from waiting import until

from aiokeyless.events import Event, OperationCreated
from aiokeyless.worker import FailureReason, Outcome, submit_approval
from aiokeyless.worker.broker import Claim, UnavailableError
from aiokeyless.worker.sqlite import SqliteBroker

from .reading import read, working

if TYPE_CHECKING:
    from collections.abc import Callable

    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import ApprovalRequest
    from aiokeyless.worker.messages import Message

pytestmark = pytest.mark.looptime


async def submit(broker: SqliteBroker, **changed: Any) -> None:
    await submit_approval(broker, "C0FFEE", **{"operation_id": "txn-1", "started_by": "phone", **changed})


async def test_nobody_is_told_of_an_operation_whose_id_the_application_handed_out(sandbox: Sandbox) -> None:
    events: list[Event] = []
    told: list[ApprovalRequest] = []
    async with working(sandbox, listeners=[events.append], on_created=told.append) as (worker, broker):
        sandbox.fail_next(method="GET")  # so the next delivery would tell of an operation that it finds
        await submit(broker)
        await until(lambda: worker.statistics.transient_failures == 1)
        sandbox.approve("txn-1", user_id="C0FFEE")
        sandbox.tamper("txn-1", state="pending")
        await until(lambda: worker.statistics.polls >= 4)
        sandbox.tamper("txn-1")
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED
    assert not told
    assert not any(isinstance(each, OperationCreated) for each in events)
    assert worker.statistics.created == 0


@pytest.mark.parametrize("is_late", [False, True], ids=["in time", "expired before its first delivery"])
async def test_nobody_who_authenticates_is_an_expired_request_whose_user_was_asked(
    sandbox: Sandbox, memory: SqliteBroker, *, is_late: bool
) -> None:
    await submit(memory, expires_in=20)
    if is_late:
        await asyncio.sleep(60)
    async with working(sandbox, memory):
        [event] = await read(memory)
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, True, True)
    assert {record.method for record in sandbox.requests} == {"GET"}


async def test_while_keyless_is_away_the_user_was_asked_nevertheless(sandbox: Sandbox) -> None:
    async with working(sandbox, grace=5) as (_, broker):
        sandbox.fail_next(503, times=None)
        await submit(broker, expires_in=10)
        [event] = await read(broker)
    assert (event.outcome, event.answered, event.asked) == (Outcome.EXPIRED, False, True)


async def test_a_gateway_that_refuses_for_a_moment_ends_no_request(sandbox: Sandbox) -> None:
    async with working(sandbox) as (worker, broker):
        sandbox.fail_next(403, times=3)
        await submit(broker)
        await until(lambda: worker.statistics.polls >= 5)
        sandbox.approve("txn-1", user_id="C0FFEE")
        [event] = await read(broker)
    assert event.outcome is Outcome.APPROVED


def claims(monkeypatch: pytest.MonkeyPatch, *answers: Claim | None) -> Callable[[], int]:
    """Let the broker be away, or another request hold the id, at the first claims. Return how many were made."""
    claim, left, made = SqliteBroker.claim, [*answers], 0

    async def disturbed(broker: SqliteBroker, message: Message) -> Claim:
        nonlocal made
        made += 1
        if not left:
            return await claim(broker, message)
        if (answer := left.pop(0)) is None:
            raise UnavailableError("it is away")
        return answer

    monkeypatch.setattr(SqliteBroker, "claim", disturbed)
    return lambda: made


async def test_an_id_that_another_request_holds_is_a_conflict_before_anything_is_polled(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims(monkeypatch, Claim.ANOTHERS)
    async with working(sandbox) as (worker, broker):
        await submit(broker)
        [event] = await read(broker)
        assert worker.statistics.polls == 0
    assert (event.reason, event.detail) == (FailureReason.CONFLICT, "the operation id belongs to a different request")


@pytest.mark.parametrize("claim", [Claim.NEW, Claim.ANOTHERS])
async def test_an_approval_counts_only_with_the_claim_even_if_the_broker_was_away_at_the_first_one(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, claim: Claim
) -> None:
    made = claims(monkeypatch, None, claim)
    async with working(sandbox) as (worker, broker):
        await submit(broker)
        await asyncio.sleep(60)  # until the delivery comes again
        assert worker.statistics.polls >= 2
        assert made() == 1  # no poll needs one
        sandbox.approve("txn-1", user_id="C0FFEE")
        [event] = await read(broker)
    assert made() == 2
    assert event.reason == (None if claim is Claim.NEW else FailureReason.CONFLICT)
