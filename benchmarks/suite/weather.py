"""Bad weather: shards that hang, long round trips, refusals, slow handlers; what it costs healthy waits, simulated.

The real poller of a default client against a simulated service (`benchmarks.simulation`), with round trips of 50 ms if
nothing else is said. Nothing is timed but the watchers of one operation, so the other figures do not depend on the
machine.
"""

from __future__ import annotations

import asyncio
import math
import statistics
import time
from collections import deque
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import aiohttp
import looptime
from tenacity import wait_exponential, wait_fixed

from aiokeyless import ApprovalUnknownError, KeylessClient, Operation, wait_adaptive
from aiokeyless.events import CircuitChanged, PollEnded, PollResult
from benchmarks.approval_times import ApprovalTimes, seeded_random
from benchmarks.report import Goal, Report, Table, p95
from benchmarks.server import API_KEY
from benchmarks.simulation import GOOD, HANGING, LATENCY, Answer, Simulation, failing, operation

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from benchmarks.bench import Bench

ONLY_BY_NAME: Final = True

_EVERYBODY: Final = ApprovalTimes(((1.0, 8.0, 0.8),), never=0.0)
_ARRIVALS: Final = 120.0  # seconds in which waits start
_TIMEOUT: Final = 120.0
_WARM: Final = 20.0  # seconds before an outage
SLOW_FAILURE: Final = failing(500, seconds=5.0)


class Crowd(NamedTuple):
    """What became of the waits of healthy operations."""

    late: list[float]
    unknown: int

    def cells(self) -> list[str]:
        """Return mean, 95th percentile, and those of unknown outcome, for a table."""
        return [
            f"{statistics.mean(self.late):.2f}",
            f"{p95(self.late):.2f}",
            f"{self.unknown} of {len(self.late) + self.unknown}",
        ]


def crowd(
    arrivals: float, is_bad: Callable[[int], bool], answer: Answer, *, seconds: float = _ARRIVALS, seed: int = 1
) -> Crowd:
    """Let so many waits a second start for a time, of which some never get a good answer."""
    source = seeded_random(seed)
    count = round(arrivals * seconds)
    starts = sorted((source.uniform(0, seconds), _EVERYBODY.draw(source)) for _ in range(count))
    named = [(at, f"bad-{k}" if is_bad(k) else f"good-{k}", approved_in) for k, (at, approved_in) in enumerate(starts)]
    return _healthy_of(named, answer, seconds=seconds, seed=seed)


def _healthy_of(starts: list[tuple[float, str, float]], answer: Answer, *, seconds: float, seed: int) -> Crowd:
    """Start the waits, of which those for a "bad" operation get this answer, and return what became of the others."""

    async def scenario() -> None:
        for at, name, approved_in in starts:
            await simulation.sleep_until(at)
            simulation.start(name, approved_in=approved_in, timeout=_TIMEOUT)
        await simulation.sleep_until(seconds + _TIMEOUT + 3)

    simulation = Simulation(lambda name, _: answer if name.startswith("bad") else GOOD, wait_adaptive(), seed=seed)
    simulation.run(scenario())
    late = [seconds for name, seconds in simulation.lateness.items() if name.startswith("good")]
    unknown = [k for n, (_, k) in simulation.outcomes.items() if n.startswith("good") and k is ApprovalUnknownError]
    return Crowd(late, len(unknown))


def beside_refusals(answer: Answer, *, every: float = math.inf, seed: int = 1, healthy: int = 200) -> Crowd:
    """Let one operation be refused always, or a new one every so many seconds, beside healthy ones."""
    source = seeded_random(seed)
    starts = [(source.uniform(0, _ARRIVALS), f"good-{k}", _EVERYBODY.draw(source)) for k in range(healthy)]
    starts += [(k * every if k else 0.0, f"bad-{k}", math.inf) for k in range(1 + int(_ARRIVALS / every))]
    return _healthy_of(sorted(starts), answer, seconds=_ARRIVALS, seed=seed)


class Shared(NamedTuple):
    """How clients share a service's limit."""

    goodput: float  # answered, of what the service would answer
    fairness: float  # Jain's index of the clients' answered polls: 1 if all have as many
    refused: float  # of what the service would answer


