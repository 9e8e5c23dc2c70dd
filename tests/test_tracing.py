"""What the library does with OpenTelemetry by itself: nothing, where a program has not loaded it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from aiokeyless._tracing import context_without_traces, current_traceparent

trace = pytest.importorskip("opentelemetry.trace", reason="opentelemetry-api is not installed")

if TYPE_CHECKING:
    from contextlib import AbstractContextManager


def span() -> AbstractContextManager[object]:
    facts = trace.SpanContext(trace_id=1, span_id=2, is_remote=False, trace_flags=trace.TraceFlags(1))
    found: AbstractContextManager[object] = trace.use_span(trace.NonRecordingSpan(facts))
    return found


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
