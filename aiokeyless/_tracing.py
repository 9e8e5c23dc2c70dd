"""What the lower layers need of OpenTelemetry. They import it only if the program has loaded it.

Spans and metrics are in `aiokeyless.otel`.
"""

from __future__ import annotations

import contextvars
import sys


def context_without_traces() -> contextvars.Context:
    """Return a context in which OpenTelemetry's instrumentations of other packages make no spans.

    Polls and explanations run in it. Waits of different callers share them, so they belong to no caller's trace. And a
    trace for each poll of 100 000 waits would be 100 000 traces.
    """
    context = contextvars.Context()
    if "opentelemetry.context" in sys.modules:
        context.run(_suppress_instrumentations)
    return context


def _suppress_instrumentations() -> None:
    from opentelemetry.context import attach, set_value  # noqa: PLC0415  # loaded already

    attach(set_value("suppress_instrumentation", value=True))


def current_traceparent() -> str | None:
    """Return the caller's position in its trace, in the form of W3C Trace Context; None without a trace."""
    if "opentelemetry.trace" not in sys.modules:
        return None
    from opentelemetry.trace import get_current_span  # noqa: PLC0415  # loaded already

    span = get_current_span().get_span_context()
    if not span.is_valid:
        return None
    return f"00-{span.trace_id:032x}-{span.span_id:016x}-{span.trace_flags:02x}"
