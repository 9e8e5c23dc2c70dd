"""Bad weather: shards that hang, limits, outages, answers that fail at random, lost connections, late deadlines.

Most of it is the real poller of a default client against a simulated service (`benchmarks.simulation`), with round
trips of 50 ms if nothing else is said. Lost connections are those of a client and a sandbox. The clock is moved, so the
figures do not depend on the machine. Only late deadlines are timed.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import math
import socket
import statistics
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar
from unittest import mock

import looptime
import msgspec
from aiohttp import web
from aiohttp.test_utils import TestServer
from tenacity import wait_fixed

from aiokeyless import (
    ApprovalTimeoutError,
    ApprovalUnknownError,
    KeylessClient,
    KeylessError,
    Operation,
    wait_adaptive,
)
from aiokeyless.events import PollEnded, PollResult
from aiokeyless.sandbox import Sandbox
from benchmarks.approval_times import seeded_random
from benchmarks.beside_loops import (
    ARRIVALS,
    EVERYBODY,
    TIMEOUT,
    Weather,
    brown_out,
    compare,
    dead_shard,
    flapping,
    limited,
    share,
)
from benchmarks.report import Goal, Report, Table, p95
from benchmarks.simulation import GOOD, HANGING, LATENCY, MOST_POLLS, Answer, Simulation, failing, operation

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from benchmarks.bench import Bench

T = TypeVar("T")

ON_PAGE: Final = True

_WARM: Final = 20.0  # seconds before an outage
_LIMIT: Final = 500  # polls a second that a service answers
_USER: Final = "C0FFEE"
_ADDRESSES: Final = ("127.0.0.1", "127.0.0.2")
_PATIENCE: Final = 120.0  # seconds that a wait may take

Start = tuple[float, str, float]  # of a wait: when, for which operation, seconds until its approval


class Crowd(NamedTuple):
    """What became of the waits of healthy operations."""

    late: list[float]
    unknown: int

    def cells(self) -> list[str]:
        """Return mean, 95th percentile, and those of unknown outcome, for a table."""
        among = f"{self.unknown} of {len(self.late) + self.unknown}"
        return [f"{statistics.mean(self.late):.2f}", f"{p95(self.late):.2f}", among]


def thirds(arrivals: float, answer: Answer, *, seconds: float = ARRIVALS) -> Crowd:
    """Let so many waits a second start for a time; every third operation always gets this answer."""
    source = seeded_random(1)
    starts = sorted((source.uniform(0, seconds), EVERYBODY.draw(source)) for _ in range(round(arrivals * seconds)))
    return _healthy_of(
        [(at, f"{'good' if k % 3 else 'bad'}-{k}", approved_in) for k, (at, approved_in) in enumerate(starts)],
        answer,
        seconds=seconds,
    )


def beside(bad: int, answer: Answer, *, within: float = 5.0, healthy: int = 200) -> Crowd:
    """Let operations that always get this answer start, evenly within so many seconds, beside healthy ones."""
    source = seeded_random(1)
    starts = [(source.uniform(0, ARRIVALS), f"good-{k}", EVERYBODY.draw(source)) for k in range(healthy)]
    starts += [(within * k / bad, f"bad-{k}", math.inf) for k in range(bad)]
    return _healthy_of(sorted(starts), answer, seconds=ARRIVALS)


def _healthy_of(starts: list[Start], answer: Answer, *, seconds: float) -> Crowd:
    """Start the waits, of which those for a "bad" operation get this answer, and return what became of the others."""

    async def scenario() -> None:
        for at, name, approved_in in starts:
            await simulation.sleep_until(at)
            simulation.start(name, approved_in=approved_in, timeout=TIMEOUT)
        await simulation.sleep_until(seconds + TIMEOUT + 3)

    simulation = Simulation(lambda name, _: answer if name.startswith("bad") else GOOD, wait_adaptive())
    simulation.run(scenario())
    late = [seconds for name, seconds in simulation.lateness.items() if name.startswith("good")]
    ended = [outcome for name, (_, outcome) in simulation.outcomes.items() if name.startswith("good")]
    return Crowd(late, sum(isinstance(outcome, ApprovalUnknownError) for outcome in ended))


class Shared(NamedTuple):
    """How clients share a service's limit."""

    goodput: float  # answered, of what the service would answer
    fairness: float  # Jain's index of the clients' answered polls: 1 if all have as many
    refused: float  # of what the service would answer


