"""The soak's own parts: a check that finds nothing proves nothing unless it can find something."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
from typing import TYPE_CHECKING

import pytest
from waiting import PATIENCE

from benchmarks.approval_times import seeded_random
from benchmarks.report import quantile
from benchmarks.soak.fleet import Told, payload_of
from benchmarks.soak.journal import Reader, Writer
from benchmarks.soak.proxy import ANSWER_FAULTS, REQUEST_FAULTS, Fault, FaultyProxy
from benchmarks.soak.verdicts import HOLD, Ending, Entry, Event, Outcome, Verdict, Verdicts

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

# -- verdicts


def outcome(ending: Ending, *, ended: float = 60.0, how: str = "wait", **of: object) -> Outcome:
    return Outcome("a", how, ending, 0.0, ended, **{"deadline": 60.0, **of})  # type: ignore[arg-type]  # by name


def having(recorded: list[Event] | None, payload: str) -> Verdicts:
    """Return verdicts by what happened to an operation after half a minute; None: there was no such operation."""
    verdicts = Verdicts(memory=600.0)
    if recorded is not None:
        verdicts.record(Entry(Event.CREATED, 0.0, "a", "AB", payload))
        for event in recorded:
            verdicts.record(Entry(event, 30.0, "a"))
    return verdicts


APPROVED = outcome(Ending.APPROVED, ended=31.0, approved=("a", "AB", "pay"))
ANOTHER_USER = outcome(Ending.APPROVED, ended=31.0, approved=("a", "CD", "pay"))
ANOTHER_PAYLOAD = outcome(Ending.APPROVED, ended=31.0, approved=("a", "AB", "pay more"))
ANOTHER_OPERATION = outcome(Ending.APPROVED, ended=31.0, approved=("b", "AB", "pay"))
TOO_EARLY = outcome(Ending.APPROVED, ended=29.0, approved=("a", "AB", "pay"))
NOT_APPROVED = outcome(Ending.APPROVED, ended=31.0)
TIMED_OUT = outcome(Ending.TIMED_OUT)
TIMED_OUT_EARLIER = outcome(Ending.TIMED_OUT, deadline=29.0)


@pytest.mark.parametrize(
    ("told", "recorded", "verdict"),
    [
        (APPROVED, [Event.APPROVED], Verdict.RIGHT),
        (APPROVED, [], Verdict.WRONG),
        (APPROVED, None, Verdict.WRONG),
        (TOO_EARLY, [Event.APPROVED], Verdict.WRONG),
        (ANOTHER_USER, [Event.APPROVED], Verdict.WRONG),
        (ANOTHER_PAYLOAD, [Event.APPROVED], Verdict.WRONG),
        (ANOTHER_OPERATION, [Event.APPROVED], Verdict.WRONG),
        (NOT_APPROVED, [Event.APPROVED], Verdict.WRONG),
        (outcome(Ending.ALREADY_APPROVED), [Event.APPROVED], Verdict.RIGHT),
        (outcome(Ending.ALREADY_APPROVED), [], Verdict.WRONG),
        (TIMED_OUT, [], Verdict.RIGHT),
        (TIMED_OUT, [Event.APPROVED], Verdict.LOST),
        (TIMED_OUT_EARLIER, [Event.APPROVED], Verdict.RIGHT),
        (TIMED_OUT, None, Verdict.UNEXPECTED),
        (outcome(Ending.UNKNOWN), [Event.APPROVED], Verdict.RIGHT),
        (outcome(Ending.CANCELLED), [Event.APPROVED], Verdict.RIGHT),
        (outcome(Ending.HELD, how=HOLD), [Event.APPROVED], Verdict.RIGHT),
        (outcome(Ending.HELD), [Event.APPROVED], Verdict.UNEXPECTED),
        (outcome(Ending.MISMATCHED), [Event.SWAPPED], Verdict.RIGHT),
        (outcome(Ending.MISMATCHED), [Event.APPROVED], Verdict.UNEXPECTED),
        (outcome(Ending.NOT_CREATED, how="create_operation"), [], Verdict.RIGHT),
        (outcome(Ending.NOT_CREATED), [], Verdict.UNEXPECTED),
        (outcome(Ending.FAILED), [Event.APPROVED], Verdict.UNEXPECTED),
    ],
)
def test_outcome_is_decided_by_the_record_alone(told: Outcome, recorded: list[Event] | None, verdict: Verdict) -> None:
    verdicts = having(recorded, "pay")
    assert verdicts.evaluate(told) is verdict
    assert verdicts.verdicts == {verdict: 1}
    assert bool(verdicts.examples) is (verdict is not Verdict.RIGHT)


def told(outcome: str, *, payload: str = payload_of("a"), **of: object) -> Told:
    of |= {"version": 1, "outcome": outcome, "operation_id": "a", "user_id": "AB", "deliveries": 4}
    of |= {"payload_sha256": hashlib.sha256(payload.encode()).hexdigest()}
    of |= dict.fromkeys(("requested_at", "decided_at"), "2026-11-30T08:00:00Z")
    return Told.of_row(f"\\x{json.dumps(of).encode().hex()}", "61.0")


@pytest.mark.parametrize(
    ("told", "recorded", "verdict"),
    [
        (told("approved"), [Event.APPROVED], Verdict.RIGHT),
        (told("approved"), [], Verdict.WRONG),
        (told("approved"), None, Verdict.WRONG),
        (told("approved", payload="another"), [Event.APPROVED], Verdict.WRONG),
        (told("expired", answered=True, asked=True), [], Verdict.RIGHT),
        (told("expired", answered=True, asked=True), [Event.APPROVED], Verdict.LOST),
        (told("expired", answered=True), None, Verdict.UNEXPECTED),
        (told("expired", answered=False, asked=True), [Event.APPROVED], Verdict.RIGHT),
        (told("expired", answered=True, asked=False), None, Verdict.RIGHT),
        (told("failed", reason="mismatch"), [Event.SWAPPED], Verdict.RIGHT),
        (told("failed", reason="mismatch"), [Event.APPROVED], Verdict.UNEXPECTED),
        (told("failed", reason="already_approved"), [Event.APPROVED], Verdict.UNEXPECTED),
    ],
)
def test_a_workers_outcome_is_decided_by_the_record(told: Told, recorded: list[Event] | None, verdict: Verdict) -> None:
    assert having(recorded, payload_of("a")).evaluate(told.as_outcome(0.0, expires_in=60.0)) is verdict


def test_lateness_counts_from_the_approval_or_from_a_later_wait() -> None:
    verdicts = having([Event.APPROVED], "pay")
    verdicts.evaluate(APPROVED)
    verdicts.evaluate(Outcome("a", "resumed", Ending.APPROVED, 100.0, 100.5, approved=("a", "AB", "pay")))
    assert verdicts.lateness == [1.0, 0.5]


def test_old_operations_are_forgotten() -> None:
    verdicts = Verdicts(memory=10.0)
    verdicts.record(Entry(Event.CREATED, 0.0, "a", "AB", "pay"))
    verdicts.record(Entry(Event.CREATED, 11.0, "b", "AB", "pay"))
    verdicts.record(Entry(Event.APPROVED, 12.0, "a"))
    assert verdicts.evaluate(APPROVED) is Verdict.WRONG


def test_quantile_is_what_its_share_of_the_values_does_not_exceed() -> None:
    values = [k / 1000 for k in range(99, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 1.0), quantile([], 0.5)) == (0.05, 0.099, 0.0)


# -- files


def test_reader_yields_complete_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "record"
    reader = Reader(path, Entry)
    assert list(reader.read()) == []
    first, second = Entry(Event.CREATED, 1.0, "a", "AB", "pay", due=2.5), Entry(Event.APPROVED, 2.5, "a")
    with Writer(path) as writer:
        writer.write(first)
        assert list(reader.read()) == [first]
        with path.open("ab") as file:
            file.write(b'["appro')
        assert list(reader.read()) == []
        with path.open("ab") as file:
            file.write(b'ved",2.5,"a"]\n')
    assert list(reader.read()) == [second]


# -- the proxy

ANSWER = b"ok" * 500


class Scripted(FaultyProxy):
    """A proxy with one fault, for the first bytes in its direction."""

    def __init__(self, fault: Fault | None, *, of_request: bool = False) -> None:
        super().__init__(seeded_random(1), longest_delay=0.01)
        self._next = fault
        self.struck = asyncio.Event()
        self._faults = REQUEST_FAULTS if of_request else ANSWER_FAULTS

    def draw(self, faults: tuple[Fault, ...]) -> Fault | None:
        if faults is not self._faults:
            return None
        self.struck.set()
        fault, self._next = self._next, None
        return fault


@contextlib.asynccontextmanager
async def scripted(fault: Fault | None, *, of_request: bool = False) -> AsyncGenerator[tuple[Scripted, list[bytes]]]:
    """Run such a proxy before a server that answers each chunk with ANSWER; the list is what the server received."""
    received: list[bytes] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                received.append(data)
                writer.write(ANSWER)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        async with Scripted(fault, of_request=of_request) as proxy:
            proxy.target = server.sockets[0].getsockname()[1]
            yield proxy, received
    finally:
        server.close()
        for writer in writers:
            writer.transport.abort()
        await asyncio.sleep(0)


async def exchange(proxy: FaultyProxy, *, enough: Callable[[bytes], bool]) -> bytes:
    """Send a request, and return what is answered until it is enough or the connection ends."""
    port = int(proxy.url.rpartition(":")[2])
    async with asyncio.timeout(PATIENCE):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(b"request")
            answer = b""
            while not enough(answer) and (data := await reader.read(65536)):
                answer += data
            return answer
        finally:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


def complete(answer: bytes) -> bool:
    return len(answer) >= len(ANSWER)


def never(_answer: bytes) -> bool:
    return False


@pytest.mark.parametrize("fault", [None, Fault.DELAY])
async def test_proxy_forwards_what_no_fault_changes(fault: Fault | None) -> None:
    async with scripted(fault) as (proxy, received):
        assert await exchange(proxy, enough=complete) == ANSWER
        assert received == [b"request"]


@pytest.mark.parametrize(
    ("fault", "is_right"),
    [
        (Fault.HALF_CLOSE, lambda answer: answer == b""),
        (Fault.TRUNCATION, lambda answer: len(answer) < len(ANSWER) and ANSWER.startswith(answer)),
    ],
)
async def test_answer_that_is_cut_off_ends_the_connection(fault: Fault, is_right: Callable[[bytes], bool]) -> None:
    async with scripted(fault) as (proxy, _):
        assert is_right(await exchange(proxy, enough=never))


async def test_garbage_comes_in_place_of_an_answer_or_after_it() -> None:
    async with scripted(Fault.GARBAGE) as (proxy, _):
        assert (await exchange(proxy, enough=bool)) not in {b"", ANSWER}
    async with scripted(Fault.EXTRA) as (proxy, _):
        answer = await exchange(proxy, enough=lambda answer: len(answer) > len(ANSWER))
        assert answer.startswith(ANSWER)


@pytest.mark.parametrize("of_request", [False, True])
async def test_reset_is_seen_by_the_client(of_request: bool) -> None:
    async with scripted(Fault.RESET, of_request=of_request) as (proxy, _):
        with pytest.raises(ConnectionResetError):
            await exchange(proxy, enough=never)


async def test_dropped_request_never_arrives_and_the_connection_stays_open() -> None:
    async with scripted(Fault.DROP, of_request=True) as (proxy, received):
        hanging = asyncio.create_task(exchange(proxy, enough=never))
        await asyncio.wait_for(proxy.struck.wait(), PATIENCE)
        assert await exchange(proxy, enough=complete) == ANSWER  # on a connection of its own
        assert not hanging.done()
        assert received == [b"request"]
        proxy.reset_all()
        with pytest.raises(ConnectionResetError):
            await hanging


async def test_truncated_request_ends_the_connection_of_the_service() -> None:
    async with scripted(Fault.TRUNCATION, of_request=True) as (proxy, received):
        await exchange(proxy, enough=never)
        assert b"request" not in received


async def test_connection_is_reset_while_there_is_no_service() -> None:
    with socket.socket() as nobody:  # bound, and not listening
        nobody.bind(("127.0.0.1", 0))
        for target in (None, nobody.getsockname()[1]):
            async with FaultyProxy(seeded_random(1)) as proxy:
                proxy.target = target
                with pytest.raises(ConnectionResetError):
                    await exchange(proxy, enough=never)


async def test_proxy_counts_the_faults_that_it_draws() -> None:
    proxy = FaultyProxy(seeded_random(1), rate=0.5)
    drawn = [proxy.draw(REQUEST_FAULTS) for _ in range(200)]
    assert 50 < proxy.counts.total() < 150
    assert proxy.counts.total() == sum(fault is not None for fault in drawn)
    assert Fault.GARBAGE not in drawn  # a request never arrives changed
