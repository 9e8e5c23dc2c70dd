"""The example of an outage: it runs in short, and what it draws comes from the exporter."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "observability"
SHORT = """
import asyncio, load, picture
scrapes = asyncio.run(picture.observe(load.Load(arrivals=20.0, approval=0.3, outage=(1.0, 2.0), end=3.0), interval=0.2))
picture.draw(scrapes, (1.0, 2.0)).savefig("outage.svg", format="svg")
"""
NAMES = """
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import generate_latest
import picture
from aiokeyless.events import PollEnded, PollResult, ServiceChanged, WaitEnded, WaitOutcome, WaitStarted
listener = picture.OpenTelemetryListener(meter_provider=MeterProvider([PrometheusMetricReader()]))
listener(WaitStarted(wait=1, operation_id="a", timeout=None, traceparent=None))
listener(WaitStarted(wait=2, operation_id="b", timeout=None, traceparent=None))
poll = {"waits": (1,), "operation_id": "a", "is_final": False, "seconds": 0, "lag": 0}
listener(PollEnded(**poll, result=PollResult.PENDING, error=None))
listener(ServiceChanged(is_failing=True, error="ServerError", waiting=1, seconds=0))
listener(WaitEnded(wait=1, operation_id="a", outcome=WaitOutcome.APPROVED, error=None, seconds=3, polls=1, age=3))
sums = picture.read(generate_latest().decode())
print(*(sums[name, None] for name in (picture.WAITS, picture.POLLS, picture.FAILING)), sums[picture.APPROVALS, 5.0])
"""
TEXT = """
# TYPE aiokeyless_wait_duration_seconds histogram
aiokeyless_wait_duration_seconds_bucket{aiokeyless_wait_outcome="approved",le="5.0"} 10
aiokeyless_wait_duration_seconds_bucket{aiokeyless_wait_outcome="approved",le="10.0"} 20
aiokeyless_wait_duration_seconds_bucket{aiokeyless_wait_outcome="approved",le="+Inf"} 20
aiokeyless_wait_duration_seconds_bucket{aiokeyless_wait_outcome="timed_out",le="+Inf"} 7
"""


def run(code: str, folder: Path) -> str:
    """Run code beside the example's modules, in a process of its own: the exporter's registry is the process's."""
    paths = os.pathsep.join([str(FOLDER), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_runs_and_draws(tmp_path: Path) -> None:
    run(SHORT, tmp_path)
    assert "polls a second" in (tmp_path / "outage.svg").read_text()


def test_the_metrics_have_the_names_that_it_reads_and_a_quantile_is_that_of_prometheus(tmp_path: Path) -> None:
    quantiles = f"""
now = 1.0, picture.read({TEXT!r})
print(*(picture.quantile(q, (0.0, {{}}), now) for q in (0.25, 0.5, 0.95)), picture.quantile(0.5, now, now))
"""
    *sums, low, median, high, none = map(float, run(NAMES + quantiles, tmp_path).split())
    assert sums == [1.0, 1.0, 1.0, 1.0]
    assert [low, median, high] == pytest.approx([2.5, 5.0, 9.5])
    assert math.isnan(none)


def test_the_picture_is_there() -> None:
    assert (FOLDER / "outage.svg").read_text().startswith("<?xml")
