"""Two workers in a world that goes wrong, from one seed, on a clock that moves: what must hold whatever happens.

The broker loses acknowledgements, delivers twice, late and in another order; claims are answered or not; workers are
killed; Keyless lags, fails and refuses; users approve early, late, in the last moment, or never. What came out is
compared with what the users did. A test that fails names its seed: the same seed is the same story.
"""

from __future__ import annotations

import asyncio
import math
import random as global_random
from datetime import UTC, datetime, timedelta
from random import Random
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import pytest

from aiokeyless.errors import (
    InvalidRequestError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    TransportError,
)
from aiokeyless.worker import ApprovalEvent, ApprovalWorker, Outcome, next_outcome, submit_approval
from aiokeyless.worker.broker import Claimed, Exchange, Message, UnavailableError
from aiokeyless.worker.messages import read_event
from aiokeyless.worker.sqlite import SqliteBroker
from benchmarks.keyless import USER, Keyless, Stored

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from aiokeyless import KeylessClient

pytestmark = pytest.mark.looptime(noop_cycles=1)  # nothing here waits for sockets

BEGAN_AT: Final = datetime(2026, 11, 24, 12, tzinfo=UTC)
REQUESTS: Final = 40
SUBMITTED_WITHIN: Final = 90.0  # seconds
LONGEST: Final = 1200.0  # seconds until every request must be decided


# -- Keyless, and the users


class UnsteadyKeyless(Keyless):
    """A service that lags, fails and refuses.

    Args:
        random: Decides what happens.
        approves_after: Seconds after its creation until the user of an operation approves it.
    """

    def __init__(self, random: Random, approves_after: dict[str, float]) -> None:
        super().__init__()
        self._random = random
        self._approves_after = approves_after
        self._outages = [(at, at + random.uniform(1, 40)) for at in (random.uniform(0, 200) for _ in range(3))]
        self._refusals = [(at, at + random.uniform(0.5, 5)) for at in (random.uniform(0, 200) for _ in range(2))]

    def approves_after(self, operation_id: str) -> float:
        return self._approves_after[operation_id]

    def misses(self, stored: Stored) -> bool:
        return self.now() - stored.created_at < 2.0 and self._random.random() < 0.3  # a replica lags

    def lose_answer(self, path: str) -> None:
        if self._random.random() <= 0.2:
            raise TransportError("the answer was lost", method="POST", path=path, sent=True)

    async def exchange(self, method: str, path: str, _operation_id: str) -> None:
        random = self._random
        await asyncio.sleep(random.uniform(0.02, 0.4))
        if any(begin <= self.now() < end for begin, end in self._outages):
            raise random.choice(
                [
                    ServerError(status=503, method=method, path=path),
                    TransportError("refused", method=method, path=path, sent=False),
                ]
            )
        if path.startswith("/v2/operations/txn") and any(begin <= self.now() < end for begin, end in self._refusals):
            raise PermissionDeniedError(status=403, method=method, path=path)
        fate = random.random()
        if fate < 0.02:
            await asyncio.sleep(self.request_timeout)
            raise RequestTimeoutError("no answer", method=method, path=path, sent=False)
        if fate < 0.06:
            raise ServerError(status=500, method=method, path=path)
        if fate < 0.07:
            raise RateLimitError(status=429, method=method, path=path, retry_after=random.uniform(0, 3))


# -- the broker


