"""A story: which processes, actors and faults there are; how one is made up from a seed, run, and told."""

from __future__ import annotations

import asyncio
import copy
import math
import random
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from .actors import Actor, Application, Leg, Process, act
from .faults import (
    LIES,
    Cache,
    Capacity,
    FailOver,
    Failure,
    Flapping,
    Lag,
    Lies,
    Moved,
    Outage,
    RateLimit,
    Repeats,
    RoundTrips,
    Shard,
    Slowness,
    Standstill,
)
from .history import History
from .people import Person, someone
from .service import Service, TooManyRequestsError
from .world import LONGEST, StuckError, VirtualLoop, deterministic

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from .faults import Fault

FAILURES: Final = (
    Failure("refused"),
    Failure("lost"),
    Failure("lost answer"),
    Failure("hangs"),
    Failure("truncated"),
    Failure("html"),
    Failure("status", 500),
    Failure("status", 503),
    Failure("status", 408),
)
#: What gateways say for a while.
PAGES: Final = (
    *(Failure("page", status) for status in (202, 204, 302, 400, 403, 404, 405, 407, 410, 421)),
    *(
        Failure("page", 200, page=page)
        for page in (b"{}", b'{"message": "Forbidden"}', b"[]", b'{"state": "approved"}')
    ),
)
#: Weather that a loop bears well.
STORMS: Final = (
    *("deploy", "flapping", "page", "refusals", "neighbour", "moved", "outage", "brown-out", "shard", "no key"),
)
#: The share of stories without it.
STORMLESS: Final = 0.6


@dataclass(frozen=True)
class Story:
    """All that happens, as data.

    Attributes:
        seed: Of what is drawn while it runs: latencies, and the library's own jitter and backoff.
        processes: The processes of the application.
        actors: What they do.
        faults: What goes wrong; of two that concern a request, the first decides.
    """

    seed: int
    processes: tuple[Process, ...]
    actors: tuple[Actor, ...]
    faults: tuple[Fault, ...]

    def tell(self) -> str:
        """Return it as text, one line for each part; what is as by default is left out."""
        parts = (*self.processes, *sorted(self.actors, key=lambda actor: actor.at), *self.faults)
        return "\n".join(f"  {brief(part)}" for part in parts)


def brief(part: object) -> str:
    if isinstance(part, tuple):
        return f"({', '.join(map(brief, part))})"
    if isinstance(part, float):
        return f"{part:.6g}"
    if not hasattr(part, "__dataclass_fields__"):
        return repr(part)
    shown = {f.name: getattr(part, f.name) for f in fields(part) if f.repr}  # type: ignore[arg-type]  # it is one
    defaults = {f.name: f.default for f in fields(part)}  # type: ignore[arg-type]
    told = (f"{name}={brief(value)}" for name, value in shown.items() if value != defaults[name])
    return f"{type(part).__name__}({', '.join(told)})"


def run(story: Story) -> History:
    """Run a story to its end."""
    history = History(standstills=standstills(story))
    history.ended_at = run_in_virtual_time(_main(story, history), story.seed, history)
    return history


def standstills(story: Story) -> list[tuple[float, float]]:
    """Return when the event loop stands still, in order; what begins meanwhile makes it no longer."""
    found: list[tuple[float, float]] = []
    for begins, ends in sorted((fault.begins, fault.ends) for fault in story.faults if isinstance(fault, Standstill)):
        if not found or begins > found[-1][1]:
            found.append((begins, ends))
    return found


def run_in_virtual_time(main: Coroutine[Any, Any, None], seed: int, history: History) -> float:
    """Run a program to its end, and note what goes wrong; return when it ended."""
    loop = VirtualLoop()
    with deterministic(seed):
        try:
            loop.run_until_complete(main)
        except (StuckError, TooManyRequestsError, TimeoutError) as error:
            history.problems.append(f"{type(error).__name__}: {error}")
        finally:
            _tear_down(loop, history)
            loop.close()
    history.problems += loop.problems
    return loop.time()


