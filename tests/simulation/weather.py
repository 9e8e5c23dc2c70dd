"""The judge of how waits are paced: our client beside loops of one poll a second, in the same bad weather.

``python -m tests.simulation.weather`` prints a line for each weather of a table; ``--random 200`` makes weather up.
``--set aiokeyless._rules.backoff:NAME=VALUE`` tries another number first. All operations are created, since only polls
are compared, and all users approve in time, so that whatever is not found is lost.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib
import json
import math
import random
import re
import statistics
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .actors import USER, Actor, Leg, Process
from .faults import Capacity, Failure, Fate, Flapping, Moved, Outage, RateLimit, RoundTrips
from .history import History, Known, ObservedWait
from .loop import run_loops
from .people import NOBODY, Person
from .service import Stored
from .story import Story, run

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from .faults import Fault, Request

#: A client with its defaults, and a wait with its own.
CLIENT: Final = Process(max_in_flight=256, rate=1000.0, request_timeout=10.0, poll_cost=0.02)
LEGS: Final = (Leg(0.0, 0),)
#: Seconds that a create takes.
CREATING: Final = 0.05
FOREVER: Final = 1e6
#: A row with fewer waits runs so much more often: a single one says nothing.
ENOUGH: Final = 30
#: The seconds before its deadline in which no user approves: who wins there is chance.
LAST: Final = 2.0
#: A row is worse than loops if it is so many times as late and so many seconds more, or loses so large a share more.
TIMES: Final = 1.2
SECONDS: Final = 0.1
SHARE: Final = 0.01


# -- more that goes wrong


@dataclass(frozen=True)
class Creates:
    """All creates succeed, each in the same time."""

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Let a create through."""
        return Fate(CREATING) if request.method == "POST" else None


@dataclass(frozen=True)
class Bad:
    """Every poll of the bad operations fails."""

    failure: Failure

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Fail."""
        return self.failure.fate(rng) if request.payload.startswith("Pay 40 to bad") else None


@dataclass(frozen=True)
class OwnLimit:
    """The service refuses a poll of an operation whose last poll that it let through is not so many seconds old."""

    seconds: float
    retry_after: float | None
    _passed: dict[str, float] = field(default_factory=dict, repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Refuse what is too soon."""
        if request.at - self._passed.get(request.payload, -math.inf) < self.seconds:
            return Fate(rng.uniform(0.01, 0.1), 429, retry_after=self.retry_after, is_processed=False)
        self._passed[request.payload] = request.at
        return None


