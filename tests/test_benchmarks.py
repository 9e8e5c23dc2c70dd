from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.benchmarks

ROOT = Path(__file__).parent.parent
#: What a benchmark of these saves has its own name; tests/test_soak.py has the soak.
ONLY_BY_NAME = {"crashes", "distributed", "fairness", "limits", "reads", "soak", "soak_fleet", "weather"}


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
    "name",
    [
        "request",
        "retry",
        "waits",
        "herd",
        "decode",
        "import",
        "lateness",
        "outage",
        "rate",
        "scale",
        "crashes",
        "soak_fleet",
        "distributed",
        "fleet",
        "crowd",
        "weather",
        "endings",
        "listeners",
        "limits",
        "fairness",
        "reads",
    ],
)
def test_benchmark_measures_and_writes_what_it_measured(name: str, tmp_path: Path) -> None:
    file = name if name in ONLY_BY_NAME else "results"
    done = benchmarks(name, "--smoke", "--save", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert f"== {name}: " in done.stdout
    report = json.loads((tmp_path / f"{file}.json").read_text())["benchmarks"][name]
    assert report["tables"]
    assert all(goal["figure"] is not None for goal in report["goals"])
    assert report["raw"]
    assert done.stdout == (tmp_path / f"{file}.txt").read_text()
    if name in {"crashes", "distributed", "limits", "reads"}:  # the docs include the tables
        assert (tmp_path / f"{name}.md").read_text().count("\n| ---: |") == len(report["tables"])


def test_unknown_benchmark_is_refused_with_the_names_that_there_are() -> None:
    done = benchmarks("nonesuch")
    assert done.returncode == 2
    assert "request, retry" in done.stderr