def limiter(clients: int, *, waits: int = 2000, seconds: float = 180.0) -> Shared:
    """Let clients that want four times as much poll a service that refuses more than so many polls in any second."""
    answered: dict[str, int] = {}
    passed: deque[float] = deque()
    refused = 0
    warm = seconds / 3

    def service(name: str, now: float) -> Answer:
        nonlocal refused
        while passed and now - passed[0] >= 1.0:
            passed.popleft()
        if len(passed) >= _LIMIT:
            refused += now >= warm
            return failing(429, seconds=0.02)
        passed.append(now)
        client = name.partition("-")[0]
        answered[client] = answered.get(client, 0) + (now >= warm)
        return 0.02, None

    async def scenario() -> None:
        pollers = [simulation.poller, *(simulation.new_poller() for _ in range(clients - 1))]
        for k in range(waits):
            client = k % clients
            pollers[client].start(f"{client}-{k}", ticket=None, timeout=math.inf, schedule=None, may_be_missing=False)
            await simulation.sleep_until(k / waits)
        await simulation.sleep_until(seconds)
        for poller in pollers[1:]:
            await poller.aclose()

    simulation = Simulation(service, wait_fixed(1))
    simulation.run(scenario())
    shares = list(answered.values())
    would = _LIMIT * (seconds - warm)
    jain = sum(shares) ** 2 / (clients * sum(share * share for share in shares))
    return Shared(sum(shares) / would, jain, refused / would)


class Saturated(NamedTuple):
    """What becomes of the requests to a service that can answer so many a second."""

    cut_off: float  # of the requests, before they are answered
    answered: float  # of what it can
    in_flight: int  # at the end


def saturated(capacity: float, *, waits: int, seconds: float = 240.0) -> Saturated:
    """Let waits poll a service that answers one request after another, also those that nobody waits for any more."""
    free_at, warm, answered, cut_off, in_flight = 0.0, seconds / 4, 0, 0, 0

    def service(_: str, now: float) -> Answer:
        nonlocal free_at
        free_at = max(free_at, now) + 1 / capacity
        return free_at - now, None

    def on_event(event: object) -> None:
        nonlocal answered, cut_off
        if isinstance(event, PollEnded) and simulation.now > warm:
            answered += event.result is PollResult.PENDING
            cut_off += event.result is PollResult.FAILED

    async def scenario() -> None:
        nonlocal in_flight
        for k in range(waits):
            await simulation.sleep_until(5 * k / waits)
            simulation.start(f"op-{k}")
        await simulation.sleep_until(seconds)
        in_flight = simulation.transport.in_flight

    simulation = Simulation(service, wait_adaptive(), listeners=(on_event,))
    simulation.run(scenario())
    would = capacity * (seconds - warm)
    return Saturated(cut_off / (cut_off + answered), answered / would, in_flight)


async def after_failover(sandbox: Sandbox, client: KeylessClient, waits: int, **options: Any) -> list[float]:
    """Return how late waits notice approvals within the five seconds that follow a failover."""
    loop = asyncio.get_running_loop()
    late: list[float] = []

    async def notice(name: str, at: float) -> None:
        await client.wait_for_approval(name, **options)
        late.append(loop.time() - at)

    names = [str(number) for number in range(waits)]
    await asyncio.gather(*(client.create_operation(_USER, operation_id=name) for name in names))
    fails_over_at = loop.time() + 5
    async with asyncio.TaskGroup() as group:
        for number, name in enumerate(names):
            at = fails_over_at + 5 * number / waits
            loop.call_at(at, sandbox.approve, name)
            group.create_task(notice(name, at))
        loop.call_at(fails_over_at, sandbox.reset_connections)
    return late


