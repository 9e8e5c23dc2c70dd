"""What the library does with OpenTelemetry by itself: nothing, where a program has not loaded it."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from aiokeyless._tracing import context_without_traces, current_traceparent

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


LOADED = "import sys, aiokeyless, aiokeyless._tracing as t; t.context_without_traces(); assert t.current_traceparent() "
LOADED += "is None; print([name for name in sys.modules if name.startswith('opentelemetry')])"


ABSENT = """
import asyncio, sys
sys.modules["opentelemetry"] = None  # as where it is not installed
from aiokeyless.sandbox import Sandbox

async def main():
    async with Sandbox(auto_approve=0.01) as sandbox, sandbox.client(listeners=[lambda event: None]) as client:
        print((await client.request_approval("C0FFEE")).state)

asyncio.run(main())
try:
    import aiokeyless.otel
except ImportError as error:
    print(error.name)
"""


def span() -> AbstractContextManager[object]:
    facts = trace.SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=trace.TraceFlags(1))
    found: AbstractContextManager[object] = trace.use_span(trace.NonRecordingSpan(facts))
    return found


def test_opentelemetry_is_not_imported() -> None:
    process = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"


def test_where_opentelemetry_is_not_installed_only_its_module_cannot_be_imported() -> None:
    process = subprocess.run([sys.executable, "-c", ABSENT], capture_output=True, text=True, check=True)
    state, missing = process.stdout.split()
    assert state == "approved"
    assert missing.startswith("opentelemetry")


def test_the_callers_span_is_written_as_the_standard_says() -> None:
    with trace.use_span(trace.INVALID_SPAN):
        assert current_traceparent() is None
    with span():
        assert current_traceparent() == f"00-{1:032x}-{2:016x}-01"


def test_polls_run_outside_of_any_trace_and_suppress_instrumentations() -> None:
    utils = pytest.importorskip("opentelemetry.instrumentation.utils")
    with span():
        context = context_without_traces()
        assert context.run(current_traceparent) is None
        assert not context.run(utils.is_http_instrumentation_enabled)
    assert utils.is_http_instrumentation_enabled()