def limiter(clients: int, *, limit: int = 500, waits: int = 2000, seconds: float = 180.0, seed: int = 1) -> Shared:
    """Let clients that want four times as much poll a service that refuses more than so many polls in any second."""
    answered: dict[str, int] = {}
    passed: deque[float] = deque()
    refused = 0
    warm = seconds / 3

    def service(name: str, now: float) -> Answer:
        nonlocal refused
        while passed and now - passed[0] >= 1.0:
            passed.popleft()
        if len(passed) >= limit:
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

    simulation = Simulation(service, wait_fixed(1), seed=seed)
    simulation.run(scenario())
    shares = list(answered.values())
    would = limit * (seconds - warm)
    jain = sum(shares) ** 2 / (clients * sum(share * share for share in shares))
    return Shared(sum(shares) / would, jain, refused / would)


class Minute(NamedTuple):
    """How a client fares with a quota for each minute."""

    held: float  # seconds in which the circuit was open
    answered: int


def minute_quota(*, quota: int = 600, waits: int = 100, seconds: float = 714.0, seed: int = 1) -> Minute:
    """Refuse what exceeds a quota for each minute, always with Retry-After 60."""
    used: dict[int, int] = {}
    held, opened_at = 0.0, math.inf

    def service(_: str, now: float) -> Answer:
        minute = int(now / 60)
        used[minute] = used.get(minute, 0) + 1
        return failing(429, seconds=LATENCY, retry_after=60) if used[minute] > quota else GOOD

    def on_event(event: object) -> None:
        nonlocal held, opened_at
        if isinstance(event, CircuitChanged):
            if event.state == "open":
                opened_at = simulation.now
            elif event.previous == "open":
                held += simulation.now - opened_at

    async def scenario() -> None:
        for k in range(int(seconds)):  # short waits, whose final polls are refused as well
            simulation.start(f"short-{k}", timeout=20.0)
            if k < waits:
                simulation.start(f"long-{k}")
            await simulation.sleep_until(k + 1.0)

    simulation = Simulation(service, wait_fixed(5), seed=seed, listeners=(on_event,))
    simulation.run(scenario())
    return Minute(held, sum(min(count, quota) for count in used.values()))


class Deadlines(NamedTuple):
    """What became of waits with one deadline."""

    unknown: int
    failures: int
    circuit: str


def one_deadline(waits: int, round_trip: float, *, seed: int = 1) -> Deadlines:
    """Let waits end in the same moment, with a service that is well."""
    found = Deadlines(waits, 0, "")

    async def scenario() -> None:
        nonlocal found
        for k in range(waits):
            await simulation.sleep_until(20 * k / waits)
            simulation.start(f"op-{k}", timeout=60 - simulation.now)
        await simulation.sleep_until(63)
        statistics_ = simulation.poller.statistics()
        unknown = sum(kind is ApprovalUnknownError for _, kind in simulation.outcomes.values())
        found = Deadlines(
            unknown + waits - len(simulation.outcomes), statistics_.transient_failures, statistics_.circuit
        )

    simulation = Simulation(lambda *_: (round_trip, None), wait_adaptive(), seed=seed)
    simulation.run(scenario())
    return found


class Hanging(NamedTuple):
    """An outage in which the service hangs."""

    noticed: float  # seconds from its end to the first good answer
    most: int  # polls in flight
    left: int  # polls in flight, a minute after
    requests: int  # while it lasted


def hanging_outage(down: float, *, waits: int = 300, afterwards: float = LATENCY, seed: int = 1) -> Hanging:
    """Let the service hang for a while, and answer in so many seconds afterwards."""
    start, end = _WARM, _WARM + down
    noticed = most = math.inf
    left = 0

    def service(_: str, now: float) -> Answer:
        return HANGING if start <= now < end else GOOD if now < start else (afterwards, None)

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
    requests = sum(start <= poll.at < end for poll in simulation.transport.sent)
    return Hanging(noticed, int(most), left, requests)


def sharing(others: str, *, seeds: range) -> float:
    """Return how late a wait with an exponential schedule is, mean: others wait for a second of every five.

    Args:
        others: "none" of them, all the time ("always"), or "before" the minute in which it is approved.
        seeds: One for each wait.
    """
    return statistics.mean(_late_by(others, seed) for seed in seeds)


