"""How a worker starts, ends and is a context manager, on a broker in memory, on a clock that moves."""

from __future__ import annotations

import asyncio
from contextlib import nullcontext, suppress
from typing import TYPE_CHECKING, Any

import pytest
from tenacity.wait import wait_base
from waiting import until

from aiokeyless import AuthenticationError, ClientClosedError, ConfigurationError, KeylessClient, PermissionDeniedError
from aiokeyless.events import WorkerInspected
from aiokeyless.worker import ApprovalWorker, BrokerError, Outcome, approval_worker
from aiokeyless.worker.serving import Serving

from .reading import approve_all, ask, read, submit

if TYPE_CHECKING:
    from tenacity import RetryCallState

    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox
    from aiokeyless.worker.sqlite import SqliteBroker

pytestmark = [pytest.mark.platform, pytest.mark.looptime]

MEMORY = "sqlite::memory:"  # of the worker's own, which it opens and closes


async def running(worker: ApprovalWorker) -> asyncio.Task[None]:
    """Run a worker until it is ready."""
    task = asyncio.create_task(worker.run())
    await until(lambda: worker.statistics.is_ready)
    return task


# -- the start


class NoSchedule(wait_base):
    def __call__(self, retry_state: RetryCallState) -> float:
        return float("nan")


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        *(("max_in_flight", 0), ("max_in_flight", 2.5), ("max_polls_per_second", 0), ("grace", -1)),
        *(("schedule", NoSchedule()), ("schedule", "every second"), ("on_created", 5)),
    ],
)
async def test_an_argument_that_is_wrong_is_refused_by_name(client: KeylessClient, argument: str, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=argument) as caught:
        ApprovalWorker(client, MEMORY, **{argument: wrong})
    assert caught.value.argument == argument


async def test_a_schedule_is_tried_as_at_a_new_operations_first_poll(client: KeylessClient) -> None:
    asked: list[tuple[int, float | None]] = []

    class Asked(wait_base):
        def __call__(self, retry_state: RetryCallState) -> float:
            asked.append((retry_state.attempt_number, retry_state.seconds_since_start))
            return 1.0

    ApprovalWorker(client, MEMORY, schedule=Asked())
    assert asked == [(1, 0.0)]


async def test_worker_runs_once(client: KeylessClient) -> None:
    async with ApprovalWorker(client, MEMORY) as worker:
        for again in (worker.run, worker.__aenter__):
            with pytest.raises(ConfigurationError, match="runs once"):
                await again()
        assert worker.statistics.is_ready
    with pytest.raises(ConfigurationError, match="runs once"):
        await worker.run()


async def test_wrong_key_is_found_before_anything_is_taken(sandbox: Sandbox, memory: SqliteBroker) -> None:
    await submit(memory)
    async with KeylessClient("wrong", base_url=sandbox.url) as client:
        with pytest.raises(AuthenticationError):
            await ApprovalWorker(client, memory).run()
    [message] = await memory.take(1, 0.0)
    assert message.number == 1


async def test_refusal_at_the_start_that_will_not_pass_ends_the_worker(client: KeylessClient, sandbox: Sandbox) -> None:
    sandbox.fail_next(status=403)
    with pytest.raises(PermissionDeniedError):
        await ApprovalWorker(client, MEMORY).run()


# -- the end


async def test_a_client_that_is_closed_ends_the_worker(client: KeylessClient, memory: SqliteBroker) -> None:
    run = await running(ApprovalWorker(client, memory))
    await client.aclose()
    await submit(memory)
    with pytest.raises(ClientClosedError):
        await run


async def test_key_that_is_withdrawn_ends_the_worker_and_another_one_finishes_its_requests(
    client: KeylessClient, sandbox: Sandbox, memory: SqliteBroker
) -> None:
    worker = ApprovalWorker(client, memory)
    run = await running(worker)
    await ask(sandbox, memory, 3)
    sandbox.fail_next(status=401, times=None)
    with pytest.raises(AuthenticationError):
        await run
    assert not worker.statistics.is_ready
    sandbox.recover()
    approve_all(sandbox)
    async with sandbox.client() as other_client, ApprovalWorker(other_client, memory):
        events = await read(memory, 3)
    assert sorted(event.operation_id or "" for event in events) == ["txn-1", "txn-2", "txn-3"]
    assert {event.outcome for event in events} == {Outcome.APPROVED}


@pytest.mark.parametrize("lag", [2, 5, 20])
async def test_requests_survive_a_key_that_rotates_while_the_function_lags(
    sandbox: Sandbox, memory: SqliteBroker, monkeypatch: pytest.MonkeyPatch, lag: float
) -> None:
    monkeypatch.setattr("aiokeyless.worker.serving.KEY_CHECKS", (1.0, 2.0, 4.0, 8.0, 15.0))
    keys, loop = [sandbox.api_key, "the next key"], asyncio.get_running_loop()
    async with KeylessClient(lambda: keys[0], base_url=sandbox.url) as client, ApprovalWorker(client, memory) as worker:
        await ask(sandbox, memory, 20)
        sandbox._api._key = keys[1]
        loop.call_later(lag, keys.pop, 0)
        for number, operation_id in enumerate(sandbox.operations):
            loop.call_later(number * (lag + 10) / 20, sandbox.approve, operation_id)
        events = await read(memory, 20)
        assert worker.statistics.created == 20
    assert {event.outcome for event in events} == {Outcome.APPROVED}


