"""OpenTelemetry with its real SDK: one span a wait, metrics by the conventions, and nothing that identifies anybody."""

from __future__ import annotations

import asyncio
import importlib
import os
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, get_args

import pytest
from msgspec.structs import replace
from tenacity.wait import wait_fixed

from aiokeyless import ApprovalTimeoutError, ApprovalUnknownError, BadRequestError, NotFoundError, events, otel
from aiokeyless.sandbox import Sandbox
from aiokeyless.worker import ApprovalEvent, ApprovalRequest, ApprovalWorker, next_outcome, submit_approval
from aiokeyless.worker.broker import NewRequest
from aiokeyless.worker.sqlite import SqliteBroker

pytest.importorskip("opentelemetry.sdk", reason="opentelemetry-sdk is not installed")

from opentelemetry.baggage import get_all, set_baggage
from opentelemetry.context import attach, detach
from opentelemetry.instrumentation.aiohttp_client import AioHttpClientInstrumentor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from aiokeyless.events import DeliveryEnded, Inspection, OutcomePublished, ServiceChanged, WaitOutcome, WorkerInspected
from aiokeyless.otel import KeylessInstrumentor, OpenTelemetryListener

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.util.types import AttributeValue

    from aiokeyless.events import Event

USER = "C0FFEE"


class Recorder:
    """An SDK that keeps what it is given, and the listener for it."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self._reader = InMemoryMetricReader()
        self.traces = TracerProvider(shutdown_on_exit=False)
        self.traces.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.meters = MeterProvider([self._reader], shutdown_on_exit=False)
        self.tracer = self.traces.get_tracer("the application")
        self.listener = OpenTelemetryListener(tracer_provider=self.traces, meter_provider=self.meters)

    @property
    def spans(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def span(self, name: str) -> ReadableSpan:
        [found] = [span for span in self.spans if span.name == name]
        return found

    @property
    def points(self) -> dict[str, list[Any]]:
        """The points of each metric."""
        data = self._reader.get_metrics_data()
        if data is None:
            return {}
        return {
            metric.name: list(metric.data.data_points)
            for resource in data.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    @property
    def failing(self) -> int:
        """The value of the gauge of failing services, for clients without a name."""
        point = self.points["aiokeyless.service.failing"][0]
        value: int = point.value
        return value

    def of_fleets(self, name: str) -> dict[str, float]:
        """The value of a metric of workers, by the destination of their fleet."""
        points = self.points.get(f"aiokeyless.worker.{name}", [])
        return {point.attributes["messaging.destination.name"]: point.value for point in points}

    def of_readers(self, name: str) -> dict[str, float]:
        """The value of a metric of readers, by the destination of their fleet and their name."""
        points = self.points.get(f"aiokeyless.worker.{name}", [])
        return {
            f"{point.attributes['messaging.destination.name']} {point.attributes['reader']}": point.value
            for point in points
        }

    @property
    def attributes(self) -> list[dict[str, AttributeValue]]:
        """All attributes of spans, of their events, and of metrics."""
        of_spans = [dict(span.attributes or {}) for span in self.spans]
        of_events = [dict(event.attributes or {}) for span in self.spans for event in span.events]
        of_metrics = [dict(point.attributes) for points in self.points.values() for point in points]
        return of_spans + of_events + of_metrics


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@contextmanager
def traced_aiohttp(recorder: Recorder) -> Iterator[None]:
    """Instrument aiohttp's client for sessions that are made meanwhile."""
    AioHttpClientInstrumentor().instrument(tracer_provider=recorder.traces, meter_provider=recorder.meters)
    try:
        yield
    finally:
        AioHttpClientInstrumentor().uninstrument()


