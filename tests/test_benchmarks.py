from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it has no type hints
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


@pytest.mark.parametrize("command", ["distributed --smoke", "soak_fleet", "soak_failover"])
def test_a_benchmark_that_is_ended_leaves_no_server_and_no_files(command: str, tmp_path: Path) -> None:
    run = psutil.Popen(
        [sys.executable, "-m", "benchmarks", *command.split()],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.DEVNULL,
    )
    folders: list[Path] = []
    while not folders:
        assert run.poll() is None
        started = [process.cmdline() for process in run.children() if process.name() == "postgres"]
        folders = [Path(words[words.index("-D") + 1]).parent for words in started if "-D" in words]
        time.sleep(0.05)  # no event tells it
    processes = run.children(recursive=True)
    run.terminate()
    assert run.wait(60) != 0
    assert psutil.wait_procs(processes, timeout=10)[1] == []
    assert [folder for folder in folders if folder.exists()] == []
    assert list(tmp_path.iterdir()) == []
