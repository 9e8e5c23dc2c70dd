"""OpenTelemetry: a span for each wait, and metrics. It needs the extra ``otel``, which is opentelemetry-api alone.

It is a listener: see `aiokeyless.events`. Without an SDK it records nothing. If an exporter raises, no wait fails.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any, Final, NamedTuple, assert_never
from weakref import WeakKeyDictionary

from ._listeners import DEFAULT_LISTENERS
from ._version import __version__
from .events import (
    DeliveryEnded,
    Event,
    OperationCreated,
    OutcomePublished,
    PollEnded,
    RequestEnded,
    ServiceChanged,
    WaitEnded,
    WaitOutcome,
    WaitStarted,
    WorkerInspected,
)

try:
    from opentelemetry.context import Context
    from opentelemetry.metrics import CallbackOptions, Meter, MeterProvider, Observation, get_meter, get_meter_provider
    from opentelemetry.trace import (
        Link,
        NonRecordingSpan,
        Span,
        SpanContext,
        SpanKind,
        Status,
        StatusCode,
        TraceFlags,
        TracerProvider,
        get_tracer,
        set_span_in_context,
    )
except ModuleNotFoundError as _missing:  # without the hint one would install "opentelemetry", which is another package
    raise ModuleNotFoundError('aiokeyless.otel needs the extra "otel"; install it', name=_missing.name) from _missing


__all__ = ["KeylessInstrumentor", "OpenTelemetryListener"]

#: Outcomes that mean that something is wrong, and not only that nobody approved.
_ERRORS: Final = frozenset({WaitOutcome.UNKNOWN, WaitOutcome.REJECTED, WaitOutcome.FAILED})
#: Bucket boundaries: those of the conventions for HTTP, and two sets that fit waits for people.
_REQUEST_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10)
_WAIT_SECONDS: Final = (1, 2, 5, 10, 15, 20, 30, 45, 60, 90, 120, 180, 300, 600)
_LAG_SECONDS: Final = (0.001, 0.01, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
#: Metrics of workers: their attribute, their unit, how the values of several workers are combined, their description.
_WORKER_GAUGES: Final[dict[str, tuple[str, str, Callable[[Iterable[float]], float], str]]] = {
    "ready": ("is_ready", "1", min, "Whether workers take requests: 1, or 0 where one does not."),
    "in_flight": ("in_flight", "{delivery}", sum, "Deliveries in flight."),
    "waiting": ("fleet.waiting", "{request}", max, "Requests of the fleet that are not decided."),
    "backlog": ("fleet.backlog", "{request}", max, "Requests of the fleet that were never delivered."),
    "oldest_age": ("fleet.oldest_age", "s", max, "Age of the oldest undecided request of the fleet."),
    "unread": ("fleet.unread", "{outcome}", max, "Outcomes that a reader has not handled; 10 000 at most."),
    "oldest_unread_age": (
        "fleet.oldest_unread_age",
        "s",
        max,
        "Age of the oldest outcome that a reader has not handled.",
    ),
    "lateness": ("lateness", "s", max, "The longest time that a request waited for its first delivery."),
    "clock_ahead": ("fleet.clock_ahead", "s", max, "How far the broker's clock is ahead of this machine's."),
}


class OpenTelemetryListener:
    """Turns events into spans and metrics: ``KeylessClient(listeners=[OpenTelemetryListener()])``.

    A wait is one span, ``aiokeyless.wait``, a child of its caller's span. A failed poll is an event of it. A wait for a
    ticket that another trace created has a link to that trace. The wait of a worker's request is such a span too, of
    the kind consumer and a child of the span in which it was submitted. The worker that decides the request records it.
    Polls and deliveries have no spans: instrumentations of aiohttp are suppressed for them. No attribute contains an
    operation id, a user, a payload or a key. ``docs/reference/events.md`` names the metrics.

    Args:
        tracer_provider: Makes the tracer. Default: the global one.
        meter_provider: Makes the meter. Default: the global one.
    """

    def __init__(
        self, *, tracer_provider: TracerProvider | None = None, meter_provider: MeterProvider | None = None
    ) -> None:
        self._tracer = get_tracer("aiokeyless", __version__, tracer_provider)
        self._spans: dict[int, Span] = {}  # by the numbers of the waits under way
        meter = get_meter("aiokeyless", __version__, meter_provider)
        self._requests = meter.create_histogram(
            "http.client.request.duration",
            "s",
            "Duration of HTTP client requests.",
            explicit_bucket_boundaries_advisory=_REQUEST_SECONDS,
        )
        self._durations = meter.create_histogram(
            "aiokeyless.wait.duration",
            "s",
            "How long a wait for an approval took, by its outcome.",
            explicit_bucket_boundaries_advisory=_WAIT_SECONDS,
        )
        self._active = meter.create_up_down_counter("aiokeyless.waits.active", "{wait}", "Waits under way.")
        self._polls = meter.create_counter("aiokeyless.polls", "{poll}", "Polls, by their result.")
        self._lag = meter.create_histogram(
            "aiokeyless.poll.lag",
            "s",
            "Seconds by which a poll started late.",
            explicit_bucket_boundaries_advisory=_LAG_SECONDS,
        )
        self._deliveries = meter.create_counter(
            "messaging.client.consumed.messages",
            "{message}",
            "Number of messages that were delivered to the application.",
        )
        self._processing = meter.create_histogram(
            "messaging.process.duration",
            "s",
            "Duration of processing operation.",
            explicit_bucket_boundaries_advisory=_REQUEST_SECONDS,
        )
        self._duplicates = meter.create_counter(
            "aiokeyless.worker.duplicates", "{event}", "Outcomes that were stored already."
        )
        self._unsettled = meter.create_counter(
            "aiokeyless.worker.unsettled", "{delivery}", "Deliveries that the broker did not let a worker settle."
        )
        self._services, self._workers = _create_gauges(meter, meter_provider or get_meter_provider())
        # The last event of each worker. The counters add the difference to the next one.
        self._counted: dict[int, WorkerInspected] = {}

    def __call__(self, event: Event) -> None:
        """Record an event."""
        match event:
            case RequestEnded():
                self._record_request(event)
            case PollEnded():
                self._record_poll(event)
            case WaitStarted():
                self._start_wait(event)
            case WaitEnded():
                self._end_wait(event)
            case DeliveryEnded():
                self._record_delivery(event)
            case OutcomePublished():
                self._record_outcome(event)
            case WorkerInspected():
                self._record_worker(event)
            case ServiceChanged():
                with _LOCK:  # each client may have a thread of its own
                    self._services[event.client] += 1 if event.is_failing else -1
            case OperationCreated():  # it names a user, and the request is recorded
                pass
            case _:
                assert_never(event)

    def _record_request(self, event: RequestEnded) -> None:
        attributes: dict[str, str | int] = {
            **_named(event.client),
            "http.request.method": event.method,
            "server.address": event.server,
            "server.port": event.port,
            "url.template": event.route,
        }
        if event.status is not None:
            attributes["http.response.status_code"] = event.status
        if event.error is not None:
            is_status = event.status is not None and event.status >= 400
            attributes["error.type"] = str(event.status) if is_status else event.error
        self._requests.record(event.seconds, attributes)

    def _record_poll(self, event: PollEnded) -> None:
        name = _named(event.client)
        self._polls.add(1, {**name, "aiokeyless.poll.result": event.result.value})
        if event.lag is not None:
            self._lag.record(event.lag, name)
        if event.error is not None:
            for wait in event.waits:
                if wait in self._spans:
                    self._spans[wait].add_event("aiokeyless.poll.failed", {"error.type": event.error})

    def _start_wait(self, event: WaitStarted) -> None:
        name = _named(event.client)
        self._active.add(1, name)
        links = [] if event.traceparent is None else [Link(_position(event.traceparent))]
        span = self._tracer.start_span("aiokeyless.wait", links=links, attributes=name)
        if span.is_recording():
            self._spans[event.wait] = span

    def _end_wait(self, event: WaitEnded) -> None:
        name = _named(event.client)
        outcome = {**name, "aiokeyless.wait.outcome": event.outcome.value}
        self._active.add(-1, name)
        self._durations.record(event.seconds, outcome)
        span = self._spans.pop(event.wait, None)
        if span is None:
            return
        span.set_attributes({**outcome, "aiokeyless.wait.polls": event.polls})
        if event.outcome in _ERRORS:
            span.set_status(Status(StatusCode.ERROR, event.error))
        if event.error is not None:
            span.set_attribute("error.type", event.error)
        span.end()

    def _record_delivery(self, event: DeliveryEnded) -> None:
        attributes = {**_messaging(event), "messaging.operation.name": "process"}
        if event.error is not None:
            attributes["error.type"] = event.error
        self._deliveries.add(1, attributes)
        self._processing.record(event.seconds, attributes)

    def _record_outcome(self, event: OutcomePublished) -> None:
        """Record the wait of a worker's request, which is over: as one span, from when the approval was asked for."""
        outcome = {**_named(event.client), "aiokeyless.wait.outcome": event.outcome.value}
        self._durations.record(event.age, outcome)
        end = time.time_ns()
        span = self._tracer.start_span(
            "aiokeyless.wait",
            context=_context(event.traceparent),
            kind=SpanKind.CONSUMER,
            attributes={**outcome, **_messaging(event), "aiokeyless.wait.deliveries": event.deliveries},
            start_time=max(0, end - round(event.age * 1e9)),  # exporters fail on a time before 1970
        )
        if event.outcome in _ERRORS:
            span.set_status(Status(StatusCode.ERROR, event.reason))
        if event.reason is not None:
            span.set_attribute("error.type", event.reason)
        span.end(end)

    def _record_worker(self, event: WorkerInspected) -> None:
        before = self._counted.pop(event.worker, None)
        attributes = _messaging(event)
        self._duplicates.add(event.duplicates - (before.duplicates if before else 0), attributes)
        self._unsettled.add(event.unsettled - (before.unsettled if before else 0), attributes)
        if event.has_ended:
            self._workers.pop(event.worker, None)
        else:
            self._counted[event.worker] = self._workers[event.worker] = event


