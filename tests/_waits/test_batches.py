"""Very many waits that end or leave at once are handled over several turns of the loop, a batch in each."""

from __future__ import annotations

import asyncio
import selectors
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from leaks import armed_timers, tasks_since
from tenacity import wait_fixed

from aiokeyless import (
    ApprovalTicket,
    ApprovalTimeoutError,
    ApprovalUnknownError,
    ClientClosedError,
    KeylessClient,
    Operation,
)
from aiokeyless._rules import approval
from aiokeyless._waits.poller import Poller
from aiokeyless._waits.state import PolledOperation
from aiokeyless.events import WaitEnded
from aiokeyless.ticket import payload_digest
from benchmarks.simulation import HANGING, SimulatedTransport

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tenacity import RetryCallState

    from aiokeyless._waits.poller import FutureWait
    from aiokeyless._waits.state import Wait
    from aiokeyless.events import Event
    from aiokeyless.sandbox import Sandbox

pytestmark = pytest.mark.looptime

MOST = 128  # waits in a turn
MANY = 500


def start(poller: Poller, operation_id: str, *, timeout: float = 60.0, missing: bool = True) -> FutureWait:
    return poller.start(operation_id, ticket=None, timeout=timeout, schedule=None, may_be_missing=missing)


@pytest.fixture
async def poller(client: KeylessClient) -> Poller:
    return client._open().poller  # the batches are its own affair: nothing public shows turns of the loop


async def waiting_by_turn(poller: Poller) -> list[int]:
    """Return how many waits were under way before each turn of the loop, until there are none."""
    counts = [poller.statistics().waiting]
    while counts[-1]:
        await asyncio.sleep(0)
        counts.append(poller.statistics().waiting)
    return counts


async def sandbox_has_pending(sandbox: Sandbox) -> None:
    async with sandbox.client() as other:
        await other.create_operation("AB", operation_id="op")
    sandbox.requests.clear()


async def first_batch(waits: list[FutureWait]) -> None:
    """Let turns pass until the first of the waits has ended."""
    while not waits[0].done():  # noqa: ASYNC110  # this very turn is what is tested
        await asyncio.sleep(0)


class LongTurns(asyncio.SelectorEventLoop):
    """A loop of which each turn takes so many virtual seconds, whatever is done in it: the process gets little CPU."""

    class Selector(selectors.SelectSelector):
        now = 0.0

        def __init__(self, turn: float) -> None:
            super().__init__()
            self.turn = turn

        def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
            self.now += max(self.turn, timeout or 0.0)
            return []

    def __init__(self, turn: float) -> None:
        self._clock = self.Selector(turn)
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now


def most_in_a_turn(counts: list[int]) -> int:
    return max(before - after for before, after in pairwise(counts))