def _late_by(others: str, seed: int) -> float:
    approved_in = 60 + 60 * seeded_random(seed).random()
    until = {"none": 0.0, "before": 60.0, "always": math.inf}[others]

    async def scenario() -> None:
        simulation.start("op", approved_in=approved_in)
        while simulation.now < until and not simulation.outcomes:
            await asyncio.sleep(4)
            passer_by = simulation.poller.start(
                "op", ticket=None, timeout=math.inf, schedule=None, may_be_missing=False
            )
            await asyncio.sleep(1)
            simulation.poller.leave(passer_by)
        await simulation.sleep_until(600)

    simulation = Simulation(lambda *_: GOOD, wait_exponential(), seed=seed)
    simulation.run(scenario())
    return simulation.lateness["op"]


def polls_for(waiters: int, *, seed: int = 1) -> int:
    """Return the polls of two minutes for so many waits for one operation."""

    async def scenario() -> None:
        for _ in range(waiters):
            simulation.poller.start("op", ticket=None, timeout=None, schedule=None, may_be_missing=False)
        await simulation.sleep_until(120)

    simulation = Simulation(lambda *_: GOOD, wait_adaptive(), seed=seed)
    simulation.run(scenario())
    return len(simulation.transport.sent)


class Handler(NamedTuple):
    """A wait whose handler is slow."""

    after_approval: float  # seconds
    after_timeout: float  # seconds beyond the timeout


def slow_handler(seconds: float, *, watches: bool) -> Handler:
    """Return when a wait whose handler, or reader of `watch_approval`, takes so long is over."""

    async def ends(seconds_for_all: float, approved_at: float) -> float:
        async with KeylessClient(API_KEY, base_url="http://localhost:1") as client:
            answer_by(client, lambda _: loop_time() >= approved_at)
            started = loop_time()
            try:
                if watches:
                    async with aclosing(client.watch_approval("op", timeout=seconds_for_all)) as updates:
                        async for _ in updates:
                            await asyncio.sleep(seconds)
                else:
                    await client.wait_for_approval(
                        "op", timeout=seconds_for_all, on_poll=lambda _: asyncio.sleep(seconds)
                    )
            except TimeoutError:
                pass
            return loop_time() - started

    approved = on_virtual_clock(lambda: ends(120.0, 30.0)) - 30.0
    return Handler(approved, on_virtual_clock(lambda: ends(60.0, math.inf)) - 60.0)


def borrowed(limit: int, max_in_flight: int) -> int:
    """Return the most polls in flight with a borrowed session whose connector has a limit; a third of them hangs."""
    most = 0

    async def main() -> None:
        nonlocal most
        connector = aiohttp.TCPConnector(limit=limit)
        async with (
            aiohttp.ClientSession(connector=connector) as session,
            KeylessClient(
                API_KEY, base_url="http://localhost:1", session=session, max_in_flight=max_in_flight
            ) as client,
        ):
            transport = answer_by(client, lambda _: False, hangs=lambda name: name.endswith(("0", "3", "6")))
            waits = [asyncio.create_task(client.wait_for_approval(f"op-{k}", timeout=30.0)) for k in range(1000)]
            await asyncio.wait(waits)
            for wait in waits:
                wait.exception()
            most = transport.most

    on_virtual_clock(main)
    return most


def watchers(count: int) -> float:
    """Return the CPU time, in ms, of the longest turn of the loop as so many watchers of one operation end."""
    longest = 0.0

    async def watch(client: KeylessClient) -> None:
        async with aclosing(client.watch_approval("op", timeout=None)) as updates:
            async for _ in updates:
                pass

    async def main() -> None:
        nonlocal longest
        is_approved = False
        async with KeylessClient(API_KEY, base_url="http://localhost:1") as client:
            answer_by(client, lambda _: is_approved)
            waits = []
            for k in range(count):
                waits.append(asyncio.create_task(watch(client)))
                if k % 100 == 0:
                    await asyncio.sleep(0.01)
            await asyncio.sleep(2.0)
            is_approved = True
            last = time.process_time()
            while not all(wait.done() for wait in waits):
                await asyncio.sleep(0)
                now = time.process_time()
                longest, last = max(longest, now - last), now
            await asyncio.gather(*waits)

    asyncio.run(main())
    return longest * 1000


