"""CPU and memory to turn an answer's JSON into objects, against other decoders.

An operation, and pending lists of several lengths: with the decoders of the library, `Secret` and its hook included,
and with common alternatives. Memory is the growth of a fresh process, one for each decoder.
"""

from __future__ import annotations

import gc
import json
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from aiokeyless._http import protocol
from benchmarks.bench import Pairs, order
from benchmarks.decoders import dataclass_operation, dataclass_pending, pydantic_operation, pydantic_pending
from benchmarks.memory import forget_peak, peak, resident
from benchmarks.report import CannotMeasureError, Report, Spread, Table

if TYPE_CHECKING:
    from collections.abc import Callable

    from benchmarks.bench import Bench

    Decode = Callable[[bytes], object]

_SIZES: Final = (1, 100, 10_000)

OURS: Final = "aiokeyless (msgspec)"
REPEATED: Final = "aiokeyless (msgspec), repeated"
PYDANTIC: Final = "pydantic"
ORJSON: Final = "orjson + dataclass"
JSON: Final = "json, dicts only"

_OPERATION: Final[dict[str, Decode]] = {
    OURS: protocol.GET_OPERATION.decode,
    REPEATED: protocol.GET_OPERATION.decode,
    PYDANTIC: pydantic_operation,
    ORJSON: dataclass_operation,
    JSON: json.loads,
}
_PENDING: Final[dict[str, Decode]] = {
    OURS: protocol.GET_PENDING.decode,
    REPEATED: protocol.GET_PENDING.decode,
    PYDANTIC: pydantic_pending,
    ORJSON: dataclass_pending,
    JSON: json.loads,
}
_MEASURED_MEMORY: Final = [name for name in _PENDING if name != REPEATED]


class Growth(NamedTuple):
    """Growth of a process that decodes a list, in bytes: at the peak, and while it holds the result."""

    peak: float
    held: float


def run(bench: Bench) -> Report:
    """Measure the CPU of an operation and of lists of 1, 100 and 10 000, and the memory of the longest list."""
    report = Report("decode: an answer's JSON into objects")
    times = bench.in_fresh_process(measure, bench)
    for title, seconds in times.items():
        report.tables.append(_table(title, seconds))
    report.raw["seconds"] = {title: {name: [*v] for name, v in of.items()} for title, of in times.items()}
    try:
        growths = _growths(bench, _SIZES[-1])
    except CannotMeasureError as error:
        report.notes.append(f"memory: not measured, {error}")
    else:
        report.tables.append(_memory_table(_SIZES[-1], growths))
        report.raw["memory"] = {name: [growth._asdict() for growth in of] for name, of in growths.items()}
    report.notes.append("only aiokeyless and pydantic check the types")
    return report


def _table(title: str, times: dict[str, list[float]]) -> Table:
    table = Table(title, ["", "CPU per decode, us", f"over {OURS}"])
    for name, seconds in times.items():
        microseconds = Spread.of([1e6 * value for value in seconds])
        over = Pairs(seconds, times[OURS]).ratio
        table.rows.append([name, microseconds.text(2), "1" if name == OURS else over.text(2)])
    return table


def _memory_table(size: int, growths: dict[str, list[Growth]]) -> Table:
    table = Table(
        f"memory of the process, {size} pending ({len(_pending(size)) / 1e6:.2f} MB of JSON)",
        ["", "peak, MB", "held, MB", f"peak over {OURS}"],
    )
    ours = Spread.of([growth.peak for growth in growths[OURS]]).median
    for name, of in growths.items():
        most = Spread.of([growth.peak / 1e6 for growth in of])
        held = Spread.of([growth.held / 1e6 for growth in of])
        over = "1" if name == OURS else f"{1e6 * most.median / ours:.2f}"
        table.rows.append([name, most.text(2), held.text(2), over])
    return table


def measure(bench: Bench) -> dict[str, dict[str, list[float]]]:
    """Return CPU seconds per decode, for each answer, decoder and round."""
    budget = bench.pick(full=0.02, quick=0.005, smoke=0.0005)
    rounds = bench.pick(full=20, quick=5, smoke=2)
    gc.freeze()  # later collections skip the imports, which belong to no side
    answers = {f"{size} pending": (_PENDING, _pending(size)) for size in _SIZES}
    times = {}
    for title, (decoders, body) in {"an operation": (_OPERATION, _operation()), **answers}.items():
        bench.progress(f"  {title}")
        times[title] = _in_turn(decoders, body, rounds, budget)
    return times


def _in_turn(decoders: dict[str, Decode], body: bytes, rounds: int, budget: float) -> dict[str, list[float]]:
    counts = {name: _count(decode, body, budget) for name, decode in decoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    for k in range(rounds):
        for name in order(list(decoders), k):
            seconds[name].append(_cpu_per_decode(decoders[name], body, counts[name]))
    return seconds


def _count(decode: Decode, body: bytes, budget: float) -> int:
    """Return how many decodes fill a turn; this is the warm-up too."""
    count = 1
    while count * _cpu_per_decode(decode, body, count) < budget:
        count *= 2
    return count


def _cpu_per_decode(decode: Decode, body: bytes, count: int) -> float:
    gc.collect()
    before = time.process_time()
    for _ in range(count):
        decode(body)
    return (time.process_time() - before) / count


def _growths(bench: Bench, size: int) -> dict[str, list[Growth]]:
    names = bench.pick(full=_MEASURED_MEMORY, quick=_MEASURED_MEMORY, smoke=[OURS, JSON])
    growths: dict[str, list[Growth]] = {name: [] for name in names}
    body = _pending(size)  # made here: otherwise the decoded list would reuse the memory that this frees
    for k in range(bench.pick(full=3, quick=1, smoke=1)):
        for name in order(names, k):
            bench.progress(f"  memory: {name}")
            growths[name].append(bench.in_fresh_process(measure_growth, name, body))
    if not all(growth.peak > 0 for of in growths.values() for growth in of):
        raise CannotMeasureError("the decoded list fitted in memory that the process held already")
    return growths


def measure_growth(name: str, body: bytes) -> Growth:
    """Decode a list once, in a process that decoded only a short one before, and return the growth."""
    decode = _PENDING[name]
    decode(_pending(1))
    gc.collect()
    before = resident()
    forget_peak()
    held = decode(body)
    growth = Growth(peak() - before, resident() - before)
    del held
    return growth


def _operation() -> bytes:
    operation = {
        "id": 123456,
        "timestamp": "2026-01-02T03:04:05.678",
        "nodeId": "operations-service-7d9f",
        "userId": "0123456789ABCDEF0123456789ABCDEF",
        "apiKey": "f1e2d3c4b5a69788796a5b4c3d2e1f00",
        "externalUserId": "alice@example.com",
        "operationId": "c1b7a0de-5a5c-4e0e-9d0e-000000000000",
        "operationPayload": "Approve wire transfer of $500 to account 1234",
        "result": False,
        "state": "pending",
    }
    return json.dumps(operation, separators=(",", ":")).encode()


def _pending(size: int) -> bytes:
    pending = [
        {
            "operationId": f"c1b7a0de-5a5c-4e0e-9d0e-{k:012x}",
            "operationPayload": f"Approve wire transfer of ${k} to account 1234",
            "externalUserId": f"user{k}@example.com",
            "authType": "biom",
        }
        for k in range(size)
    ]
    return json.dumps(pending, separators=(",", ":")).encode()