class _Observed(NamedTuple):
    """What gauges are read from."""

    services: Counter[str | None]  # how many fail, by the name of their client
    workers: dict[int, WorkerInspected]  # the last report of each one that runs, by its number


_LOCK: Final = threading.Lock()
_OBSERVED: Final[WeakKeyDictionary[MeterProvider, _Observed]] = WeakKeyDictionary()


def _create_gauges(meter: Meter, provider: MeterProvider) -> _Observed:
    """Return what the gauges of a provider are read from; the first call makes them, so that they are there at once.

    All listeners of a provider share them: of two observations of one instrument, only the last would count.
    """
    if (known := _OBSERVED.get(provider)) is not None:
        return known
    services: Counter[str | None] = Counter({None: 0})
    workers: dict[int, WorkerInspected] = {}

    def are_failing(_options: CallbackOptions) -> list[Observation]:
        return [Observation(int(count > 0), _named(client)) for client, count in [*services.items()]]

    def of_workers(
        field: str, combine: Callable[[Iterable[float]], float]
    ) -> Callable[[CallbackOptions], list[Observation]]:
        return lambda _options: _of_fleets([*workers.values()], field, combine)  # an exporter has a thread of its own

    meter.create_observable_gauge(
        "aiokeyless.service.failing", [are_failing], "1", "Whether Keyless fails for a client or a worker: 0 or 1."
    )
    for name, (field, unit, combine, description) in _WORKER_GAUGES.items():
        meter.create_observable_gauge(f"aiokeyless.worker.{name}", [of_workers(field, combine)], unit, description)
    return _OBSERVED.setdefault(provider, _Observed(services, workers))


