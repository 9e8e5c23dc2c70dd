"""CPU of importing the library, against importing its four dependencies.

Each import runs in a fresh interpreter that counts its own CPU; all bytecode is compiled beforehand, in a temporary
directory.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from typing import TYPE_CHECKING, Final, NamedTuple

from benchmarks.bench import Pairs, order
from benchmarks.report import CannotMeasureError, Goal, Report, Spread, Table

if TYPE_CHECKING:
    from benchmarks.bench import Bench

OURS: Final = "import aiokeyless"
FOUR: Final = "import aiohttp, msgspec, tenacity, anyio"
REPEATED: Final = "the four, repeated"
NOTHING: Final = "pass"

_STATEMENTS: Final = {OURS: OURS, FOUR: FOUR, REPEATED: FOUR, NOTHING: NOTHING}
_TIMED: Final = """\
import time
before = time.process_time()
{statement}
after = time.process_time()
print(after - before, after)
"""
_CHECKED: Final = """\
{statement}
import os, sys
specs = [getattr(module, "__spec__", None) for module in [*sys.modules.values()]]
print(*(spec.name for spec in specs if spec and spec.cached and not os.path.exists(spec.cached)))
"""


class Start(NamedTuple):
    """CPU seconds of one interpreter: for the statement, and from the process start to the statement's end."""

    statement: float
    process: float


def run(bench: Bench) -> Report:
    """Measure each import in fresh interpreters."""
    starts = bench.in_fresh_process(measure, bench)
    report = Report("import: CPU of an import in a fresh interpreter")
    imports = {name: [start.statement for start in of] for name, of in starts.items()}
    table = Table(
        "a fresh interpreter each, bytecode compiled", ["", "the import, ms", "over the four", "the whole process, ms"]
    )
    for name, of in starts.items():
        process = Spread.of([1e3 * start.process for start in of]).text(1)
        over = "" if name == NOTHING else "1" if name == FOUR else Pairs(imports[name], imports[FOUR]).ratio.text(3)
        millis = "" if name == NOTHING else Spread.of([1e3 * value for value in imports[name]]).text(1)
        table.rows.append([name, millis, over, process])
    report.tables.append(table)
    report.goals.append(Goal("CPU over its four", 1.10, Pairs(imports[OURS], imports[FOUR]).ratio.median, "x"))
    report.raw = {name: [[start.statement, start.process] for start in of] for name, of in starts.items()}
    return report


def measure(bench: Bench) -> dict[str, list[Start]]:
    """Start the interpreters in turn, on the core of this process."""
    starts: dict[str, list[Start]] = {name: [] for name in _STATEMENTS}
    rounds = bench.pick(full=25, quick=4, smoke=1)
    with tempfile.TemporaryDirectory() as bytecode:
        if uncompiled := _output(_CHECKED, OURS, bytecode):  # the first run compiles the bytecode
            raise CannotMeasureError(f"no bytecode on disk for {uncompiled}")
        for k in range(rounds):
            for name in order(list(_STATEMENTS), k):
                starts[name].append(Start(*map(float, _output(_TIMED, _STATEMENTS[name], bytecode).split())))
            if (k + 1) % 10 == 0:
                bench.progress(f"  round {k + 1} of {rounds}")
    return starts


def _output(program: str, statement: str, bytecode: str) -> str:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    # -P: do not import modules from the current directory.
    command = [sys.executable, "-P", "-c", program.format(statement=statement)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)  # noqa: S603  # our own
    return done.stdout.strip()
