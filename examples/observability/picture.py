"""Draws what Prometheus would see of an outage: ``python picture.py outage.svg``.

It runs the load with OpenTelemetry's exporter for Prometheus, and reads what that serves, once a second.
"""

from __future__ import annotations

import asyncio
import math
import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Final

import aiohttp
import load
from matplotlib import rcParams
from matplotlib.figure import Figure
from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.sdk.metrics import MeterProvider
from prometheus_client import start_http_server
from prometheus_client.parser import text_string_to_metric_families

from aiokeyless.otel import OpenTelemetryListener
from aiokeyless.sandbox import Sandbox

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WAITS: Final = "aiokeyless_waits_active"
POLLS: Final = "aiokeyless_polls_total"
FAILING: Final = "aiokeyless_service_failing"
APPROVALS: Final = "aiokeyless_wait_duration_seconds_bucket"
WINDOW: Final = 10.0  # seconds of approvals in a quantile, as histogram_quantile(..., rate(...[10s])) does

#: The time, and the sum of each metric; of a bucket, under its name and bound.
Scrape = tuple[float, dict[tuple[str, float | None], float]]


def read(text: str) -> dict[tuple[str, float | None], float]:
    """Sum the samples of what an exporter served; of the waits, those that were approved."""
    sums: dict[tuple[str, float | None], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("aiokeyless_wait_outcome", "approved") == "approved":
                bound = float(sample.labels["le"]) if "le" in sample.labels else None
                key = (sample.name, bound)
                sums[key] = sums.get(key, 0.0) + sample.value
    return sums


async def observe(scenario: load.Load, interval: float = 1.0) -> list[Scrape]:
    """Run the load, and read the exporter all the while."""
    provider = MeterProvider([PrometheusMetricReader()])
    server, thread = start_http_server(0, "127.0.0.1")
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    clock = asyncio.get_running_loop().time
    scrapes: list[Scrape] = []
    try:
        async with (
            Sandbox() as sandbox,
            sandbox.client(listeners=[OpenTelemetryListener(meter_provider=provider)]) as client,
            aiohttp.ClientSession() as session,
        ):
            started = clock()
            running = asyncio.create_task(load.run(client, sandbox, scenario))
            while not running.done():
                async with session.get(url) as response:
                    scrapes.append((clock() - started, read(await response.text())))
                await asyncio.wait([running], timeout=interval)
            await running
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
        provider.shutdown()
    return scrapes


def quantile(q: float, before: Scrape, after: Scrape) -> float:
    """Estimate a quantile of the approvals between two scrapes, as Prometheus does; NaN where there were none."""
    bounds = sorted(bound for name, bound in after[1] if name == APPROVALS and bound is not None)
    counts = [after[1][APPROVALS, bound] - before[1].get((APPROVALS, bound), 0.0) for bound in bounds]
    if not counts or not counts[-1]:
        return math.nan
    rank, low, below = q * counts[-1], 0.0, 0.0
    for bound, count in zip(bounds, counts, strict=True):
        if count >= rank:
            return low if math.isinf(bound) else low + (bound - low) * (rank - below) / (count - below)
        low, below = bound, count
    return math.nan


def draw(scrapes: list[Scrape], outage: tuple[float, float]) -> Figure:
    """Draw the four diagrams that a dashboard would have."""
    rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "aiokeyless", "font.size": 9})
    figure = Figure(figsize=(8, 8), layout="constrained")
    waits, polls, failing, approvals = figure.subplots(4, sharex=True)
    times = [at for at, _ in scrapes]
    waits.plot(times, [sums.get((WAITS, None), 0.0) for _, sums in scrapes])
    waits.set_ylabel("waits active")
    rates = [
        (b[1].get((POLLS, None), 0.0) - a[1].get((POLLS, None), 0.0)) / (b[0] - a[0]) for a, b in pairwise(scrapes)
    ]
    polls.plot(times[1:], rates)
    polls.set_ylabel("polls a second")
    failing.step(times, [sums.get((FAILING, None), 0.0) for _, sums in scrapes], where="post")
    failing.set_yticks([0, 1], ["no", "yes"])
    failing.set_ylabel("Keyless fails")
    for q, label in ((0.5, "p50"), (0.95, "p95")):
        values = [quantile(q, _earlier(scrapes, scrape[0]), scrape) for scrape in scrapes]
        approvals.plot(times, values, label=label)
    approvals.set_ylabel(f"approval time, s\n(of the last {WINDOW:.0f} s)")
    approvals.set_xlabel("seconds")
    approvals.legend(frameon=False)
    axes: tuple[Axes, ...] = (waits, polls, failing, approvals)
    for ax in axes:
        ax.axvspan(*outage, color="#f4d9d0", zorder=0)
        ax.set_ylim(bottom=0)
        ax.spines[["top", "right"]].set_visible(False)
    waits.set_title("An outage of Keyless (shaded), by the metrics of aiokeyless in Prometheus")
    return figure


def _earlier(scrapes: list[Scrape], at: float) -> Scrape:
    """Return the last scrape from before the window that ends then, or else the first."""
    return next((scrape for scrape in reversed(scrapes) if scrape[0] <= at - WINDOW), scrapes[0])


def main(path: Path, scenario: load.Load, interval: float = 1.0) -> None:
    """Run the load, and write the picture."""
    scrapes = asyncio.run(observe(scenario, interval))
    draw(scrapes, scenario.outage).savefig(path, format="svg", facecolor="white", metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), load.Load())
