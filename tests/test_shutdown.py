"""Closing clients when a signal arrives: what was installed before is called, and what is open ends."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING
from weakref import WeakSet

import pytest
from waiting import PATIENCE, until

from aiokeyless import ClientClosedError, ConfigurationError, KeylessClient
from aiokeyless.shutdown import close_on_signals

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from aiokeyless.sandbox import Sandbox

    Install = Callable[[signal.Handlers | Callable[[int, FrameType | None], object]], None]

pytestmark = pytest.mark.platform


SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture
def install() -> Iterator[Install]:
    """Install a handler for both signals, as a server would; undone after the test."""
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def install(handler: signal.Handlers | Callable[[int, FrameType | None], object]) -> None:
        for number in SIGNALS:
            signal.signal(number, handler)

    yield install
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def received(install: Install) -> list[int]:
    """What the handler of a server received."""
    numbers: list[int] = []
    install(lambda number, _frame: numbers.append(number))
    return numbers


async def waiting(client: KeylessClient) -> asyncio.Task[object]:
    """Return a wait that has begun."""
    ticket = await client.create_operation("C0FFEE")
    wait: asyncio.Task[object] = asyncio.create_task(client.wait_for_approval(ticket))
    await until(lambda: client.statistics.waiting > 0)
    return wait


@pytest.mark.parametrize("number", SIGNALS)
async def test_a_signal_ends_the_waits_and_reaches_the_server_at_once(
    client: KeylessClient, received: list[int], number: signal.Signals
) -> None:
    wait = await waiting(client)
    async with close_on_signals(client):
        signal.raise_signal(number)
        assert received == [number]
        with pytest.raises(ClientClosedError):
            async with asyncio.timeout(PATIENCE):
                await wait


@pytest.mark.usefixtures("received")
async def test_a_handler_of_the_loop_is_called_too(client: KeylessClient) -> None:
    loop = asyncio.get_running_loop()
    handled = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, handled.set)
    try:
        wait = await waiting(client)
        async with close_on_signals(client):
            signal.raise_signal(signal.SIGTERM)
            async with asyncio.timeout(PATIENCE):
                await handled.wait()
                with pytest.raises(ClientClosedError):
                    await wait
    finally:
        loop.remove_signal_handler(signal.SIGTERM)


async def test_each_signal_is_handed_on(client: KeylessClient, received: list[int]) -> None:
    async with close_on_signals(client):
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert received == [signal.SIGTERM, signal.SIGTERM, signal.SIGINT]


@pytest.mark.usefixtures("received")
async def test_all_clients_are_closed(sandbox: Sandbox) -> None:
    clients = [sandbox.client(), sandbox.client()]
    waits = [await waiting(client) for client in clients]
    async with close_on_signals(*clients):
        signal.raise_signal(signal.SIGTERM)
        async with asyncio.timeout(PATIENCE):
            ends = await asyncio.gather(*waits, return_exceptions=True)
    assert [type(end) for end in ends] == [ClientClosedError, ClientClosedError]


async def test_a_client_that_is_entered_into_a_stack_is_closed_too_and_at_once_after_the_signal(
    sandbox: Sandbox, received: list[int]
) -> None:
    stack = AsyncExitStack()
    async with close_on_signals(stack), asyncio.timeout(PATIENCE):
        early = await waiting(await stack.enter_async_context(sandbox.client()))
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(ClientClosedError):
            await early
        for _ in range(2):
            late = await stack.enter_async_context(sandbox.client())
            with pytest.raises(ClientClosedError):
                await late.request_approval("C0FFEE")
        last = await stack.enter_async_context(sandbox.client())
    assert "closed" in repr(last)
    assert received == [signal.SIGTERM]


@pytest.mark.usefixtures("received")
async def test_one_that_cannot_be_closed_keeps_none_of_the_others_open(client: KeylessClient) -> None:
    stack = AsyncExitStack()
    stack.callback(divmod, 1, 0)
    wait = await waiting(client)
    block = close_on_signals(stack, client)
    await block.__aenter__()
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(ClientClosedError):
        await wait
    late = await stack.enter_async_context(KeylessClient("key"))
    with pytest.raises(ZeroDivisionError):
        await block.__aexit__(None, None, None)
    assert "closed" in repr(late)


@pytest.mark.usefixtures("received")
async def test_nothing_is_left_of_clients_that_came_and_went(sandbox: Sandbox) -> None:
    class Tenants(dict[str, KeylessClient]):
        async def aclose(self) -> None:
            await asyncio.gather(*(client.aclose() for client in self.values()))

    tenants = Tenants()
    gone: WeakSet[KeylessClient] = WeakSet()
    async with close_on_signals(tenants):
        for _ in range(1000):
            tenants["acme"] = sandbox.client()
            gone.add(tenants["acme"])
            await tenants.pop("acme").aclose()
        gc.collect()
        assert len(gone) == 0


@pytest.mark.usefixtures("received")
async def test_the_end_of_the_block_closes_and_restores(client: KeylessClient) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    wait = await waiting(client)
    async with close_on_signals(client):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(ClientClosedError):
        await wait


@pytest.mark.usefixtures("received")
async def test_a_handler_that_was_installed_later_stays(client: KeylessClient) -> None:
    def later(_number: int, _frame: FrameType | None) -> None:
        """Do nothing."""

    async with close_on_signals(client):
        signal.signal(signal.SIGTERM, later)
    assert signal.getsignal(signal.SIGTERM) is later


async def test_an_ignored_signal_stays_ignored(client: KeylessClient, install: Install) -> None:
    install(signal.SIG_IGN)
    async with close_on_signals(client):
        signal.raise_signal(signal.SIGTERM)
        await asyncio.sleep(0)
        await client.get_pending_operations("C0FFEE")  # it is open


async def test_what_a_handler_raises_is_raised(client: KeylessClient, install: Install) -> None:
    def fail(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    install(fail)
    wait = await waiting(client)
    with pytest.raises(KeyboardInterrupt):
        async with close_on_signals(client):
            signal.raise_signal(signal.SIGINT)
    with pytest.raises(ClientClosedError):
        await wait


@pytest.mark.usefixtures("received")
async def test_a_cancelled_block_closes_all_the_same(client: KeylessClient) -> None:
    wait = await waiting(client)

    async def block() -> None:
        async with close_on_signals(client):
            await asyncio.sleep(PATIENCE)

    task = asyncio.create_task(block())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    with pytest.raises(ClientClosedError):
        await wait


@pytest.mark.usefixtures("received")
async def test_outside_of_the_main_thread_the_end_of_the_block_closes(sandbox: Sandbox) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    closed: list[str] = []

    async def serve() -> None:
        client = sandbox.client()
        async with close_on_signals(client):
            assert [signal.getsignal(number) for number in SIGNALS] == before
        closed.append(repr(client))

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    await asyncio.to_thread(thread.join)
    assert closed[0].endswith("closed>")


@pytest.mark.usefixtures("received")
async def test_a_client_of_another_loop_is_refused(sandbox: Sandbox) -> None:
    client = sandbox.client()

    async def use() -> None:
        with pytest.raises(ConfigurationError):
            async with close_on_signals(client):
                pass

    await client.get_pending_operations("C0FFEE")
    await asyncio.to_thread(asyncio.run, use())
    await client.aclose()


async def test_the_default_action_comes_last(
    client: KeylessClient, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[tuple[int, bool, object]] = []

    def take(number: int) -> None:
        taken.append((number, wait.done(), signal.getsignal(number)))

    install(signal.SIG_DFL)
    wait = await waiting(client)
    monkeypatch.setattr(signal, "raise_signal", take)
    async with close_on_signals(client):
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: bool(taken))
    assert taken == [(signal.SIGTERM, True, signal.SIG_DFL)]
    assert wait.exception().__class__ is ClientClosedError


async def test_a_second_signal_has_the_default_action(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    class HangingClient(KeylessClient):
        async def aclose(self) -> None:
            await closed.wait()

    taken: list[int] = []
    closed = asyncio.Event()
    install(signal.SIG_DFL)
    monkeypatch.setattr(signal, "raise_signal", taken.append)
    async with close_on_signals(HangingClient("key")):
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        assert not taken
        os.kill(os.getpid(), signal.SIGTERM)
        await until(lambda: bool(taken))
        closed.set()
        await until(lambda: len(taken) > 1)  # the end of the first, which finds no handler to remove
