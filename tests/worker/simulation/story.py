"""A story: requests, workers, readers, faults, and the clock; how one is made up from a seed, run, and told."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from simulation.faults import (
    LIES,
    FailOver,
    Failure,
    Lag,
    Lies,
    Moved,
    Outage,
    RateLimit,
    Repeats,
    RoundTrips,
    Shard,
    Slowness,
    shard,
)
from simulation.people import Person, someone
from simulation.service import Service, Stored
from simulation.story import FAILURES, brief, run_in_virtual_time
from tenacity import wait_fixed

from aiokeyless import KeylessClient, wait_adaptive
from aiokeyless._http import transport
from aiokeyless.errors import AuthenticationError, BrokerError, ConflictError, KeylessError
from aiokeyless.worker import ApprovalRequest, ApprovalWorker, next_outcome, submit_approval

from .world import Delivered, Life, Mishap, Process, Session, Task, Told, WorkerHistory, World

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from simulation.faults import Fate, Fault, Request

    Main = Callable[[Process], Coroutine[Any, Any, None]]

USER: Final = "C0FFEE"
#: Seconds after which all requests must be decided and all outcomes handled.
LONGEST: Final = 5000.0
DAY: Final = 24 * 3600.0
MISHAPS: Final = ("failover", "full", "nearly full", "silent", "forgets", "doubts", "deleted", "rotation")
#: What operators meet, beside these.
WEATHER: Final = ("read-only", "vanishes", "no key", "not cleaned", "not corrected", "moved", "nobody reads")


@dataclass(frozen=True)
class Gateway(Outage):
    """An outage in which nothing reaches the service: its statuses say so."""

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        fate = super().fate(request, rng)
        return None if fate is None else replace(fate, is_processed=False)


@dataclass(frozen=True)
class Ask:
    """A request of an application. Its number is its context."""

    number: int
    at: float
    operation_id: str
    payload: str
    expires_in: float
    person: Person
    external_user_id: str | None = None
    lives: tuple[Life, ...] = (Life(),)
    """How the processes fare that submit it, one after the other."""
    earlier: str = ""
    """What was approved under its id before: nothing, "the same", or "another" content."""
    phone: str = ""
    """When the phone gets the id of the operation, which it starts: "before" the request is stored, or "after" that."""


@dataclass(frozen=True)
class Reader:
    """One process of a reader, and the share of deliveries that are trouble to it."""

    name: str
    lives: tuple[Life, ...] = ()
    trouble: float = 0.0
    troubles: tuple[str, ...] = ("fails", "slow", "dies")
    fails_until: float = 0.0
    """Until when it fails to handle anything."""


@dataclass(frozen=True)
class Story:
    """All that happens, as data. The seed is that of what is drawn while it runs."""

    seed: int
    asks: tuple[Ask, ...]
    workers: tuple[tuple[Life, ...], ...] = ((), ())
    """How the processes of each worker fare; after the last one, others live to the end."""
    workers_begin: float = 0.0
    """When the first processes of the workers start."""
    readers: tuple[Reader, ...] = (Reader("shop"),)
    faults: tuple[Fault, ...] = ()
    steps: tuple[tuple[float, float], ...] = ()
    """When the wall clock is set, and by how much."""
    duplicates: tuple[float, ...] = ()
    """When everything is delivered once more."""
    max_in_flight: int = 8
    rate: float = 1000.0
    request_timeout: float = 10.0
    poll_cost: float = 0.3
    grace: float = 30.0
    every: float | None = None
    """The delay of a schedule that has only one."""
    mishaps: tuple[Mishap, ...] = ()
    is_back_in_time: bool = False
    """Whether the service is back before the grace is over, so that no approval may be lost."""
    telling: str = ""
    """What goes wrong as phones are told: nothing, or it "raises", is "slow", "hangs", or the process "dies"."""

    @property
    def is_steady(self) -> bool:
        """Whether the machine is well, so that only the service can fail."""
        return self.is_steady_but()

    def is_steady_but(self, *kinds: str) -> bool:
        """Return whether the machine is well, but for some kinds of mishaps, and for keys that are replaced in time."""
        others = any(m.kind not in kinds and (m.kind != "rotation" or m.begins < m.ends) for m in self.mishaps)
        is_set = self.steps and "steps" not in kinds
        return not (any(self.workers) or is_set or self.duplicates or self.telling == "dies" or others)

    def has(self, *kinds: str) -> bool:
        """Return whether there are mishaps of some kinds."""
        return any(mishap.kind in kinds for mishap in self.mishaps)

    def tell(self) -> str:
        """Return it as text."""
        return "  " + brief(self).replace("Ask(", "\n    Ask(")


def run(story: Story) -> WorkerHistory:
    """Run a story to its end."""
    history = WorkerHistory()
    with mock.patch.object(asyncio, "Task", Task):  # for tasks that go past the loop's factory
        run_in_virtual_time(_main(story, history), story.seed, history)
    return history


async def _main(story: Story, history: WorkerHistory) -> None:
    people = {ask.payload: ask.person for ask in story.asks}
    service = Service(story.seed, copy.deepcopy(story.faults), people, history)  # some faults remember
    world = World(service, history, story.mishaps)
    world.loop.set_task_factory(lambda loop, work, **options: Task(work, loop=loop, **options))
    for ask in story.asks:
        if ask.earlier:
            payload = ask.payload if ask.earlier == "the same" else "something else"
            service.operations[ask.operation_id] = Stored(ask.operation_id, USER, payload, None, -60.0, -30.0)
    for at, seconds in story.steps:
        world.loop.call_at(at, world.set_clock, seconds)
    for at in story.duplicates:
        world.loop.call_at(at, world.deliver_twice)
    begins, work = story.workers_begin, partial(_work, story)
    lives = [_live(world, f"worker {n}", each, work, begins=begins) for n, each in enumerate(story.workers)]
    lives += [_live(world, f"reader {n}", r.lives, partial(_read, story, r)) for n, r in enumerate(story.readers)]
    living = [asyncio.create_task(life) for life in lives]
    await asyncio.gather(*(_submit(world, ask) for ask in story.asks))
    try:
        async with asyncio.timeout(LONGEST):
            while (
                world.count("request WHERE decided_at IS NULL")
                or world.count("unread")
                or world.count("reader") < len({reader.name for reader in story.readers})
            ):
                if ended := [task for task in living if task.done()]:
                    ended[0].result()  # which raises: they live to the end
                world.look()
                await asyncio.sleep(1.0)
        history.ended_at = world.loop.time()
    finally:
        for task in living:
            task.cancel()
        await asyncio.wait(living)
    failed = {task for task in history.deliveries.values() if task.done() and not task.cancelled() and task.exception()}
    history.problems += [f"a push ends {task!r}" for task in failed if isinstance(task.exception(), _PushError)]
    await _count_what_is_left(world)
    world.database.close()
    history.problems += [f"a task is left: {task!r}" for task in asyncio.all_tasks() - {asyncio.current_task()}]


async def _count_what_is_left(world: World) -> None:
    """Count what is left at once, after a week, and when nothing is kept any more."""
    left = world.history.left
    left["waiting"], world.mishaps = world.count("waiting"), ()
    world.set_clock(8 * DAY)
    await Process(world, "cleaner", Life()).run(_clean)
    left["bodies"], left["outcome"] = world.count("request WHERE body <> x''"), world.count("outcome")
    world.set_clock(400 * DAY)
    await Process(world, "cleaner", Life()).run(_clean)
    left["request"], left["unread"] = world.count("request"), world.count("unread")


async def _clean(process: Process) -> None:
    await process.broker._clean()


async def _live(world: World, name: str, lives: Iterable[Life], main: Main, *, begins: float = 0.0) -> None:
    for number, life in enumerate(chain(lives, repeat(Life(after=2.0)))):
        await asyncio.sleep(life.after if number else begins)
        await Process(world, f"{name}.{number}", life).run(main)


async def _submit(world: World, ask: Ask) -> None:
    async def submit(process: Process) -> None:
        try:
            submission = await submit_approval(
                process.broker,
                USER,
                operation_id=ask.operation_id,
                operation_payload=ask.payload,
                external_user_id=ask.external_user_id,
                expires_in=ask.expires_in,
                context=ask.number,
                started_by="phone" if ask.phone else "backend",
            )
            results.append("duplicate" if submission.duplicate else "stored")
        except ConflictError:
            results.append("refused")
        except BrokerError:
            results.append("unknown")

    def hand_out() -> None:
        if ask.operation_id not in world.service.operations:  # the user taps once
            now, content = world.loop.time(), (USER, ask.payload)
            world.service.store_by_phone(ask.operation_id, *content, now, ask.external_user_id)

    await asyncio.sleep(ask.at)
    if ask.phone == "before":
        hand_out()
    for number, life in enumerate(chain(ask.lives, repeat(Life(after=1.0))), 1):
        results: list[str] = []
        await asyncio.sleep(life.after)
        await Process(world, f"application {ask.number}", life).run(submit)
        [result] = results or ["unknown"]
        world.history.submitted.append((ask.number, result))
        if ask.phone and result in {"stored", "duplicate"}:
            hand_out()
        if number >= len(ask.lives) and result != "unknown":
            return


async def _work(story: Story, process: Process) -> None:
    client = KeylessClient(
        partial(process.world.key, process), base_url="https://keyless.test", request_timeout=story.request_timeout
    )
    with (
        mock.patch.object(transport, "_make_session", lambda *_, **options: Session(process, **options)),
        mock.patch.object(transport, "_make_untraced", lambda session, _settings: session),
    ):
        client._open()
    worker = ApprovalWorker(
        client,
        process.broker,
        max_in_flight=story.max_in_flight,
        max_polls_per_second=story.rate,
        schedule=wait_adaptive(poll_cost=story.poll_cost) if story.every is None else wait_fixed(story.every),
        grace=story.grace,
        on_created=partial(_tell, story, process),
    )
    process.stop = worker.stop
    process.world.workers[process] = worker
    try:
        if not process.life.is_cancelled:
            await worker.run()
        else:  # the worker is a task beside others
            stopped = asyncio.Event()
            process.stop = stopped.set
            async with worker:
                await stopped.wait()
    except KeylessError as error:  # if the key is refused, or it could not start, another process does
        if not (process.is_dead or worker._serving is None or isinstance(error, AuthenticationError)):
            process.world.history.problems.append(f"{process.name} gave up: {error}")
    finally:
        del process.world.workers[process]
        await client.aclose()


class _PushError(Exception):
    """The phone could not be told."""


async def _tell(story: Story, process: Process, request: ApprovalRequest) -> None:
    told = Told(request.operation_id, process.world.loop.time())
    if not process.is_dead:
        process.world.history.told.append(told)
    try:
        if story.telling == "raises":
            raise _PushError
        if story.telling == "dies":
            process.die()
        await asyncio.sleep({"slow": 3.0, "hangs": 1000.0}.get(story.telling, 0.0))
    finally:
        told.ended_at = process.world.loop.time()


class _BodyError(Exception):
    """The application could not handle an outcome."""


async def _read(story: Story, reader: Reader, process: Process) -> None:
    """Read in several tasks, if it is of interest what these do to each other at their end."""
    await asyncio.gather(*(_read_on(story, reader, process) for _ in range(3 if process.life.is_cancelled else 1)))


async def _read_on(story: Story, reader: Reader, process: Process) -> None:
    world = process.world
    while not process.is_dead:
        delivered = None
        try:
            async with next_outcome(process.broker, reader.name) as event:
                number = event.read_context(int)
                earlier = [d for d in world.history.delivered if (d.reader, d.number) == (reader.name, number)]
                delivered = Delivered(reader.name, number, event, world.loop.time())
                world.history.delivered.append(delivered)
                rng = random.Random(f"{story.seed} {reader.name} {number} {len(earlier)}")  # noqa: S311
                if process.life.is_cancelled:
                    await asyncio.sleep(rng.uniform(0.0, 2.0))
                is_failing = world.loop.time() < reader.fails_until
                if is_failing or (rng.random() < reader.trouble and len(earlier) < 2):
                    await _have_trouble(process, "fails" if is_failing else rng.choice(reader.troubles))
                delivered.result = "unknown"
            delivered.result = "handled"
        except _BodyError:
            assert delivered is not None
            delivered.result = "failed"
        except BrokerError:
            await asyncio.sleep(0.5)
        except asyncio.CancelledError as error:
            if delivered is not None and delivered.result == "died" and not process.is_dead:
                delivered.result = "cancelled"
                is_body_cancelled = not isinstance(error.__context__, _BodyError)  # and not the clean-up after it
                if is_body_cancelled and not process.life.errors:
                    delivered.put_off = world.put_off(delivered)
            raise
        finally:
            if delivered is not None and not process.is_dead:
                delivered.ended_at = world.loop.time()


async def _have_trouble(process: Process, trouble: str) -> None:
    if trouble == "fails":
        raise _BodyError
    if trouble == "dies":
        process.die()
    await asyncio.sleep(35.0)


# -- made up


def make_up(seed: int) -> Story:
    """Return the story of a seed."""
    crowd = random.Random(f"{seed} crowd")  # noqa: S311
    if (drawn := crowd.random()) < 0.03:
        return _rush(seed, crowd) if drawn < 0.01 else _late_workers(seed, crowd)
    absence = random.Random(f"{seed} absence")  # noqa: S311
    if absence.random() < 0.02:
        return _absences(seed, absence)
    rng = random.Random(seed)  # noqa: S311
    asks = _crowd(rng) if rng.random() < 0.1 else _asks(rng)
    is_calm = rng.random() < 0.25
    step = (rng.uniform(0.0, 40.0), rng.choice((-100.0, -30.0, -2.0, 3.0, 90.0, 3600.0)))
    story = Story(
        seed,
        asks,
        workers=tuple(() if is_calm else _lives(rng, 0, 1, 1, 2) for _ in range(2)),
        readers=tuple(_readers(rng)),
        faults=tuple(_faults(rng, asks)),
        steps=() if is_calm or rng.random() < 0.7 else (step,),
        duplicates=() if is_calm or rng.random() < 0.7 else (rng.uniform(0.0, 30.0),),
        max_in_flight=rng.choice((2, 8, 64)),
        rate=rng.choice((5.0, 1000.0, 1000.0)),
        request_timeout=rng.choice((2.0, 2.0, 10.0)),
        poll_cost=rng.choice((0.1, 0.3, 2.0)),
        grace=rng.choice((0.0, 5.0, 5.0, 30.0)),
    )
    telling = random.Random(f"{seed} telling").choice(("", "", "raises", "slow", "hangs", "dies"))  # noqa: S311
    story = replace(_with_cancellations(_with_created_ones(_with_a_bad_moment(story))), telling=telling)
    story = _with_a_mishap(story, random.Random(f"{seed} mishap"), (*MISHAPS, *[""] * 16))  # noqa: S311
    if not story.mishaps:
        story = _with_a_mishap(story, random.Random(f"{seed} weather"), (*WEATHER, *[""] * 14))  # noqa: S311
    return _with_dead_connections(_with_phones(_with_repeats(_with_lies(story))))


def _rush(seed: int, rng: random.Random) -> Story:
    """Return a story of so many bad requests, created within seconds, that the good ones after them need the order."""
    within, begins, gap = rng.choice((0.0, 1.0, 3.0)), rng.uniform(8.0, 12.0), rng.uniform(1.0, 4.0)
    bad = [Ask(n, rng.uniform(0.0, within), f"bad-{n}", f"Bad {n}", 40.0, Person(math.inf)) for n in range(100)]
    good = [
        Ask(100 + n, begins + n * gap, f"good-{n}", f"Pay {n}", 40.0, Person(rng.uniform(2.0, 5.0))) for n in range(3)
    ]
    failure = rng.choice((Failure("status", 500), Failure("status", 503, 20.0), Failure("refused"), Failure("hangs")))
    return Story(
        seed,
        (*bad, *good),
        workers=((),) * rng.choice((1, 2)),
        faults=(
            *(Outage(0.0, math.inf, failure, payload=ask.payload, methods="GET") for ask in bad),
            RoundTrips(0.1, 0.3),
        ),
        grace=0.0,
        every=rng.choice((None, None, 5.0)),
    )


def _late_workers(seed: int, rng: random.Random) -> Story:
    """Return a story of workers that start after the grace of all requests, in a shorter outage."""
    grace = rng.choice((5.0, 30.0))
    begins = 25.0 + grace + rng.uniform(1.0, 30.0)
    asks = [
        Ask(n, rng.uniform(0.0, 5.0), f"op-{n}", f"Pay {n}", 20.0, Person(rng.uniform(1.0, 10.0)), phone="before")
        for n in range(rng.randint(5, 30))
    ]
    failure = rng.choice((Failure("status", 500), Failure("status", 503), Failure("status", 429), Failure("refused")))
    return Story(
        seed,
        tuple(asks),
        workers=((),) * rng.choice((1, 2)),
        workers_begin=begins,
        faults=(Outage(0.0, begins + rng.uniform(0.5, grace / 2), failure), RoundTrips(0.1, 0.3)),
        grace=grace,
    )


def _absences(seed: int, rng: random.Random) -> Story:
    """Return a story whose requests end while workers cannot ask, since they, their broker or Keyless are away."""
    kind = rng.choice(("frozen", "away", "flaps", "suspended", "refused", "one is refused"))
    grace, begins, lasts = rng.choice((5.0, 30.0)), rng.uniform(36.0, 40.0), rng.choice((4.0, 20.0, 120.0))
    asks = tuple(
        Ask(n, rng.uniform(0.0, 2.0), f"op-{n}", f"Pay {n}", 38.0, Person(rng.uniform(34.0, 36.0)), phone="before")
        for n in range(rng.randint(1, 20))
    )
    from_, ends, payload = 34.0, begins + lasts, None
    mishaps: tuple[Mishap, ...] = (Mishap(kind, begins, ends),)
    steps: tuple[tuple[float, float], ...] = ()
    refusals: tuple[Fault, ...] = ()
    if kind == "flaps":
        mishaps = tuple(Mishap("away", at, at + 3.0) for at in range(20, 600, 28))
        ends = rng.choice((36.0, 600.0))
    elif kind == "suspended":
        mishaps, steps, ends = (), ((begins, lasts),), begins
    elif "refused" in kind:
        pause, payload = grace * rng.uniform(0.5, 1.0), None if kind == "refused" else asks[0].payload
        refusals = (Outage(from_, begins, Failure("status", 429, pause), payload=payload),)
        mishaps, from_, ends = (), begins, begins + pause
    failure = rng.choice((Failure("status", 500), Failure("status", 503), Failure("refused")))
    outage = Gateway(from_, ends + rng.uniform(0.5, grace / 2), failure, payload=payload)
    return Story(
        seed,
        asks,
        workers=((),),
        faults=(*refusals, outage, RoundTrips(0.1, 0.3)),
        steps=steps,
        mishaps=mishaps,
        grace=grace,
        is_back_in_time=kind in {"frozen", "away", "suspended"},
    )


def _with_cancellations(story: Story) -> Story:
    """Let processes of some stories end as `asyncio.run` does. With random numbers of its own, so all else stays."""
    rng = random.Random(f"{story.seed} cancellations")  # noqa: S311

    def cancelled(lives: tuple[Life, ...]) -> tuple[Life, ...]:
        return tuple(replace(life, is_cancelled=rng.random() < 0.7) for life in lives)

    if rng.random() < 0.5:
        return story
    return replace(
        story,
        asks=tuple(replace(ask, lives=cancelled(ask.lives)) for ask in story.asks),
        workers=tuple(cancelled(lives) for lives in story.workers),
        readers=tuple(replace(r, lives=cancelled(r.lives or _lives(rng, 0, 1, 2))) for r in story.readers),
    )


def _with_created_ones(story: Story) -> Story:
    """Let the bad requests of some crowds be created and then fail. It has random numbers of its own, as below."""

    def created(fault: Fault) -> Fault:
        if isinstance(fault, Outage) and (fault.payload or "").startswith("Bad"):
            return replace(fault, methods="GET")
        return fault

    rng = random.Random(f"{story.seed} created")  # noqa: S311
    return replace(story, faults=tuple(map(created, story.faults))) if rng.random() < 0.5 else story


def _with_a_bad_moment(story: Story) -> Story:
    """Add to some stories what is rare by chance. It has random numbers of its own, as all else shall stay."""
    rng = random.Random(f"{story.seed} moment")  # noqa: S311
    story = replace(story, every=rng.choice((None, None, None, 1.0, 5.0)))
    kind, ask = rng.choice(("late", "refused", *[""] * 8)), rng.choice(story.asks)
    if kind == "late" and ask.expires_in >= 20.0:  # a poll hangs while its request is delivered once more
        at = ask.at + rng.uniform(6.0, 10.0)
        hangs = Outage(at - 5.0, at, Failure("hangs"), payload=ask.payload)
        return replace(story, every=5.0, duplicates=(at,), faults=(hangs, *story.faults))
    if kind == "refused":  # a create, after one that is in doubt
        doubt = Outage(0.0, 30.0, Failure("lost"), share=0.5, methods="POST")
        refusal = Gateway(0.0, 30.0, Failure("status", 400), share=0.5, methods="POST")
        return replace(story, faults=(doubt, refusal, *story.faults))
    return story


def _with_lies(story: Story) -> Story:
    """Let the service lie in some stories more: there are many lies, and each is to be told often. Likewise."""
    rng = random.Random(f"{story.seed} lies")  # noqa: S311
    victim = rng.choice(story.asks)
    if rng.random() < 0.9 or len(story.asks) > 6:
        return story
    return replace(story, faults=(_lies(rng, victim), *story.faults))


def _lies(rng: random.Random, victim: Ask) -> Lies:
    # A request without an external id asks for no comparison.
    lies = [lie for lie in LIES if victim.external_user_id or lie != "another external user"]
    return Lies(victim.at, victim.payload, rng.choice(lies), rng.choice((0.3, 1.0)))


def _with_repeats(story: Story) -> Story:
    """Let a gateway send the creates of some stories twice. Likewise."""
    rng = random.Random(f"{story.seed} repeats")  # noqa: S311
    if rng.random() > 0.04:
        return story
    return replace(story, faults=(Repeats(0.0, rng.choice((5.0, 30.0))), *story.faults))


def _with_phones(story: Story) -> Story:
    """Let the phone start the operations of some stories, several perhaps under one id. Likewise."""
    rng = random.Random(f"{story.seed} phones")  # noqa: S311
    if rng.random() < 0.7 or len(story.asks) > 6:
        return story
    others = {ask.operation_id for ask in story.asks if ask.earlier or rng.random() < 0.3}
    ids = [ask.operation_id for ask in story.asks if ask.operation_id not in others]
    if rng.random() < 0.5:
        ids = ids[:1] * len(ids)

    def by_phone(ask: Ask) -> Ask:
        if ask.operation_id in others:
            return ask
        return replace(ask, operation_id=ids.pop(), phone=rng.choice(("before", "after")))

    story = replace(story, asks=tuple(map(by_phone, story.asks)))
    started = [ask for ask in story.asks if ask.phone]
    if started and rng.random() < 0.1:  # what no answer has shown yet, and the first one cannot be read
        faults = (Lies(0.0, rng.choice(started).payload, "another shape", 1.0), *story.faults)
        return replace(story, faults=faults)
    return story


def _with_dead_connections(story: Story) -> Story:
    """Let the connections that workers keep die in some stories. Likewise."""
    rng = random.Random(f"{story.seed} connections")  # noqa: S311
    if rng.random() > 0.1:
        return story
    at = rng.choice(story.asks).at + rng.uniform(0.0, 20.0)
    failover = FailOver(at, at + rng.choice((0.0, 0.0, 10.0, 60.0)))
    return replace(story, faults=(failover, *story.faults))


def _with_a_mishap(story: Story, rng: random.Random, kinds: tuple[str, ...]) -> Story:
    """Let something go wrong with the broker or the key in some stories, whose processes and clocks are well."""
    kind, victim = rng.choice(kinds), rng.choice(story.asks)
    if not kind or len(story.asks) > 6:
        return story
    at = victim.at + rng.choice((rng.uniform(0.0, 0.6), rng.uniform(0.0, 10.0), victim.expires_in - 0.5))
    lasts, who = rng.choice((1.0, 5.0, 20.0, 60.0)), rng.choice(("", "worker 0"))
    asks = tuple(replace(ask, lives=(Life(),)) for ask in story.asks)
    readers = tuple(replace(reader, lives=()) for reader in story.readers)
    story = replace(story, workers=((), ()), steps=(), duplicates=(), asks=asks, readers=readers)
    if rng.random() < 0.5:
        faults = tuple(fault for fault in story.faults if isinstance(fault, RoundTrips))
        story = replace(story, faults=faults, max_in_flight=8, rate=1000.0)
    if kind == "failover":  # every second request is lost, and the others get the ids of those soon after it
        lasts, who = rng.choice((0.5, 1.0)), ""
        asks = tuple(replace(ask, operation_id=f"op-{ask.number}") for ask in asks)
        lost = [replace(ask, at=at + rng.uniform(0.0, lasts), earlier=rng.choice(("", "another"))) for ask in asks[::2]]
        soon = [replace(ask, earlier=rng.choice((ask.earlier, "the same"))) for ask in asks[1::2]]
        after = [replace(ask, at=at + lasts + rng.uniform(0.0, 0.3)) for ask in soon]
        readers = tuple(replace(reader, trouble=max(reader.trouble, 0.5), troubles=("slow",)) for reader in readers)
        hangs = Outage(at, at + lasts, Failure("hangs"), share=0.3, methods="GET")
        story = replace(story, asks=(*lost, *after), readers=readers, faults=(hangs, *story.faults))
        story = replace(story, request_timeout=2.0, every=rng.choice((None, 5.0)))
    elif kind == "rotation":
        lasts, round_trips = rng.choice((0.0, 0.0, 2.0)), RoundTrips(0.2, 0.5)
        asks = tuple(replace(ask, expires_in=20.0) for ask in asks)
        story = replace(story, workers=((),), every=rng.choice((None, 1.0)), faults=(*story.faults[:-1], round_trips))
        mishaps = tuple(Mishap(kind, at + n * 3.0, at + n * 3.0 + lasts) for n in range(5))
        return replace(story, asks=asks, mishaps=mishaps)
    elif kind == "moved":  # of so many requests that the service seems to be down
        failure = rng.choice((Failure("status", 503), Failure("status", 503), Failure("hangs"), None))
        asks = tuple(
            Ask(n, rng.uniform(0.0, 15.0), f"op-{n}", f"Pay {n}", 90.0, Person(rng.uniform(25.0, 40.0)))
            for n in range(7)  # too many for `_with_phones`
        )
        moved = Moved(rng.uniform(10.0, 20.0), 600.0, failure)
        story = replace(story, faults=(moved, RoundTrips(0.1, 0.3)), max_in_flight=8, rate=1000.0)
        return replace(story, asks=asks, every=1.0)
    elif kind == "nobody reads":
        until = rng.choice((600.0, 3600.0))
        readers = tuple(replace(reader, fails_until=until, troubles=("fails",)) for reader in readers)
        return replace(story, workers=((),), readers=readers)
    elif kind.startswith("not c"):  # which matters after the clock was set back
        at, lasts, who = 0.0, rng.choice((100.0, 300.0)), ""
        story = replace(story, steps=((rng.uniform(0.0, 20.0), -300.0),), every=5.0)
    elif kind == "silent" and who:  # while the others go on, and perhaps for longer than its lease
        at, lasts = victim.at + rng.uniform(0.05, 0.5), rng.choice((5.0, 20.0, 20.0))
        refusal = Gateway(0.0, at + 2.0, Failure("status", 400), share=0.8, methods="POST")
        asks = tuple(replace(ask, expires_in=max(ask.expires_in, lasts * 2)) for ask in asks)
        story = replace(story, asks=asks, faults=(refusal, *story.faults), request_timeout=2.0)
    return replace(story, mishaps=(Mishap(kind, at, at + lasts, who),))


def _lives(rng: random.Random, *how_many: int) -> tuple[Life, ...]:
    """Return lives that end somehow."""
    lives = []
    for _ in range(rng.choice(how_many)):
        errors = tuple(int(10 ** rng.uniform(0.0, 2.4)) for _ in range(rng.choice((0, 0, 1, 3))))
        life, ends = Life(after=rng.choice((0.1, 1.0, 10.0)), errors=errors), rng.uniform(0.0, 30.0)
        at_step = replace(life, dies_at=int(10 ** rng.uniform(0.0, 2.6)))
        lives.append(rng.choice((at_step, at_step, replace(life, dies_after=ends), replace(life, stops_after=ends))))
    return tuple(lives)


def _asks(rng: random.Random) -> tuple[Ask, ...]:
    asks: list[Ask] = []
    for number in range(rng.randint(1, 6)):
        expires_in = rng.choice((2.0, 5.0, 5.0, 20.0, 20.0, 20.0, 60.0))
        ids, earlier = [f"op-{number}"], rng.choice(("the same", "another")) if rng.random() < 0.1 else ""
        if rng.random() < 0.1:  # the id of another request
            ids, earlier = [ask.operation_id for ask in asks if not ask.earlier] or ids, ""
        waits = [rng.choice((0.0, 0.5, 5.0)) for _ in range(rng.choice((1, 1, 2)))]
        person = someone(rng, expires_in)
        asks.append(
            Ask(
                number,
                rng.uniform(0.0, 10.0),
                rng.choice(ids),
                f"Pay {number}",
                expires_in,
                replace(person, approves_after=max(person.approves_after, 0.3)),
                external_user_id=f"user {number}" if rng.random() < 0.3 else None,
                lives=tuple(Life(wait, dies_at=rng.choice((0, 0, *range(1, 8)))) for wait in waits),
                earlier=earlier,
            )
        )
    return tuple(asks)


def _crowd(rng: random.Random) -> tuple[Ask, ...]:
    """Return many bad requests, which have a fault of their own, and some good ones."""
    bad = [Ask(n, rng.uniform(0.0, 5.0), f"bad-{n}", f"Bad {n}", 20.0, Person(math.inf)) for n in range(12)]
    good = [Ask(n, rng.uniform(1.0, 15.0), f"good-{n}", f"Pay {n}", 20.0, Person(6.0)) for n in range(12, 15)]
    return (*bad, *good)


def _readers(rng: random.Random) -> Iterable[Reader]:
    for name in ("shop", "audit")[: rng.choice((1, 2))]:
        troubles = rng.choice((("fails",), ("fails", "slow", "dies")))
        trouble = rng.choice((0.0, 0.2, 0.5))
        for _ in range(rng.choice((1, 2))):
            yield Reader(name, _lives(rng, 0, 0, 1), trouble, troubles)


def _faults(rng: random.Random, asks: tuple[Ask, ...]) -> Iterable[Fault]:
    bad = [ask.payload for ask in asks if ask.payload.startswith("Bad")]
    failure = rng.choice((Failure("status", 500), Failure("status", 503), Failure("refused")))
    yield from (Outage(0.0, math.inf, failure, payload=payload) for payload in bad)
    for _ in range(0 if bad else rng.choice((0, 1, 1, 2))):
        yield _fault(rng, rng.choice(asks))
    if not bad and rng.random() < 0.4:  # answers to creates that are lost
        failure = rng.choice((Failure("lost answer"), Failure("lost"), Failure("status", 500), Failure("truncated")))
        yield Outage(0.0, 60.0, failure, share=rng.choice((0.3, 1.0)), methods="POST")
    shortest = rng.choice((0.005, 0.1, 0.4))
    yield RoundTrips(shortest, rng.uniform(shortest, 0.5))


def _fault(rng: random.Random, victim: Ask) -> Fault:
    begins = rng.choice((rng.uniform(0.0, 30.0), victim.at, victim.at + victim.expires_in - 0.5))
    ends = begins + rng.choice((0.3, 2.0, 20.0, 90.0))
    failure, status = rng.choice(FAILURES), rng.choice((400, 401, 403, 403, 429))
    hangs = Shard(begins, ends, Failure("hangs"), shard(victim.operation_id))
    return rng.choice(
        (
            Outage(begins, ends, failure),
            Outage(begins, ends, failure),
            Outage(begins, ends, failure, share=rng.uniform(0.2, 0.8)),
            Outage(begins, ends, failure, payload=victim.payload),
            Gateway(begins, min(ends, begins + 20.0), Failure("status", status, 5.0), share=rng.choice((0.3, 1.0))),
            RateLimit(begins, begins + 60.0, rng.choice((1, 3)), rng.choice((None, 2.0))),
            rng.choice((Slowness(begins, begins + 30.0, 8.0, 2), hangs)),
            Lag(0.0, 200.0, rng.choice((0.5, 2.0))),
            _lies(rng, victim),
        )
    )
