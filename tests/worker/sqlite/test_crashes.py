"""Killed with -9 at every statement, in turn: nothing is lost, and nobody is asked twice."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "crash_process.py"
STEP = 5  # statements by which each run gets further than the one before; five tests meet all of them together


def run(program: subprocess.Popen[str], role: str, kill_at: int) -> tuple[bool, list[str]]:
    """Run a role; return whether it was killed, and what it said."""
    assert program.stdin is not None
    assert program.stdout is not None
    print(role, kill_at, file=program.stdin, flush=True)
    said = []
    while not (line := program.stdout.readline()).startswith("ended "):
        assert line, "the program ended"
        said.append(line.strip())
    status = int(line.removeprefix("ended "))
    assert status in {0, signal.SIGKILL}
    return status != 0, said


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 1 + STEP))
def test_a_worker_and_an_application_may_be_killed_at_any_statement(tmp_path: Path, first: int) -> None:
    path = tmp_path / "keyless.db"
    said: list[str] = []
    kill_at, was_killed = first, True
    command = (sys.executable, str(PROGRAM), str(path))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        while was_killed:
            was_killed = False
            for role in ("application", "worker"):
                at_a_statement, lines = run(program, role, kill_at)
                was_killed |= at_a_statement
                said += lines
            kill_at += STEP
    counts = Counter(said)
    for number in range(3):
        assert counts[f"asked payment-{number}"] <= 1
        assert counts[f"decided payment-{number}"] <= 1
        assert counts[f"submitted {number} False"] <= 1
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM request WHERE decided_at IS NULL").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM waiting").fetchone() == (0,)
        assert connection.execute("SELECT count(*) FROM outcome").fetchone() == (3,)
