"""`explain=True`: what a wait learns of the user's attempts, what that costs, and that it decides nothing."""

from __future__ import annotations

import asyncio
import logging
import string
from typing import TYPE_CHECKING, Any

import pytest
from leaks import armed_timers, tasks_since
from raw_server import now
from tenacity import wait_fixed
from waiting import spin_until

from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ApprovalUpdate,
    ClientClosedError,
    ConfigurationError,
    KeylessClient,
)
from aiokeyless._waits.explanation import _MOST_REQUESTS
from aiokeyless.sandbox import Sandbox
from aiokeyless.sandbox.api import Answer, error_answer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from aiohttp import web

pytestmark = pytest.mark.looptime

USER = "0123456789ABCDEF"
HANGS = 3600.0


class Service(Sandbox):
    """A sandbox whose Telemetry can have troubles of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.trouble: Callable[[], Awaitable[Answer]] | None = None
        self.asking = 0
        self.most_asking = 0

    async def _answer(self, request: web.Request) -> Answer | None:
        if self.trouble is None or not request.path.endswith("/authentications"):
            return await super()._answer(request)
        self.asking += 1
        self.most_asking = max(self.asking, self.most_asking)
        try:
            return await self.trouble()
        finally:
            self.asking -= 1

    def answers(self, status: int, body: bytes | None = None, retry_after: str | None = None) -> None:
        async def trouble() -> Answer:
            if body is not None:
                return Answer(status, body)
            return error_answer(status, "trouble", {"Retry-After": retry_after} if retry_after else None)

        self.trouble = trouble

    def hangs(self) -> None:
        async def trouble() -> Answer:
            await asyncio.sleep(HANGS)
            return error_answer(500, "too late")

        self.trouble = trouble

    def asked(self) -> list[float]:
        """Return when Telemetry was asked."""
        return [record.at for record in self.requests if "/authentications" in record.path]

    def polled(self) -> list[float]:
        """Return when an operation was polled."""
        return [record.at for record in self.requests if record.path.startswith("/v2/operations/")]


@pytest.fixture
async def service() -> AsyncGenerator[Service]:
    async with Service() as running:
        yield running


@pytest.fixture
async def client(service: Service) -> AsyncGenerator[KeylessClient]:
    async with service.client(schedule=wait_fixed(1)) as running:
        yield running


async def created(client: KeylessClient, operation_id: str = "op", **options: Any) -> ApprovalTicket:
    return await client.create_operation(USER, operation_id=operation_id, **options)


def later(seconds: float, action: Callable[..., object], *arguments: object) -> None:
    asyncio.get_running_loop().call_later(seconds, action, *arguments)


async def timed_out(client: KeylessClient, target: ApprovalTicket | str, **options: Any) -> ApprovalTimeoutError:
    with pytest.raises(ApprovalTimeoutError) as caught:
        await client.wait_for_approval(target, explain=True, **options)
    return caught.value


class TestWhatIsLearned:
    async def test_a_cancelled_attempt_is_soon_in_the_updates(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client)
        started = now()
        later(12, service.fail_authentication, "op", 30003)
        async for update in client.watch_approval(ticket, explain=True):
            if update.attempts:
                break
        assert [(attempt.reason, attempt.error_code) for attempt in update.attempts] == [
            ("the user left the scan", 30003)
        ]
        assert update.elapsed == pytest.approx(17, abs=1)  # asked after 5 s and after 15 s, told with the next poll
        assert service.asked() == pytest.approx([started + 5, started + 15], abs=0.1)

    async def test_the_error_at_the_deadline_has_and_says_them(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=20)
        later(19, service.fail_authentication, "op")
        error = await timed_out(client, ticket)
        assert [attempt.error_code for attempt in error.attempts] == [30004]
        assert str(error).endswith("; 1 attempt failed: the face did not match (30004)")
        assert "a timeout is not a denial" in str(error)

    async def test_the_approved_update_has_the_earlier_attempts(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client)
        later(3, service.fail_authentication, "op")
        later(10.5, service.approve, "op")
        updates: list[ApprovalUpdate] = []
        assert (await client.wait_for_approval(ticket, explain=True, on_poll=updates.append)).is_approved
        assert updates[-1].operation is not None
        assert updates[-1].operation.is_approved
        assert [attempt.error_code for attempt in updates[-1].attempts] == [30004]

    async def test_request_approval_learns_them_too(self, service: Service, client: KeylessClient) -> None:
        later(3, service.fail_authentication, "op")
        later(10.5, service.approve, "op")
        updates: list[ApprovalUpdate] = []
        await client.request_approval(USER, operation_id="op", explain=True, on_poll=updates.append)
        assert len(updates[-1].attempts) == 1

    @pytest.mark.parametrize("fails_until", [0.0, 7.999], ids=["first", "final"])
    async def test_a_bare_id_is_explained_by_its_answers_user(
        self, service: Service, client: KeylessClient, fails_until: float
    ) -> None:
        await created(client)
        service.fail_next(503, times=None)
        later(fails_until, service.recover)
        later(3, service.fail_authentication, "op")
        assert len((await timed_out(client, "op", timeout=8)).attempts) == 1

    async def test_attempts_at_an_operation_that_the_phone_will_create_are_learned_by_its_ticket(
        self, service: Service, client: KeylessClient
    ) -> None:
        ticket = ApprovalTicket.for_operation("op", user_id=USER, expires_in=20)
        later(3, lambda: service.fail_authentication("op", user_id=USER))
        error = await timed_out(client, ticket, if_missing="wait")
        assert len(error.attempts) == 1
        assert len(service.asked()) == 2

    async def test_an_id_that_was_never_seen_is_not_explained(self, service: Service, client: KeylessClient) -> None:
        error = await timed_out(client, "op", timeout=20, if_missing="wait")
        assert error.attempts == ()
        assert service.asked() == []


class TestWhatItDecides:
    async def test_an_approved_attempt_approves_nothing(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=20)
        lie = b'{"content": [{"authentications": [{"result": "APPROVED", "errorCode": 0, "operationId": "op"}]}]}'
        service.answers(200, lie)
        error = await timed_out(client, ticket)
        assert [attempt.result for attempt in error.attempts] == ["APPROVED"]
        assert "attempt" not in str(error)

    async def test_what_on_poll_raises_for_one_ends_the_wait(self, service: Service, client: KeylessClient) -> None:
        class DeclinedError(Exception):
            pass

        def decide(update: ApprovalUpdate) -> None:
            if any(attempt.error_code == 30003 for attempt in update.attempts):
                raise DeclinedError

        ticket = await created(client)
        later(2, service.fail_authentication, "op", 30003)
        before = asyncio.all_tasks()
        with pytest.raises(DeclinedError):
            await client.wait_for_approval(ticket, explain=True, on_poll=decide)
        await asyncio.sleep(0.1)
        assert tasks_since(before) == set()
        assert armed_timers() == []


class TestWhatItCosts:
    async def test_it_is_asked_every_ten_seconds_and_at_the_end(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=60)
        started = now()
        await timed_out(client, ticket)
        explained = [at - started for at in service.polled()]
        assert [at - started for at in service.asked()] == pytest.approx([5, 15, 25, 35, 45, 60], abs=0.1)
        service.requests.clear()
        ticket = await created(client, "other", expires_in=60)
        started = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval(ticket)
        assert [at - started for at in service.polled()] == pytest.approx(explained, abs=0.1)
        assert service.asked() == []

    async def test_waits_for_one_operation_share_what_is_asked(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=60)
        later(3, service.fail_authentication, "op")
        errors = await asyncio.gather(*(timed_out(client, ticket) for _ in range(20)))
        assert {len(error.attempts) for error in errors} == {1}
        assert len(service.asked()) == 6

    async def test_a_wait_shorter_than_an_interval_asks_once(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client)
        later(4, service.fail_authentication, "op")
        errors = [await timed_out(client, ticket, timeout=8) for _ in range(3)]
        assert [attempt.error_code for attempt in errors[-1].attempts] == [30004]
        assert len(service.asked()) == 3

    async def test_a_hold_asks_only_if_the_ticket_ends_in_it(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=30)
        service.fail_authentication("op")
        for _ in range(2):
            assert await client.hold_for_approval(ticket, seconds=14, explain=True) is None
        assert service.asked() == []
        with pytest.raises(ApprovalTimeoutError, match=r"1 attempt failed: the face did not match \(30004\)") as caught:
            await client.hold_for_approval(ticket, seconds=14, explain=True)
        assert len(caught.value.attempts) == 1
        assert len(service.asked()) == 1

    async def test_a_hold_that_is_approved_costs_no_request(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client)
        later(8, service.approve, "op")
        assert await client.hold_for_approval(ticket, seconds=25, explain=True) is not None
        assert service.asked() == []

    async def test_few_requests_are_under_way_at_once_and_each_wait_gets_its_turn(
        self, service: Service, client: KeylessClient
    ) -> None:
        async def slow() -> Answer:
            await asyncio.sleep(0.01)
            return Answer(200, b'{"content": []}')

        service.trouble = slow
        tickets = [await created(client, f"op-{number}", expires_in=16) for number in range(40)]
        await asyncio.gather(*(timed_out(client, ticket) for ticket in tickets))
        assert service.most_asking == 8
        assert len({record.path for record in service.requests if "/authentications" in record.path}) == 40

    async def test_an_operation_is_forgotten_with_its_last_wait(self, client: KeylessClient) -> None:
        await timed_out(client, await created(client), timeout=0.5)
        assert client._open().poller.explainer._subjects == {}


class TestTrouble:
    async def test_telemetry_that_hangs_delays_ends_by_a_second(self, service: Service, client: KeylessClient) -> None:
        service.hangs()
        ticket = await created(client, expires_in=40)
        started = now()
        before = asyncio.all_tasks()
        error = await timed_out(client, ticket)
        assert now() - started == pytest.approx(41, abs=0.2)
        assert error.attempts == ()
        assert [at - started for at in service.polled()] == pytest.approx(list(range(1, 41)), abs=0.2)
        await asyncio.sleep(0.1)
        assert tasks_since(before) == set()
        assert armed_timers() == []

    async def test_telemetry_that_hangs_is_not_asked_again_meanwhile(self, service: Service) -> None:
        service.hangs()
        async with service.client(schedule=wait_fixed(1), request_timeout=60) as client:
            await timed_out(client, await created(client, expires_in=30))
        assert len(service.asked()) == 1

    async def test_a_late_end_is_not_put_off_past_two_seconds(self, service: Service, client: KeylessClient) -> None:
        service.hangs()
        ticket = await created(client, expires_in=20)
        started = now()
        later(19.5, lambda: setattr(service, "latency", 1.5))
        error = await timed_out(client, ticket)
        assert not isinstance(error, ApprovalUnknownError)
        assert now() - started == pytest.approx(22, abs=0.1)

    async def test_an_unknown_outcome_takes_no_other_request(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client, expires_in=20)
        later(2, service.fail_authentication, "op")
        later(10, lambda: service.fail_next(503, times=None))
        error = await timed_out(client, ticket)
        assert isinstance(error, ApprovalUnknownError)
        assert len(service.asked()) == 1
        assert len(error.attempts) == 1

    @pytest.mark.parametrize(("status", "body"), [(500, None), (200, b"<html>")])
    async def test_a_failure_is_logged_and_ignored_and_asked_again_later(
        self, service: Service, client: KeylessClient, caplog: pytest.LogCaptureFixture, status: int, body: bytes | None
    ) -> None:
        caplog.set_level(logging.DEBUG, "aiokeyless")
        service.answers(status, body)
        ticket = await created(client)
        later(38, service.approve, "op")
        assert (await client.wait_for_approval(ticket, explain=True)).is_approved
        assert len(service.asked()) == 4
        logged = [
            record
            for record in caplog.records
            if "the attempts at operation 'op' are not known: GET /v2/users/" in record.message
        ]
        assert [record.levelname for record in logged] == ["DEBUG"] * 4
        assert client.statistics.transient_failures == 0
        assert not client.statistics.is_failing

    async def test_telemetry_that_is_forbidden_rests_two_minutes(
        self, service: Service, client: KeylessClient, caplog: pytest.LogCaptureFixture
    ) -> None:
        service.answers(403)
        names = string.ascii_letters
        tickets = [await created(client, name) for name in names]
        for name in names:
            later(119, service.approve, name)
        await asyncio.gather(*(client.wait_for_approval(ticket, explain=True) for ticket in tickets))
        assert len(service.asked()) == _MOST_REQUESTS  # all at the same time; none again
        assert [record.levelname for record in caplog.records if "are not known" in record.message] == ["WARNING"]

    async def test_telemetry_that_refuses_a_key_that_was_replaced_meanwhile_is_asked_again_with_the_new_one(
        self, service: Service
    ) -> None:
        keys = [service.api_key]

        async def rotate() -> Answer:
            keys[0] = service._api._key = "the next key"
            service.trouble = None
            return error_answer(401, "the key was revoked")

        service.trouble = rotate
        async with KeylessClient(lambda: keys[0], base_url=service.url, schedule=wait_fixed(1)) as client:
            ticket = await created(client)
            later(16, service.fail_authentication, "op")
            error = await timed_out(client, ticket, timeout=30)
        assert len(service.asked()) == 3
        assert len(error.attempts) == 1

    async def test_retry_after_holds_questions_about_all_others(self, service: Service, client: KeylessClient) -> None:
        ticket = await created(client)
        service.answers(429, retry_after="33")
        later(60.5, service.approve, "op")
        started = now()
        await client.wait_for_approval(ticket, explain=True)
        assert [at - started for at in service.asked()] == pytest.approx([5, 38], abs=1.1)

    async def test_a_user_id_that_cannot_be_sent_is_ignored(self, service: Service, client: KeylessClient) -> None:
        await created(client)
        service.tamper("op", user_id="../x")
        error = await timed_out(client, "op", timeout=20)
        assert error.attempts == ()
        assert service.asked() == []

    @pytest.mark.parametrize("moment", [4.5, 5.5, 19.5, 20.5])
    async def test_cancelling_returns_at_once_and_leaves_nothing(
        self, service: Service, client: KeylessClient, moment: float
    ) -> None:
        service.hangs()
        ticket = await created(client, expires_in=20)
        before = asyncio.all_tasks()
        waiting = asyncio.create_task(client.wait_for_approval(ticket, explain=True))
        await asyncio.sleep(moment)
        cancelled_at = now()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert now() == cancelled_at
        await asyncio.sleep(0.1)
        assert tasks_since(before) == set()
        assert armed_timers() == []
        await spin_until(lambda: service.asking == 0)

    async def test_a_request_goes_on_for_the_wait_that_stays(self, service: Service, client: KeylessClient) -> None:
        async def slow() -> Answer:
            await asyncio.sleep(3)
            return Answer(200, b'{"content": [{"authentications": [{"errorCode": 30003, "operationId": "op"}]}]}')

        service.trouble = slow
        ticket = await created(client, expires_in=40)
        leaving = asyncio.create_task(client.wait_for_approval(ticket, explain=True))
        staying = asyncio.create_task(timed_out(client, ticket))
        await asyncio.sleep(6)
        leaving.cancel()
        assert len((await staying).attempts) == 1

    async def test_closing_the_client_ends_what_is_asked(self, service: Service) -> None:
        before = asyncio.all_tasks()
        service.hangs()
        client = service.client(schedule=wait_fixed(1))
        ticket = await created(client)
        waiting = asyncio.create_task(client.wait_for_approval(ticket, explain=True))
        await asyncio.sleep(6)
        await client.aclose()
        with pytest.raises(ClientClosedError):
            await waiting
        await asyncio.sleep(0.1)
        assert tasks_since(before) == set()
        await spin_until(lambda: service.asking == 0)

    @pytest.mark.parametrize("explain", [None, 1, "yes"])
    async def test_a_wrong_argument_sends_nothing(self, service: Service, client: KeylessClient, explain: Any) -> None:
        with pytest.raises(ConfigurationError, match="explain must be True or False"):
            await client.wait_for_approval("op", explain=explain)
        with pytest.raises(ConfigurationError, match="explain must be True or False"):
            await client.hold_for_approval("op", seconds=5, explain=explain)
        with pytest.raises(ConfigurationError, match="explain must be True or False"):
            await client.request_approval(USER, explain=explain)
        with pytest.raises(ConfigurationError, match="explain must be True or False"):
            client.watch_approval("op", explain=explain)
        assert service.requests == []