async def test_stop_finishes_what_is_in_flight_and_leaves_the_rest_to_others_at_once(
    client: KeylessClient, sandbox: Sandbox, memory: SqliteBroker
) -> None:
    worker = ApprovalWorker(client, memory, max_in_flight=2)
    run = await running(worker)
    sandbox.latency = 9  # the client's time for a request is 10 s
    await submit(memory, 5)
    await until(lambda: worker.statistics.in_flight == 2)
    worker.stop()
    assert worker.statistics.is_draining
    assert memory._lease > 3 * client.request_timeout + 5  # so no other worker gets them meanwhile
    async with asyncio.timeout(20):
        await run
    assert (worker.statistics.in_flight, worker.statistics.created) == (0, 2)
    sandbox.latency = 0
    async with sandbox.client() as other_client, ApprovalWorker(other_client, memory), asyncio.timeout(3):
        await until(lambda: len(sandbox.operations) == 5)


async def test_cancelling_returns_at_once_and_leaves_no_task_behind(
    client: KeylessClient, sandbox: Sandbox, memory: SqliteBroker
) -> None:
    before = asyncio.all_tasks()
    worker = ApprovalWorker(client, memory)
    run = await running(worker)
    sandbox.latency = 60
    await submit(memory)
    await until(lambda: worker.statistics.in_flight == 1)
    run.cancel()
    async with asyncio.timeout(1):
        await asyncio.wait({run})
    assert run.cancelled()
    await client.aclose()
    await memory.aclose()
    await until(lambda: asyncio.all_tasks() <= before)
    assert worker.statistics.in_flight == 0


async def test_a_repeated_cancellation_leaves_no_task_behind_either_and_is_told(sandbox: Sandbox) -> None:
    before = asyncio.all_tasks()
    told: list[Event] = []
    async with sandbox.client(listeners=[told.append]) as client:
        run = await running(ApprovalWorker(client, MEMORY))
        while not run.done():  # as a scope of anyio does
            run.cancel()
            await asyncio.sleep(0)
    await until(lambda: asyncio.all_tasks() <= before)
    assert [event.has_ended for event in told if isinstance(event, WorkerInspected)][-1]


async def test_a_worker_that_is_stopped_before_it_runs_ends_at_once(
    client: KeylessClient, memory: SqliteBroker
) -> None:
    worker = ApprovalWorker(client, memory)
    worker.stop()
    assert worker.statistics.is_draining
    async with asyncio.timeout(5):
        await worker.run()


# -- as a context manager


async def test_it_is_ready_in_the_body_only(client: KeylessClient, sandbox: Sandbox, memory: SqliteBroker) -> None:
    worker = ApprovalWorker(client, memory)
    assert worker.statistics.problems == ("the worker has not started yet",)
    async with worker:
        assert worker.statistics.is_ready
        await ask(sandbox, memory)
    assert worker.statistics.is_draining
    assert not worker.statistics.is_ready
    assert worker.statistics.problems == ("the worker is about to end",)
    assert worker._running is not None
    assert worker._running.done()


async def test_a_worker_that_cannot_start_never_runs_the_body(client: KeylessClient) -> None:
    ran: list[str] = []
    with pytest.raises(BrokerError, match="no-such-folder"):
        async with ApprovalWorker(client, "sqlite:/no-such-folder/keyless.db"):
            ran.append("the body")
    assert ran == []


def fail_once_connected(monkeypatch: pytest.MonkeyPatch, release: asyncio.Event) -> None:
    async def serve(_serving: Serving) -> None:
        await release.wait()
        raise BrokerError("it failed")

    monkeypatch.setattr(Serving, "serve", serve)


@pytest.mark.parametrize("swallows", [False, True])
async def test_a_worker_that_fails_cancels_the_body_and_raises_what_it_failed_with(
    client: KeylessClient, monkeypatch: pytest.MonkeyPatch, *, swallows: bool
) -> None:
    fail_once_connected(monkeypatch, failing := asyncio.Event())
    with pytest.raises(BrokerError, match="it failed"):  # noqa: PT012  # the body is what is tested
        async with ApprovalWorker(client, MEMORY):
            failing.set()
            with suppress(asyncio.CancelledError) if swallows else nullcontext():
                await asyncio.Event().wait()
    task = asyncio.current_task()
    assert task is not None
    assert task.cancelling() == 0
    await asyncio.sleep(0)


async def entered(worker: ApprovalWorker) -> asyncio.Task[None]:
    """Enter a worker in a task of its own, whose body never ends."""
    is_entered = asyncio.Event()

    async def body() -> None:
        async with worker:
            is_entered.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(body())
    await is_entered.wait()
    return task


async def test_the_callers_cancellation_in_the_same_moment_stays_a_cancellation(
    client: KeylessClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_once_connected(monkeypatch, failing := asyncio.Event())
    task = await entered(worker := ApprovalWorker(client, MEMORY))
    assert worker._running is not None
    worker._running.add_done_callback(lambda _: task.cancel())
    failing.set()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelling_the_body_ends_the_worker(client: KeylessClient) -> None:
    task = await entered(worker := ApprovalWorker(client, MEMORY))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not worker.statistics.is_ready


async def test_cancelling_the_start_ends_it(client: KeylessClient, monkeypatch: pytest.MonkeyPatch) -> None:
    before = asyncio.all_tasks()
    hanging = asyncio.Event()

    async def hang(*_: object) -> None:
        hanging.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(approval_worker, "check_key", hang)
    starting = asyncio.create_task(ApprovalWorker(client, MEMORY).__aenter__())
    await hanging.wait()
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    assert asyncio.all_tasks() <= before