async def after_failover_by_name(waits: int, stale: int = 503) -> tuple[list[float], int]:
    """Return how late waits notice approvals around a failover by DNS, and how many never do.

    Another address answers from then on. The old one goes on, with this status, and with what it knew.
    """
    loop, source = asyncio.get_running_loop(), seeded_random(1)
    approved_at: dict[str, float] = {}
    fails_over_at = loop.time() + 30
    late: list[float] = []

    async def answer(request: web.Request, address: str) -> web.Response:
        name, now, is_old = request.match_info["name"], loop.time(), address == _ADDRESSES[0]
        if is_old and now >= fails_over_at:
            now = fails_over_at
            if stale != 200:
                return web.Response(status=stale)
        found = operation(name, is_approved=now >= approved_at[name])
        return web.Response(body=msgspec.json.encode(found), content_type="application/json")

    async def resolve(_: object, port: int, **_options: object) -> list[Any]:
        address = _ADDRESSES[loop.time() >= fails_over_at]
        return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port))]

    async def notice(client: KeylessClient, at: float, name: str) -> None:
        await asyncio.sleep(at)
        approved_at[name] = loop.time() + EVERYBODY.draw(source)
        with contextlib.suppress(ApprovalTimeoutError):
            await client.wait_for_approval(name, timeout=_PATIENCE)
            late.append(loop.time() - approved_at[name])

    vars(loop)["getaddrinfo"] = resolve
    async with contextlib.AsyncExitStack() as stack:
        # aiohttp forgets addresses after ten seconds of this clock.
        stack.enter_context(mock.patch("aiohttp.connector.monotonic", loop.time))
        port = 0
        for address in _ADDRESSES:
            application = web.Application()
            application.router.add_get("/v2/operations/{name}", functools.partial(answer, address=address))
            server = TestServer(application, host=address, port=port)
            await stack.enter_async_context(server)
            port = server.port or 0
        client = await stack.enter_async_context(KeylessClient("key", base_url=f"http://localhost:{port}"))
        await asyncio.gather(*(notice(client, 60 * number / waits, str(number)) for number in range(waits)))
    in_time = sum(at < loop.time() for at in approved_at.values())
    return late, in_time - len(late)


async def _failover(waits: int, *, at_each_request: bool = False) -> float:
    """Return the mean lateness after a failover. If asked for, each connection is lost at its second request."""
    sandbox = Sandbox(on_request=lambda _: sandbox.reset_connections() if at_each_request else None)
    async with sandbox, sandbox.client() as client:
        sandbox.latency = LATENCY
        return statistics.mean(await after_failover(sandbox, client, waits))


async def _create_on_dead_connections(connections: int) -> tuple[int, int]:
    """Return how many operations one create makes if all connections are dead, and with how many requests."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        sandbox.approve("warm", user_id=_USER)
        sandbox.latency = 0.1  # so that each request has a connection of its own
        await asyncio.gather(*(client.get_operation("warm") for _ in range(connections)))
        sandbox.reset_connections()
        before = sandbox.request_count
        await client.create_operation(_USER)
        return len(sandbox.operations) - 1, sandbox.request_count - before


async def _creates_in_outage(calls: int, *, are_dropped: bool) -> float:
    """Return the requests a call of creates that meet an outage."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        if are_dropped:
            sandbox.drop_next(times=None)
        else:
            sandbox.fail_next(503, times=None)
        slots = asyncio.Semaphore(50)  # no more at once than a listening socket takes

        async def create() -> None:
            async with slots:
                with contextlib.suppress(KeylessError):
                    await client.create_operation(_USER)

        await asyncio.gather(*(create() for _ in range(calls)))
        return sandbox.request_count / calls