class TestLeaving:
    async def test_the_first_ones_leave_at_once_and_the_others_in_the_next_turns(self, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(MANY)]
        for wait in waits:
            poller.leave(wait)
        assert all(wait.cancelled() for wait in waits)
        assert poller.statistics().waiting == MANY - MOST
        assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
        assert armed_timers() == []

    async def test_one_that_leaves_later_leaves_at_once(self, poller: Poller) -> None:
        for _ in range(3):
            for wait in [start(poller, f"op{k}") for k in range(MOST)]:
                poller.leave(wait)
            assert poller.statistics().waiting == 0
            for _ in range(2):
                await asyncio.sleep(0)

    async def test_those_of_one_caller_leave_in_batches_too(self, sandbox: Sandbox) -> None:
        sandbox.latency = 60
        events: list[Event] = []
        async with sandbox.client(listeners=[events.append]) as client:
            poller = client._open().poller
            waits = [start(poller, f"op{k}") for k in range(MANY)]
            await asyncio.sleep(1)
            poller.leave_all(waits)
            assert poller.statistics().waiting == MANY - MOST
            assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
            assert all(wait.cancelled() for wait in waits)
            poller.leave_all(waits)  # they have left: harmless
        assert [event.seconds for event in events if isinstance(event, WaitEnded)] == [1.0] * MANY

    async def test_one_that_ends_before_its_turn_keeps_its_result(self, poller: Poller) -> None:
        waits = [start(poller, f"op{k}") for k in range(MOST + 2)]
        poller.leave_all(waits)
        await poller.aclose()
        assert [type(wait.result()) for wait in waits[MOST:]] == [ClientClosedError] * 2
        await waiting_by_turn(poller)

    async def test_closing_the_client_ends_them_in_batches(self, poller: Poller) -> None:
        for k in range(MANY):
            start(poller, f"op{k}")
        closing = asyncio.create_task(poller.aclose())
        assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
        await closing

    async def test_closing_the_client_does_not_wait_for_callers_that_are_gone(self, sandbox: Sandbox) -> None:
        events: list[Event] = []
        async with sandbox.client(listeners=[events.append]) as client:
            waits = [start(client._open().poller, "op") for _ in range(3)]
            waits[0].cancel()
            await client.aclose()
            assert client.statistics.waiting == 0
        assert [event.outcome for event in events if isinstance(event, WaitEnded)] == ["cancelled", "closed", "closed"]

    async def test_a_wait_for_the_same_operation_goes_on(
        self, sandbox: Sandbox, poller: Poller, caplog: pytest.LogCaptureFixture
    ) -> None:
        waits = [start(poller, "op") for _ in range(MANY)]
        poller.leave_all(waits)
        another = start(poller, "op")
        sandbox.approve("op", user_id="AB")
        assert getattr(await another, "is_approved", False)
        assert poller.statistics().waiting == 0
        assert caplog.records == []


