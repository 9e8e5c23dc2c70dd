"""Error reporters print local variables: none of them shows the password of a broker that cannot be used."""

from __future__ import annotations

import asyncio
import secrets
from typing import TYPE_CHECKING, Any

import asyncpg
import pytest
from error_reports import reports
from ports import own_port

from aiokeyless import BrokerError, ConfigurationError, KeylessClient, models, sync
from aiokeyless.worker import ApprovalWorker, next_outcome, submit_approval
from aiokeyless.worker.nats import EventKeys, NatsBroker
from aiokeyless.worker.postgres import PostgresBroker, PostgresConnection
from aiokeyless.worker.sqlite import SqliteBroker

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Iterator

# Made here, so that no line of source that a reporter quotes holds it.
PASSWORD = f"password-{secrets.token_hex(8)}"
PORT = own_port()
OPTIONS = {"user": "worker", "password": PASSWORD}
POSTGRES, NATS = (f"{scheme}://worker:{PASSWORD}@127.0.0.1:{PORT}/shop" for scheme in ("postgresql", "nats"))


async def opened(broker: PostgresBroker | NatsBroker) -> None:
    async with broker:
        pass


async def read(broker: object, reader: str) -> None:
    async with next_outcome(broker, reader):
        pass


MISTAKES: dict[str, Callable[[KeylessClient], Any]] = {
    "a worker's limit": lambda client: ApprovalWorker(client, POSTGRES, max_in_flight=0),
    "a schema in a URL": lambda client: ApprovalWorker(client, f"{POSTGRES}?schema=No"),
    "a schema": lambda _: PostgresBroker(POSTGRES, "No"),
    "a scheme": lambda client: ApprovalWorker(client, f"redis://:{PASSWORD}@db"),
    "a scheme with slashes": lambda client: ApprovalWorker(client, f"sqlite://:{PASSWORD}@db"),
    "an option": lambda _: NatsBroker(NATS, connect_options={"servers": PASSWORD, "password": PASSWORD}),
    "a URL for a broker": lambda _: submit_approval(POSTGRES, "C0FFEE", operation_id="a"),
    "a user": lambda _: submit_approval(POSTGRES, "nobody", operation_id="a"),
    "a URL for a reader's broker": lambda _: read(POSTGRES, "shop"),
    "a reader": lambda _: read(POSTGRES, "no name"),
    "a URL with a mistake": lambda _: opened(PostgresBroker(f"{POSTGRES}?a")),
    "a password with a question mark": lambda _: opened(PostgresBroker(f"postgresql://worker:a?{PASSWORD}@db/shop")),
    "a password with a slash": lambda _: opened(PostgresBroker(f"postgresql://worker:{PASSWORD}/a@db/shop")),
}
AWAY: dict[str, Callable[[KeylessClient], Awaitable[object]]] = {
    "PostgresBroker": lambda _: opened(PostgresBroker(POSTGRES)),
    "NatsBroker": lambda _: opened(NatsBroker(NATS)),
    "NatsBroker with options": lambda _: opened(NatsBroker(f"nats://127.0.0.1:{PORT}", connect_options=OPTIONS)),
    "a worker on PostgreSQL": lambda client: ApprovalWorker(client, POSTGRES).prepare(),
    "a worker on NATS": lambda client: ApprovalWorker(client, NATS).prepare(),
}
SYNC: dict[str, Callable[[], object]] = {
    "a submission": lambda: sync.submit_approval(POSTGRES, "C0FFEE", operation_id="a"),
    "a reader": lambda: sync.next_outcome(POSTGRES, "shop").__enter__(),
    "a schema": lambda: sync.submit_approval(f"{POSTGRES}?schema=No", "C0FFEE", operation_id="a"),
}


def check(error: BaseException) -> None:
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next  # the caller's own frames know the URL
    assert traceback is not None
    for name, text in reports(error.with_traceback(traceback)).items():
        assert type(error).__name__ in text
        assert PASSWORD not in text, name
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename != __file__:
            assert not any(holds(value) for value in traceback.tb_frame.f_locals.values()), traceback.tb_frame
        traceback = traceback.tb_next