class Broker(SqliteBroker):
    """A broker in memory of which each answer may be lost.

    Args:
        random: Decides what happens.
    """

    def __init__(self, random: Random) -> None:
        super().__init__(":memory:")
        self._random = random

    async def open(self) -> None:
        await super().open()
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._clock = lambda: BEGAN_AT + timedelta(seconds=loop.time() - began + 1e-6)

    @property
    def stored(self) -> list[ApprovalEvent]:
        rows = self._store._connection.execute("SELECT body FROM outcome").fetchall()
        return [read_event(body) for (body,) in rows]

    def _lose(self, share: float) -> None:
        if self._random.random() < share:
            raise UnavailableError("the broker did not answer")

    async def take(self, up_to: int, within: float, *, probing: bool = False) -> Sequence[Message]:
        messages = await super().take(up_to, within, probing=probing)
        for message in messages:
            if self._random.random() < 0.05:  # now and then one is delivered again while it is processed
                again = asyncio.get_running_loop().time() + self._random.uniform(0, 2)
                asyncio.get_running_loop().call_at(again, self._deliver_again, message)
        return messages

    def _deliver_again(self, message: Message) -> None:
        if self._is_open:
            self._store._connection.execute(
                "UPDATE waiting SET due_at = 0 WHERE id = ? AND deliveries = ?", (message.id, message.number)
            )
            self._due.notify()

    async def put_off(self, message: Message, delay: float, exchange: Exchange) -> None:
        self._lose(0.05)
        await super().put_off(message, delay * self._random.uniform(0.9, 1.1), exchange)
        self._lose(0.03)

    async def decide(self, message: Message, event: ApprovalEvent) -> bool:
        self._lose(0.1)
        is_new = await super().decide(message, event)
        self._lose(0.05)
        return is_new

    async def claim(self, message: Message) -> Claimed:
        self._lose(0.03)
        claimed = await super().claim(message)
        self._lose(0.03)
        return claimed

    async def holds(self, message: Message) -> bool:
        self._lose(0.03)
        return await super().holds(message)

    async def unclaim(self, message: Message, token: int) -> bool:
        self._lose(0.03)
        is_free = await super().unclaim(message, token)
        self._lose(0.03)
        return is_free


# -- one story


class Asked(NamedTuple):
    """A request: what is submitted, and when; `number` comes back as its context."""

    number: int
    at: float
    operation_id: str
    payload: str
    expires_in: float
    times: int


class Story:
    """Everything that happens from one seed.

    Attributes:
        asked: The requests.
        keyless: The service, with all operations that were created.
        refused: The numbers of requests that the broker did not take.
        older: The operations that were created and approved before anybody asked.
        broker: The broker, with all outcomes that were stored.
        told: The events as an application read them.
    """

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)  # noqa: S311  # guards nothing
        self.asked: list[Asked] = []
        self.older: set[str] = set()
        self.refused: set[int] = set()
        self.told: list[ApprovalEvent] = []
        self.kept: list[ApprovalEvent] = []
        approves_after: dict[str, float] = {}
        for number in range(REQUESTS):
            self._plan(number, approves_after)
        self.broker = Broker(self._random)
        self.keyless = UnsteadyKeyless(self._random, approves_after)
        now = self.keyless.now()
        for operation_id in self.older:
            payload = next(each.payload for each in self.asked if each.operation_id == operation_id)
            self.keyless.operations[operation_id] = Stored(payload, now - 60.0, now - 30.0)

    def _plan(self, number: int, approves_after: dict[str, float]) -> None:
        random = self._random
        expires_in = random.choice((5.0, 30.0, 120.0))
        at = random.uniform(0, SUBMITTED_WITHIN)
        request = Asked(number, at, f"txn-{number}", f"Pay {number}", expires_in, random.choice((1, 1, 1, 3)))
        kind = random.random()
        if kind < 0.1 and self.asked:  # under the name of another request
            request = request._replace(operation_id=random.choice(self.asked).operation_id)
        elif kind < 0.2:
            self.older.add(request.operation_id)
        self.asked.append(request)
        when = (math.inf, random.lognormvariate(2.0, 0.8), expires_in - random.uniform(-0.3, 0.6))
        # Nobody approves in no time.
        approves_after.setdefault(request.operation_id, max(1.2, random.choices(when, (1, 2, 1))[0]))

    async def play(self) -> None:
        tasks = [asyncio.create_task(self._submit(request)) for request in self.asked]
        serving = [asyncio.create_task(self._work()) for _ in range(2)]
        serving.append(asyncio.create_task(self._read()))
        try:
            async with asyncio.timeout(LONGEST):
                await asyncio.gather(*tasks)
                while (await self.broker.inspect()).waiting:
                    await asyncio.sleep(1.0)
                    for task in serving:
                        assert not task.done(), task.exception()
            await asyncio.sleep(1.0)  # what was decided last is read
        finally:
            for task in (*tasks, *serving):
                task.cancel()
            await asyncio.wait((*tasks, *serving))

    async def _submit(self, request: Asked) -> None:
        await asyncio.sleep(request.at)
        for _ in range(request.times):
            try:
                await submit_approval(
                    self.broker,
                    USER,
                    operation_id=request.operation_id,
                    operation_payload=request.payload,
                    expires_in=request.expires_in,
                    context=request.number,
                )
            except InvalidRequestError:  # under the operation id of another request
                self.refused.add(request.number)
            await asyncio.sleep(self._random.uniform(0, 4))

    async def _work(self) -> None:
        """Run one worker after another: each is told to end after a while, or killed."""
        while True:
            worker = ApprovalWorker(cast("KeylessClient", self.keyless), self.broker, max_in_flight=16)
            kill = self._random.random() < 0.5
            try:
                async with asyncio.timeout(self._random.uniform(5, 60)) as life:
                    if not kill:
                        asyncio.get_running_loop().call_at(life.when() or 0.0, worker.stop)
                        life.reschedule(None)
                    await worker.run()
            except TimeoutError:
                pass
            await asyncio.sleep(self._random.uniform(0, 5))

    async def _read(self) -> None:
        while True:
            async with next_outcome(self.broker, "application") as event:
                self.told.append(event)


