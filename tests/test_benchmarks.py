from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parent.parent
WITH_PICTURE = {"herd", "lateness", "limits", "soak"}


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.parametrize(
    "command",
    [
        *("request", "waits", "tenants", "herd", "lateness", "limits", "weather", "fairness", "distributed"),
        *("soak --uvloop", "soak_failover", "soak_fleet", "soak_nats", "soak_pods"),
    ],
)
def test_benchmark_measures_and_writes_what_it_measured(command: str, tmp_path: Path) -> None:
    name, *options = command.split()
    done = benchmarks(name, *options, "--smoke", "--save", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"== {name}: " in done.stdout
    report = json.loads((tmp_path / f"{name}.json").read_text())
    assert report["tables"]
    assert all(goal["figure"] is not None for goal in report["goals"])
    assert report["raw"]
    if options:
        assert "the client ran on uvloop" in report["notes"]
        assert report["raw"]["verdicts"]["right"] > 0
    assert done.stdout == (tmp_path / f"{name}.txt").read_text()
    assert (tmp_path / f"{name}.svg").exists() is (name in WITH_PICTURE)


def test_unknown_benchmark_is_refused_with_the_names_that_there_are() -> None:
    done = benchmarks("nonesuch")
    assert done.returncode == 2
    assert "request, soak" in done.stderr