async def _standstill(waits: int, seconds: float) -> int:
    """Return how many waits are approved although the loop stands still across their deadlines, on the real clock."""
    async with Sandbox() as sandbox, sandbox.client() as client:
        names = [str(number) for number in range(waits)]
        for name in names:
            await client.create_operation(_USER, operation_id=name)
        started = [asyncio.create_task(client.wait_for_approval(name, timeout=1.0)) for name in names]
        await asyncio.sleep(0.9)
        for name in names:
            sandbox.approve(name)
        time.sleep(seconds)  # noqa: ASYNC251  # what stands still
        outcomes = await asyncio.gather(*started, return_exceptions=True)
        return sum(isinstance(outcome, Operation) for outcome in outcomes)


def _on_moved_clock(measurement: Coroutine[Any, Any, T]) -> T:
    loop = looptime.new_event_loop()
    try:
        return loop.run_until_complete(measurement)
    finally:
        loop.close()


class Deadlines(NamedTuple):
    """The measurements of waits that end within one second."""

    last: float  # seconds from the last deadline to the last end
    timed_out: int
    unsent: int  # unknown, since no poll could be sent for them
    unanswered: int  # unknown, although one was sent


def deadlines(waits: int) -> Deadlines:
    """Let waits end within one second, on the real clock."""
    first = waits / MOST_POLLS + 5.0  # by then, each of them was polled

    async def scenario() -> None:
        begin = simulation.now
        ends = {f"op-{k}": begin + first + k / waits for k in range(waits)}
        started = [simulation.start(name, timeout=at - simulation.now) for name, at in ends.items()]
        await simulation.sleep_until(begin + first + 1.0)
        last_deadline.append(simulation.now)
        await asyncio.wait(started)

    last_deadline: list[float] = []
    simulation = Simulation(lambda _, __: GOOD, wait_fixed(1000), loop=asyncio.new_event_loop())
    simulation.run(scenario())
    outcomes = [outcome for _, outcome in simulation.outcomes.values()]
    unknown = [outcome for outcome in outcomes if isinstance(outcome, ApprovalUnknownError)]
    unsent = sum("no final poll could be sent" in str(error) for error in unknown)
    last = max(at for at, _ in simulation.outcomes.values()) - last_deadline[0]
    return Deadlines(last, len(outcomes) - len(unknown), unsent, len(unknown) - unsent)


class Outage(NamedTuple):
    """The measurements of one outage."""

    noticed: float  # seconds from its end to the first good answer
    most: int  # polls in flight
    left: int  # polls in flight, a minute after
    requests: int  # while it lasted


def outage(
    down: float, answer: Answer = HANGING, *, waits: int = 300, afterwards: float = LATENCY, seed: int = 1
) -> Outage:
    """Let the service answer so for a while, and well in so many seconds afterwards."""
    start, end = _WARM, _WARM + down
    noticed = math.inf
    most = left = 0

    def service(_: str, now: float) -> Answer:
        return answer if start <= now < end else GOOD if now < start else (afterwards, None)

    def on_event(event: object) -> None:
        nonlocal noticed
        is_good = isinstance(event, PollEnded) and event.result is PollResult.PENDING
        if is_good and simulation.now > end and noticed == math.inf:
            noticed = simulation.now - end

    async def scenario() -> None:
        nonlocal most, left
        for k in range(waits):
            await simulation.sleep_until(5 * k / waits)
            simulation.start(f"op-{k}", timeout=end + 60 - simulation.now)
        await simulation.sleep_until(end)
        most = simulation.transport.most_in_flight
        await simulation.sleep_until(end + 63)
        left = simulation.transport.in_flight

    simulation = Simulation(service, wait_adaptive(), seed=seed, listeners=(on_event,))
    simulation.run(scenario())
    return Outage(noticed, most, left, sum(start <= poll.at < end for poll in simulation.transport.sent))


def run(bench: Bench) -> Report:
    """Simulate all of it."""
    report = Report("weather: shards that hang, limits, outages, answers that fail at random, lost connections")
    _crowds(bench, report)
    _beside_loops(bench, report)
    _short_outages(bench, report)
    _limits(bench, report)
    _saturated(bench, report)
    _outages(bench, report)
    _lost_connections(bench, report)
    _late_deadlines(bench, report)
    return report