def approved_in_time(stored: Stored | None, request: Asked, event: ApprovalEvent) -> bool:
    """Return whether the user approved what this request asked for, by its deadline.

    What was created only after the request was decided does not count: the broker keeps the first outcome, and delivers
    a request again of which the acknowledgement was lost.
    """
    if stored is None or stored.payload != request.payload or stored.created_at > seconds_of(event.decided_at):
        return False
    return stored.approved_at <= seconds_of(event.requested_at) + request.expires_in


def seconds_of(moment: datetime) -> float:
    """Return a moment on the clock of the loop."""
    return (moment - BEGAN_AT).total_seconds()


def problems(story: Story) -> Iterator[str]:
    """Yield what must not happen and did."""
    kept = story.kept
    numbers = [event.read_context(int) for event in story.told]
    if len(kept) != len(story.told) or sorted(numbers) != [
        request.number for request in story.asked if request.number not in story.refused
    ]:
        yield f"{len(story.asked)} requests, {len(kept)} outcomes stored, {sorted(numbers)} read"
    approved_ids = [event.operation_id for event in story.told if event.outcome is Outcome.APPROVED]
    if len(approved_ids) > len(set(approved_ids)):
        yield "one operation was approved twice"
    for event in story.told:
        request = story.asked[event.read_context(int)]
        stored = story.keyless.operations.get(request.operation_id)
        is_older = request.operation_id in story.older
        facts = f"request {request.number}: {event.outcome} {event.reason} {event.answered} {event.detail}, {stored}"
        if event.outcome is Outcome.APPROVED:
            decided_at = seconds_of(event.decided_at)
            is_right = stored is not None and stored.payload == request.payload and stored.approved_at <= decided_at
            if not is_right or is_older:
                yield f"a wrong approval: {facts}"
        elif approved_in_time(stored, request, event) and not is_older and event.answered is not False:
            yield f"a lost approval: {facts}"
        is_alone = sum(other.operation_id == request.operation_id for other in story.asked) == 1
        existed = stored is not None and stored.created_at <= seconds_of(event.decided_at)
        if event.asked is False and is_alone and existed and not is_older:
            yield f"a user who was asked, and the event says that nobody was: {facts}"


async def played(seed: int) -> Story:
    global_random.seed(seed)  # of the backoff
    story = Story(seed)
    async with story.broker:
        await story.play()
        story.kept = story.broker.stored
    return story


@pytest.mark.parametrize("seed", range(4))
async def test_whatever_goes_wrong_each_request_has_one_outcome_and_no_approval_is_wrong_or_lost(seed: int) -> None:
    story = await played(seed)
    assert list(problems(story)) == []
