"""The client: arguments, the environment, opening and closing, and the five ways to wait."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import gc
import json
import math
import pickle
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Literal

import pytest
from leaks import armed_timers, tasks_since
from raw_server import now
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_fixed

from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    Approved,
    Authentications,
    ClientClosedError,
    ConfigurationError,
    InvalidIdentifierError,
    KeylessClient,
    NotApproved,
    NotFoundError,
    Operation,
    Region,
    Secret,
    wait_adaptive,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Iterator

    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.platform

USER = "0123456789ABCDEF"
KEY = "the-secret-key"


def yielding(_told: object) -> Iterator[None]:
    yield


async def yielding_async(_told: object) -> AsyncGenerator[None]:
    yield


class TestConstruction:
    def test_the_key_comes_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEYLESS_API_KEY", " from-the-environment\n")
        assert KeylessClient()._api_keys.current().secret == Secret("from-the-environment")

    @pytest.mark.parametrize("value", [None, ""])
    def test_no_key_is_an_error_that_says_what_to_do(self, monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
        if value is not None:
            monkeypatch.setenv("KEYLESS_API_KEY", value)
        with pytest.raises(ConfigurationError, match="KEYLESS_API_KEY"):
            KeylessClient()

    def test_the_region_is_europe_by_default(self) -> None:
        assert repr(KeylessClient(KEY)) == "<KeylessClient region='eu'>"

    def test_the_region_comes_from_the_argument_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEYLESS_REGION", "us")
        assert repr(KeylessClient(KEY)) == "<KeylessClient region='us'>"
        assert repr(KeylessClient(KEY, region=Region.SG)) == "<KeylessClient region='sg'>"

    def test_a_name_tells_clients_apart(self) -> None:
        client = KeylessClient(KEY, name="Acme \u00c4G")
        assert (client.name, repr(client)) == ("Acme \u00c4G", "<KeylessClient name='Acme \u00c4G' region='eu'>")
        assert KeylessClient(KEY, name="x" * 64).name == "x" * 64

    @pytest.mark.parametrize("name", ["", "x" * 65, "a\nb", "a\u202eb", 5])
    def test_a_name_that_a_log_could_not_show_is_refused(self, name: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"^name must be 1 to 64 printable characters, or None$"):
            KeylessClient(KEY, name=name)

    def test_an_empty_region_in_the_environment_counts_as_unset(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEYLESS_REGION", "")
        monkeypatch.setenv("KEYLESS_BASE_URL", "")
        assert repr(KeylessClient(KEY)) == "<KeylessClient region='eu'>"

    def test_in_the_environment_the_base_url_wins_over_the_region(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEYLESS_BASE_URL", "https://gw.example/keyless/")
        monkeypatch.setenv("KEYLESS_REGION", "us")
        assert repr(KeylessClient(KEY)) == "<KeylessClient base_url='https://gw.example/keyless'>"

    def test_an_argument_wins_over_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KEYLESS_BASE_URL", "https://left-over.example")
        monkeypatch.setenv("KEYLESS_REGION", "sg")
        assert repr(KeylessClient(KEY, region="us")) == "<KeylessClient region='us'>"
        other = KeylessClient(KEY, base_url="https://gw.example")
        assert repr(other) == "<KeylessClient base_url='https://gw.example'>"

    def test_region_and_base_url_exclude_each_other(self) -> None:
        with pytest.raises(ConfigurationError, match="region and base_url must not both be given"):
            KeylessClient(KEY, region="us", base_url="https://gw.example")

    @pytest.mark.parametrize(
        ("variable", "value", "arguments"),
        [
            ("KEYLESS_REGION", "mars", {"api_key": KEY, "base_url": "https://gw.example"}),
            ("KEYLESS_BASE_URL", "ftp://gw.example", {"api_key": KEY, "region": "us"}),
            ("KEYLESS_API_KEY", "k\u00e9y", {}),
        ],
    )
    def test_a_wrong_variable_is_named_even_if_it_is_not_used(
        self, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, arguments: dict[str, Any]
    ) -> None:
        monkeypatch.setenv(variable, value)
        argument = variable.removeprefix("KEYLESS_").lower()
        with pytest.raises(ConfigurationError, match=rf"^\${variable} is wrong: {argument} must be ") as raised:
            KeylessClient(**arguments)
        assert raised.value.argument == argument
        alone: dict[str, Any] = {"api_key": KEY, argument: value}
        with pytest.raises(ConfigurationError, match=f"^{argument} must be "):
            KeylessClient(**alone)

    @pytest.mark.parametrize("duplicate", [pickle.dumps, copy.copy, copy.deepcopy])
    def test_it_cannot_be_pickled_or_copied(self, duplicate: Callable[[KeylessClient], object]) -> None:
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            duplicate(KeylessClient(KEY))


class TestOpeningAndClosing:
    async def test_it_closes_with_async_with(self, sandbox: Sandbox) -> None:
        async with sandbox.client() as client:
            assert await client.get_pending_operations(USER) == []
        assert repr(client).endswith(" closed>")
        with pytest.raises(ClientClosedError):
            await client.get_pending_operations(USER)
        with pytest.raises(ClientClosedError):
            async with client:
                pass

    async def test_everything_raises_once_it_is_closed(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.aclose()
        for call in (
            client.create_operation(USER),
            client.get_operation("op"),
            client.get_authentications(user_id=USER),
            client.wait_for_approval("op"),
            client.request_approval(USER),
            anext(client.watch_approval("op")),
            anext(client.wait_for_approvals(["op"])),
        ):
            with pytest.raises(ClientClosedError):
                await call
        assert sandbox.requests == []

    def test_it_belongs_to_the_loop_of_its_first_use(self) -> None:
        client = KeylessClient(KEY, base_url="http://127.0.0.1:9")

        async def use() -> None:
            async with client:
                pass

        async def hold() -> None:
            await client.__aenter__()

        first = asyncio.new_event_loop()
        try:
            first.run_until_complete(hold())
            for coroutine in (
                *(client.get_operation("op"), client.create_operation(USER), client.wait_for_approval("op")),
                *(client.aclose(), use()),
            ):
                with pytest.raises(ConfigurationError, match="event loop"):
                    asyncio.run(coroutine)
            first.run_until_complete(client.aclose())
        finally:
            first.close()

    def test_it_is_refused_on_another_library_than_asyncio(self) -> None:
        with pytest.raises(ConfigurationError, match="runs on asyncio"):
            KeylessClient(KEY).get_operation("op").send(None)  # as trio runs a coroutine

    def test_one_that_outlives_the_modules_at_exit_prints_no_error(self) -> None:
        program = """