def _crowds(bench: Bench, report: Report) -> None:
    columns = ["", "late, mean s", "p95 s", "unknown"]
    seconds = bench.pick(full=ARRIVALS, smoke=2.0)
    report.tables.append(among := Table("healthy waits, a third of the operations beside them bad", columns))
    for kind, arrivals, answer in (
        ("none is bad", 10, GOOD),
        *(("a third hang", arrivals, HANGING) for arrivals in bench.pick(full=(10, 20, 50), smoke=(10,))),
        ("a third answer 500 after 5 s", 20, failing(500, seconds=5.0)),
    ):
        name = f"{kind}, {arrivals} arrivals a second"
        bench.progress(f"  {name}")
        found = thirds(arrivals, answer, seconds=seconds)
        among.rows.append([name, *found.cells()])
        report.goals.append(Goal(f"{name}: late, mean", 0.8, statistics.mean(found.late), " s"))
        report.raw[name] = {**found._asdict()}


def _limits(bench: Bench, report: Report) -> None:
    columns = ["", "answered, of the limit", "Jain's index", "refused, of the limit"]
    title = f"a service that refuses more than {_LIMIT} polls in any second, {4 * _LIMIT} wanted"
    report.tables.append(table := Table(title, columns))
    for clients in (1, 20):
        bench.progress(f"  {clients} clients of a service with a limit")
        shared = limiter(clients, seconds=bench.pick(full=180.0, smoke=3.0))
        table.rows.append([f"{clients} clients", *(f"{figure:.3f}" for figure in shared)])
        report.goals.append(Goal(f"{clients} clients: limit not used", 0.15, 1 - shared.goodput))
        report.raw[f"limit, {clients} clients"] = {**shared._asdict()}


#: Weather, how many waits there are in so many seconds, and how late ours may be: times the loop's, and seconds more.
_BESIDE_LOOPS: Final[dict[str, tuple[Weather, int, float, float, float]]] = {
    "half of the answers are 503": (brown_out(), 300, 120.0, 1.0, 0.0),
    "the same, and 5 % of the requests hang": (brown_out(hanging=0.05), 300, 120.0, 1.1, 0.0),
    "70 % of the answers are 502": (share(of=failing(502), at=0.7), 300, 120.0, 1.0, 0.0),
    "half are 503 with Retry-After: 30, for 20 s": (
        share(of=failing(503, retry_after=30), at=0.5, between=(50.0, 70.0)),
        *(300, 120.0, 1.2, 0.0),
    ),
    "503 with Retry-After: 10 for 2 s of each 5": (
        flapping(of=failing(503, retry_after=10), down=2.0, every=5.0),
        *(300, 120.0, 2.0, 0.0),
    ),
    "the same, three waits": (flapping(of=failing(503, retry_after=10), down=2.0, every=5.0), 3, 5.0, 2.5, 0.0),
    "403 for 10 s": (share(of=failing(403), at=1.0, between=(50.0, 60.0)), 300, 120.0, 1.2, 0.0),
    "5 % of the answers are 429": (share(of=failing(429), at=0.05), 300, 120.0, 1.2, 0.0),
    "20 % of the answers are 429": (share(of=failing(429), at=0.2), 300, 120.0, 1.3, 0.0),
    "a limit of 50 a second, a neighbour sends 25": (limited(50.0, neighbour=25.0), 300, 120.0, 1.0, 0.3),
    "a limit of 20 a second": (limited(20.0), 300, 120.0, 1.0, 0.0),
    "a limit of 20 a second from the middle on": (limited(20.0, since=60.0), 300, 120.0, 1.0, 0.0),
    "round trips of 400 ms, 660 waits in 5 s": (lambda _: lambda _, __: (0.4, None), 660, 5.0, 1.2, 0.0),
    "a fifth of the operations always get 503 with Retry-After: 60": (
        dead_shard(of=failing(503, retry_after=60)),
        *(300, 120.0, 1.3, 0.0),
    ),
}