@dataclass(frozen=True)
class Recovery:
    """From its beginning the service answers five requests a second, then twice as many after each so many seconds.

    It sheds the rest with a failure; None: they queue.
    """

    begins: float
    failure: Failure | None
    doubles_after: float = 2.0
    _free_at: list[float] = field(default_factory=lambda: [0.0], repr=False, compare=False)

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Answer, shed or queue it."""
        if request.at < self.begins:
            return None
        each = 1.0 / (5.0 * 2.0 ** min(20.0, (request.at - self.begins) // self.doubles_after))
        free_at = self._free_at[0]
        if self.failure is not None and free_at > request.at + 0.5:  # a small queue, so that shedding is not chance
            return self.failure.fate(rng)
        self._free_at[0] = max(free_at, request.at) + each
        return Fate(self._free_at[0] - request.at + rng.uniform(0.02, 0.2)) if self.failure is None else None


@dataclass(frozen=True)
class ForgottenFlows:
    """A firewall forgets all flows after each so many seconds: what is sent on them gets to nobody, without an error.

    The system of the client notices that after some seconds (``TCP_USER_TIMEOUT``); infinite: never.
    """

    every: float
    noticed_after: float = math.inf

    def fate(self, request: Request, rng: random.Random) -> Fate | None:
        """Swallow it, if its connection was made before."""
        if request.made_at // self.every >= request.at // self.every or request.made_at == math.inf:
            return None
        return Fate(self.noticed_after, is_forgotten=True)


# -- weather


@dataclass(frozen=True)
class Weather:
    """One row of the table: how many wait, and in what.

    Attributes:
        name: Its name; its beginning names its group.
        waits: How many good operations there are.
        faults: What goes wrong with polls.
        bad: How many bad operations there are beside them.
        lifetime: Seconds that each wait may take.
        within: Seconds in which they all begin; 0: at once.
        thinks: How long users take: the median in seconds, and sigma, of a log-normal distribution.
        since: When users begin to think at the soonest.
        about: What its name does not say.
    """

    name: str
    waits: int
    faults: tuple[Fault, ...]
    bad: int = 0
    lifetime: float = 60.0
    within: float = 20.0
    thinks: tuple[float, float] = (8.0, 0.8)
    since: float = 0.0
    about: str = ""

    @property
    def repeats(self) -> int:
        """How many runs count as one."""
        return max(1, ENOUGH // self.waits)

    def story(self, seed: int) -> Story:
        """Return a story of it."""
        rng = random.Random(f"{seed} {self.name}")  # noqa: S311
        actors = [self._actor(rng, f"w{number}") for number in range(self.waits)]
        actors += [self._actor(rng, f"bad{number}") for number in range(self.bad)]
        return Story(seed, (CLIENT,), tuple(actors), (Creates(), *self.faults))

    def _actor(self, rng: random.Random, name: str) -> Actor:
        at, (median, sigma) = 1.0 + rng.uniform(0.0, self.within), self.thinks
        while True:
            after = max(0.0, self.since - at) + rng.lognormvariate(math.log(median), sigma)
            if after < self.lifetime - LAST:
                break
        person = NOBODY if name.startswith("bad") else Person(after)
        return Actor(at, name, 0, lifetime=self.lifetime, person=person, legs=LEGS, is_compared=True)


REFUSED: Final = Failure("refused")
LOST: Final = Failure("lost")
HANGS: Final = Failure("hangs")
UNAVAILABLE: Final = Failure("status", 503)
KINDS: Final = {"refused": REFUSED, "5xx": UNAVAILABLE, "lost": LOST, "hangs": HANGS}


def _flapping(failure: Failure, down: float, every: float, shortest: float, longest: float) -> tuple[Fault, ...]:
    """Return a service that is down for some seconds of each so many; all answers take as long."""
    failure = failure._replace(seconds=(shortest, longest))
    return Flapping(0.0, FOREVER, failure, down, every), RoundTrips(shortest, longest)


def _failing(share: float, failure: Failure, shortest: float = 0.01, longest: float = 0.2) -> tuple[Fault, ...]:
    """Return a service of whose answers a share fails, after some seconds."""
    return (Outage(0.0, FOREVER, failure._replace(seconds=(shortest, longest)), share),)


def _mixed() -> Iterator[Weather]:
    """Yield weather in which some answers are good all the time, or after a few seconds."""
    bad = Failure("status", 500)
    slow = RoundTrips(0.0, 2.0)
    yield Weather("flap 2.9/3.7 lost, good 0-2s", 150, (Flapping(0.0, FOREVER, LOST, 2.9, 3.7), slow))
    yield Weather("flap 2.9/3.7 lost, all 0-2s", 150, _flapping(LOST, 2.9, 3.7, 0.0, 2.0))
    yield Weather("flap 4/5 500, good 0-2s", 150, (Flapping(0.0, FOREVER, bad, 4.0, 5.0), slow))
    yield Weather("flap 4/5 500, all 0-2s", 150, _flapping(bad, 4.0, 5.0, 0.0, 2.0))
    yield Weather("flap 8/10 500 1s", 60, _flapping(bad, 8.0, 10.0, 1.0, 1.0))
    for down, every in ((4.0, 5.0), (7.0, 10.0), (9.0, 10.0), (18.0, 20.0)):
        for kind, failure in KINDS.items():
            yield Weather(f"flap {down:g}/{every:g} {kind}", 100, _flapping(failure, down, every, 0.01, 0.4))
    yield Weather("share 90% 503 at once", 300, _failing(0.9, UNAVAILABLE), within=0.0)
    yield Weather("share 90% after 1.5s", 100, _failing(0.9, bad, 1.5, 1.5))
    yield Weather("share 97%", 100, _failing(0.97, bad))
    for waits in (30, 100):
        for share in (0.8, 0.9):
            yield Weather(f"share {share:.0%} {waits}", waits, _failing(share, bad))
    yield Weather("share 80% hangs", 100, _failing(0.8, HANGS))
    yield Weather("share 50% 503 Retry-After 10", 30, _failing(0.5, Failure("status", 503, 10.0)))
    yield Weather("share 50% 503 Retry-After 30", 30, _failing(0.5, Failure("status", 503, 30.0)))
    yield Weather("share 20% 503 Retry-After 30", 100, _failing(0.2, Failure("status", 503, 30.0)))


def _outages() -> Iterator[Weather]:
    """Yield outages in which nothing is answered well."""
    begins = 8.0
    for seconds in (3.0, 4.0, 10.0, 20.0, 30.0, 60.0, 180.0):
        for waits in (1, 3, 30, 200, 1000):
            for kind, failure in KINDS.items():
                if kind == "lost":  # much as refused
                    continue
                yield Weather(
                    f"outage {seconds:g}s {waits} {kind}",
                    waits,
                    (Outage(begins, begins + seconds, failure),),
                    lifetime=seconds + 60.0,
                    within=5.0,
                    thinks=(max(3.0, seconds / 2.0), 0.8),
                    since=begins,
                )
    for seconds in (20.0, 30.0, 40.0):
        for waits in (10, 100):
            faults = (Outage(begins, begins + seconds, HANGS),)
            yield Weather(f"hangs {seconds:g}s {waits}", waits, faults, lifetime=120.0, within=20.0, thinks=(20.0, 0.8))
    for seconds, waits in ((10.0, 100), (30.0, 100), (30.0, 300), (60.0, 300)):
        for kind, sheds in (("sheds", UNAVAILABLE), ("queues", None)):
            yield Weather(
                f"recovery {seconds:g}s {waits} {kind}",
                waits,
                (Outage(begins, begins + seconds, UNAVAILABLE), Recovery(begins + seconds, sheds)),
                lifetime=seconds + 60.0,
                within=5.0,
                thinks=(seconds / 2.0, 0.8),
                since=begins,
            )


def _busy() -> Iterator[Weather]:
    """Yield services that have too little for all."""
    sheds = RateLimit(0.0, FOREVER, 60, None, status=503)
    yield Weather("sheds over 60/s 900", 900, (sheds,), lifetime=120.0, within=10.0)
    yield Weather("sheds over 60/s 900, slow users", 900, (sheds,), lifetime=120.0, within=10.0, thinks=(30.0, 0.8))
    yield Weather("sheds over 20/s 100", 100, (RateLimit(0.0, FOREVER, 20, None, status=503),), lifetime=120.0)
    for waits, rate in ((1000, 20.0), (200, 5.0)):
        yield Weather(f"capacity {rate:g}/s {waits}", waits, (Capacity(0.0, FOREVER, rate),), lifetime=120.0)
    yield Weather("capacity 1/s 30", 30, (Capacity(0.0, FOREVER, 1.0),), lifetime=120.0)
    yield Weather("capacity 1/s 100", 100, (Capacity(0.0, FOREVER, 1.0),), lifetime=300.0)


def _refusals() -> Iterator[Weather]:
    """Yield services that answer 429."""
    for share in (0.05, 0.2, 0.4):
        for pause in (None, 1.0):
            asks = "" if pause is None else " Retry-After 1"
            yield Weather(f"429 {share:.0%}{asks}", 100, _failing(share, Failure("status", 429, pause)))
    for rate in (10, 20):
        for begins in (0.0, 20.0):
            for pause in (None, 1.0):
                asks = "" if pause is None else " Retry-After 1"
                limit = RateLimit(begins, FOREVER, rate, pause)
                name = f"429 own {rate}/s{' from 20s' if begins else ''}{asks}"
                yield Weather(name, 100, (limit,), lifetime=120.0, within=40.0)
    for takes in (18, 20):
        yield Weather(
            f"429 neighbour {takes} of 20/s", 30, (RateLimit(0.0, FOREVER, 20, None, takes),), lifetime=120.0, within=30
        )
    for pause in (1.0, 20.0):
        refused = Failure("status", 429, pause)
        yield Weather(f"429 burst Retry-After {pause:g}", 100, (Outage(12.0, 14.0, refused),))
        yield Weather(f"429 bursts 2/10 Retry-After {pause:g}", 100, (Flapping(0.0, FOREVER, refused, 2.0, 10.0),))
    yield Weather("429 per key 2s", 100, (OwnLimit(2.0, None),))
    yield Weather("429 per key 2s Retry-After 1", 100, (OwnLimit(2.0, 1.0),))


def _bad_ones() -> Iterator[Weather]:
    """Yield bad operations beside good ones."""
    for good, bad in ((80, 20), (20, 80)):
        for seconds in (0.01, 0.3, 0.9):
            failure = Failure("status", 500, seconds=(seconds, seconds))
            yield Weather(f"bad {bad}% 500 {seconds:g}s", good, (Bad(failure),), bad)
        yield Weather(f"bad {bad}% hang", good, (Bad(HANGS),), bad)
        yield Weather(f"bad {bad}% 429", good, (Bad(Failure("status", 429)),), bad)
        yield Weather(f"bad {bad}% 429 Retry-After 5", good, (Bad(Failure("status", 429, 5.0)),), bad)


def _connections() -> Iterator[Weather]:
    """Yield connections that lead nowhere, or to an old host."""
    for noticed_after in (math.inf, 3.0):
        for waits in (10, 100):
            noticed = "never noticed" if noticed_after == math.inf else f"noticed after {noticed_after:g}s"
            yield Weather(f"flows 8s {noticed} {waits}", waits, (ForgottenFlows(8.0, noticed_after),))
    for waits in (1, 4):
        for known_for in (0.0, 3.0, 10.0):
            moved = Moved(12.0, FOREVER, UNAVAILABLE, known_for)
            yield Weather(f"moved {known_for:g}s {waits}", waits, (moved,), within=5.0, thinks=(15.0, 0.8))


def _evolved() -> Iterator[Weather]:
    """Yield what a search found that lets waits be later than loops, or lost, in weather of many kinds."""
    hang = Bad(HANGS)
    outage = Outage(0.8, 11.7, REFUSED._replace(seconds=(1.0, 1.0)))
    yield Weather("evolved: outage, 67% hang", 79, (hang, outage, RoundTrips(0.6, 0.9)), 158, 120.0, 0.0)
    flaps = Flapping(0.0, FOREVER, UNAVAILABLE._replace(seconds=(0.01, 2.0)), 11.8, 18.3)
    yield Weather("evolved: flaps, 67% hang", 118, (hang, flaps, RoundTrips(0.1, 2.0)), 236, 120.0, 40.0)
    flaps = Flapping(0.0, FOREVER, REFUSED, 5.0, 6.2)
    yield Weather("evolved: up for a round trip", 100, (flaps, RoundTrips(1.2, 1.4)), 0, 120.0, 5.0)
    flaps = Flapping(0.0, FOREVER, LOST, 11.9, 15.5)
    yield Weather(
        "evolved: flaps, 30% fail", 336, (flaps, Outage(0.0, FOREVER, LOST, 0.3), RoundTrips(0.02, 2.4)), 0, 120.0
    )


TABLE: Final = (*_mixed(), *_outages(), *_busy(), *_refusals(), *_bad_ones(), *_connections(), *_evolved())


def random_weather(seed: int) -> Weather:
    """Make weather up: any of it, in any numbers."""
    rng = random.Random(f"{seed} random weather")  # noqa: S311
    shortest = rng.choice((0.01, 0.01, 0.1, 0.5, 1.0))
    longest = max(shortest, rng.choice((0.05, 0.2, 0.4, 1.0, 2.0)))
    quickest, slowest = sorted((rng.choice((0.01, shortest)), rng.choice((0.2, longest))))
    kind, failure = rng.choice(list(KINDS.items()))
    failure = failure._replace(seconds=(quickest, slowest))
    told = [f"{kind} {quickest:g}-{slowest:g}s, good {shortest:g}-{longest:g}s"]
    faults: list[Fault] = []
    bad = 0.0
    what = rng.choices(("flapping", "share", "outage", "both", "none", "shed"), (6, 4, 3, 2, 1, 1))[0]
    if what in ("flapping", "both"):
        every = rng.uniform(2.0, 20.0)
        down = every * rng.choice((rng.uniform(0.1, 0.95), rng.uniform(0.6, 0.95)))
        faults.append(Flapping(0.0, FOREVER, failure, down, every))
        told.append(f"down {down:.1f} of {every:.1f} s")
    if what in ("share", "both"):
        share = rng.choice((rng.uniform(0.1, 0.97), rng.uniform(0.7, 0.97))) if what == "share" else 0.3
        faults.append(Outage(0.0, FOREVER, failure, share))
        told.append(f"{share:.0%} fail")
    if what == "outage":
        begins, lasts = rng.uniform(0.0, 15.0), math.exp(rng.uniform(math.log(2.0), math.log(45.0)))
        faults.append(Outage(begins, begins + lasts, failure))
        told.append(f"down from {begins:.0f} to {begins + lasts:.0f} s")
    if what == "shed":
        faults.append(RateLimit(0.0, FOREVER, limit := rng.choice((5, 20, 60)), None, status=503))
        told.append(f"sheds over {limit}/s")
    if what == "none" or rng.random() < 0.3:
        took = rng.choice((0.01, 0.3, 0.9))
        of_bad = rng.choice((Failure("status", 500, seconds=(took, took)), HANGS, Failure("status", 429)))
        faults.insert(0, Bad(of_bad))
        bad = rng.choice((0.1, 0.5, 0.8))
        told.append(f"{bad:.0%} bad: {of_bad.how} {of_bad.status} {took:g} s")
    faults.append(RoundTrips(shortest, longest))
    waits = round(math.exp(rng.uniform(math.log(3.0), math.log(rng.choice((60.0, 200.0, 200.0, 600.0))))))
    within = rng.choice((0.0, 5.0, 20.0, 40.0))
    lifetime = rng.choice((60.0, 60.0, 90.0, 120.0))
    median = rng.choice((3.0, 8.0, 8.0, 20.0))
    told.append(f"{lifetime:g} s, begin within {within:g} s, think {median:g} s")
    few = round(bad * waits)
    return Weather(
        f"random {seed}",
        max(1, waits - few),
        tuple(faults),
        few,
        lifetime=lifetime,
        within=within,
        thinks=(median, 0.8),
        about="; ".join(told),
    )


# -- what comes of it


@dataclass
class Side:
    """What became of waits, or of the loops in their place.

    Attributes:
        late: Seconds from an approval to its notice, of each that was noticed.
        lost: How many were not.
        requests: Polls.
        peak: Polls in one second, at most.
        in_outages: Polls at times when every poll failed.
    """

    late: list[float]
    lost: int
    requests: int
    peak: int
    in_outages: int

    def add(self, other: Side) -> None:
        """Add another run of the same weather."""
        self.late += other.late
        self.lost += other.lost
        self.requests += other.requests
        self.peak = max(self.peak, other.peak)
        self.in_outages += other.in_outages

    @property
    def mean(self) -> float:
        """Seconds late on average; 0 if none was noticed."""
        return statistics.fmean(self.late) if self.late else 0.0

    @property
    def p95(self) -> float:
        """Seconds that one of twenty is late."""
        return sorted(self.late)[max(0, math.ceil(0.95 * len(self.late)) - 1)] if self.late else 0.0

    def to_dict(self, runs: int) -> dict[str, float]:
        """Return its figures; requests are of one run."""
        return {
            "late": round(self.mean, 3),
            "p95": round(self.p95, 3),
            "lost": self.lost,
            "requests": self.requests / runs,
            "peak": self.peak,
            "in_outages": self.in_outages / runs,
        }


@dataclass
class Verdict:
    """Our waits and the loops, in one weather."""

    weather: Weather
    ours: Side
    loops: Side
    runs: int = 1
    seconds: float = 0.0
    """Of computing."""

    def add(self, other: Verdict) -> None:
        """Add another run of the same weather."""
        self.ours.add(other.ours)
        self.loops.add(other.loops)
        self.runs += other.runs
        self.seconds += other.seconds

    @property
    def ratio(self) -> float:
        """How many times as late as the loops."""
        return self.ours.mean / self.loops.mean if self.loops.mean else math.nan

    @property
    def excess(self) -> float:
        """Seconds by which it is later than it may be; below 0: sooner."""
        return self.ours.mean - TIMES * self.loops.mean - SECONDS

    @property
    def is_late(self) -> bool:
        """Whether it is later than it may be. If loops lost more, they did not notice the late ones at all."""
        return self.excess > 0.0 and self.loops.lost - self.ours.lost <= SHARE * self.runs * self.weather.waits

    @property
    def loses(self) -> bool:
        """Whether it loses more than it may."""
        return self.ours.lost - self.loops.lost > SHARE * self.runs * self.weather.waits

    def to_dict(self) -> dict[str, Any]:
        """Return its figures."""
        sides = {"ours": self.ours.to_dict(self.runs), "loops": self.loops.to_dict(self.runs)}
        waits, worse = self.weather.waits, {"is_late": self.is_late, "loses": self.loses}
        return {
            "name": self.weather.name,
            "waits": waits,
            "runs": self.runs,
            **sides,
            **worse,
            "cpu": round(self.seconds, 2),
        }

    def __str__(self) -> str:
        sides = " |".join(
            f"{side.mean:6.2f} {side.p95:6.1f} {side.lost:4} {side.requests / self.runs:7.0f} {side.peak:4} "
            f"{side.in_outages / self.runs:6.0f}"
            for side in (self.ours, self.loops)
        )
        worse = f"{' late' if self.is_late else ''}{' lost' if self.loses else ''}"
        return f"{self.weather.name:34} {self.runs * self.weather.waits:5} |{sides} | {self.ratio:5.2f}{worse}"


HEAD: Final = (
    f"{'':34} {'waits':>5} |{'late':>6} {'p95':>6} {'lost':>4} {'polls':>7} {'peak':>4} {'down':>6}"
    f" |{'loop':>6} {'p95':>6} {'lost':>4} {'polls':>7} {'peak':>4} {'down':>6} | ratio"
)


def judge(weather: Weather, seed: int, loops: Side | None = None) -> Verdict:
    """Run a story of some weather, and loops in it unless it is known what became of them."""
    started = time.process_time()
    story = weather.story(seed)
    loops = loops or run_beside(story)
    return Verdict(weather, run_ours(story), loops, seconds=time.process_time() - started)


def run_ours(story: Story) -> Side:
    """Run our client."""
    history = run(story)
    if history.problems:
        raise RuntimeError(f"{story.seed}: {history.problems}")
    late = [
        wait.ended_at - max(wait.started_at, history.operations[wait.operation_id].approved_at)
        for wait in history.waits
        if wait.outcome == "approved"
    ]
    return _side(story, late, [exchange.sent_at for exchange in history.exchanges if exchange.method == "GET"])


def run_beside(story: Story) -> Side:
    """Run loops in place of our waits; each begins and ends when the wait does."""
    history = History()
    for actor in story.actors:
        created_at = actor.at + CREATING / 2
        approved_at = created_at + actor.person.approves_after
        history.operations[actor.name] = Stored(actor.name, USER, actor.payload, None, created_at, approved_at)
        history.waits.append(
            ObservedWait(
                number=0,
                client="",
                operation_id=actor.name,
                started_at=actor.at + CREATING,
                ticket=Known(user_id=USER, payload=actor.payload, external_user_id=None, lifetime=actor.lifetime),
                ages=(CREATING,),
                timeout=None,
                delays=(1.0, 1.0),
            )
        )
    found, sent = run_loops(story, history, history.waits, CLIENT)
    late = [
        found_at - max(wait.started_at, history.operations[wait.operation_id].approved_at)
        for wait, found_at in zip(history.waits, found, strict=True)
        if found_at < math.inf
    ]
    return _side(story, late, sent)


def _side(story: Story, late: list[float], sent: list[float]) -> Side:
    approved = sum(actor.person.approves_after < math.inf for actor in story.actors)
    sent.sort()
    first = peak = 0
    for number, at in enumerate(sent):
        while sent[first] <= at - 1.0:
            first += 1
        peak = max(peak, number - first + 1)
    return Side(late, approved - len(late), len(sent), peak, sum(is_down(story.faults, at) for at in sent))


def is_down(faults: Sequence[Fault], at: float) -> bool:
    """Return whether every poll fails at a time."""
    return any(
        (isinstance(fault, Outage) and fault.is_total and fault.begins <= at < fault.ends)
        or (isinstance(fault, Flapping) and fault.begins <= at < fault.ends and at % fault.every < fault.down)
        for fault in faults
    )


# -- the command


class Setting(NamedTuple):
    """Another value of a constant."""

    module: str
    name: str
    value: object

    @classmethod
    def parse(cls, text: str) -> Setting:
        """Read ``module:NAME=VALUE``."""
        module, _, rest = text.partition(":")
        name, _, value = rest.partition("=")
        return cls(module, name, ast.literal_eval(value))

    def apply(self) -> None:
        """Set it, in the modules that import it from there, too."""
        module = importlib.import_module(self.module)
        before = getattr(module, self.name)
        setattr(module, self.name, self.value)
        for other in [module for name, module in sys.modules.items() if name.startswith("aiokeyless")]:
            if not self.name.startswith("_") and getattr(other, self.name, None) == before:
                setattr(other, self.name, self.value)


class Job(NamedTuple):
    """One story to run."""

    weather: Weather
    seed: int
    loops: Side | None
    key: str

    def run(self) -> tuple[str, Verdict]:
        """Run it."""
        return self.key, judge(self.weather, self.seed, self.loops)


class Loops:
    """What became of the loops in earlier runs, in a file: they do not depend on the library.

    Args:
        path: The file; None: nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._known: dict[str, dict[str, Any]] = json.loads(path.read_text()) if path and path.exists() else {}
        sources = (
            Path(__file__).with_name(f"{name}.py") for name in ("faults", "loop", "people", "service", "weather")
        )
        self._version = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()

    def job(self, weather: Weather, seed: int) -> Job:
        """Return a story to run, with what is known of its loops."""
        key = hashlib.sha256(f"{self._version} {seed} {weather}".encode()).hexdigest()
        known = self._known.get(key)
        return Job(weather, seed, None if known is None else Side(**known), key)

    def learn(self, key: str, side: Side) -> None:
        """Remember what became of some."""
        if self._path is not None:
            self._known[key] = {**vars(side), "late": list(side.late)}

    def save(self) -> None:
        """Write the file."""
        if self._path is not None:
            self._path.write_text(json.dumps(self._known))