def _of_fleets(
    reports: list[WorkerInspected], field: str, combine: Callable[[Iterable[float]], float]
) -> list[Observation]:
    """Return one observation for each fleet that this process has workers of, or for each of its readers."""
    groups: dict[tuple[str | None, str, str | None], tuple[dict[str, str], list[float]]] = {}
    for event in reports:
        figure = attrgetter(field)(event)
        for reader, value in (figure if isinstance(figure, dict) else {None: figure}).items():
            attributes = _messaging(event) if reader is None else {**_messaging(event), "reader": reader}
            groups.setdefault((event.client, event.destination, reader), (attributes, []))[1].append(float(value))
    return [Observation(combine(values), attributes) for attributes, values in groups.values()]


def _messaging(event: DeliveryEnded | OutcomePublished | WorkerInspected) -> dict[str, str]:
    """Return the attributes by the conventions for messaging, and the client's name."""
    return {
        **_named(event.client),
        "messaging.system": event.system,
        "messaging.destination.name": event.destination,
    }


def _named(client: str | None) -> dict[str, str]:
    """Return the attribute of what belongs to a client, which may have no name."""
    return {} if client is None else {"aiokeyless.client.name": client}


def _context(traceparent: str | None) -> Context:
    """Return the context of a request's submission, empty if that was not traced, and never that of the worker."""
    if traceparent is None:
        return Context()
    return set_span_in_context(NonRecordingSpan(_position(traceparent)), Context())


def _position(traceparent: str) -> SpanContext:
    _, trace_id, span_id, flags = traceparent.split("-")
    return SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))


class KeylessInstrumentor:
    """Gives each client that is created from now on an `OpenTelemetryListener`.

    ``opentelemetry-instrument`` finds it under the entry point ``opentelemetry_instrumentor``.

    Example:
        >>> KeylessInstrumentor().instrument()
    """

    _listener: OpenTelemetryListener | None = None

    def instrument(
        self,
        *,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
        **_options: Any,  # of opentelemetry-instrument: they concern packages that are patched
    ) -> None:
        """Start, unless it was started before.

        Args:
            tracer_provider: Makes the tracer. Default: the global one.
            meter_provider: Makes the meter. Default: the global one.
        """
        if KeylessInstrumentor._listener is None:
            KeylessInstrumentor._listener = OpenTelemetryListener(
                tracer_provider=tracer_provider, meter_provider=meter_provider
            )
            DEFAULT_LISTENERS.append(KeylessInstrumentor._listener)

    def uninstrument(self, **_options: Any) -> None:
        """Stop: clients that are created from now on have no listener of this kind."""
        if KeylessInstrumentor._listener is not None:
            DEFAULT_LISTENERS.remove(KeylessInstrumentor._listener)
            KeylessInstrumentor._listener = None