class Answering:
    """What stands in for the network of a client, and counts."""

    def __init__(self, is_approved: Callable[[str], bool], hangs: Callable[[str], bool]) -> None:
        self._is_approved = is_approved
        self._hangs = hangs
        self.under_way = 0
        self.most = 0

    async def poll(self, operation_id: str) -> Operation:
        """Answer by the state at the start."""
        approved = self._is_approved(operation_id)
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            await (asyncio.get_running_loop().create_future() if self._hangs(operation_id) else asyncio.sleep(LATENCY))
        finally:
            self.under_way -= 1
        return operation(operation_id, is_approved=approved)


def answer_by(
    client: KeylessClient, is_approved: Callable[[str], bool], hangs: Callable[[str], bool] = lambda _: False
) -> Answering:
    """Let a client's polls be answered without a socket."""
    transport, _ = client._open()  # noqa: SLF001  # what is measured lies above it
    answering = Answering(is_approved, hangs)
    transport.poll = answering.poll  # type: ignore[method-assign]  # stands in for the network
    return answering


def loop_time() -> float:
    """Return the loop's time."""
    return asyncio.get_running_loop().time()


def on_virtual_clock(main: Callable[[], Coroutine[object, object, Any]]) -> Any:
    """Run a coroutine on a clock that jumps."""
    loop = looptime.patch_event_loop(asyncio.SelectorEventLoop(), noop_cycles=1)
    try:
        return loop.run_until_complete(main())
    finally:
        loop.close()


def run(bench: Bench) -> Report:
    """Simulate all of it."""
    report = Report("weather: shards that hang, long round trips, refusals, slow handlers, simulated")
    _crowds(bench, report)
    _refusals(bench, report)
    _deadlines(bench, report)
    _outages(bench, report)
    _callers(bench, report)
    return report


def _crowds(bench: Bench, report: Report) -> None:
    columns = ["", "late, mean s", "p95 s", "unknown"]
    report.tables.append(table := Table("healthy waits, a third of the operations beside them bad", columns))
    seconds = bench.pick(full=_ARRIVALS, quick=_ARRIVALS, smoke=2.0)

    def add(name: str, arrivals: float, is_bad: Callable[[int], bool], answer: Answer, at_most: float) -> None:
        bench.progress(f"  {name}, {arrivals} arrivals a second")
        found = crowd(arrivals, is_bad, answer, seconds=seconds)
        table.rows.append([f"{name}, {arrivals} arrivals a second", *found.cells()])
        report.goals.append(
            Goal(f"{name}, {arrivals} a second: late, mean", at_most, statistics.mean(found.late), " s")
        )
        report.goals.append(Goal(f"{name}, {arrivals} a second: of unknown outcome", 0, found.unknown))
        report.raw[f"{name}, {arrivals}"] = [statistics.mean(found.late), p95(found.late), found.unknown]

    add("none is bad", 10, lambda _: False, GOOD, 0.75)
    for arrivals in bench.pick(full=[10, 20, 50], quick=[10, 20], smoke=[10]):
        add("a third hang", arrivals, _is_third, HANGING, 0.8)
    add("a third answer 500 after 5 s", 20, _is_third, SLOW_FAILURE, 0.8)


def _is_third(number: int) -> bool:
    return number % 3 == 0


def _refusals(bench: Bench, report: Report) -> None:
    columns = ["", "late, mean s", "p95 s", "unknown"]
    healthy = bench.pick(full=200, quick=200, smoke=10)
    report.tables.append(table := Table(f"{healthy} healthy waits beside operations that always get 429", columns))
    rows: dict[str, tuple[Answer, float]] = {
        "one, no Retry-After": (failing(429), math.inf),
        "one, Retry-After 5": (failing(429, retry_after=5), math.inf),
        "one, Retry-After 30": (failing(429, retry_after=30), math.inf),
        "a new one every 10 s, Retry-After 30": (failing(429, retry_after=30), 10.0),
    }
    for name, (answer, every) in rows.items():
        found = beside_refusals(answer, every=every, healthy=healthy)
        table.rows.append([name, *found.cells()])
        report.goals.append(Goal(f"beside {name}: late, mean", 1.0, statistics.mean(found.late), " s"))
        report.raw[name] = [statistics.mean(found.late), p95(found.late), found.unknown]
    columns = ["", "answered, of the limit", "Jain's index", "refused, of the limit"]
    report.tables.append(
        table := Table("a service that refuses more than 500 polls in any second, 2000 wanted", columns)
    )
    for clients in (1, 20):
        bench.progress(f"  {clients} clients of a service with a limit")
        shared = limiter(clients, seconds=bench.pick(full=180.0, quick=60.0, smoke=3.0))
        table.rows.append([f"{clients} clients", *(f"{figure:.3f}" for figure in shared)])
        report.goals.append(Goal(f"{clients} clients: limit not used", 0.15, 1 - shared.goodput))
        report.raw[f"limit, {clients} clients"] = [*shared]
    found_minute = minute_quota(seconds=bench.pick(full=714.0, quick=714.0, smoke=70.0))
    columns = ["", "circuit open, s", "answered"]
    row = ["714 s", f"{found_minute.held:.0f}", f"{found_minute.answered}"]
    report.tables.append(Table("a quota of 600 polls a minute, and Retry-After 60 beyond it", columns, [row]))
    report.raw["quota"] = [*found_minute]