def run_all(jobs: Sequence[Job], processes: int) -> Iterator[tuple[str, Verdict]]:
    """Run stories, and yield what came of them in their order."""
    if processes == 1:
        yield from map(Job.run, jobs)
        return
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:  # they have the settings of this process
        yield from pool.map(Job.run, jobs)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="weather", description=__doc__)
    parser.add_argument("--rows", default="", help="only rows whose name has a match of this regular expression")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each row (default: 1)")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="so many random stories instead")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (default: 0)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("-j", type=int, default=1, dest="processes", help="processes (default: 1)")
    parser.add_argument(
        "--set",
        type=Setting.parse,
        action="append",
        default=[],
        help="module:NAME=VALUE; computed from it before: as it was",
    )
    parser.add_argument("--loops", type=Path, help="a file in which what became of the loops is kept")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options, started = _options(), time.monotonic()
    seeds = range(options.seed, options.seed + max(options.random, options.seeds))
    if options.random:
        weathers = [(random_weather(seed), seed) for seed in seeds]
    else:
        rows = [weather for weather in TABLE if re.search(options.rows, weather.name)]
        weathers = [(row, 1000 * seed + number) for row in rows for seed in seeds for number in range(row.repeats)]
    for setting in options.set:
        setting.apply()
    loops = Loops(options.loops)
    verdicts: dict[str, Verdict] = {}
    is_listed = not options.json and not options.random
    if is_listed:
        print(HEAD, flush=True)
    left = Counter(weather.name for weather, _ in weathers)
    for key, verdict in run_all([loops.job(*each) for each in weathers], options.processes):
        loops.learn(key, verdict.loops)
        name = verdict.weather.name
        if name in verdicts:
            verdicts[name].add(verdict)
        else:
            verdicts[name] = verdict
        left[name] -= 1
        if is_listed and not left[name]:
            print(verdicts[name], flush=True)
    loops.save()
    if options.json:
        print(json.dumps([verdict.to_dict() for verdict in verdicts.values()], indent=1))
        return
    if options.random:
        _print_worst([*verdicts.values()])
    _print_sum([*verdicts.values()])
    print(
        f"{time.monotonic() - started:.0f} s, {sum(verdict.seconds for verdict in verdicts.values()):.0f} of computing"
    )


def _print_worst(verdicts: list[Verdict]) -> None:
    """Print the ten that are latest and the ten that lose most, beside loops."""
    print(HEAD)
    for what, key in (("lateness", lambda v: v.excess), ("loss", lambda v: v.ours.lost - v.loops.lost)):
        print(f"the worst by {what}:")
        for verdict in sorted(verdicts, key=key, reverse=True)[:10]:
            print(f"{verdict}\n  {verdict.weather.about}")


def _print_sum(verdicts: list[Verdict]) -> None:
    total = Verdict(Weather("all", 0, ()), Side([], 0, 0, 0, 0), Side([], 0, 0, 0, 0), 0)
    for verdict in verdicts:
        total.add(verdict)
    total.weather = Weather("all", sum(v.weather.waits * v.runs for v in verdicts) // max(1, total.runs), ())
    late, lost = sum(v.is_late for v in verdicts), sum(v.loses for v in verdicts)
    print(f"{total}\n{len(verdicts)} rows, of which {late} are later than loops and {lost} lose more")


if __name__ == "__main__":
    main()
