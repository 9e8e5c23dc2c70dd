"""Waits of ours, and loops of one poll a second that survive every error, in the same weather on a moved clock."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from aiokeyless import KeylessError, Operation, wait_adaptive
from benchmarks.approval_times import EAGER, seeded_random
from benchmarks.report import p95
from benchmarks.simulation import GOOD, HANGING, Answer, Service, Simulation, failing

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

ARRIVALS: Final = 120.0  # seconds in which waits start
TIMEOUT: Final = 120.0

#: Makes the service of one run, with its own source of chance.
Weather: TypeAlias = "Callable[[random.Random], Service]"


class Found(NamedTuple):
    """What became of the waits, or of the loops."""

    late: float
    """Mean seconds from an approval to its notice."""
    p95: float
    lost: int
    """Approved in time, and not noticed."""
    requests: float


def share(*, of: Answer, at: float, between: tuple[float, float] = (0.0, float("inf"))) -> Weather:
    """Let this share of the answers be another one, between two times."""
    first, last = between

    def weather(source: random.Random) -> Service:
        return lambda _, now: of if first <= now < last and source.random() < at else GOOD

    return weather


def brown_out(*, hanging: float = 0.0) -> Weather:
    """Let half of the answers be 503, and this share of the requests hang."""

    def weather(source: random.Random) -> Service:
        def service(_: str, __: float) -> Answer:
            drawn = source.random()
            return HANGING if drawn < hanging else failing(503) if drawn < hanging + 0.5 * (1 - hanging) else GOOD

        return service

    return weather


def flapping(*, of: Answer, down: float, every: float) -> Weather:
    """Let all answers be another one for the first seconds of each period."""
    return lambda _: lambda _, now: of if now % every < down else GOOD


def dead_shard(*, of: Answer) -> Weather:
    """Let a fifth of the operations always get another answer."""
    return lambda _: lambda name, _: of if int(name) % 5 == 0 else GOOD


def limited(polls: float, *, neighbour: float = 0.0, since: float = 0.0) -> Weather:
    """Refuse more than so many polls a second, from a time on; a neighbour takes some of them, refused or not."""

    def weather(_: random.Random) -> Service:
        tokens, filled_at = polls, 0.0

        def service(_: str, now: float) -> Answer:
            nonlocal tokens, filled_at
            tokens = min(polls, max(0.0, tokens + (now - filled_at) * (polls - neighbour)))
            filled_at = now
            if now < since:
                return GOOD
            if tokens < 1:
                return failing(429)
            tokens -= 1
            return GOOD

        return service

    return weather


def compare(weather: Weather, *, waits: int = 300, arrivals: float = ARRIVALS, seeds: int = 4) -> tuple[Found, Found]:
    """Return what becomes of waits of ours, and of loops, over some seeds."""

    def found(*, is_loop: bool) -> Found:
        runs = [_run(weather, is_loop=is_loop, waits=waits, arrivals=arrivals, seed=10 * seed) for seed in range(seeds)]
        late, p95s, lost, requests = zip(*runs, strict=True)
        return Found(statistics.mean(late), statistics.mean(p95s), sum(lost), statistics.mean(requests))

    return found(is_loop=False), found(is_loop=True)


def _run(weather: Weather, *, is_loop: bool, waits: int, arrivals: float, seed: int) -> Found:
    users = seeded_random(seed + 1)
    starts = sorted((users.uniform(0, arrivals), EAGER.draw(users)) for _ in range(waits))
    simulation = Simulation(weather(seeded_random(seed)), wait_adaptive(), seed=seed)

    async def scenario() -> None:
        async with asyncio.TaskGroup() as loops:
            for number, (at, approved_in) in enumerate(starts):
                await simulation.sleep_until(at)
                if is_loop:
                    loops.create_task(poll_each_second(simulation, str(number), approved_in))
                else:
                    simulation.start(str(number), approved_in=approved_in, timeout=TIMEOUT)
        await simulation.sleep_until(arrivals + TIMEOUT + 3)

    simulation.run(scenario())
    late = [*simulation.lateness.values()]
    in_time = sum(approved_in < TIMEOUT for _, approved_in in starts)
    return Found(statistics.mean(late), p95(late), in_time - len(late), len(simulation.transport.sent))


async def poll_each_second(simulation: Simulation, name: str, approved_in: float) -> None:
    """Poll an operation once a second, whatever the answers are, until it is approved or the time is over."""
    ends_at, approved_at = simulation.now + TIMEOUT, simulation.now + approved_in
    simulation.transport.approved_at[name] = approved_at
    while simulation.now <= ends_at:
        with contextlib.suppress(TimeoutError, KeylessError):
            async with asyncio.timeout(simulation.transport.request_timeout):
                operation: Operation = await simulation.transport.poll(name)
            if operation.is_approved:
                simulation.lateness[name] = simulation.now - approved_at
                return
        await asyncio.sleep(1)