def _beside_loops(bench: Bench, report: Report) -> None:
    columns = ["", "late, mean s", "p95", "of loops", "p95", "lost", "by loops", "requests, of the loops'"]
    report.tables.append(table := Table("waits of ours, and loops of one poll a second", columns))
    seeds = bench.pick(full=8, smoke=1)
    for name, (weather, waits, arrivals, times, more) in _BESIDE_LOOPS.items():
        bench.progress(f"  {name}")
        ours, loops = compare(weather, waits=waits, arrivals=arrivals, seeds=seeds)
        requests = ours.requests / loops.requests
        late = [f"{figure:.2f}" for found in (ours, loops) for figure in (found.late, found.p95)]
        table.rows.append([name, *late, str(ours.lost), str(loops.lost), f"{requests:.2f}"])
        report.goals.append(Goal(f"{name}: late, mean", times * loops.late + more, ours.late, " s"))
        report.goals.append(Goal(f"{name}: lost", loops.lost, ours.lost))
        report.raw[name] = {"ours": ours._asdict(), "loops": loops._asdict()}


class ShortOutage(NamedTuple):
    """The measurements of one short outage."""

    late: float
    """Mean seconds from its end to the notice of approvals that came in it."""
    requests: float
    """While it lasted."""


def short_outage(down: float, *, waits: int, seeds: int) -> ShortOutage:
    """Let all answers be 503 for some seconds, in which all approve."""
    found = [_short_outage(down, waits, seed) for seed in range(seeds)]
    return ShortOutage(*(statistics.mean(figures) for figures in zip(*found, strict=True)))


def _short_outage(down: float, waits: int, seed: int) -> ShortOutage:
    source, end = seeded_random(seed), _WARM + down

    async def scenario() -> None:
        for number in range(waits):
            await simulation.sleep_until(5 * number / waits)
            simulation.start(str(number), approved_in=_WARM + source.uniform(0, down) - simulation.now)
        await simulation.sleep_until(end + 60)

    simulation = Simulation(lambda _, now: failing(503) if _WARM <= now < end else GOOD, wait_adaptive(), seed=seed)
    simulation.run(scenario())
    late = statistics.mean(at - end for at, _ in simulation.outcomes.values())
    return ShortOutage(late, sum(_WARM <= poll.at < end for poll in simulation.transport.sent))


def _short_outages(bench: Bench, report: Report) -> None:
    columns = ["", "late after it, mean s", "requests a second"]
    report.tables.append(table := Table("short outages, in which all approve", columns))
    for down in (4.0, 10.0, 20.0):
        for waits in (1, 3, 30, 200):
            bench.progress(f"  an outage of {down:g} s, {waits} waits")
            found = short_outage(down, waits=waits, seeds=bench.pick(full=64 if waits < 10 else 8, smoke=1))
            name = f"{down:g} s, {waits} waits"
            table.rows.append([name, f"{found.late:.2f}", f"{found.requests / down:.1f}"])
            report.goals.append(Goal(f"an outage of {name}: late after it", 0.9, found.late, " s"))
            most = 1.4 * waits if waits < 5 else 2.5 + min(waits, 64) / down / 4
            report.goals.append(Goal(f"an outage of {name}: requests a second", most, found.requests / down))
            report.raw[f"an outage of {name}"] = {**found._asdict()}


def _saturated(bench: Bench, report: Report) -> None:
    columns = ["", "cut off before the answer", "answered, of what it can", "in flight, at the end"]
    report.tables.append(table := Table("a service that answers so many requests a second", columns))
    for capacity, waits in ((20.0, 1000), (5.0, 200)):
        bench.progress(f"  a service of {capacity:g} requests a second")
        found = saturated(capacity, waits=waits, seconds=bench.pick(full=240.0, smoke=20.0))
        name = f"{capacity:g}, {waits} waits"
        table.rows.append([name, f"{found.cut_off:.0%}", f"{found.answered:.0%}", f"{found.in_flight}"])
        report.goals.append(Goal(f"saturated, {name}: cut off", 0.05, found.cut_off))
        report.goals.append(Goal(f"saturated, {name}: capacity not used", 0.1, 1 - found.answered))
        report.raw[f"saturated, {name}"] = {**found._asdict()}


