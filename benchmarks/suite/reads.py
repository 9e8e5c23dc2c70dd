"""Memory of a process that only reads: the event loop's buffers, and the holes that they leave in the C library's heap.

No code of ours and of no other library: connections come and go, and each keeps a little of what it read for a while.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks import pictures
from benchmarks.approval_times import seeded_random
from benchmarks.loops import loop_factory
from benchmarks.memory import resident
from benchmarks.programs import environment
from benchmarks.report import CannotMeasureError, Report, Table
from benchmarks.soak import heap

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.bench import Bench

#: Its figures are of one machine's C library, and it takes a minute.
ONLY_BY_NAME: Final = True

_MB: Final = 1e6
_POINTS: Final = 20
_LARGE: Final = 600_000  # bytes, freed at the start, as an import does: then glibc maps no block below that size
_SIZES: Final = (100, 300, 700, 3000)  # bytes
_FEWEST, _MOST = 40, 80  # connections at a time
_KEPT: Final = 20  # reads that a connection keeps, at most


class Variant(NamedTuple):
    """A side of the comparison."""

    uvloop: bool
    environment: dict[str, str]


_VARIANTS: Final = {
    "asyncio": Variant(uvloop=False, environment={}),
    f"asyncio, {heap.THRESHOLD}=65536": Variant(uvloop=False, environment={heap.THRESHOLD: "65536"}),
    "uvloop": Variant(uvloop=True, environment={}),
}


class Point(NamedTuple):
    """The process after so many reads."""

    reads: int
    cpu: float  # seconds
    resident: int  # bytes
    free: int  # bytes of the C library's heap


class _Connection(asyncio.Protocol):
    def __init__(self, kept: int) -> None:
        self.received: asyncio.Future[None]
        self._kept: deque[bytes] = deque(maxlen=kept)

    def data_received(self, data: bytes) -> None:
        self._kept.append(data)
        self.received.set_result(None)


def measure(reads: int, *, uvloop: bool) -> list[Point]:
    """Read so often, in this process."""
    with asyncio.Runner(loop_factory=loop_factory(uvloop=uvloop)) as runner:
        return runner.run(_measure(reads))


async def _measure(reads: int) -> list[Point]:
    loop, source = asyncio.get_running_loop(), seeded_random(1)
    large = bytearray(_LARGE)
    del large
    connections: list[tuple[asyncio.Transport, _Connection, socket.socket]] = []
    points = []
    for count in range(reads + 1):
        if count % (reads // _POINTS) == 0:
            points.append(_point(count))
        if len(connections) < _FEWEST or source.random() < 1 / 50:
            ours, theirs = socket.socketpair()
            made = partial(_Connection, source.randrange(_KEPT))
            connections.append((*await loop.create_connection(made, sock=ours), theirs))
        if len(connections) > source.randint(_FEWEST, _MOST):
            transport, _, theirs = connections.pop(source.randrange(len(connections)))
            transport.abort()
            theirs.close()
        _, connection, theirs = source.choice(connections)
        connection.received = loop.create_future()
        theirs.send(bytes(source.choice(_SIZES)))
        await connection.received
    for transport, _, theirs in connections:
        transport.abort()
        theirs.close()
    return points


def _point(reads: int) -> Point:
    found = heap.read()
    if found is None:
        raise CannotMeasureError("the C library is not glibc")
    return Point(reads, time.process_time(), resident(), found.free)


def run(bench: Bench) -> Report:
    """Read a million times in each of the ways."""
    reads = bench.pick(full=1_000_000, quick=100_000, smoke=2_000)
    found = {}
    for name, variant in _VARIANTS.items():
        bench.progress(f"  {name}")
        with environment(**variant.environment):
            found[name] = bench.in_fresh_process(measure, reads, uvloop=variant.uvloop)
    report = Report(f"reads: {reads} reads of {_FEWEST} to {_MOST} connections that come and go")
    report.raw = {name: [list(point) for point in points] for name, points in found.items()}
    report.tables.append(_table(report.raw))
    return report


def _table(raw: dict[str, Any]) -> Table:
    table = Table("memory of reads", ["", "MB before", "MB after", "free in the heap, MB", "CPU of a read, µs"])
    for name, points in raw.items():
        first, last = Point(*points[0]), Point(*points[-1])
        cost = 1e6 * (last.cpu - first.cpu) / last.reads
        figures = first.resident / _MB, last.resident / _MB, last.free / _MB
        table.rows.append([name, *(f"{figure:.1f}" for figure in figures), f"{cost:.1f}"])
    return table


def page(raw: dict[str, Any]) -> str:
    """Write the table for the docs."""
    return f"{_table(raw).markdown()}\n"


def draw(raw: dict[str, Any]) -> Figure:
    """Draw the resident memory by the number of reads."""
    figure, (memory,) = pictures.panels(1, width=6.4)
    for (name, points), color in zip(raw.items(), (pictures.OTHERS[1], pictures.OURS, pictures.OTHERS[2]), strict=True):
        memory.plot([point[0] for point in points], [point[2] / _MB for point in points], color=color, label=name)
    memory.set_xlabel("reads")
    memory.set_ylabel("resident memory, MB")
    memory.set_ylim(bottom=0)
    memory.legend()
    return figure