async def _main(story: Story, history: History) -> None:
    people = {actor.payload: actor.person for actor in reversed(story.actors)}
    service = Service(story.seed, copy.deepcopy(story.faults), people, history)  # some of them remember
    applications = [Application(process, number, service) for number, process in enumerate(story.processes)]
    end = asyncio.Event()
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop)
    for begins, ends in history.standstills:
        loop.call_at(begins, loop.stand_still, ends)
    lives = [asyncio.create_task(application.live(end)) for application in applications]
    async with asyncio.timeout(LONGEST):
        await asyncio.gather(*(act(actor, applications, service) for actor in story.actors))
        await asyncio.sleep(15.0)  # a poll that goes on between two holds ends by itself
        end.set()
        await asyncio.gather(*lives)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    history.problems += [f"a task is left: {task!r}" for task in left]
    timers = (timer for timer in loop.armed_timers() if "timeout" not in timer.lower() and "stand_still" not in timer)
    history.problems += [f"a timer is left: {timer}" for timer in timers]


def _tear_down(loop: VirtualLoop, history: History) -> None:
    """Cancel what is left, where a story broke off."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        try:
            loop.run_until_complete(asyncio.wait(tasks, timeout=60.0))
        except StuckError as error:
            history.problems.append(f"it cannot be cancelled: {error}")
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


# -- making one up


def make_up(seed: int) -> Story:
    """Return the story of a seed: some hours, in which a few episodes are dense and the rest is quiet."""
    rng = random.Random(seed)  # noqa: S311
    processes = tuple(_process(rng) for _ in range(rng.randint(1, 3)))
    actors: list[Actor] = []
    faults: list[Fault] = []
    begins = 0.0
    for episode in range(rng.randint(2, 4)):
        begins += rng.uniform(1200.0, 6000.0)
        new = _episode(rng, begins, f"e{episode}", len(processes))
        actors += new
        faults += _faults(rng, begins, new)
    faults += _rare_lies(seed, actors)
    faults += _brown_outs(seed, actors)
    rush, trouble = _rush(seed, begins + 6000.0, len(processes))
    faults += trouble
    faults += _weather(seed, actors)
    faults += _fail_overs(seed, actors)
    faults = [*_long_pages(seed, actors), *faults]
    faults = [*_repeats(seed, actors), *faults]
    faults += _standstills(seed, [*actors, *rush])
    rotations = _rotations(seed, [*actors, *rush])
    actors = _slow_handlers(seed, actors)
    closes = rng.random() < 0.3
    jumps = rng.random() < 0.3
    moment = rng.choice(actors).at
    processes = tuple(
        replace(
            process,
            closes=(moment + rng.uniform(0.0, 60.0),) if closes else (),
            jumps=((moment + rng.uniform(-5.0, 30.0), rng.choice((-3600.0, -40.0, 3.0, 90.0))),) if jumps else (),
            rotates=rotations,
            lag=random.Random(f"{seed} lag").choice((0.0, 0.0, 2.0, 20.0)),  # noqa: S311  # of its own, as the lies
        )
        for process in processes
    )
    processes += (Process(),) if any(isinstance(fault, Capacity) for fault in trouble) else ()
    crowd, storms, keyless = _storm(seed, begins + 12_000.0, len(processes))
    storms += _caches(seed, crowd)
    processes += (Process(has_no_key=keyless),) if crowd else ()
    return Story(seed, processes, (*actors, *rush, *crowd), (*storms, *faults))


def _process(rng: random.Random) -> Process:
    return Process(
        max_in_flight=rng.choice((3, 8, 16, 64, 64)),
        rate=rng.choice((3.0, 20.0, 1000.0, 1000.0)),
        request_timeout=rng.choice((1.0, 3.0, 10.0, 10.0)),
        max_attempts=rng.choice((1, 3, 3, 5)),
        poll_cost=rng.choice((0.02, 0.3, 0.3, 2.0)),
        clock_error=rng.choice((0.0, 0.0, -200.0, -7.0, 0.4, 31.0, 500.0)),
    )


def _episode(rng: random.Random, begins: float, name: str, processes: int) -> list[Actor]:
    """Return actors that begin within a minute or two."""
    crowd, within = rng.choice((3, 8, 8, 16)), rng.choice((0.0, 5.0, 60.0, 120.0))
    lifetime = rng.choice((None, None, 5.0, 30.0))  # None: each has its own; else they all end at once
    actors: list[Actor] = []
    for number in range(crowd):
        own = rng.choice((1.0, 10.0, 45.0, 120.0, 120.0, 300.0)) if lifetime is None else lifetime
        actor = _actor(rng, begins + rng.uniform(0.0, within), f"{name}a{number}", own, processes)
        actors.append(actor)
        if actor.creates == "application" and rng.random() < 0.4:
            actors.append(_rival(rng, actor, f"{name}r{number}", processes))
    return actors


def _actor(rng: random.Random, at: float, name: str, lifetime: float, processes: int) -> Actor:
    creates: Literal["application", "client", "phone"]
    creates = rng.choices(("application", "client", "phone"), (3, 5, 1))[0]
    return Actor(
        at=at,
        name=name,
        process=rng.randrange(processes),
        creates=creates,
        lifetime=lifetime,
        external_user_id=f"user of {name}" if creates != "phone" and rng.random() < 0.6 else None,
        if_exists=rng.choice(("raise", "resume")),
        cancel_create_after=rng.uniform(0.0, 0.5) if rng.random() < 0.04 else math.inf,
        person=someone(rng, lifetime),
        legs=tuple(_leg(rng, lifetime, processes, first=not number) for number in range(rng.choice((1, 1, 1, 2, 3)))),
    )


def _rival(rng: random.Random, actor: Actor, name: str, processes: int) -> Actor:
    """Return an actor that takes the operation id of another one, for the same content or not."""
    return Actor(
        at=actor.at + rng.choice((0.0, rng.uniform(0.0, 1.0), rng.uniform(0.0, 60.0))),
        name=name,
        process=rng.randrange(processes),
        creates="application",
        lifetime=actor.lifetime,
        external_user_id=actor.external_user_id,
        takes_id_of=actor.name,
        asks_for=actor.payload if rng.random() < 0.7 else None,
        if_exists=rng.choice(("raise", "resume")),
        person=actor.person,
        legs=(_leg(rng, actor.lifetime, processes, first=True),),
    )


def _leg(rng: random.Random, lifetime: float, processes: int, *, first: bool) -> Leg:
    after = 0.0 if first else rng.choice((0.0, rng.uniform(0.0, 1.2 * lifetime), lifetime + 1.0))
    forever = rng.random() < 0.05
    gives_up = forever or rng.random() < 0.15
    return Leg(
        after=after,
        process=rng.randrange(processes),
        how=rng.choices(("wait", "report", "iterate", "hold", "many"), (6, 2, 2, 3, 1))[0],
        timeout=math.inf if forever else rng.choice((None, None, None, lifetime, lifetime / 3)),
        by_id=rng.random() < 0.2,
        cancel_after=rng.uniform(0.0, 1.1 * lifetime) if gives_up else math.inf,
        every=rng.choice((None, None, None, 1.0, 5.0, 30.0)),
        hold=rng.choice((0.5, 2.0, 10.0, 25.0)),
        gap=rng.choice((0.0, 0.1, 1.0, 20.0)),
    )


def _faults(rng: random.Random, begins: float, actors: list[Actor]) -> list[Fault]:
    """Return what goes wrong in an episode; in some nothing does, so that every promise is checked in full."""
    faults: list[Fault] = []
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        victim = rng.choice(actors)
        start = rng.choice((begins + rng.uniform(0.0, 100.0), victim.at, victim.at + victim.lifetime - 0.5))
        faults.append(_fault(rng, start, victim))
    if rng.random() < 0.5:  # the worst moment for an answer to be lost
        failure = rng.choice((Failure("lost answer"), Failure("lost"), Failure("status", 500), Failure("truncated")))
        faults.append(Outage(begins, begins + 150.0, failure, share=rng.choice((0.1, 0.5)), methods="POST"))
    return faults


def _rare_lies(seed: int, actors: list[Actor]) -> list[Fault]:
    """Return some lies more: what is wrong only where money is at stake is found by these alone.

    They have random numbers of their own, so that all else in a story is as it would be without them.
    """
    rng = random.Random(f"{seed} lies")  # noqa: S311
    victims = rng.sample(actors, k=min(3, len(actors)))
    return [Lies(victim.at, victim.payload, rng.choice(list(LIES)), share=0.5) for victim in victims]


def _weather(seed: int, actors: list[Actor]) -> list[Fault]:
    """Return bad weather: a shard that fails, operations that are refused, and how long answers take.

    With random numbers of its own, as the lies.
    """
    rng = random.Random(f"{seed} weather")  # noqa: S311
    faults: list[Fault] = []
    if rng.random() < 0.3:
        begins = rng.choice(actors).at + rng.uniform(-5.0, 30.0)
        failure = rng.choice((Failure("hangs"), Failure("hangs"), Failure("status", 500), Failure("status", 429, 30.0)))
        faults.append(Shard(begins, begins + rng.choice((20.0, 120.0)), failure, rng.randrange(3)))
    for victim in rng.sample(actors, k=min(rng.choice((0, 0, 1, 3)), len(actors))):
        refused = Failure("status", 429, rng.choice((None, 5.0, 30.0)))
        faults.append(Outage(victim.at, victim.at + rng.choice((10.0, 300.0)), refused, payload=victim.payload))
    shortest = rng.choice((0.005, 0.02, 0.1, 0.4))
    return [*faults, RoundTrips(shortest, rng.uniform(shortest, 0.5))]


def _fail_overs(seed: int, actors: list[Actor]) -> list[Fault]:
    """Return when connections die, at one moment or for some time. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} connections")  # noqa: S311
    begins = [rng.choice(actors).at + rng.uniform(-5.0, 60.0) for _ in range(rng.choice((0, 0, 1, 3)))]
    return [FailOver(at, at + rng.choice((0.0, 0.0, 60.0, 600.0))) for at in begins]