def holds(value: object, depth: int = 4) -> bool:
    """Return whether the password is in a value, or in what it is made of."""
    if isinstance(value, str | bytes):
        return PASSWORD in str(value)
    if depth == 0 or isinstance(value, models.Secret):
        return False
    parts: list[object] = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, dict):
        parts += value.values()
    elif isinstance(value, list | tuple | set | frozenset):
        parts += value
    return any(holds(part, depth - 1) for part in parts)


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES.keys())
async def test_no_report_of_a_mistake_shows_a_password(mistake: Callable[[KeylessClient], Any]) -> None:
    async with KeylessClient("a-key", base_url="http://127.0.0.1:1") as client:
        with pytest.raises((ConfigurationError, BrokerError)) as caught:  # noqa: PT012  # some await
            made = mistake(client)
            await made
    check(caught.value)


@pytest.mark.parametrize("start", AWAY.values(), ids=AWAY.keys())
async def test_no_report_of_a_broker_that_is_away_shows_its_password(
    start: Callable[[KeylessClient], Awaitable[object]],
) -> None:
    async with KeylessClient("a-key", base_url="http://127.0.0.1:1") as client:
        with pytest.raises(BrokerError) as caught:
            await start(client)
    check(caught.value)


async def call_with_pool(call: Callable[[PostgresBroker], Awaitable[object]]) -> None:
    async with asyncpg.create_pool(POSTGRES, min_size=0) as pool, PostgresBroker(pool) as broker:
        await call(broker)


@pytest.mark.parametrize(
    "call",
    [
        lambda: PostgresBroker(POSTGRES).open(),
        lambda: call_with_pool(lambda broker: submit_approval(broker, "C0FFEE", operation_id="a")),
        lambda: call_with_pool(lambda broker: read(broker, "shop")),
    ],
    ids=["a start", "a submission", "a reader"],
)
async def test_no_report_of_what_is_cancelled_while_it_connects_shows_a_password(
    call: Callable[[], Coroutine[Any, Any, object]],
) -> None:
    connected = asyncio.Event()
    ended = asyncio.Event()

    async def swallow(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected.set()
        await ended.wait()
        writer.close()

    async with await asyncio.start_server(swallow, "127.0.0.1", PORT):
        calling = asyncio.create_task(call())
        await connected.wait()
        calling.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await calling
        ended.set()
    check(caught.value)


@pytest.mark.parametrize("call", SYNC.values(), ids=SYNC.keys())
def test_no_report_shows_a_password_without_an_event_loop(call: Callable[[], object]) -> None:
    with pytest.raises((BrokerError, ConfigurationError)) as caught:
        call()
    check(caught.value)


def half_made() -> Iterator[tuple[str, object]]:
    """Yield each of our objects that the frames of a constructor's error hold."""
    untyped: dict[str, Callable[[Any], object]] = {
        "PostgresBroker": lambda _: PostgresBroker(POSTGRES, "No"),
        "PostgresConnection": PostgresConnection,
        "SqliteBroker": SqliteBroker,
        "EventKeys": EventKeys,
        "KeylessClient": lambda none: KeylessClient(POSTGRES, region=repr(none)),
    }
    for name, make in untyped.items():
        try:
            make(None)
        except (ConfigurationError, AttributeError, TypeError) as error:
            traceback = error.__traceback__
            while traceback is not None:
                for value in traceback.tb_frame.f_locals.values():
                    if type(value).__module__.startswith("aiokeyless"):
                        yield name, value
                traceback = traceback.tb_next


def test_an_object_that_was_not_made_has_a_repr() -> None:
    found = list(half_made())
    assert {name for name, _ in found} >= {"PostgresBroker", "PostgresConnection", "SqliteBroker", "EventKeys"}
    for _, value in found:
        assert PASSWORD not in repr(value)