@pytest.mark.looptime
class TestSpans:
    async def test_a_wait_of_ten_polls_is_one_span_of_its_caller(self, sandbox: Sandbox, recorder: Recorder) -> None:
        with traced_aiohttp(recorder):
            async with sandbox.client(listeners=[recorder.listener], schedule=wait_fixed(1)) as client:
                with recorder.tracer.start_as_current_span("checkout"):
                    ticket = await client.create_operation(USER)
                    asyncio.get_running_loop().call_later(9.5, sandbox.approve, ticket.operation_id)
                    await client.wait_for_approval(ticket)
        assert client.statistics.polls >= 10
        checkout, wait = recorder.span("checkout"), recorder.span("aiokeyless.wait")
        assert wait.parent is not None
        assert wait.parent == checkout.context
        assert [span.name for span in recorder.spans] == ["POST", "aiokeyless.wait", "checkout"]
        assert dict(wait.attributes or {}) == {
            "aiokeyless.wait.outcome": "approved",
            "aiokeyless.wait.polls": client.statistics.polls,
        }
        assert wait.status.status_code is StatusCode.UNSET

    async def test_what_explains_a_wait_is_in_no_trace(self, sandbox: Sandbox, recorder: Recorder) -> None:
        with traced_aiohttp(recorder):
            async with sandbox.client(schedule=wait_fixed(1)) as client:
                ticket = await client.create_operation(USER)
                asyncio.get_running_loop().call_later(9.5, sandbox.approve, ticket.operation_id)
                await client.wait_for_approval(ticket, explain=True)
        assert any("/authentications" in record.path for record in sandbox.requests)
        assert [span.name for span in recorder.spans] == ["POST"]

    async def test_a_wait_that_fails_shows_the_polls_that_failed(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            ticket = await client.create_operation(USER)
            sandbox.fail_next(503, times=None)
            with pytest.raises(ApprovalUnknownError):
                await client.wait_for_approval(ticket, timeout=10)
        span = recorder.span("aiokeyless.wait")
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "ApprovalUnknownError")
        assert (span.attributes or {})["error.type"] == "ApprovalUnknownError"
        assert (span.attributes or {})["aiokeyless.wait.outcome"] == "unknown"
        assert {event.name for event in span.events} == {"aiokeyless.poll.failed"}
        assert dict(span.events[0].attributes or {}) == {"error.type": "ServerError"}

    async def test_no_poll_failed_if_a_phone_creates_the_operation(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            asyncio.get_running_loop().call_later(5, lambda: sandbox.approve("phone-1", user_id=USER))
            await client.wait_for_approval("phone-1", if_missing="wait")
        assert recorder.span("aiokeyless.wait").events == ()
        polls = recorder.points["aiokeyless.polls"]
        assert {point.attributes["aiokeyless.poll.result"] for point in polls} == {"missing", "approved"}

    async def test_that_nobody_approved_is_no_error(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            ticket = await client.create_operation(USER)
            with pytest.raises(ApprovalTimeoutError):
                await client.wait_for_approval(ticket, timeout=5)
        assert recorder.span("aiokeyless.wait").status.status_code is StatusCode.UNSET

    async def test_a_resumed_wait_links_to_the_tickets_trace(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            with recorder.tracer.start_as_current_span("create"):
                ticket = await client.create_operation(USER)
            sandbox.approve(ticket.operation_id)
            with recorder.tracer.start_as_current_span("resume"):
                await client.wait_for_approval(ticket)
        [link] = recorder.span("aiokeyless.wait").links
        created = recorder.span("create").context
        assert created is not None
        assert (link.context.trace_id, link.context.span_id) == (created.trace_id, created.span_id)
        assert link.context.is_remote

    async def test_a_cancelled_wait_ends_its_span(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            ticket = await client.create_operation(USER)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(5):
                    await client.wait_for_approval(ticket)
        assert (recorder.span("aiokeyless.wait").attributes or {})["aiokeyless.wait.outcome"] == "cancelled"


@pytest.mark.looptime
class TestMetrics:
    async def test_they_count_requests_waits_and_polls(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            ticket = await client.create_operation(USER)
            wait = asyncio.create_task(client.wait_for_approval(ticket))
            await asyncio.sleep(5)
            [active] = recorder.points["aiokeyless.waits.active"]
            assert active.value == 1
            sandbox.fail_next(503)
            await asyncio.sleep(15)
            sandbox.approve(ticket.operation_id)
            await wait
            with pytest.raises(NotFoundError):
                await client.get_operation("unknown")
            polls = client.statistics.polls
        points = recorder.points
        assert [point.value for point in points["aiokeyless.waits.active"]] == [0]
        assert {point.attributes["aiokeyless.poll.result"]: point.value for point in points["aiokeyless.polls"]} == {
            "pending": polls - 2,
            "failed": 1,
            "approved": 1,
        }
        [duration] = points["aiokeyless.wait.duration"]
        assert dict(duration.attributes) == {"aiokeyless.wait.outcome": "approved"}
        assert 20 <= duration.sum <= 60
        [lag] = points["aiokeyless.poll.lag"]
        assert lag.count == polls
        for histogram, seconds in (duration, 600), (lag, 60), (points["http.client.request.duration"][0], 10):
            assert histogram.explicit_bounds[-1] == seconds
        requests = {
            (point.attributes["http.request.method"], point.attributes["http.response.status_code"]): point
            for point in points["http.client.request.duration"]
        }
        assert sorted(requests) == [("GET", 200), ("GET", 404), ("GET", 503), ("POST", 200)]
        assert dict(requests["GET", 404].attributes) == {
            "http.request.method": "GET",
            "http.response.status_code": 404,
            "error.type": "404",
            "server.address": "127.0.0.1",
            "server.port": int(sandbox.url.rpartition(":")[2]),
            "url.template": "/v2/operations/{operationId}",
        }
        assert "error.type" not in requests["GET", 200].attributes

    async def test_an_exchange_without_an_answer_names_its_error(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener], max_attempts=1) as client:
            sandbox.fail_next(200, body=b"<html>")
            sandbox.drop_next(times=None)
            for _ in range(2):
                with pytest.raises(Exception, match="GET"):
                    await client.get_pending_operations(USER)
        found = {point.attributes["error.type"] for point in recorder.points["http.client.request.duration"]}
        assert found == {"NotJsonError", "TransportError"}

    async def test_an_exchange_that_is_refused_names_its_status(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            sandbox.fail_next(400)
            with pytest.raises(BadRequestError):
                await client.get_pending_operations(USER)
        [point] = recorder.points["http.client.request.duration"]
        assert point.attributes["error.type"] == "400"

    async def test_a_service_fails_as_long_as_it_does_for_one_client_that_is_not_closed(
        self, sandbox: Sandbox, recorder: Recorder
    ) -> None:
        other = OpenTelemetryListener(tracer_provider=recorder.traces, meter_provider=recorder.meters)
        async with sandbox.client(listeners=[recorder.listener]) as well:
            async with sandbox.client(listeners=[other], schedule=wait_fixed(1)) as client:
                sandbox.fail_next(503, times=None)
                waits = [asyncio.create_task(client.wait_for_approval(f"op-{number}")) for number in range(20)]
                await asyncio.sleep(20)
                assert recorder.failing == 1
            assert recorder.failing == 0
            sandbox.recover()
            await well.create_operation(USER)
        await asyncio.gather(*waits, return_exceptions=True)


def test_a_service_fails_until_it_answers_all_of_its_clients_of_one_name(recorder: Recorder) -> None:
    assert recorder.failing == 0  # before anything has happened
    for is_failing, number in ((True, 1), (True, 1), (False, 1), (False, 0)):
        event = ServiceChanged(is_failing=is_failing, error=None, seconds=1.0, waiting=1)
        recorder.listener(event)
        assert recorder.failing == number
        for name in ("acme", "globex"):
            recorder.listener(replace(event, client=name, is_failing=is_failing or name == "globex"))
        acme, globex = recorder.points["aiokeyless.service.failing"][1:]
        assert (acme.attributes, acme.value) == ({"aiokeyless.client.name": "acme"}, number)
        assert (globex.attributes, globex.value) == ({"aiokeyless.client.name": "globex"}, 1)


@pytest.mark.looptime
async def test_events_spans_and_metrics_have_the_name_of_their_client_and_those_of_a_worker_too(
    sandbox: Sandbox, recorder: Recorder, memory: SqliteBroker
) -> None:
    told: list[Event] = []
    async with (
        sandbox.client(listeners=[recorder.listener, told.append], name="acme") as client,
        ApprovalWorker(client, memory),
    ):
        await submit_approval(memory, USER, operation_id="txn-1")
        ticket = await client.create_operation(USER, operation_id="txn-2")
        for operation_id in ("txn-1", "txn-2"):
            asyncio.get_running_loop().call_later(2, sandbox.approve, operation_id)
        await client.wait_for_approval(ticket)
        await next_event(memory)
        sandbox.fail_next(503, times=None)
        with pytest.raises(ApprovalUnknownError):
            await client.wait_for_approval("txn-3", timeout=30)
        observed = recorder.points
    assert {type(event) for event in told} == set(get_args(events.Event))
    assert {event.client for event in told} == {"acme"}
    points = [point for name in observed for point in observed[name] if name != "aiokeyless.service.failing"]
    assert len(points) > 20
    for attributes in (*(point.attributes for point in points), *(span.attributes or {} for span in recorder.spans)):
        assert attributes["aiokeyless.client.name"] == "acme"


INSPECTED = WorkerInspected(
    worker=1,
    system="nats",
    destination="a",
    has_ended=False,
    is_ready=True,
    is_failing=False,
    in_flight=2,
    fleet=Inspection(
        waiting=5,
        backlog=4,
        oldest_age=60.0,
        unread={"shop": 3, "ledger": 0},
        oldest_unread_age={"shop": 600.0, "ledger": 0.0},
        clock_ahead=0.5,
    ),
    lateness=3.0,
    duplicates=2,
    unsettled=1,
)


async def next_event(broker: object) -> ApprovalEvent:
    async with next_outcome(broker, "test") as event:
        return event


class TestWorker:
    @pytest.mark.looptime
    async def test_a_request_is_one_span_in_the_trace_that_submitted_it_however_often_it_is_delivered(
        self, sandbox: Sandbox, recorder: Recorder, memory: SqliteBroker
    ) -> None:
        broker = memory
        with traced_aiohttp(recorder):
            async with (
                sandbox.client(listeners=[recorder.listener]) as client,
                ApprovalWorker(client, broker, schedule=wait_fixed(1)) as worker,
            ):
                with recorder.tracer.start_as_current_span("checkout"):
                    await submit_approval(broker, USER, operation_id="txn-1", operation_payload="Pay 40 to Alice")
                asyncio.get_running_loop().call_later(9.5, sandbox.approve, "txn-1")
                event = await next_event(broker)
                await asyncio.sleep(1)  # the span ends when the request is acknowledged
                assert recorder.failing == 0
            statistics = worker.statistics
        checkout, wait = recorder.span("checkout"), recorder.span("aiokeyless.wait")
        # The worker checks its key when it starts; its polls and the create have no spans.
        assert [span.name for span in recorder.spans] == ["GET", "checkout", "aiokeyless.wait"]
        assert wait.kind is SpanKind.CONSUMER
        assert wait.parent is not None
        assert checkout.context is not None
        assert (wait.parent.trace_id, wait.parent.span_id) == (checkout.context.trace_id, checkout.context.span_id)
        assert wait.start_time is not None
        assert wait.end_time is not None
        took = (event.decided_at - event.requested_at).total_seconds()
        assert (wait.end_time - wait.start_time) / 1e9 == pytest.approx(took)
        assert dict(wait.attributes or {}) == {
            "aiokeyless.wait.outcome": "approved",
            "aiokeyless.wait.deliveries": event.deliveries,
            "messaging.system": "sqlite",
            "messaging.destination.name": ":memory:",
        }
        points = recorder.points
        [deliveries] = points["messaging.client.consumed.messages"]
        [processing] = points["messaging.process.duration"]
        assert deliveries.value == processing.count == statistics.deliveries >= 10
        assert processing.explicit_bounds[-1] == 10
        assert dict(deliveries.attributes) == {
            "messaging.system": "sqlite",
            "messaging.destination.name": ":memory:",
            "messaging.operation.name": "process",
        }
        [duration] = points["aiokeyless.wait.duration"]
        assert dict(duration.attributes) == {"aiokeyless.wait.outcome": "approved"}
        assert duration.sum == pytest.approx(took)
        assert sum(point.value for point in points["aiokeyless.polls"]) == statistics.polls
        for name in ("aiokeyless.poll.lag", "aiokeyless.waits.active"):  # a worker holds no wait
            assert name not in points
        text = repr(recorder.attributes)
        for secret in ("txn-1", "Alice", USER, sandbox.api_key):
            assert secret not in text

    @pytest.mark.looptime
    async def test_a_request_that_fails_says_why_and_starts_a_trace_where_it_had_none(
        self, sandbox: Sandbox, recorder: Recorder, memory: SqliteBroker
    ) -> None:
        broker = memory
        with recorder.tracer.start_as_current_span("the program that runs the worker"):
            async with sandbox.client(listeners=[recorder.listener]) as client, ApprovalWorker(client, broker):
                request = ApprovalRequest(version=1, user_id=USER, operation_id="broken")
                await broker.submit(NewRequest(request, b"no request", "broken", None))
                await next_event(broker)
                await asyncio.sleep(1)
        span = recorder.span("aiokeyless.wait")
        assert span.parent is None
        assert (span.status.status_code, span.status.description) == (StatusCode.ERROR, "invalid_request")
        assert (span.attributes or {})["aiokeyless.wait.outcome"] == "failed"
        assert (span.attributes or {})["error.type"] == "invalid_request"

    @pytest.mark.looptime
    async def test_how_a_fleet_fares_is_observed_while_a_worker_of_it_runs(
        self, sandbox: Sandbox, recorder: Recorder, memory: SqliteBroker
    ) -> None:
        broker = memory
        async with (
            sandbox.client(listeners=[recorder.listener]) as client,
            ApprovalWorker(client, broker, schedule=wait_fixed(1)),
        ):
            for number in range(3):
                await submit_approval(broker, USER, operation_id=f"txn-{number}")
            await asyncio.sleep(7)
            assert recorder.of_fleets("waiting") == {":memory:": 3}
            assert recorder.of_fleets("ready") == {":memory:": 1}
            assert 4 < recorder.of_fleets("oldest_age")[":memory:"] < 6
            for number in range(3):
                sandbox.approve(f"txn-{number}")
            await asyncio.sleep(10)
            assert recorder.of_fleets("waiting") == {":memory:": 0}
        assert recorder.of_fleets("waiting") == {}

    def test_of_several_workers_of_a_fleet_the_worst_is_observed(self, recorder: Recorder) -> None:
        told = INSPECTED
        recorder.listener(told)
        recorder.listener(
            replace(
                told,
                worker=2,
                is_ready=False,
                in_flight=1,
                fleet=replace(told.fleet, waiting=7, unread={"shop": 4}, oldest_unread_age={"shop": 605.0}),
                duplicates=10,
            )
        )
        recorder.listener(replace(told, worker=3, destination="b", lateness=9.0))
        recorder.listener(replace(told, worker=1, duplicates=3, unsettled=1))
        observed = {
            name: recorder.of_fleets(name)
            for name in ("ready", "in_flight", "waiting", "backlog", "oldest_age", "lateness")
        }
        assert observed == {
            "ready": {"a": 0, "b": 1},
            "in_flight": {"a": 3, "b": 2},
            "waiting": {"a": 7, "b": 5},
            "backlog": {"a": 4, "b": 4},
            "oldest_age": {"a": 60, "b": 60},
            "lateness": {"a": 3, "b": 9},
        }
        assert recorder.of_fleets("clock_ahead") == {"a": 0.5, "b": 0.5}
        assert {name: recorder.of_readers(name) for name in ("unread", "oldest_unread_age")} == {
            "unread": {"a shop": 4, "a ledger": 0, "b shop": 3, "b ledger": 0},
            "oldest_unread_age": {"a shop": 605, "a ledger": 0, "b shop": 600, "b ledger": 0},
        }
        for number, destination in ((1, "a"), (2, "a"), (3, "b")):
            recorder.listener(replace(told, worker=number, destination=destination, has_ended=True, duplicates=10))
        assert recorder.of_fleets("waiting") == {}
        assert recorder.of_fleets("duplicates") == {"a": 20, "b": 10}  # what was counted stays
        assert recorder.of_fleets("unsettled") == {"a": 2, "b": 1}

    def test_two_listeners_of_one_provider_observe_each_worker(self, recorder: Recorder) -> None:
        another = OpenTelemetryListener(tracer_provider=recorder.traces, meter_provider=recorder.meters)
        for number, (listener, destination) in enumerate(((recorder.listener, "a"), (another, "b"))):
            listener(replace(INSPECTED, worker=number, destination=destination))
        assert recorder.of_fleets("waiting") == {"a": 5, "b": 5}


def test_a_request_that_claims_to_be_centuries_old_is_a_span_that_can_be_exported(recorder: Recorder) -> None:
    recorder.listener(
        OutcomePublished(
            system="nats",
            destination="a.approvals.request",
            operation_id="txn-1",
            outcome=WaitOutcome.TIMED_OUT,
            reason=None,
            deliveries=1,
            age=6e10,
            traceparent=None,
        )
    )
    assert recorder.span("aiokeyless.wait").start_time == 0


@pytest.mark.parametrize("traceparent", [None, f"00-{'1' * 32}-{'2' * 16}-01"])
def test_what_the_program_of_a_worker_has_in_its_context_is_not_about_a_request(
    recorder: Recorder, traceparent: str | None
) -> None:
    seen: list[Context | None] = []

    class Noting(SpanProcessor):
        def on_start(self, _span: object, parent_context: Context | None = None) -> None:
            seen.append(parent_context)

    recorder.traces.add_span_processor(Noting())
    token = attach(set_baggage("worker", "7"))
    recorder.listener(
        OutcomePublished(
            system="nats",
            destination="a.approvals.request",
            operation_id="txn-1",
            outcome=WaitOutcome.APPROVED,
            reason=None,
            deliveries=1,
            age=1.0,
            traceparent=traceparent,
        )
    )
    detach(token)
    [context] = seen
    assert context is not None
    assert get_all(context) == {}


def test_a_delivery_that_was_not_settled_is_counted_with_its_error(recorder: Recorder) -> None:
    recorder.listener(
        DeliveryEnded(system="nats", destination="a.approvals.request", number=1, error="BrokerError", seconds=0.1)
    )
    for name in ("messaging.client.consumed.messages", "messaging.process.duration"):
        [point] = recorder.points[name]
        assert point.attributes["error.type"] == "BrokerError"


@pytest.mark.looptime
class TestPrivacyAndFailures:
    async def test_no_attribute_identifies_anybody(self, sandbox: Sandbox, recorder: Recorder) -> None:
        async with sandbox.client(listeners=[recorder.listener]) as client:
            ticket = await client.create_operation(
                USER, operation_id="txn-1", operation_payload="Pay 40 to Alice", external_user_id="alice@example.com"
            )
            sandbox.approve("txn-1")
            await client.wait_for_approval(ticket)
            await client.get_pending_operations(USER)
            await client.get_authentications(user_id=USER)
        text = repr(recorder.attributes)
        for secret in ("txn-1", "alice", "Alice", USER, sandbox.api_key):
            assert secret not in text

    async def test_no_span_of_aiohttp_names_an_external_user(self, sandbox: Sandbox, recorder: Recorder) -> None:
        sandbox.enroll(USER)
        with traced_aiohttp(recorder):
            async with sandbox.client(listeners=[recorder.listener]) as client:
                await client.create_external_user(USER, "alice@example.com")
                sandbox.fail_next(503)  # what is sent again goes another way
                assert await client.find_users("alice@example.com")
                await client.get_authentications(external_user_id="alice@example.com")
                await client.delete_external_user("alice@example.com")
        assert [record.method for record in sandbox.requests] == ["POST", "GET", "GET", "GET", "DELETE"]
        assert [span.name for span in recorder.spans] == ["POST"]
        assert "alice" not in repr(recorder.attributes)

    async def test_without_an_sdk_nothing_is_kept(self, sandbox: Sandbox) -> None:
        listener = OpenTelemetryListener()
        async with sandbox.client(listeners=[listener]) as client:
            ticket = await client.create_operation(USER)
            wait = asyncio.create_task(client.wait_for_approval(ticket))
            await asyncio.sleep(5)
            assert not listener._spans
            sandbox.fail_next(503)
            await asyncio.sleep(15)
            sandbox.approve(ticket.operation_id)
            await wait


class TestInstrumentor:
    @pytest.mark.looptime
    async def test_clients_are_instrumented_until_it_ends(self, sandbox: Sandbox, recorder: Recorder) -> None:
        instrumentor = KeylessInstrumentor()
        early = sandbox.client()
        instrumentor.instrument(tracer_provider=recorder.traces, meter_provider=recorder.meters, skip_dep_check=True)
        KeylessInstrumentor().instrument()  # again: no second listener
        try:
            client = sandbox.client()
        finally:
            KeylessInstrumentor().uninstrument()
        instrumentor.uninstrument()  # again: nothing to do
        late = sandbox.client()
        async with early, client, late:
            for used in (early, client, late):
                ticket = await used.create_operation(USER)
                sandbox.approve(ticket.operation_id)
                await used.wait_for_approval(ticket)
        assert [span.name for span in recorder.spans] == ["aiokeyless.wait"]
        assert [point.count for point in recorder.points["aiokeyless.wait.duration"]] == [1]

    @pytest.mark.slow
    async def test_opentelemetry_instrument_traces_a_worker(self, tmp_path: Path) -> None:
        path = tmp_path / "keyless.db"
        async with Sandbox(auto_approve=0.1) as sandbox, SqliteBroker(path) as broker:
            process = await instrumented(sandbox, "worker", "--broker", f"sqlite:{path}")
            assert process.stdout is not None
            while b"worker.ready" not in (line := await asyncio.wait_for(process.stdout.readline(), 60)):
                assert line, "it ended"
            await submit_approval(broker, USER, operation_id="txn-1")
            assert (await next_event(broker)).outcome == "approved"
            process.terminate()
            output, _ = await process.communicate()
        assert process.returncode == 0, output.decode()
        assert output.count(b'"name": "aiokeyless.wait"') == 1
        assert b'"kind": "SpanKind.CONSUMER"' in output


async def instrumented(sandbox: Sandbox, *command: str) -> asyncio.subprocess.Process:
    """Start our command line as ``opentelemetry-instrument`` does, and have it print its spans."""
    pytest.importorskip("opentelemetry.distro", reason="opentelemetry-distro is not installed")
    run = "from opentelemetry.instrumentation.auto_instrumentation import run; run()"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", run),
        *("--traces_exporter", "console", "--metrics_exporter", "none", "--logs_exporter", "none"),
        *(sys.executable, "-m", "aiokeyless", *command),
        env={**os.environ, "KEYLESS_BASE_URL": sandbox.url, "KEYLESS_API_KEY": sandbox.api_key},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_without_opentelemetry_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.context", None)
    with pytest.raises(ModuleNotFoundError, match='needs the extra "otel"'):
        importlib.reload(otel)