def _long_pages(seed: int, actors: list[Actor]) -> list[Fault]:
    """Let a gateway stand before an operation whose wait may have no deadline. With random numbers of its own."""
    rng = random.Random(f"{seed} pages")  # noqa: S311
    victims = [a for a in actors if any(leg.timeout == math.inf or (leg.by_id and leg.how == "hold") for leg in a.legs)]
    if not victims or rng.random() < 0.5:
        return []
    victim, begins = rng.choice(victims), rng.uniform(1.0, 20.0)
    return [Outage(victim.at + begins, victim.at + 300.0, rng.choice(PAGES), payload=victim.payload, methods="GET")]


def _repeats(seed: int, actors: list[Actor]) -> list[Fault]:
    """Let a gateway send creates twice. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} repeats")  # noqa: S311
    begins = rng.choice(actors).at - rng.uniform(0.0, 5.0)
    return [Repeats(begins, begins + rng.choice((6.0, 150.0)))] if rng.random() < 0.1 else []


def _brown_outs(seed: int, actors: list[Actor]) -> list[Fault]:
    """Let some answers fail at random, and some requests hang. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} brown-out")  # noqa: S311
    if rng.random() < 0.8:
        return []
    begins = rng.choice(actors).at + rng.uniform(-5.0, 30.0)
    ends = begins + rng.choice((30.0, 150.0))
    return [
        Outage(begins, ends, Failure("hangs"), share=rng.choice((0.02, 0.05, 0.1)), methods="GET"),
        Outage(begins, ends, rng.choice((Failure("status", 503), Failure("lost"))), share=0.5),
    ]