import asyncio, os
from aiokeyless import KeylessClient
os.client = KeylessClient("key", base_url="http://127.0.0.1:9")  # as in a function that Django caches
asyncio.run(os.client.__aenter__())
"""
        ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
        assert "TypeError" not in ended.stderr

    def test_one_that_was_never_made_prints_nothing_when_it_is_dropped(self) -> None:
        unraisable: list[object] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "unraisablehook", unraisable.append)
            with pytest.raises(TypeError, match="timout"):
                KeylessClient(KEY, timout=5)  # type: ignore[call-arg]  # that is the mistake
            gc.collect()
        assert not unraisable


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"timeout": 0}, "timeout"),
            ({"schedule": 2}, "schedule"),
            ({"if_missing": "ignore"}, "if_missing"),
            ({"target": 5}, "target"),
            ({"target": ""}, "operation_id"),
        ],
    )
    async def test_a_wrong_argument_of_a_wait_is_named_before_anything_is_sent(
        self, sandbox: Sandbox, client: KeylessClient, arguments: dict[str, Any], name: str
    ) -> None:
        target = arguments.pop("target", "op")
        with pytest.raises(ConfigurationError, match=name):
            await client.wait_for_approval(target, **arguments)
        with pytest.raises(ConfigurationError, match=name):
            client.watch_approval(target, **arguments)
        with pytest.raises(ConfigurationError, match=name):
            client.wait_for_approvals([target], **arguments)
        assert sandbox.requests == []

    async def test_a_create_that_was_not_awaited_is_no_target_and_says_so(self, client: KeylessClient) -> None:
        ticket: Any = client.create_operation("C0FFEE")
        with contextlib.closing(ticket), pytest.raises(ConfigurationError, match="not coroutine; await it first"):
            await client.wait_for_approval(ticket)

    async def test_a_stored_ticket_that_was_not_read_is_refused_wherever_an_id_or_a_target_is_taken(
        self, sandbox: Sandbox, client: KeylessClient
    ) -> None:
        stored = ApprovalTicket.for_operation("op", user_id=USER).to_json()
        read = r"ApprovalTicket\.from_json\(\.\.\.\)"
        targets: list[Any] = [stored, stored.encode(), json.loads(stored)]
        for target in targets:
            with pytest.raises(ConfigurationError, match=read):
                await client.wait_for_approval(target)
            with pytest.raises(ConfigurationError, match=read):
                await client.hold_for_approval(target, seconds=1)
            with pytest.raises(ConfigurationError, match=read):
                client.watch_approval(target)
            with pytest.raises(ConfigurationError, match=read):
                client.wait_for_approvals([target])
        for call in (
            client.get_operation(stored),
            client.create_operation(USER, operation_id=stored),
            client.request_approval(USER, operation_id=stored),
            client.get_authentications(user_id=USER, operation_id=stored),
        ):
            with pytest.raises(ConfigurationError, match=read):
                await call
        assert sandbox.requests == []

    @pytest.mark.parametrize(
        "targets",
        ["op", b"op", 7, None, ApprovalTicket.for_operation("op", user_id=USER)],
        ids=lambda targets: type(targets).__name__,  # a ticket's repr holds the time
    )
    async def test_a_single_target_is_not_many(self, client: KeylessClient, targets: Any) -> None:
        with pytest.raises(ConfigurationError, match=f"^targets must be several .* not {type(targets).__name__}$"):
            client.wait_for_approvals(targets)

    @pytest.mark.parametrize("wrong", ["", "..", "a\nb", "x" * 513, 7, None])
    async def test_a_wrong_one_among_many_targets_is_named_at_the_call(self, client: KeylessClient, wrong: Any) -> None:
        with pytest.raises(ConfigurationError, match=r"operation_id|target"):
            client.wait_for_approvals([*(f"op{number}" for number in range(200)), wrong])

    @pytest.mark.parametrize(
        ("arguments", "name"),
        [
            ({"user_id": "xyz"}, "user_id"),
            ({"operation_id": ""}, "operation_id"),
            ({"operation_payload": "\ud800"}, "operation_payload"),
            ({"external_user_id": 5}, "external_user_id"),
            ({"expires_in": math.inf}, "expires_in"),
            ({"expires_in": 1e12}, "expires_in"),
        ],
    )
    async def test_a_wrong_argument_of_a_create_is_named_before_anything_is_sent(
        self, sandbox: Sandbox, client: KeylessClient, arguments: dict[str, Any], name: str
    ) -> None:
        user_id = arguments.pop("user_id", USER)
        for method in (client.create_operation, client.request_approval):
            with pytest.raises(ConfigurationError, match=name):
                await method(user_id, **arguments)
        assert sandbox.requests == []

    async def test_a_schedule_is_checked_before_the_create(self, sandbox: Sandbox, client: KeylessClient) -> None:
        with pytest.raises(ConfigurationError, match="schedule"):
            await client.request_approval(USER, schedule=5)  # type: ignore[arg-type]  # that is the mistake
        assert sandbox.requests == []

    @pytest.mark.parametrize("argument", ["on_created", "on_poll"])
    @pytest.mark.parametrize(
        ("value", "words"),
        [
            (5, "must be callable or None, not int"),
            (yielding, "must not be a generator function"),
            (functools.partial(yielding_async), "must not be a generator function"),
        ],
    )
    async def test_what_is_called_back_must_run_when_it_is_called(
        self, sandbox: Sandbox, client: KeylessClient, argument: str, value: object, words: str
    ) -> None:
        wrong: dict[str, Any] = {argument: value}
        with pytest.raises(ConfigurationError, match=f"{argument} {words}"):
            await client.request_approval(USER, **wrong)
        with pytest.raises(ConfigurationError, match="on_poll"):
            await client.wait_for_approval("op", on_poll=5)  # type: ignore[arg-type]  # that is the mistake
        assert sandbox.requests == []

    @pytest.mark.parametrize("odd", ["a/b", "/", "a\\b"])
    async def test_an_id_that_a_proxy_would_change_is_read_but_not_created(
        self, sandbox: Sandbox, client: KeylessClient, odd: str
    ) -> None:
        for create in (client.create_operation, client.request_approval):
            with pytest.raises(InvalidIdentifierError, match=r"operation_id must not contain / or .*proxies decode"):
                await create(USER, operation_id=odd)
        assert sandbox.requests == []
        call = client.request_approval(
            USER,
            operation_id=odd,
            started_by="phone",
            on_created=lambda _: sandbox.approve(odd, user_id=USER),
            schedule=wait_fixed(0.05),
        )
        assert (await call).operation_id == (await client.get_operation(odd)).operation_id == odd

    async def test_single_calls_refuse_ids_that_cannot_be_sent(self, sandbox: Sandbox, client: KeylessClient) -> None:
        with pytest.raises(InvalidIdentifierError):
            await client.get_operation("")
        with pytest.raises(InvalidIdentifierError):
            await client.get_pending_operations("not hex")
        with pytest.raises(InvalidIdentifierError):
            await client.get_authentications(user_id="not hex")
        with pytest.raises(InvalidIdentifierError):
            await client.get_authentications(external_user_id="..")
        with pytest.raises(InvalidIdentifierError):
            await client.get_authentications(user_id=USER, operation_id="")
        assert sandbox.requests == []

    @pytest.mark.parametrize("users", [{}, {"user_id": USER, "external_user_id": "ann"}])
    async def test_attempts_are_asked_for_by_exactly_one_of_the_users_ids(
        self, sandbox: Sandbox, client: KeylessClient, users: dict[str, str]
    ) -> None:
        with pytest.raises(ConfigurationError, match="exactly one of user_id and external_user_id"):
            await client.get_authentications(**users)
        assert sandbox.requests == []


@pytest.mark.looptime
class TestTheWayThrough:
    async def test_create_wait_be_sure(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER, operation_payload="Pay 40", external_user_id="alice")
        assert [p.operation_id for p in await client.get_pending_operations(USER)] == [ticket.operation_id]
        asyncio.get_running_loop().call_later(8, sandbox.approve, ticket.operation_id)
        operation = await client.wait_for_approval(ticket)
        assert operation == await client.get_operation(ticket.operation_id)
        assert operation.is_approved
        assert operation.operation_payload == "Pay 40"
        assert await client.get_pending_operations(USER) == []

    async def test_a_ticket_is_resumed_in_another_process(self, sandbox: Sandbox, client: KeylessClient) -> None:
        text = (await client.create_operation(USER, operation_payload="Pay 40")).to_json()
        async with sandbox.client() as other:
            asyncio.get_running_loop().call_later(8, lambda: sandbox.approve(next(iter(sandbox.operations))))
            assert (await other.wait_for_approval(ApprovalTicket.from_json(text))).is_approved

    @pytest.mark.parametrize("is_async", [True, False], ids=["async", "plain"])
    async def test_the_phone_is_told_after_the_create_and_before_the_wait_in_the_callers_task(
        self, sandbox: Sandbox, client: KeylessClient, *, is_async: bool
    ) -> None:
        told: list[tuple[ApprovalTicket, object]] = []

        def tell(ticket: ApprovalTicket) -> None:
            assert [request.method for request in sandbox.requests] == ["POST"]
            told.append((ticket, asyncio.current_task()))
            sandbox.approve(ticket.operation_id)

        async def tell_later(ticket: ApprovalTicket) -> None:
            await asyncio.sleep(0)
            tell(ticket)

        operation = await client.request_approval(USER, on_created=tell_later if is_async else tell)
        [(ticket, task)] = told
        assert (ticket.operation_id, task) == (operation.operation_id, asyncio.current_task())

    @pytest.mark.parametrize("seconds", [0.0, 2.0, 29.0])
    async def test_a_phone_that_is_told_slowly_changes_neither_the_deadline_nor_when_the_wait_polls(
        self, sandbox: Sandbox, client: KeylessClient, seconds: float
    ) -> None:
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.request_approval(
                USER, expires_in=30, schedule=wait_fixed(7), on_created=lambda _: asyncio.sleep(seconds)
            )
        polls = [request.at - start for request in sandbox.requests if request.method == "GET"]
        first = seconds or 7.0  # at once, unless the operation is younger than a second
        assert polls == pytest.approx([*(first + 7 * number for number in range(5) if first + 7 * number < 30), 30])

    async def test_an_operation_that_expires_then_gets_a_poll(self, sandbox: Sandbox, client: KeylessClient) -> None:
        def tell(ticket: ApprovalTicket) -> object:
            sandbox.approve(ticket.operation_id)
            return asyncio.sleep(40)

        assert (await client.request_approval(USER, expires_in=30, on_created=tell)).is_approved
        assert [request.method for request in sandbox.requests] == ["POST", "GET"]

    @pytest.mark.parametrize("if_exists", ["raise", "resume"])
    async def test_the_phone_is_told_of_an_operation_that_was_found_as_well(
        self, sandbox: Sandbox, client: KeylessClient, if_exists: Literal["raise", "resume"]
    ) -> None:
        told: list[ApprovalTicket] = []
        if if_exists == "resume":
            await client.create_operation(USER, operation_id="op")
        else:
            sandbox.drop_next(stored=True)
        with pytest.raises(ApprovalTimeoutError):
            await client.request_approval(
                USER, operation_id="op", if_exists=if_exists, expires_in=5, on_created=told.append
            )
        assert [(ticket.operation_id, ticket.reconciled) for ticket in told] == [("op", True)]

    @pytest.mark.parametrize(
        ("raised", "error"), [(ZeroDivisionError, ZeroDivisionError), (StopIteration, RuntimeError)]
    )
    async def test_what_telling_the_phone_raises_is_raised_and_the_operation_stays(
        self, sandbox: Sandbox, client: KeylessClient, raised: type[Exception], error: type[Exception]
    ) -> None:
        def fail(_ticket: ApprovalTicket) -> None:
            raise raised

        with pytest.raises(error, match=r"^$|on_created raised StopIteration"):
            await client.request_approval(USER, operation_id="op", on_created=fail)
        assert "op" in sandbox.operations
        assert [request.method for request in sandbox.requests] == ["POST"]

    async def test_a_caller_who_is_cancelled_while_a_phone_is_told_leaves_nothing(self, client: KeylessClient) -> None:
        telling = asyncio.Event()

        async def hang(_ticket: ApprovalTicket) -> None:
            telling.set()
            await asyncio.sleep(1000)

        before = asyncio.all_tasks()
        caller = asyncio.create_task(client.request_approval(USER, on_created=hang))
        await telling.wait()
        caller.cancel()
        with pytest.raises(asyncio.CancelledError):
            await caller
        assert client.statistics.waiting == client.statistics.polls == 0
        assert tasks_since(before) == set()
        assert armed_timers() == []

    async def test_single_calls_are_neither_delayed_nor_counted(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        sandbox.fail_next(503, retry_after=100)
        wait = asyncio.create_task(client.wait_for_approval("op"))
        await asyncio.sleep(1)
        start = now()
        await client.get_operation("op")
        assert now() == start
        assert client.statistics.polls == 1
        wait.cancel()


@pytest.mark.looptime
class TestAttempts:
    async def test_they_are_found_by_either_id_and_by_operation(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for operation_id in ("a", "b"):
            await client.create_operation(USER, operation_id=operation_id, external_user_id="ann@example.com")
        cancelled = sandbox.fail_authentication("a", 30003)
        failed = sandbox.fail_authentication("b")
        for user in ({"user_id": USER.lower()}, {"external_user_id": "ann@example.com"}):
            answered = await client.get_authentications(**user)
            assert sorted(answered.attempts, key=repr) == sorted([cancelled, failed], key=repr)
            answered = await client.get_authentications(**user, operation_id="a")
            assert answered == Authentications(attempts=(cancelled,))
        assert not (await client.get_authentications(user_id=USER)).truncated

    async def test_more_than_a_page_says_so(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for _ in range(21):
            sandbox.fail_authentication("a", 30003, user_id=USER)
        answered = await client.get_authentications(user_id=USER)
        assert (len(answered.attempts), answered.truncated) == (20, True)


@pytest.mark.looptime
class TestWatchApproval:
    async def test_one_update_a_poll_the_last_one_approved(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(3, sandbox.approve, "op")
        updates = [update async for update in client.watch_approval("op", schedule=wait_fixed(2))]
        assert [update.polls for update in updates] == [1, 2, 3]
        approved = [update.operation is not None and update.operation.is_approved for update in updates]
        assert approved == [False, False, True]

    async def test_it_raises_what_the_wait_would(self, client: KeylessClient) -> None:
        with pytest.raises(NotFoundError):
            await anext(client.watch_approval("nobody-made-it"))

    async def test_a_break_frees_the_wait(self, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        async for _ in client.watch_approval("op"):
            assert client.statistics.waiting == 1
            break
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert client.statistics.waiting == 0

    async def test_polls_go_on_while_the_reader_is_slow(self, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        start = now()
        elapsed = []
        async with contextlib.aclosing(client.watch_approval("op", schedule=wait_fixed(2), timeout=5)) as updates:
            for _ in range(2):
                elapsed.append((await anext(updates)).elapsed)
                await asyncio.sleep(10)
            with pytest.raises(ApprovalTimeoutError):
                await anext(updates)
        assert elapsed == pytest.approx([0, 5])  # the newest, and not those in between
        assert now() - start == pytest.approx(20)

    async def test_cancelling_the_reader_frees_the_wait(self, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")

        async def read() -> None:
            async for _ in client.watch_approval("op"):
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert client.statistics.waiting == 0

    async def test_an_iterator_that_never_began_holds_nothing(self, client: KeylessClient) -> None:
        updates = client.watch_approval("op")
        await updates.aclose()
        assert client.statistics.waiting == 0

    async def test_it_can_be_read_by_one_task_and_closed_by_another(self, client: KeylessClient) -> None:
        """No cancel scope is held open across a yield: that would be an error here."""
        await client.create_operation(USER, operation_id="op")
        updates = client.watch_approval("op")
        await asyncio.create_task(anext(updates))
        await asyncio.create_task(updates.aclose())
        assert client.statistics.waiting == 0


@pytest.mark.looptime
class TestManyWaits:
    async def test_outcomes_come_in_the_order_of_the_waits_ends(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for number in range(3):
            await client.create_operation(USER, operation_id=f"op{number}")
        for number, at in ((0, 9), (1, 3), (2, 6)):
            asyncio.get_running_loop().call_later(at, sandbox.approve, f"op{number}")
        targets = (f"op{number}" for number in range(3))
        outcomes = [outcome async for outcome in client.wait_for_approvals(targets, schedule=wait_fixed(1))]
        assert [outcome.operation_id for outcome in outcomes] == ["op1", "op2", "op0"]
        assert all(outcome.operation is not None and outcome.error is None for outcome in outcomes)

    async def test_one_that_fails_does_not_end_the_others(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(3, sandbox.approve, "op")
        outcomes = [outcome async for outcome in client.wait_for_approvals(["op", "nobody-made-it"])]
        assert [outcome.operation_id for outcome in outcomes] == ["nobody-made-it", "op"]
        missing, approved = outcomes
        assert isinstance(missing, NotApproved)
        assert isinstance(missing.error, NotFoundError)
        assert missing.operation is None
        assert isinstance(approved, Approved)
        assert isinstance(approved.operation, Operation)
        assert approved.error is None

    async def test_a_target_given_twice_has_two_outcomes(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ticket = await client.create_operation(USER, operation_id="op")
        sandbox.approve("op")
        outcomes = [outcome async for outcome in client.wait_for_approvals([ticket, "op", "op"])]
        assert [outcome.operation_id for outcome in outcomes] == ["op"] * 3

    async def test_no_target_has_no_outcome(self, client: KeylessClient) -> None:
        assert [outcome async for outcome in client.wait_for_approvals([])] == []

    async def test_a_wait_that_cannot_begin_has_its_outcome_too(self, client: KeylessClient) -> None:
        class Broken(wait_adaptive):
            def __call__(self, retry_state: object) -> float:
                raise ZeroDivisionError

        ticket = await client.create_operation(USER)
        outcomes = [outcome async for outcome in client.wait_for_approvals([ticket], schedule=Broken())]
        assert isinstance(outcomes[0].error, ConfigurationError)

    async def test_an_outcome_that_is_no_error_of_this_library_is_raised(
        self, sandbox: Sandbox, client: KeylessClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(*_: object, **__: object) -> None:
            raise ZeroDivisionError

        await client.create_operation(USER, operation_id="op")
        monkeypatch.setattr("aiokeyless._waits.machine.poll_verdict", broken)
        async with asyncio.timeout(10):
            with pytest.raises(ZeroDivisionError):
                async for _ in client.wait_for_approvals(["op", "op"]):
                    pass
        assert client.statistics.waiting == 0

    async def test_a_break_frees_all_waits(self, sandbox: Sandbox, client: KeylessClient) -> None:
        for number in range(5):
            await client.create_operation(USER, operation_id=f"op{number}")
        sandbox.approve("op3")
        async for outcome in client.wait_for_approvals([f"op{number}" for number in range(5)]):
            assert outcome.operation_id == "op3"
            break
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert client.statistics.waiting == 0

    async def test_waits_that_end_as_it_closes_make_no_noise(self, sandbox: Sandbox, client: KeylessClient) -> None:
        failures: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: failures.append(context))
        await client.create_operation(USER, operation_id="op")
        sandbox.approve("op")
        outcomes = client.wait_for_approvals(["op", "op"])
        await anext(outcomes)
        await outcomes.aclose()
        await asyncio.sleep(1)
        assert failures == []

    async def test_closing_the_client_is_the_outcome_of_each(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        for number in range(3):
            await client.create_operation(USER, operation_id=f"op{number}")
        asyncio.get_running_loop().call_later(1, lambda: asyncio.ensure_future(client.aclose()))
        outcomes = [outcome async for outcome in client.wait_for_approvals([f"op{number}" for number in range(3)])]
        assert [type(outcome.error) for outcome in outcomes] == [ClientClosedError] * 3

    async def test_closing_while_many_begin_is_the_outcome_of_those_that_did_not(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_soon(lambda: asyncio.ensure_future(client.aclose()))
        outcomes = [outcome async for outcome in client.wait_for_approvals(["op"] * 1000)]
        assert len(outcomes) == 1000
        assert {type(outcome.error) for outcome in outcomes} == {ClientClosedError}

    @pytest.mark.slow
    @pytest.mark.looptime
    async def test_thousands_at_once(self, sandbox: Sandbox, client: KeylessClient) -> None:
        ids = [f"op{number}" for number in range(2_000)]
        for operation_id in ids:
            sandbox.approve(operation_id, user_id=USER)
        outcomes = [outcome async for outcome in client.wait_for_approvals(ids, timeout=None)]
        assert sorted(outcome.operation_id for outcome in outcomes) == sorted(ids)
        assert all(outcome.operation is not None for outcome in outcomes)
        assert client.statistics.polls == 2_000


@pytest.mark.looptime
async def test_wait_adaptive_works_in_a_plain_retry_loop(sandbox: Sandbox, client: KeylessClient) -> None:
    await client.create_operation(USER, operation_id="op")
    asyncio.get_running_loop().call_later(8, sandbox.approve, "op")
    retrying = AsyncRetrying(
        wait=wait_adaptive(), retry=retry_if_result(lambda op: not op.is_approved), stop=stop_after_attempt(60)
    )
    assert (await retrying(client.get_operation, "op")).is_approved


@pytest.mark.real_clock
class TestOnTheRealClock:
    """A small set that shows that nothing depends on a moved clock."""

    async def test_a_wait_returns_soon_after_the_approval(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(0.2, sandbox.approve, "op")
        start = now()
        assert (await client.wait_for_approval("op", schedule=wait_fixed(0.05))).is_approved
        assert 0.2 <= now() - start < 9

    async def test_a_hanging_server_does_not_hang_the_wait(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        sandbox.latency = 60
        start = now()
        with pytest.raises(ApprovalTimeoutError):
            await client.wait_for_approval("op", timeout=0.1)
        assert 2.1 <= now() - start < 9  # request_timeout is 10

    async def test_a_thousand_waits_share_their_polls(self, sandbox: Sandbox, client: KeylessClient) -> None:
        await client.create_operation(USER, operation_id="op")
        asyncio.get_running_loop().call_later(0.5, sandbox.approve, "op")
        await asyncio.gather(*(client.wait_for_approval("op", schedule=wait_fixed(0.2)) for _ in range(1000)))
        assert client.statistics.polls <= 8

    async def test_closing_is_prompt(self, sandbox: Sandbox) -> None:
        client = sandbox.client()
        await client.create_operation(USER, operation_id="op")
        sandbox.latency = 60
        waits = [asyncio.create_task(client.wait_for_approval("op")) for _ in range(3)]
        calls = [asyncio.create_task(client.get_operation("op")) for _ in range(3)]
        await asyncio.sleep(0.05)
        start = now()
        await client.aclose()
        outcomes = await asyncio.gather(*waits, *calls, return_exceptions=True)
        assert {type(outcome) for outcome in outcomes} == {ClientClosedError}
        assert now() - start < 9  # request_timeout is 10