def _lost_connections(bench: Bench, report: Report) -> None:
    bench.progress("  lost connections")
    report.tables.append(table := Table("lost connections", ["", "", "at most"]))

    def add(name: str, figure: float, goal: float, unit: str) -> None:
        table.rows.append([name, f"{figure:.2f}{unit}", f"{goal:g}{unit}"])
        report.goals.append(Goal(name, goal, figure, unit))
        report.raw[name] = figure

    for waits in bench.pick(full=(20, 60, 100), smoke=(5,)):
        add(f"a failover, {waits} waits: late, mean", _on_moved_clock(_failover(waits)), 1.0, " s")
    for stale in (503, 200):
        waits = bench.pick(full=120, smoke=5)
        late, lost = _on_moved_clock(after_failover_by_name(waits, stale))
        name = f"a failover by DNS, the old host answers {stale}, {waits} waits"
        add(f"{name}: late, mean", statistics.mean(late), 1.0 if stale == 503 else 10.0, " s")
        add(f"{name}: lost", lost, 0, "")
    waits = bench.pick(full=20, smoke=5)
    name = f"each connection is lost at its second request, {waits} waits: late, mean"
    add(name, _on_moved_clock(_failover(waits, at_each_request=True)), 0.7, " s")
    made, requests = _on_moved_clock(_create_on_dead_connections(12))
    add("one create, 12 dead connections: operations", made, 1, "")
    add("requests for it that arrive", requests, 2, "")
    calls = bench.pick(full=300, smoke=150)
    for name, are_dropped, goal in (("503", False, 1.5), ("connections dropped", True, 2.0)):
        per_call = _on_moved_clock(_creates_in_outage(calls, are_dropped=are_dropped))
        add(f"{calls} creates in an outage, {name}: requests a call", per_call, goal, "")


def _late_deadlines(bench: Bench, report: Report) -> None:
    waits, seconds = bench.pick(full=(20, 3.0), smoke=(3, 1.0))
    bench.progress("  a loop that stands still, and many deadlines")
    approved = asyncio.run(_standstill(waits, seconds))
    columns = ["", "approved or timed out", "unknown, none sent", "unknown, sent", "the last ends after, s"]
    report.tables.append(table := Table("late deadlines, on the real clock", columns))
    name = f"the loop stands still for {seconds:g} s across {waits} deadlines, approved before"
    table.rows.append([name, f"{approved}", "", f"{waits - approved}", ""])
    report.goals.append(Goal(f"{name}: not noticed", 0, waits - approved))
    many = bench.pick(full=20_000, smoke=300)
    found = deadlines(many)
    table.rows.append([f"{many} deadlines within one second", *map(str, found[1:]), f"{found.last:.1f}"])
    report.goals.append(Goal(f"{many} deadlines: the last ends after", 2.5, found.last, " s"))
    report.raw["late deadlines"] = {"approved": approved, **found._asdict()}


def _outages(bench: Bench, report: Report) -> None:
    columns = ["the service answers afterwards", "noticed, mean s", "at most", "in flight at most", "left"]
    report.tables.append(table := Table("300 waits, outages in which the service hangs", columns))
    lengths = bench.pick(full=[33.0, 40.3, 48.7, 55.1, 62.9, 70.0], smoke=[5.0])
    for afterwards in (LATENCY, 2.0, 5.0, 9.0):
        bench.progress(f"  outages, {afterwards} s afterwards")
        found = [outage(down, afterwards=afterwards) for down in lengths]
        noticed, most, left, _ = zip(*found, strict=True)
        mean = statistics.mean(noticed)
        figures = [f"{mean:.1f}", f"{max(noticed):.1f}", f"{max(most)}", f"{max(left)}"]
        table.rows.append([f"in {afterwards:g} s", *figures])
        report.goals.append(Goal(f"noticed after an outage, {afterwards:g} s", 3 + afterwards, mean, " s"))
        report.raw[f"outages, {afterwards:g} s afterwards"] = [*noticed]