def _standstills(seed: int, actors: list[Actor]) -> list[Fault]:
    """Let the event loop stand still, most often across a deadline. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} standstill")  # noqa: S311
    faults: list[Fault] = []
    for victim in rng.sample(actors, k=min(rng.choice((0, 0, 0, 1, 3)), len(actors))):
        begins = victim.at + rng.choice((rng.uniform(0.0, 60.0), victim.lifetime - rng.uniform(0.1, 2.5)))
        faults.append(Standstill(begins, begins + rng.choice((0.3, 1.0, 3.0, 8.0))))
    return faults


def _rotations(seed: int, actors: list[Actor]) -> tuple[float, ...]:
    """Return when all processes get a new key. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} keys")  # noqa: S311
    begins = [rng.choice(actors).at + rng.uniform(0.0, 30.0) for _ in range(rng.choice((0, 0, 0, 5)))]
    return tuple(sorted(begins + [at + rng.uniform(0.0, 5.0) for at in begins]))


def _rush(seed: int, begins: float, processes: int) -> tuple[list[Actor], list[Fault]]:
    """Return many actors of one process who begin at once, and a service that answers few of them, or none.

    If it answers few, their process is one more than there are. With random numbers of its own, as the lies.
    """
    rng = random.Random(f"{seed} rush")  # noqa: S311
    kind = rng.choices(("none", "capacity", "outage"), (7, 1, 2))[0]
    if kind == "none":
        return [], []
    process, crowd, every = rng.randrange(processes), rng.choice((60, 100)), rng.choice((None, 1.0))
    if kind == "capacity":
        process, crowd, every = processes, 60, 1.0
    legs = (Leg(0.0, process, every=every),)
    actors = [
        Actor(begins + rng.uniform(0.0, 20.0), f"rush{number}", process, person=someone(rng, 120.0), legs=legs)
        for number in range(crowd)
    ]
    if kind == "capacity":
        return actors, [Capacity(begins + 20.0, begins + 120.0, 5.0)]
    failure = rng.choice((Failure("status", 503), Failure("lost"), Failure("lost answer"), Failure("hangs")))
    # After 25 s, all are created and wait; after 160 s, the time of all has ended. One good answer of 100 is too few.
    starts, ends = begins + rng.choice((-10.0, 25.0, 25.0)), begins + rng.choice((40.0, 160.0))
    return actors, [Outage(starts, ends, failure, share=rng.choice((1.0, 0.99)))]