class TestOneAnswerForMany:
    async def test_an_approval_ends_them_in_batches(
        self, sandbox: Sandbox, poller: Poller, caplog: pytest.LogCaptureFixture
    ) -> None:
        waits = [start(poller, "op") for _ in range(MANY)]
        sandbox.approve("op", user_id="AB")
        assert most_in_a_turn(await waiting_by_turn(poller)) <= MOST
        assert {getattr(wait.result(), "is_approved", False) for wait in waits} == {True}
        assert len(sandbox.requests) == 1
        assert caplog.records == []

    async def test_a_pending_answer_asks_their_schedule_once(self, poller: Poller) -> None:
        asked: list[object] = []

        class Counted(wait_fixed):
            def __call__(self, retry_state: RetryCallState) -> float:
                asked.append(retry_state)
                return 1000.0

        schedule = Counted(1)
        for _ in range(MANY):
            poller.start("op", ticket=None, timeout=60.0, schedule=schedule, may_be_missing=True)
        await asyncio.sleep(1)
        assert len(asked) == 1
        await poller.aclose()

    async def test_a_payload_has_one_hash(
        self, sandbox: Sandbox, poller: Poller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        hashed: list[str | None] = []

        def digest(payload: str | None) -> str:
            hashed.append(payload)
            return payload_digest(payload)

        monkeypatch.setattr(approval, "payload_digest", digest)
        sandbox.approve("op", user_id="AB")
        texts = [ApprovalTicket.for_operation("op", user_id="AB").to_json()] * MANY
        waits = [
            poller.start("op", ticket=ApprovalTicket.from_json(t), timeout=60.0, schedule=None, may_be_missing=False)
            for t in texts
        ]
        await waiting_by_turn(poller)
        assert {type(wait.result()) for wait in waits} == {Operation}
        assert len(hashed) == 1

    async def test_one_that_leaves_before_its_batch_is_cancelled(self, sandbox: Sandbox, poller: Poller) -> None:
        waits = [start(poller, "op") for _ in range(MANY)]
        sandbox.approve("op", user_id="AB")
        await first_batch(waits)
        poller.leave(waits[-1])
        await waiting_by_turn(poller)
        assert waits[-1].cancelled()
        assert {type(wait.result()) for wait in waits[:-1]} == {Operation}

    async def test_cancelling_a_worker_between_batches_costs_nothing(self, sandbox: Sandbox, poller: Poller) -> None:
        before = asyncio.all_tasks()
        waits = [start(poller, "op") for _ in range(MANY)]
        sandbox.approve("op", user_id="AB")
        await first_batch(waits)
        for task in tasks_since(before):
            task.cancel()
        await waiting_by_turn(poller)
        assert {type(wait.result()) for wait in waits} == {Operation}


class TestDeadlines:
    async def test_waits_of_one_operation_share_a_final_poll_in_batches(self, sandbox: Sandbox, poller: Poller) -> None:
        await sandbox_has_pending(sandbox)
        schedule = wait_fixed(1000)
        waits = [
            poller.start("op", ticket=None, timeout=5.0, schedule=schedule, may_be_missing=False) for _ in range(MANY)
        ]
        await asyncio.wait(waits)
        assert {type(wait.result()) for wait in waits} == {ApprovalTimeoutError}
        assert len(sandbox.requests) == 2

    async def test_many_deadlines_of_one_operation_are_marked_one_by_one(
        self, sandbox: Sandbox, poller: Poller, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        visited: list[int] = []
        active_waits = PolledOperation.active_waits

        def counted(polled: PolledOperation) -> list[Wait]:
            visited.append(polled.live)
            return active_waits(polled)

        sandbox.latency = 3600.0
        waits = [start(poller, "op", timeout=5.0 + k / 10_000) for k in range(MANY)]
        await asyncio.sleep(4.9)
        monkeypatch.setattr(PolledOperation, "active_waits", counted)
        await asyncio.sleep(0.2)  # all deadlines pass
        assert len(visited) <= 2 * 4 * 64  # by the final polls that may be in flight, and not by each of the deadlines
        await asyncio.wait(waits)
        assert {type(wait.result()) for wait in waits} == {ApprovalUnknownError}

    async def test_a_hold_whose_time_is_over_as_a_poll_starts_is_no_timeout(
        self, sandbox: Sandbox, client: KeylessClient, poller: Poller
    ) -> None:
        await sandbox_has_pending(sandbox)
        for _ in range(MANY):
            start(poller, "other", timeout=1.0)
        holds = [client.hold_for_approval("op", seconds=1.0, schedule=wait_fixed(1)) for _ in range(MANY)]
        assert set(await asyncio.gather(*holds)) == {None}
        await poller.aclose()


class TestLongTurns:
    """Where a turn of the loop takes a second, there are few of them."""

    @pytest.fixture
    def loop(self) -> Iterator[LongTurns]:
        loop = LongTurns(1.0)
        yield loop
        loop.close()

    def test_waits_do_not_end_ever_later(self, loop: LongTurns) -> None:
        """A hundred in each turn; and each has a deadline that passes, and an end."""
        late: list[float] = []

        def ended(wait: FutureWait) -> None:
            late.append(loop.time() - wait.deadline)

        async def scenario() -> None:
            poller = Poller(SimulatedTransport(lambda *_: HANGING), schedule=wait_fixed(5), max_in_flight=64)
            for turn in range(40):
                for k in range(100):
                    start(poller, f"op{turn}-{k}", timeout=5.0).add_done_callback(ended)
                await asyncio.sleep(0)
            await waiting_by_turn(poller)
            await poller.aclose()

        loop.run_until_complete(scenario())
        assert len(late) == 4000
        assert max(late) <= 2.0 + 2.0  # a turn until the deadline is noticed, and one until the caller wakes up

    def test_however_late_they_are_not_all_of_them_end_in_one_turn(self, loop: LongTurns) -> None:
        async def scenario() -> None:
            poller = Poller(SimulatedTransport(lambda *_: HANGING), schedule=wait_fixed(5), max_in_flight=64)
            for k in range(30 * MOST):
                start(poller, f"op{k}", timeout=5.0)
            counts = await waiting_by_turn(poller)
            # Those whose poll ends in the same turn end, too: 64 ordinary polls, and four times as many final ones.
            assert MOST < most_in_a_turn(counts) <= 3 * MOST + 5 * 64
            await poller.aclose()

        loop.run_until_complete(scenario())
