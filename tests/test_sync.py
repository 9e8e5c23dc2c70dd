"""The client without an event loop: threads, fork, Ctrl-C, and the end of a process."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import inspect
import os
import pickle
import selectors
import signal
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing
from contextvars import ContextVar
from queue import Empty
from typing import TYPE_CHECKING, Any, get_args, get_origin, get_type_hints

import pytest
from freezegun import freeze_time
from nats.aio.client import Client
from tenacity.wait import wait_fixed
from waiting import PATIENCE, until

import aiokeyless
from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    Approved,
    ClientClosedError,
    ConfigurationError,
    NotApproved,
    sync,
    worker,
)
from aiokeyless.sync import KeylessClient, OnCreated, OnPoll, get_background, submit_approval
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from aiokeyless import ApprovalUpdate, Operation
    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker import Broker

FAST = wait_fixed(0.05)


@pytest.fixture
async def keyless(sandbox: Sandbox) -> AsyncGenerator[KeylessClient]:
    """A client for the sandbox, which runs in the loop of the test: each call is made in another thread."""
    client = KeylessClient(sandbox.api_key, base_url=sandbox.url, schedule=FAST)
    yield client
    await asyncio.to_thread(client.close)


def ends_its_waits(client: KeylessClient) -> bool:
    """Whether no wait goes on; a cancellation takes some turns of the loop."""
    deadline = time.monotonic() + PATIENCE
    while client.statistics.waiting and time.monotonic() < deadline:
        pass
    return client.statistics.waiting == 0


# -- the same face


def public(face: type) -> dict[str, Any]:
    return {name: member for name, member in vars(face).items() if not name.startswith("_")}


def test_it_has_the_public_names_of_the_other_face() -> None:
    names = public(aiokeyless.KeylessClient).keys() - {"aclose"} | {"close"}
    assert public(KeylessClient).keys() == names


def both(name: str) -> tuple[Any, Any]:
    """Return a method, or what computes a property, of this face and of the other one."""
    found = getattr(KeylessClient, name), getattr(aiokeyless.KeylessClient, name)
    return tuple(member.fget if isinstance(member, property) else member for member in found)  # type: ignore[return-value]


NAMES = sorted(public(KeylessClient).keys() - {"close"})


@pytest.mark.parametrize("name", NAMES)
def test_a_method_is_one_of_this_face_and_documented_for_it(name: str) -> None:
    ours, _ = both(name)
    assert ours.__module__ == "aiokeyless.sync"
    assert not inspect.iscoroutinefunction(inspect.unwrap(ours))
    assert_documented(ours)


def assert_documented(ours: object) -> None:
    documentation = str(inspect.getdoc(ours))
    assert not any(word in documentation for word in ("await", "aclose", "may be async", "in this task"))
    assert not inspect.signature(ours).parameters.keys() - {"self"} or "Args:" in documentation  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["__init__", *NAMES])
def test_a_method_has_the_arguments_and_the_result_of_the_other_face(name: str) -> None:
    ours, theirs = both(name)
    shown, expected = inspect.signature(ours).parameters, inspect.signature(theirs).parameters
    assert [*shown] == [argument for argument in expected if argument != "session"]
    for argument, parameter in shown.items():
        assert (parameter.kind, parameter.default) == (expected[argument].kind, expected[argument].default)
    hints, expected_hints = get_type_hints(ours), get_type_hints(theirs)
    result, expected_result = hints.pop("return"), expected_hints.pop("return")
    assert hints.pop("on_created", None) in {None, OnCreated | None}
    assert hints.pop("on_poll", None) in {None, OnPoll | None}
    assert hints.items() <= expected_hints.items()
    if get_origin(expected_result) is AsyncGenerator:
        result, expected_result = get_args(result), (get_args(expected_result)[0], None, None)
    assert result == expected_result


# -- calls


async def test_operations_are_created_and_read(keyless: KeylessClient) -> None:
    def program() -> list[str]:
        with keyless as client:
            ticket = client.create_operation("C0FFEE", operation_id="op-1", operation_payload="Pay 40 to Alice")
            assert client.get_operation("op-1").operation_payload == "Pay 40 to Alice"
            assert client.get_authentications(user_id="C0FFEE").attempts == ()
            return [ticket.operation_id, *(found.operation_id for found in client.get_pending_operations("C0FFEE"))]

    assert await asyncio.to_thread(program) == ["op-1", "op-1"]


def test_its_settings_are_those_of_the_client_in_the_loop() -> None:
    def listener(_event: Event) -> None:
        pass

    client = KeylessClient("key", base_url="https://keyless.example", request_timeout=3, listeners=[listener])
    assert (client.base_url, client.request_timeout) == ("https://keyless.example", 3)
    assert client.listeners[0] is listener


async def test_a_call_runs_in_the_callers_context(sandbox: Sandbox) -> None:
    traced: ContextVar[str] = ContextVar("traced", default="nothing")
    seen: list[str] = []

    def program() -> None:
        traced.set("this request")
        with KeylessClient(
            sandbox.api_key, base_url=sandbox.url, listeners=[lambda _event: seen.append(traced.get())]
        ) as client:
            client.get_pending_operations("C0FFEE")

    await asyncio.to_thread(program)
    assert seen == ["this request"]


# -- waits


async def test_on_poll_runs_in_the_waiting_thread_and_holds_no_other(sandbox: Sandbox, keyless: KeylessClient) -> None:
    threads: list[threading.Thread] = []
    other_is_approved = threading.Event()
    handling = threading.Event()

    def slow(_update: ApprovalUpdate) -> None:
        threads.append(threading.current_thread())
        handling.set()
        assert other_is_approved.wait(PATIENCE)

    def first() -> Operation:
        operation = keyless.request_approval("C0FFEE", operation_id="op-1", on_poll=slow)
        assert set(threads) == {threading.current_thread()}
        return operation

    waiting = asyncio.create_task(asyncio.to_thread(first))
    await until(handling.is_set)
    other = asyncio.create_task(asyncio.to_thread(keyless.request_approval, "BEEF", operation_id="op-2"))
    await until(lambda: "op-2" in sandbox.operations)
    sandbox.approve("op-2")
    assert (await other).is_approved
    other_is_approved.set()
    sandbox.approve("op-1")
    assert (await waiting).is_approved


@pytest.mark.parametrize("error", [ValueError, StopIteration, Empty, KeyboardInterrupt, asyncio.CancelledError])
async def test_what_on_poll_raises_ends_the_wait_with_it(keyless: KeylessClient, error: type[BaseException]) -> None:
    def fail(_update: ApprovalUpdate) -> None:
        raise error("on_poll")

    def program() -> None:
        ticket = keyless.create_operation("C0FFEE")
        with pytest.raises(error, match="on_poll"):
            keyless.wait_for_approval(ticket, on_poll=fail)
        assert ends_its_waits(keyless)

    await asyncio.to_thread(program)


async def test_an_on_poll_slower_than_polls_gets_the_newest_update(sandbox: Sandbox, keyless: KeylessClient) -> None:
    polls: list[int] = []

    def slow(update: ApprovalUpdate) -> None:
        polls.append(update.polls)
        if update.polls == 1:
            while keyless.statistics.polls < 4:
                pass
        else:
            sandbox.approve("op-1")

    def program() -> None:
        keyless.request_approval("C0FFEE", operation_id="op-1", on_poll=slow)
        first, second, *_ = polls
        assert (first, second >= 3) == (1, True)

    await asyncio.to_thread(program)


async def test_a_function_may_call_the_client_and_wait_itself(sandbox: Sandbox, keyless: KeylessClient) -> None:
    def tell(ticket: ApprovalTicket) -> None:
        assert keyless.get_operation(ticket.operation_id).state == "pending"

    def ask_again(update: ApprovalUpdate) -> None:
        if update.polls == 1:
            inner = keyless.request_approval("BEEF", on_created=approve, on_poll=lambda _update: keyless.statistics)
            assert inner.is_approved
            sandbox.approve("op-1")

    def approve(ticket: ApprovalTicket) -> None:
        sandbox.approve(ticket.operation_id)

    def program() -> None:
        outer = keyless.request_approval("C0FFEE", operation_id="op-1", on_created=tell, on_poll=ask_again)
        assert outer.is_approved

    await asyncio.to_thread(program)


@pytest.mark.parametrize("argument", ["on_created", "on_poll"])
async def test_a_function_that_closes_the_client_ends_its_wait(keyless: KeylessClient, argument: str) -> None:
    functions: dict[str, Any] = {argument: lambda _told: keyless.close()}
    with pytest.raises(ClientClosedError):
        await asyncio.to_thread(keyless.request_approval, "C0FFEE", **functions)


async def test_the_phone_is_told_in_the_asking_thread_before_it_waits(sandbox: Sandbox, keyless: KeylessClient) -> None:
    def program() -> None:
        threads: list[threading.Thread] = []

        def tell(ticket: ApprovalTicket) -> None:
            threads.append(threading.current_thread())
            sandbox.approve(ticket.operation_id)

        assert keyless.request_approval("C0FFEE", on_created=tell).is_approved
        assert threads == [threading.current_thread()]
        with pytest.raises(ZeroDivisionError):
            keyless.request_approval("C0FFEE", operation_id="op-1", on_created=lambda _ticket: 1 // 0)
        assert keyless.get_operation("op-1").state == "pending"

    await asyncio.to_thread(program)


class AsyncObject:
    async def __call__(self, _told: object) -> None: ...


@pytest.mark.parametrize("argument", ["on_created", "on_poll"])
@pytest.mark.parametrize("wrong", [5, asyncio.sleep, AsyncObject()], ids=["no function", "async function", "object"])
async def test_a_wrong_function_creates_nothing(
    sandbox: Sandbox, keyless: KeylessClient, argument: str, wrong: Any
) -> None:
    wrongs: dict[str, Any] = {argument: wrong}
    with pytest.raises(ConfigurationError, match=argument) as raised:
        await asyncio.to_thread(keyless.request_approval, "C0FFEE", **wrongs)
    assert raised.value.argument == argument
    assert not sandbox.operations


async def test_watching_yields_an_update_for_each_poll(sandbox: Sandbox, keyless: KeylessClient) -> None:
    def program() -> list[str]:
        ticket = keyless.create_operation("C0FFEE", operation_id="op-1")
        states = []
        for update in keyless.watch_approval(ticket):
            assert update.operation is not None
            states.append(update.operation.state)
            sandbox.approve("op-1")
        return states

    *earlier, last = await asyncio.to_thread(program)
    assert ({*earlier}, last) == ({"pending"}, "approved")  # on a busy machine a poll may come before the approval


async def test_an_iteration_that_is_left_early_ends_its_wait(keyless: KeylessClient) -> None:
    def program() -> None:
        ticket = keyless.create_operation("C0FFEE")
        for _ in keyless.watch_approval(ticket):
            assert keyless.statistics.waiting == 1
            break
        assert ends_its_waits(keyless)

    await asyncio.to_thread(program)


async def test_an_iterator_that_is_collected_in_the_loops_thread_ends_its_wait(keyless: KeylessClient) -> None:
    collected = threading.Event()

    def listener(_event: Event) -> None:  # runs in the loop's thread
        gc.collect()
        collected.set()

    def program() -> None:
        client = KeylessClient("sandbox-key", base_url=keyless.base_url, schedule=FAST, listeners=[listener])
        ticket = keyless.create_operation("C0FFEE")
        cycle: list[object] = [keyless.watch_approval(ticket)]
        next(cycle[0])  # type: ignore[call-overload]
        cycle.append(cycle)
        gc.disable()
        try:
            del cycle
            with client:
                client.get_operation(ticket.operation_id)
        finally:
            gc.enable()
        assert collected.is_set()
        assert ends_its_waits(keyless)

    await asyncio.to_thread(program)


async def test_many_waits_yield_an_outcome_each(sandbox: Sandbox, keyless: KeylessClient) -> None:
    def program() -> list[type]:
        ticket = keyless.create_operation("C0FFEE", operation_id="op-1")
        sandbox.approve("op-1")
        return [type(outcome) for outcome in keyless.wait_for_approvals([ticket, "none"])]

    assert set(await asyncio.to_thread(program)) == {Approved, NotApproved}


async def test_twenty_threads_share_a_client_and_its_loop(sandbox: Sandbox, keyless: KeylessClient) -> None:
    def request(number: int) -> bool:
        return keyless.request_approval("C0FFEE", operation_id=f"op-{number}").is_approved

    with ThreadPoolExecutor(20) as pool:
        loop = asyncio.get_running_loop()
        waits = [loop.run_in_executor(pool, request, number) for number in range(20)]
        await until(lambda: len(sandbox.operations) == 20)
        assert [thread.name for thread in threading.enumerate()].count("aiokeyless") == 1
        for operation_id in list(sandbox.operations):
            sandbox.approve(operation_id)
        assert await asyncio.gather(*waits) == [True] * 20


def test_a_wait_ends_though_freezegun_stops_all_clocks_that_it_finds(keyless_client: KeylessClient) -> None:
    def program() -> None:
        ticket = keyless_client.create_operation("C0FFEE", expires_in=0.1)
        with pytest.raises(ApprovalTimeoutError):
            keyless_client.wait_for_approval(ticket)

    with ThreadPoolExecutor(1) as pool, freeze_time("2026-12-01"):
        pool.submit(program).result(PATIENCE)


# -- interruptions, at the moments at which a signal seldom comes


async def test_a_call_that_is_interrupted_while_it_is_handed_to_the_loop_is_cancelled(
    keyless: KeylessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def program() -> None:
        ticket = keyless.create_operation("C0FFEE")
        loop = sync._process.background()._loop
        hand_over = loop.call_soon_threadsafe

        def interrupted(*arguments: Any) -> None:
            monkeypatch.undo()
            hand_over(*arguments)
            raise KeyboardInterrupt

        monkeypatch.setattr(loop, "call_soon_threadsafe", interrupted)
        with pytest.raises(KeyboardInterrupt):
            keyless.wait_for_approval(ticket)
        assert ends_its_waits(keyless)

    await asyncio.to_thread(program)


@pytest.mark.parametrize("call", [lambda client: client.statistics, lambda client: client.get_operation("a")])
async def test_a_call_that_is_interrupted_before_it_is_handed_to_the_loop_leaves_no_coroutine(
    keyless: KeylessClient, monkeypatch: pytest.MonkeyPatch, call: Callable[[KeylessClient], object]
) -> None:
    def interrupted(*_: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def program() -> None:
        keyless.create_operation("C0FFEE")
        monkeypatch.setattr(sync._process.background()._loop, "call_soon_threadsafe", interrupted)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.suppress(KeyboardInterrupt):
                call(keyless)
                pytest.fail("it was not interrupted")
        assert caught == []  # such as of a coroutine that was never awaited

    await asyncio.to_thread(program)


async def test_an_iteration_interrupted_between_updates_ends_its_wait(
    keyless: KeylessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    def program() -> None:
        updates = keyless.watch_approval(keyless.create_operation("C0FFEE"))
        next(updates)
        monkeypatch.setattr(sync, "_refuse_event_loop", interrupt)
        with pytest.raises(KeyboardInterrupt) as raised:
            next(updates)
        assert ends_its_waits(keyless)
        del raised  # whose traceback has the frame of the iterator until here

    await asyncio.to_thread(program)


# -- in a thread that runs an event loop


@pytest.mark.parametrize(
    "use",
    [
        lambda client: client.get_operation("op-1"),
        lambda client: client.request_approval("C0FFEE"),
        lambda client: client.watch_approval("op-1"),
        lambda client: client.wait_for_approvals(["op-1"]),
        lambda client: client.__enter__(),
        lambda client: client.close(),
        lambda client: client.statistics,
    ],
    ids=["call", "wait", "watch", "many", "with", "close", "statistics"],
)
async def test_a_thread_that_runs_an_event_loop_is_refused(
    sandbox: Sandbox, keyless: KeylessClient, use: Callable[[KeylessClient], object]
) -> None:
    await asyncio.to_thread(keyless.get_pending_operations, "C0FFEE")
    before = len(sandbox.requests)
    with pytest.raises(ConfigurationError, match=r"aiokeyless\.KeylessClient"):
        use(keyless)
    assert len(sandbox.requests) == before


def test_a_connection_to_nats_is_refused_as_its_library_needs_a_loop() -> None:
    with pytest.raises(ConfigurationError, match="broker must be a connection to PostgreSQL, a closed broker, or"):
        submit_approval(Client(), "C0FFEE", operation_id="txn-1")


async def test_an_iterator_is_refused_in_a_thread_that_runs_an_event_loop(keyless: KeylessClient) -> None:
    updates = await asyncio.to_thread(keyless.watch_approval, "op-1")
    with pytest.raises(ConfigurationError, match=r"aiokeyless\.KeylessClient"):
        next(updates)


@pytest.mark.parametrize(("module", "name"), [(threading, "get_ident"), (selectors, "DefaultSelector")])
async def test_what_gevent_has_replaced_is_refused_before_anything_is_sent(
    sandbox: Sandbox, monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str
) -> None:
    client = KeylessClient(sandbox.api_key, base_url=sandbox.url)
    monkeypatch.setattr(sync, "_process", sync._Process())  # a process that has not started its loop
    replaced = getattr(module, name)
    monkeypatch.setattr(module, name, lambda: replaced())  # noqa: PLW0108  # as gevent replaces it
    with pytest.raises(ConfigurationError, match="gevent or eventlet"):
        await asyncio.to_thread(client.get_operation, "op-1")
    assert not sandbox.requests
    client.close()


# -- closing


async def test_closing_ends_the_waits_of_other_threads(sandbox: Sandbox, keyless: KeylessClient) -> None:
    waiting = asyncio.create_task(asyncio.to_thread(keyless.request_approval, "C0FFEE"))
    await until(lambda: len(sandbox.operations) == 1)
    await asyncio.to_thread(keyless.close)
    await asyncio.to_thread(keyless.close)
    with pytest.raises(ClientClosedError):
        await waiting
    with pytest.raises(ClientClosedError):
        await asyncio.to_thread(keyless.get_operation, "op-1")
    assert repr(keyless).endswith(" closed>")


def test_a_client_that_was_never_used_is_closed_without_a_loop() -> None:
    client = KeylessClient("key")
    assert client.statistics.polls == 0
    client.close()
    with pytest.raises(ClientClosedError):
        client.get_operation("op-1")


async def test_a_client_that_is_dropped_open_warns_and_is_closed(sandbox: Sandbox) -> None:
    def program() -> None:
        client = KeylessClient(sandbox.api_key, base_url=sandbox.url)
        client.get_pending_operations("C0FFEE")
        background = sync._process.background()
        before = len(background._clients)
        with pytest.warns(ResourceWarning, match="use 'with' or close"):
            del client
        background.call(lambda: until(lambda: len(background._clients) == before - 1))

    await asyncio.to_thread(program)


# -- workers


@pytest.mark.parametrize("name", ["submit_approval", "next_outcome"])
def test_what_workers_are_asked_and_answer_has_the_arguments_of_the_other_face(name: str) -> None:
    ours, theirs = getattr(sync, name), getattr(worker, name)
    assert inspect.signature(ours).parameters == inspect.signature(theirs, eval_str=True).parameters
    assert get_type_hints(ours).keys() - {"return"} == inspect.signature(ours).parameters.keys()
    assert_documented(ours)
    assert "SQLAlchemy" in ours.__doc__


@pytest.mark.parametrize("made", [lambda path: f"sqlite:{path}", SqliteBroker], ids=["url", "broker"])
async def test_a_request_comes_back_as_an_outcome_by_a_broker_that_is_opened_on_first_use(
    client: aiokeyless.KeylessClient, sandbox: Sandbox, tmp_path: Path, made: Callable[[Path], Broker | str]
) -> None:
    path = tmp_path / "keyless.db"
    broker = made(path)

    def submit(operation_id: str) -> bool:
        return sync.submit_approval(broker, "C0FFEE", operation_id=operation_id).duplicate

    def read() -> str:
        with sync.next_outcome(broker, "shop") as event:
            return f"{event.operation_id} {event.outcome}"

    async with worker.ApprovalWorker(client, f"sqlite:{path}", schedule=FAST):
        submitted = [asyncio.to_thread(submit, operation_id) for operation_id in ("op-1", "op-1")]
        assert sorted(await asyncio.gather(*submitted)) == [False, True]
        await until(lambda: "op-1" in sandbox.operations)
        sandbox.approve("op-1")
        assert await asyncio.to_thread(read) == "op-1 approved"


async def test_what_a_body_raises_puts_the_outcome_off_and_is_raised(
    client: aiokeyless.KeylessClient, sandbox: Sandbox, tmp_path: Path
) -> None:
    url = f"sqlite:{tmp_path / 'keyless.db'}"

    def program() -> None:
        sync.submit_approval(url, "C0FFEE", operation_id="op-1")
        with pytest.raises(ZeroDivisionError), sync.next_outcome(url, "shop"):
            _ = 1 / 0

    async with worker.ApprovalWorker(client, url, schedule=FAST):
        running = asyncio.create_task(asyncio.to_thread(program))
        await until(lambda: "op-1" in sandbox.operations)
        sandbox.approve("op-1")
        await running
    with closing(sqlite3.connect(tmp_path / "keyless.db")) as file:
        assert file.execute("SELECT reader, failures FROM unread").fetchall() == [("shop", 1)]


# -- what it shows


def test_neither_repr_nor_pickle_show_the_key() -> None:
    client = KeylessClient("secret-key", base_url="https://keyless.example", name="acme")
    assert repr(client) == "<sync.KeylessClient name='acme' base_url='https://keyless.example'>"
    assert client.name == "acme"
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(client)


@pytest.mark.parametrize(
    "wrong",
    [{"region": "mars"}, {"listeners": 5}, {"schedule": 5}, {"max_attempts": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_no_frame_of_a_wrong_construction_has_the_key(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError) as raised:
        KeylessClient("secret-key", **wrong)
    assert raised.value.argument == next(iter(wrong))
    frames = [frame.frame.f_locals for frame in inspect.getinnerframes(raised.tb)]
    assert not any("secret-key" in repr(value) for found in frames[1:] for value in found.values())


# -- processes

#: The shell that runs the tests may ignore SIGINT, and processes inherit that.
PROLOGUE = """
import os, signal, sys, threading, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from aiokeyless.sync import KeylessClient
from aiokeyless import ClientClosedError, sync
from tenacity.wait import wait_fixed
client = KeylessClient(schedule=wait_fixed(0.1))
"""


@asynccontextmanager
async def program(text: str, sandbox: Sandbox, before: str = "") -> AsyncGenerator[asyncio.subprocess.Process]:
    """Run a program in a process of its own, with each warning an error."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-W", "error", "-c", before + PROLOGUE + text),
        env=os.environ | {"KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key, "PYTHONUNBUFFERED": "1"},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def run(text: str, sandbox: Sandbox, before: str = "") -> tuple[int | None, str]:
    """Run a program to its end."""
    async with program(text, sandbox, before) as process:
        return await ended(process)


async def ended(process: asyncio.subprocess.Process) -> tuple[int | None, str]:
    async with asyncio.timeout(PATIENCE):
        output, _ = await process.communicate()
    return process.returncode, output.decode()


INTERRUPTED = """
try:
    {wait}
except KeyboardInterrupt:
    while client.statistics.waiting > {others}: time.sleep(0.01)
    print("interrupted")
"""

ONE = 'client.request_approval("C0FFEE", expires_in=600)'
WITH_ON_POLL = 'client.request_approval("C0FFEE", expires_in=600, on_poll=lambda update: None)'
IN_ON_POLL = 'client.request_approval("C0FFEE", expires_in=600, on_poll=lambda update: time.sleep(600))'
MANY = 'list(client.wait_for_approvals([client.create_operation("C0FFEE")], timeout=600))'
BESIDE_TWENTY = f"""
    threads = [threading.Thread(target=client.request_approval, args=["C0FFEE"], daemon=True) for _ in range(20)]
    for thread in threads: thread.start()
    while client.statistics.waiting < 20: time.sleep(0.01)
    {ONE}"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wait", "others"),
    [(WITH_ON_POLL, 0), (IN_ON_POLL, 0), (MANY, 0), (BESIDE_TWENTY, 20)],
    ids=["with on_poll", "in on_poll", "many", "beside twenty threads"],
)
async def test_ctrl_c_ends_a_wait_at_once_and_cancels_it_and_no_other(sandbox: Sandbox, wait: str, others: int) -> None:
    async with program(INTERRUPTED.format(wait=wait, others=others), sandbox) as process:
        created = others + 1
        await until(lambda: len(sandbox.operations) == created and len(sandbox.requests) > created)  # and a poll
        process.send_signal(signal.SIGINT)
        status, output = await ended(process)
    assert status == 0, output
    assert "interrupted\n" in output


@pytest.mark.slow
async def test_ctrl_c_ends_a_wait_also_if_the_signal_does_not_wake_the_main_thread(sandbox: Sandbox) -> None:
    """Another thread gets it here. One that comes just before the main thread sleeps does not wake it either."""
    interrupting = """
def interrupt():
    while client.statistics.polls == 0: time.sleep(0.01)
    time.sleep(0.2)
    signal.pthread_kill(threading.get_ident(), signal.SIGINT)
threading.Thread(target=interrupt, daemon=True).start()
"""
    assert await run(interrupting + INTERRUPTED.format(wait=ONE, others=0), sandbox) == (0, "interrupted\n")


@pytest.mark.slow
async def test_ctrl_c_ends_twenty_threads_with_the_client_that_they_share(sandbox: Sandbox) -> None:
    text = """
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(20) as pool, client:
    waits = []
    try:  # the signal may come while the last one starts
        for _ in range(20): waits.append(pool.submit(client.request_approval, "C0FFEE", expires_in=600))
        waits[0].result()
    except KeyboardInterrupt:
        client.close()
print({type(wait.exception()).__name__ for wait in waits})
"""
    async with program(text, sandbox) as process:
        await until(lambda: len(sandbox.operations) == 20)
        process.send_signal(signal.SIGINT)
        status, output = await ended(process)
    assert (status, output) == (0, "{'ClientClosedError'}\n")


OPEN_AT_THE_END = """
client.get_pending_operations("C0FFEE")
updates = client.watch_approval(client.create_operation("C0FFEE"))
next(updates)
threading.excepthook = lambda failed: None
threading.Thread(target=client.request_approval, args=["C0FFEE"], daemon=True).start()
while client.statistics.waiting < 2: time.sleep(0.01)
"""
A_LISTENER_HANGS = """
hangs = threading.Event()
def listener(event):
    hangs.set()
    time.sleep(3600)
client = KeylessClient(listeners=[listener])
threading.Thread(target=client.get_operation, args=["op-1"], daemon=True).start()
hangs.wait()
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", [OPEN_AT_THE_END, A_LISTENER_HANGS], ids=["waits", "a listener that hangs"])
async def test_a_process_ends_silently_though_client_and_broker_are_open(
    sandbox: Sandbox, text: str, tmp_path: Path
) -> None:
    text = f'sync.submit_approval("sqlite:{tmp_path}/keyless.db", "C0FFEE", operation_id="op-1")\n{text}'
    assert await run(text, sandbox) == (0, "")  # in far less time than the wait and the listener take


@pytest.mark.slow
@pytest.mark.parametrize("argument", ["on_created", "on_poll"])
async def test_a_function_that_returns_after_the_end_of_the_loop_ends_silently(sandbox: Sandbox, argument: str) -> None:
    before = """
import atexit, threading
atexit.register(lambda: waiting.join(10))  # before the import, so it runs after what the module registers
"""
    text = f"""
background, called = sync.get_background(), threading.Event()
def function(_):
    called.set()
    while background._thread.is_alive(): time.sleep(0.001)
def wait():
    try:
        client.request_approval("C0FFEE", {argument}=function)
    except ClientClosedError:
        print("closed")
waiting = threading.Thread(target=wait, daemon=True)
waiting.start()
called.wait()
"""
    assert await run(text, sandbox, before) == (0, "closed\n")


@pytest.mark.slow
async def test_a_call_at_the_end_of_the_process_is_refused_and_hangs_nothing(sandbox: Sandbox) -> None:
    before = """
import atexit
def late():
    client.close()
    try:
        KeylessClient().get_operation("op-1")
    except ClientClosedError:
        print("closed")
atexit.register(late)  # before the import, so it runs after what the module registers
"""
    assert await run('client.get_pending_operations("C0FFEE")', sandbox, before) == (0, "closed\n")


# -- fork

WAITING = """
import warnings; warnings.simplefilter("ignore", DeprecationWarning)  # a fork beside threads, from 3.12 on
in_parent = threading.Thread(target=client.request_approval, args=["C0FFEE"], kwargs={"operation_id": "op-parent"})
in_parent.start()
while not client.statistics.polls: time.sleep(0.01)
updates = client.watch_approval(client.create_operation("C0FFEE", operation_id="op-updates"))
next(updates)
"""
FORK = """
{before}
child = os.fork()
if child == 0:
    assert client.request_approval("C0FFEE", operation_id="op-child").is_approved
    {in_child}
    print("child")
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
{after}
print("parent")
"""
#: Says so if the child wakes the loop of its parent.
WATCH_CHILD = """
import os
from asyncio.selector_events import BaseSelectorEventLoop
def wake(loop, wake=BaseSelectorEventLoop._write_to_self, parent=os.getpid()):
    if os.getpid() != parent: print("wakes the loop of the parent")
    wake(loop)
BaseSelectorEventLoop._write_to_self = wake
"""
GOES_ON = """
next(updates)
in_parent.join()
assert client.request_approval("C0FFEE", operation_id="op-later").is_approved
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "in_child"),
    [
        ("", "client.close()"),
        (WAITING, ""),
        (WAITING, "client.close()"),
        (WAITING, "import gc; warnings.simplefilter('ignore'); del client, updates, in_parent; gc.collect()"),
    ],
    ids=["made", "used", "used, closed", "used, dropped"],
)
async def test_a_client_from_before_a_fork_works_in_the_child(sandbox: Sandbox, before: str, in_child: str) -> None:
    text = FORK.format(before=before, in_child=in_child, after=GOES_ON if before else "")
    async with program(text, sandbox) as process:
        await until(lambda: "op-child" in sandbox.operations)
        sandbox.approve("op-child")
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            first = (await process.stdout.readline()).decode()
        assert first == "child\n", first + (await ended(process))[1]
        if before:
            sandbox.approve("op-parent")
            await until(lambda: "op-later" in sandbox.operations)
            sandbox.approve("op-later")
        status, output = await ended(process)
    assert (status, output) == (0, "parent\n")


@pytest.mark.slow
async def test_an_iterator_does_not_go_on_in_a_forked_child(sandbox: Sandbox) -> None:
    text = """
import warnings; warnings.simplefilter("ignore", DeprecationWarning)
updates = client.watch_approval(client.create_operation("C0FFEE", operation_id="op-updates"))
next(updates)
if (child := os.fork()) == 0:
    try:
        next(updates)
    except ClientClosedError as error:
        print(error)
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
next(updates)
print("parent")
"""
    async with program(text, sandbox, before=WATCH_CHILD) as process:
        status, output = await ended(process)
    assert status == 0, output
    assert output == "the wait belongs to a process that was forked, or is ending: start it anew\nparent\n"


BY_ON_POLL = """
def fork_once(update):
    if update.polls == 1: fork()
functions = {"on_poll": fork_once}
"""
BY_A_SIGNAL = """
signal.signal(signal.SIGALRM, lambda *_: fork())
functions = {"on_created": lambda ticket: signal.setitimer(signal.ITIMER_REAL, 0.1)}
"""


@pytest.mark.slow
@pytest.mark.parametrize("forking", [BY_ON_POLL, BY_A_SIGNAL], ids=["by on_poll", "by a signal"])
async def test_a_wait_does_not_go_on_in_a_child_that_is_forked_meanwhile(sandbox: Sandbox, forking: str) -> None:
    text = f"""
import warnings; warnings.simplefilter("ignore", DeprecationWarning)
def fork():
    global child
    child = os.fork()
{forking}
try:
    print(client.request_approval("C0FFEE", operation_id="op-1", **functions).operation_id)
except ClientClosedError:
    print("child")
    sys.exit()
assert os.waitpid(child, 0)[1] == 0
"""
    async with program(text, sandbox, before=WATCH_CHILD) as process:
        assert process.stdout is not None
        async with asyncio.timeout(PATIENCE):
            assert await process.stdout.readline() == b"child\n"
        sandbox.approve("op-1")
        status, output = await ended(process)
    assert (status, output) == (0, "op-1\n")


@pytest.mark.slow
async def test_a_fork_waits_until_the_loops_thread_has_no_lock(sandbox: Sandbox) -> None:
    # Such as that of a module that it imports: in the child nobody would ever release it.
    text = """
import warnings; warnings.simplefilter("ignore", DeprecationWarning)
lock, locked = threading.Lock(), threading.Event()
def listener(event):
    with lock:
        locked.set()
        time.sleep(0.2)
        while not forking.is_set(): time.sleep(0.01)
forking = threading.Event()
os.register_at_fork(before=forking.set)  # runs before what the module has registered
sync._PATIENCE = 60  # for a busy machine
client = KeylessClient(listeners=[listener])
threading.Thread(target=client.get_pending_operations, args=["C0FFEE"]).start()
locked.wait()
if (child := os.fork()) == 0:
    print("free" if lock.acquire(timeout=0) else "locked for ever")
    os._exit(0)
os.waitpid(child, 0)
"""
    assert await run(text, sandbox) == (0, "free\n")


async def test_a_fork_in_a_listener_does_not_wait_for_its_own_thread(sandbox: Sandbox) -> None:
    children: list[int] = []

    def listener(_event: Event) -> None:  # runs in the loop's thread
        if not children:
            sync._process.before_fork()
            children.append(1)
            sync._process.after_fork_in_parent()

    def program() -> None:
        with KeylessClient(sandbox.api_key, base_url=sandbox.url, listeners=[listener]) as client:
            client.get_pending_operations("C0FFEE")

    await asyncio.to_thread(program)
    assert children == [1]


def test_a_context_that_ends_the_task_in_which_it_is_held_raises_when_it_is_left() -> None:
    @asynccontextmanager
    async def failing() -> AsyncGenerator[None]:
        async with asyncio.timeout(0):
            yield

    background = get_background()
    with pytest.raises(TimeoutError), background.holding(failing()):
        background.call(lambda: asyncio.sleep(0.01))  # after the time-out