def _storm(seed: int, begins: float, process: int) -> tuple[list[Actor], list[Fault], tuple[tuple[float, float], ...]]:
    """Return users who approve in weather of one or a few kinds, that weather, and when their process has no key.

    Their waits are compared with loops. With random numbers of its own, as the lies.
    """
    rng = random.Random(f"{seed} storm")  # noqa: S311
    if rng.random() < STORMLESS:
        return [], [], ()
    starts = [begins + rng.uniform(12.0, 25.0) for _ in range(rng.choice((1, 1, 2, 3)))]
    faults: list[Fault] = []
    keyless: list[tuple[float, float]] = []
    for start, kind in zip(starts, rng.sample(STORMS, len(starts)), strict=True):
        ends = start + rng.choice((4.0, 10.0, 20.0, 40.0))
        if kind == "no key":
            keyless.append((start, start + rng.choice((0.2, 1.0, 5.0, 20.0))))
        else:
            faults.append(_storm_of(rng, kind, start, ends))
    actors: list[Actor] = []
    for number in range(rng.choice((1, 3, 3, 8, 30))):
        at, approved_at = begins + rng.uniform(0.0, 10.0), begins + rng.uniform(12.0, 60.0)
        lifetime = rng.choice((120.0, 120.0, 300.0, approved_at - at + rng.uniform(1.0, 10.0)))
        legs = (Leg(0.0, process, every=1.0),)
        person = Person(approved_at - at)
        actors.append(
            Actor(at, f"storm{number}", process, lifetime=lifetime, person=person, legs=legs, is_compared=True)
        )
    return actors, faults, tuple(keyless)


