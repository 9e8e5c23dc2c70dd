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


def run(role: str, path: Path, kill_at: int) -> tuple[bool, list[str]]:
    """Run a role; return whether it was killed, and what it said."""
    result = subprocess.run(
        [sys.executable, str(PROGRAM), role, str(path), str(kill_at)], capture_output=True, text=True, check=False
    )
    assert result.returncode in {0, -signal.SIGKILL}, result.stderr
    return result.returncode != 0, result.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1, 1 + STEP))
def test_a_worker_and_an_application_may_be_killed_at_any_statement(tmp_path: Path, first: int) -> None:
    path = tmp_path / "keyless.db"
    said: list[str] = []
    kill_at, was_killed = first, True
    while was_killed:
        was_killed = False
        for role in ("application", "worker"):
            at_a_statement, lines = run(role, path, kill_at)
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
