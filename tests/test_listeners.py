"""What a client does with listeners: each is told, whatever the others do."""

from __future__ import annotations

import functools
import logging
import time
from typing import TYPE_CHECKING

import pytest

from aiokeyless import ConfigurationError, KeylessClient
from aiokeyless._listeners import Listeners
from aiokeyless.events import Event, PollEnded, RequestEnded, WaitEnded, WaitStarted

if TYPE_CHECKING:
    from aiokeyless.sandbox import Sandbox

EVENT = RequestEnded(
    method="GET",
    route="/v2/operations/{operationId}",
    server="127.0.0.1",
    port=1,
    status=200,
    error=None,
    seconds=0.1,
    attempt=1,
    request_id=None,
)


def raising(error: BaseException) -> Listeners:
    def fail(_event: Event) -> None:
        raise error

    return Listeners((fail,))


async def coroutine_function(_event: Event) -> None:
    """Do nothing."""


class AsyncCallable:
    async def __call__(self, _event: Event) -> None:
        """Do nothing."""


@pytest.mark.parametrize(
    ("listeners", "message"),
    [
        (5, "an iterable of functions, such as a list, not int"),
        (print, "an iterable of functions, such as a list, not builtin_function_or_method"),
        ("print", "an iterable of functions, such as a list, not str"),
        ([print, 5], "must be callable, not int"),
        ([None], "must be callable, not NoneType"),
        ([coroutine_function], "must be a plain function"),
        ([AsyncCallable()], "must be a plain function"),
        ([functools.partial(coroutine_function)], "must be a plain function"),
    ],
)
def test_what_cannot_be_told_is_refused(listeners: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        KeylessClient("key", listeners=listeners)  # type: ignore[arg-type]  # that is the mistake
    assert caught.value.argument == "listeners"


def test_events_are_told_in_order_to_each_listener() -> None:
    told: list[tuple[str, Event]] = []
    listeners = Listeners((lambda event: told.append(("first", event)), lambda event: told.append(("second", event))))
    listeners.tell(EVENT)
    assert told == [("first", EVENT), ("second", EVENT)]


@pytest.mark.parametrize("kind", [ValueError, StopIteration, GeneratorExit])
def test_what_a_listener_raises_is_logged_and_the_next_is_told(
    kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    told: list[Event] = []

    def fail(_event: Event) -> None:
        raise kind("broken")

    with caplog.at_level(logging.ERROR, "aiokeyless"):
        Listeners((fail, told.append)).tell(EVENT)
    assert told == [EVENT]
    [record] = caplog.records
    assert record.exc_info
    assert record.exc_info[0] is kind
    assert f"{fail!r} failed on RequestEnded" in record.getMessage()


def test_a_listener_that_always_fails_is_logged_once_for_each_kind(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = iter([ValueError(), ValueError(), ValueError(), KeyError(), KeyError(), KeyError()])

    def fail(_event: Event) -> None:
        raise next(errors)

    other = functools.partial(fail)
    listeners = Listeners((fail, other))
    with caplog.at_level(logging.DEBUG, "aiokeyless"):
        for _ in range(3):
            listeners.tell(EVENT)
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR", "DEBUG", "ERROR", "ERROR", "DEBUG"]
    assert caplog.messages[-1] == f"listener {other!r} failed again: KeyError"


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_process_ends_it(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        raising(kind()).tell(EVENT)


@pytest.mark.looptime
async def test_a_broken_listener_costs_no_call(sandbox: Sandbox, caplog: pytest.LogCaptureFixture) -> None:
    def fail(_event: Event) -> None:
        raise ValueError("broken")

    with caplog.at_level(logging.ERROR, "aiokeyless"):
        async with sandbox.client(listeners=[fail]) as client:
            ticket = await client.create_operation("C0FFEE")
            sandbox.approve(ticket.operation_id)
            assert (await client.wait_for_approval(ticket)).is_approved
    assert len(caplog.records) == 1


def test_a_client_says_what_it_tells() -> None:
    client = KeylessClient("key", listeners=[print, repr])
    assert client.listeners == (print, repr)
    assert KeylessClient("key").listeners == ()


@pytest.mark.looptime
async def test_a_listener_that_blocks_delays_a_wait_by_what_it_takes_and_by_no_poll_more(sandbox: Sandbox) -> None:
    told: list[Event] = []

    def block(event: Event) -> None:
        told.append(event)
        time.sleep(0.05)

    async with sandbox.client() as other:
        await other.create_operation("C0FFEE", operation_id="op")
    sandbox.approve("op")
    async with sandbox.client(listeners=[block]) as client:
        assert (await client.wait_for_approval("op")).is_approved
    assert [type(event) for event in told] == [WaitStarted, RequestEnded, PollEnded, WaitEnded]