def _storm_of(rng: random.Random, kind: str, begins: float, ends: float) -> Fault:  # noqa: PLR0911  # one for each kind
    """Return weather of one kind."""
    unavailable = Failure("status", 503, rng.choice((None, 5.0, 30.0, 60.0)))
    refusal = Failure("status", 429, rng.choice((None, None, 1.0, 30.0)))
    page = rng.choice(PAGES)
    match kind:
        case "deploy":
            return Outage(begins, ends, unavailable, share=rng.choice((0.2, 0.5, 0.6)), methods="GET")
        case "flapping":
            failure = rng.choice((unavailable, page, Failure("lost")))
            return Flapping(begins, ends + 30.0, failure, rng.choice((1.0, 2.0)), rng.choice((5.0, 8.0)))
        case "page":
            return Outage(begins, ends, page, share=rng.choice((0.5, 1.0, 1.0)), methods="GET")
        case "refusals":
            return Outage(begins, ends + 30.0, refusal, share=rng.uniform(0.01, 0.2), methods="GET")
        case "neighbour":
            return RateLimit(
                begins, ends + 30.0, rng.choice((20, 40)), refusal.retry_after, others=rng.choice((10, 18))
            )
        case "moved":
            return Moved(begins, begins + 600.0, rng.choice((unavailable, unavailable, None)))
        case "outage":
            return Outage(begins, ends, rng.choice((*FAILURES, unavailable)), methods="GET")
        case "brown-out":
            return Outage(begins, ends, Failure("status", 502), share=rng.choice((0.3, 0.5, 0.7)), methods="GET")
        case _:
            return Shard(begins, ends, unavailable, rng.randrange(3))


def _caches(seed: int, crowd: list[Actor]) -> list[Fault]:
    """Put a cache before some of the polls of the storm. With random numbers of its own, as the lies."""
    rng = random.Random(f"{seed} cache")  # noqa: S311
    if not crowd or rng.random() < 0.8:
        return []
    begins = crowd[0].at + rng.uniform(0.0, 30.0)
    return [Cache(begins, begins + rng.choice((20.0, 100.0)), rng.choice((2.0, 10.0, 120.0)))]


def _slow_handlers(seed: int, actors: list[Actor]) -> list[Actor]:
    """Give some callers who do not give up a handler that takes its time."""
    rng = random.Random(f"{seed} handlers")  # noqa: S311

    def slow(leg: Leg) -> Leg:
        is_slow = leg.how == "report" and leg.cancel_after == math.inf and rng.random() < 0.5
        return replace(leg, handler=rng.choice((0.1, 3.0, 20.0))) if is_slow else leg

    return [replace(actor, legs=tuple(map(slow, actor.legs))) for actor in actors]


def _fault(rng: random.Random, start: float, victim: Actor) -> Fault:  # noqa: PLR0911  # one for each kind
    failure = rng.choice(FAILURES)
    match rng.randrange(10):
        case 0 | 1:
            return Outage(start, start + rng.choice((0.3, 1.2, 20.0, 60.0, 300.0)), failure)
        case 2:
            return Outage(start, start + rng.choice((20.0, 120.0)), failure, share=rng.uniform(0.2, 0.8))
        case 3 | 4:
            failure = rng.choice((*FAILURES, Failure("status", 503, 30.0), Failure("status", 404)))
            return Outage(start, start + rng.choice((2.0, 60.0, 600.0)), failure, payload=victim.payload)
        case 5:
            pause = rng.choice((None, 1.0, 20.0, 1000.0))
            return Outage(start, start + rng.choice((0.5, 5.0, 30.0)), Failure("status", rng.choice((429, 503)), pause))
        case 6:
            return RateLimit(start, start + 120.0, rng.choice((1, 3, 10)), rng.choice((None, 1.0, 5.0)))
        case 7:
            return Slowness(start, start + 60.0, rng.choice((1.0, 3.0, 15.0)), rng.choice((1, 4)))
        case 8:
            return Lag(start - 100.0, start + 100.0, rng.choice((0.3, 2.0, 4.0)))
        case _:
            return Lies(start, victim.payload, rng.choice(list(LIES)), rng.choice((0.2, 1.0)))