def _deadlines(bench: Bench, report: Report) -> None:
    columns = ["", "unknown", "failures", "circuit"]
    report.tables.append(table := Table("waits with one deadline, a service that is well", columns))
    for waits, round_trip in bench.pick(full=[(1000, 0.2), (3000, 0.1)], quick=[(1000, 0.2)], smoke=[(50, 0.2)]):
        found = one_deadline(waits, round_trip)
        name = f"{waits} waits, round trips of {round_trip * 1000:.0f} ms"
        table.rows.append([name, *map(str, found)])
        report.goals.append(Goal(f"{name}: of unknown outcome", 0, found.unknown))
        report.raw[name] = [*found]


def _outages(bench: Bench, report: Report) -> None:
    columns = ["the service answers afterwards", "noticed, mean s", "at most", "in flight at most", "left"]
    report.tables.append(table := Table("300 waits, outages in which the service hangs", columns))
    lengths = bench.pick(full=[33.0, 40.3, 48.7, 55.1, 62.9, 70.0], quick=[33.0, 55.1], smoke=[5.0])
    for afterwards in (LATENCY, 2.0, 5.0, 9.0):
        bench.progress(f"  outages, {afterwards} s afterwards")
        found = [hanging_outage(down, afterwards=afterwards) for down in lengths]
        noticed = [outage.noticed for outage in found]
        mean, most = statistics.mean(noticed), max(noticed)
        in_flight, left = max(outage.most for outage in found), max(outage.left for outage in found)
        table.rows.append([f"in {afterwards:g} s", f"{mean:.1f}", f"{most:.1f}", f"{in_flight}", f"{left}"])
        report.goals.append(Goal(f"noticed after an outage, {afterwards:g} s", 3 + afterwards, mean, " s"))
        report.raw[f"outages, {afterwards:g} s afterwards"] = [*noticed]


def _callers(bench: Bench, report: Report) -> None:
    report.tables.append(table := Table("callers", ["", ""]))

    def add(name: str, figure: float, digits: int = 1) -> None:
        table.rows.append([name, f"{figure:.{digits}f}"])
        report.raw[name] = figure

    for name, watches in (("on_poll", False), ("a reader of watch_approval", True)):
        slow = slow_handler(3.0, watches=watches)
        add(f"{name} takes 3 s: returned after the approval, s", slow.after_approval)
        add(f"{name} takes 3 s: returned after the timeout, s", slow.after_timeout)
        report.goals.append(Goal(f"{name} takes 3 s: returned after", 6.1, max(slow), " s"))
    seeds = bench.pick(full=range(1, 21), quick=range(1, 21), smoke=range(1, 2))
    for others, text in (("none", "alone"), ("before", "that others shared before"), ("always", "that others share")):
        add(f"an exponential schedule, {text}: late, mean s", sharing(others, seeds=seeds))
    for waiters in (1, 5, 20):
        add(f"{waiters} waits for one operation: polls in two minutes", polls_for(waiters), 0)
    most = borrowed(100, 200)
    add("a borrowed session of 100 connections, max_in_flight=200: polls in flight at most", most, 0)
    report.goals.append(Goal("polls in flight in a session of 100 connections", 100, most))
    longest = watchers(bench.pick(full=2000, quick=2000, smoke=10))
    add("2000 watchers of one operation: the longest turn of the loop at its end, ms of CPU", longest)
