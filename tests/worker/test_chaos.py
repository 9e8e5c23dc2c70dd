"""Workers and a broker that are killed, and a service that fails, all at once: nothing is lost, nothing is doubled."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess
import sys
from collections import Counter
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, NoReturn

import msgspec
import nats
import nats.errors
import pytest
from nats_server import OUTCOMES, REQUESTS, NatsServer, prepare
from waiting import PATIENCE, until

from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalEvent, BrokerError, Outcome, submit_approval
from aiokeyless.worker.nats import StreamSettings
from aiokeyless.worker.nats.intake import ACK_WAIT

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from nats.aio.client import Client

    from aiokeyless import Operation

pytestmark = pytest.mark.chaos

PROGRAM: Final = Path(__file__).with_name("worker_process.py")
REQUESTS_MADE: Final = 2000
ASKED_IN: Final = 8.0  # seconds over which they are made
EXPIRES_IN: Final = 9.0
FAR_OFF: Final = 600.0  # seconds to a deadline that passes on no machine, however busy it is
KILLS: Final = 12


class Case(NamedTuple):
    """A request: when its user approves it, and what becomes of it.

    Args:
        approved_after: Seconds after the user was asked; None: the user never approves.
        expires_in: Seconds to its deadline.
        outcome: The only one that can be true, on a slow machine too; None: the approval races with the final poll.
    """

    approved_after: float | None
    expires_in: float
    outcome: Outcome | None


class Fleet:
    """Worker processes, and what starts them again, as an orchestrator does."""

    def __init__(self, size: int, broker: NatsServer, sandbox: Sandbox) -> None:
        # -P: the folder of the program has one that is called nats, and must not be imported from.
        self._command = [sys.executable, "-P", str(PROGRAM), broker.url, sandbox.url]
        self._environment = {**os.environ, "KEYLESS_API_KEY": sandbox.api_key}
        self._processes = [self._started() for _ in range(size)]

    def kill_one(self, turn: int) -> None:
        """Kill one at once, in the middle of whatever it does."""
        process = self._processes[turn % len(self._processes)]
        process.kill()
        process.wait()

    async def keep_running(self) -> NoReturn:
        """Start those again that have ended: killed, or with no broker to connect to."""
        while True:
            self._processes = [process if process.poll() is None else self._started() for process in self._processes]
            await asyncio.sleep(0.2)

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self._command, env=self._environment, stderr=subprocess.DEVNULL)


class Users:
    """They approve so many seconds after they were asked as the payload says, if it says so."""

    def __init__(self) -> None:
        self.approved_at: dict[str, datetime] = {}
        self.sandbox = Sandbox(auto_approve=self._asked)

    def _asked(self, operation: Operation) -> None:
        if operation.operation_payload is not None:
            delay = float(operation.operation_payload)
            asyncio.get_running_loop().call_later(delay, self._approve, operation.operation_id)

    def _approve(self, operation_id: str) -> None:
        self.sandbox.approve(operation_id)
        self.approved_at[operation_id] = datetime.now(UTC)


@asynccontextmanager
async def stage(folder: Path, workers: int) -> AsyncGenerator[tuple[Users, NatsServer, Client, Fleet]]:
    """Set up people, a service, a broker with its streams, a connection to it, and workers."""
    users, broker = Users(), NatsServer(folder)
    await broker.start()
    try:
        async with users.sandbox, await nats.connect(broker.url, error_cb=_unheard) as connection:
            await prepare(connection.jetstream(timeout=PATIENCE), StreamSettings(), ack_wait=ACK_WAIT)
            fleet = Fleet(workers, broker, users.sandbox)
            running = asyncio.create_task(fleet.keep_running())
            try:
                yield users, broker, connection, fleet
            finally:
                running.cancel()
                fleet.end()
    finally:
        broker.stop()


async def _unheard(_error: Exception) -> None:
    """Take note of nothing: that the broker is away for a while is what is tested."""


async def ask(connection: Client, operation_id: str, case: Case) -> None:
    """Submit a request as one does who means it: again, until the broker has it."""
    payload = None if case.approved_after is None else str(case.approved_after)
    while True:
        try:
            await submit_approval(
                connection, "C0FFEE", operation_id=operation_id, operation_payload=payload, expires_in=case.expires_in
            )
        except BrokerError:
            continue
        return


async def all_events(connection: Client) -> list[ApprovalEvent]:
    """Wait until no request is left, and return every event that there is."""
    stream, hasty = connection.jetstream(timeout=PATIENCE), connection.jetstream()

    async def no_request_is_left() -> bool:
        try:
            return (await hasty.stream_info(REQUESTS)).state.messages == 0
        except nats.errors.TimeoutError:  # a request that the connection lost with the broker has no answer
            return False

    await until(no_request_is_left, PATIENCE)
    stored = (await stream.stream_info(OUTCOMES)).state
    messages = [await stream.get_msg(OUTCOMES, number) for number in range(1, stored.last_seq + 1)]
    return [msgspec.json.decode(message.data or b"", type=ApprovalEvent) for message in messages]


async def fail_one_in_ten(sandbox: Sandbox, chance: random.Random) -> NoReturn:
    """Answer 503 to a tenth of the requests, before or after they took effect."""
    seen = sandbox.request_count
    while True:
        await asyncio.sleep(0.01)
        for _ in range(sandbox.request_count - seen):
            seen += 1
            if chance.random() < 0.1:
                sandbox.fail_next(stored=chance.random() < 0.5)


async def kill_workers(fleet: Fleet) -> None:
    for turn in range(KILLS):
        await asyncio.sleep(1)
        fleet.kill_one(turn)


async def restart_broker(broker: NatsServer) -> None:
    await asyncio.sleep(5)
    broker.kill()
    await asyncio.sleep(1)
    await broker.start()


async def ask_everybody(connection: Client, cases: dict[str, Case]) -> None:
    began = asyncio.get_running_loop().time()
    for number, (operation_id, case) in enumerate(cases.items()):
        ahead = began + number * ASKED_IN / len(cases) - asyncio.get_running_loop().time()
        await asyncio.sleep(max(0.0, ahead))
        await ask(connection, operation_id, case)


def case_by(chance: random.Random) -> Case:
    """Some approve in time, some never, and some about when the time is up."""
    kind = chance.random()
    if kind < 0.25:
        return Case(None, EXPIRES_IN, Outcome.EXPIRED)
    if kind < 0.45:
        return Case(EXPIRES_IN + chance.uniform(-2, 4), EXPIRES_IN, None)
    return Case(chance.uniform(0.2, 6), FAR_OFF, Outcome.APPROVED)


async def test_each_request_has_one_outcome_and_it_is_true_whatever_dies(tmp_path: Path) -> None:
    chance = random.Random(5)  # noqa: S311  # the same trouble each time
    cases = {f"txn-{number}": case_by(chance) for number in range(REQUESTS_MADE)}
    async with stage(tmp_path, workers=3) as (users, broker, connection, fleet):
        faults = asyncio.create_task(fail_one_in_ten(users.sandbox, chance))
        await asyncio.gather(ask_everybody(connection, cases), kill_workers(fleet), restart_broker(broker))
        events = await all_events(connection)
        faults.cancel()
        operations = set(users.sandbox.operations)
    assert Counter(event.operation_id for event in events) == dict.fromkeys(cases, 1)
    assert operations <= cases.keys()
    by_id = {event.operation_id: event for event in events}
    assert not [
        (by_id[name], by_id[name].reason, case)
        for name, case in cases.items()
        if not is_true(by_id[name], case, users.approved_at.get(name))
    ]
    assert not [by_id[name] for name, case in cases.items() if case.outcome not in {by_id[name].outcome, None}]
    kinds = Counter(event.outcome for event in events)
    assert kinds[Outcome.APPROVED] > REQUESTS_MADE / 2
    assert kinds[Outcome.EXPIRED] > REQUESTS_MADE / 5


def is_true(event: ApprovalEvent, case: Case, approved_at: datetime | None) -> bool:
    """Return whether an event says what was so at its final poll, which started at the deadline or later."""
    if event.outcome is Outcome.APPROVED:
        return approved_at is not None and approved_at <= event.decided_at
    deadline = event.requested_at + timedelta(seconds=case.expires_in)
    in_time = approved_at is not None and approved_at < deadline
    return event.outcome is Outcome.EXPIRED and not (
        event.answered and in_time
    )  # unanswered: it says that it is unknown


async def outcomes_with(workers: int, folder: Path) -> set[tuple[str | None, Outcome, bool | None]]:
    async with stage(folder, workers) as (_, _, connection, _):
        for number in range(60):
            approves = number % 3 == 0
            case = Case(0.3, FAR_OFF, Outcome.APPROVED) if approves else Case(None, 1.5, Outcome.EXPIRED)
            await ask(connection, f"txn-{number}", case)
        events = await all_events(connection)
    assert len(events) == 60
    return {(event.operation_id, event.outcome, event.answered) for event in events}


async def test_one_worker_and_three_come_to_the_same_outcomes(tmp_path: Path) -> None:
    alone = await outcomes_with(1, tmp_path / "one")
    assert alone == await outcomes_with(3, tmp_path / "three")
    assert {outcome for _, outcome, _ in alone} == {Outcome.APPROVED, Outcome.EXPIRED}
