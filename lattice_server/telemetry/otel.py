"""Exports metrics and spans by OpenTelemetry.

Rule: this module is the server's only importer of OpenTelemetry, and is imported only by a server that is to export.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
from opentelemetry import context, propagate, trace
from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricExporter,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import Event, ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, Status, StatusCode

from lattice_server.engine.workers.spans import ReportedSpan, Scalar
from lattice_server.telemetry.catalogue import Kind
from lattice_server.telemetry.exporters import interval_ms, within_limit
from lattice_server.telemetry.meters import Distribution, Reading

log = logging.getLogger(__name__)

CUMULATIVE = AggregationTemporality.CUMULATIVE
# Least and greatest values are not kept: the buckets tell as much as their bounds. Both fields of OTLP are optional,
# which the types of the SDK do not say.
UNKNOWN: Any = None


def resource_of(version: str, instance_id: str) -> Resource:
    """Return the description of a server. `OTEL_SERVICE_NAME` and `OTEL_RESOURCE_ATTRIBUTES` take precedence."""
    named = {"service.name": "lattice-server", "service.version": version, "service.instance.id": instance_id}
    given = Resource.create().attributes
    if str(given.get("service.name", "")).startswith("unknown_service"):
        given = {name: value for name, value in given.items() if name != "service.name"}
    return Resource({**named, **given})


class MetricExport:
    """Exports the readings that `read` returns: every minute, or as `OTEL_METRIC_EXPORT_INTERVAL` says, and at the end.

    All sums are cumulative since the start of the server.
    """

    def __init__(
        self, exporter: MetricExporter, resource: Resource, read: Callable[[], Awaitable[Sequence[Reading]]]
    ) -> None:
        self._exporter, self._resource, self._read = exporter, resource, read
        self._started_ns = time.time_ns()
        self._interval_s = interval_ms() / 1000

    async def run(self) -> None:
        """Export; for ever."""
        while True:
            # The interval is the user's.
            await asyncio.sleep(self._interval_s)
            await self.export()

    async def export(self) -> None:
        """Export once. A receiver that is away is logged; the next export has the same sums and later ones."""
        try:
            data = metrics_data(await self._read(), self._resource, self._started_ns, time.time_ns())
            if await asyncio.to_thread(self._exporter.export, data) is not MetricExportResult.SUCCESS:
                log.warning("the metrics could not be exported; the next export has their sums")
        except Exception:
            log.exception("the metrics could not be exported")

    async def stop(self) -> None:
        """Export the metrics once more, and close the exporter."""
        if await within_limit(asyncio.create_task(self.export()), self._exporter):
            await asyncio.to_thread(self._exporter.shutdown)


def metrics_data(readings: Iterable[Reading], resource: Resource, started_ns: int, now_ns: int) -> MetricsData:
    """Return readings as the data of an exporter. Times are in nanoseconds since the epoch."""
    scope = InstrumentationScope("lattice_server")
    metrics = [_metric(reading, started_ns, now_ns) for reading in readings if reading.values]
    return MetricsData([ResourceMetrics(resource, [ScopeMetrics(scope, metrics, "")], "")])


def _metric(reading: Reading, started_ns: int, now_ns: int) -> Metric:
    instrument = reading.instrument
    numbers, distributions = [], []
    for labels, value in reading.values.items():
        attributes = dict(zip(instrument.labels, labels, strict=True))
        if isinstance(value, Distribution):
            count, bounds = sum(value.counts), instrument.bounds
            point = (attributes, started_ns, now_ns, count, value.total, value.counts, bounds)
            distributions.append(HistogramDataPoint(*point, min=UNKNOWN, max=UNKNOWN))
        else:
            numbers.append(NumberDataPoint(attributes, started_ns, now_ns, value))
    data: Sum | Gauge | Histogram
    match instrument.kind:
        case Kind.COUNTER:
            data = Sum(numbers, CUMULATIVE, is_monotonic=True)
        case Kind.UP_DOWN:
            data = Sum(numbers, CUMULATIVE, is_monotonic=False)
        case Kind.GAUGE:
            data = Gauge(numbers)
        case Kind.HISTOGRAM:
            data = Histogram(distributions, CUMULATIVE)
    return Metric(instrument.name, instrument.description, instrument.unit, data)


# Spans.

# OpenTelemetry's own numbers of kinds in messages begin at 1, those of its API at 0.
KINDS = (SpanKind.INTERNAL, SpanKind.SERVER, SpanKind.CLIENT, SpanKind.PRODUCER, SpanKind.CONSUMER)
OWN, OF_TASKS = InstrumentationScope("lattice_server"), InstrumentationScope("lattice_task")


@dataclass(slots=True, eq=False)
class Span:
    """A span of a run, which is exported when it ends. One of the SDK would take three times as long."""

    context: SpanContext
    parent: SpanContext | None
    name: str
    kind: SpanKind
    start_ns: int
    attributes: dict[str, Scalar]
    links: Sequence[Link] = ()
    events: list[Event] = field(default_factory=list)


class Spans:
    """Makes spans and exports them in batches; `OTEL_TRACES_SAMPLER` and `OTEL_BSP_*` hold.

    By default every trace that the caller did not begin is sampled, and any other as the caller says.
    """

    def __init__(self, exporter: SpanExporter, resource: Resource) -> None:
        self.provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter, self._processor = exporter, BatchSpanProcessor(exporter)
        self.provider.add_span_processor(self._processor)
        self._tracer = self.provider.get_tracer("lattice_server")
        self._resource = resource

    def begin(self, name: str, start_ns: int, attributes: Mapping[str, Scalar]) -> Span | None:
        """Begin a span of the call that is being served; None when its trace is not sampled."""
        # The SDK samples it and chooses its ids.
        made: Any = self._tracer.start_span(name, attributes=attributes, start_time=start_ns)
        if not made.is_recording():
            return None
        return Span(made.get_span_context(), made.parent, name, made.kind, start_ns, dict(made.attributes))

    def child(
        self,
        parent: Span,
        name: str,
        start_ns: int,
        attributes: Mapping[str, Scalar],
        link: Span | None = None,
        *,
        is_remote_work: bool = False,
    ) -> Span:
        """Begin a span below another one; `link` names a span that it follows."""
        above = parent.context
        span_id = self.provider.id_generator.generate_span_id()
        own = SpanContext(above.trace_id, span_id, False, above.trace_flags, above.trace_state)
        links = () if link is None else (Link(link.context),)
        kind = SpanKind.CONSUMER if is_remote_work else SpanKind.INTERNAL
        return Span(own, above, name, kind, start_ns, dict(attributes), links)

    def note(self, span: Span, attributes: Mapping[str, Scalar]) -> None:
        """Add attributes to a span."""
        span.attributes.update(attributes)

    def event(self, span: Span, name: str, time_ns: int) -> None:
        """Add an event to a span."""
        span.events.append(Event(name, timestamp=time_ns))

    def end(self, span: Span, end_ns: int, error_type: str = "") -> None:
        """End a span; with the type of an error, as failed."""
        if error_type:
            span.attributes["error.type"] = error_type
        status = Status(StatusCode.ERROR, error_type) if error_type else Status()
        self._export(span, end_ns, status, OWN)

    def traceparent(self, span: Span) -> str:
        """Return the text by which a process names a span as a parent."""
        found = span.context
        return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"

    def write(self, attempt: Span, span: ReportedSpan, parent_id: int | None) -> None:
        """Export a span of a task in the trace of its attempt, below that or below another span of the task."""
        top = attempt.context
        if span.span_id == top.span_id:
            return
        own = SpanContext(top.trace_id, span.span_id, is_remote=True, trace_flags=top.trace_flags)
        parent = top if parent_id is None else SpanContext(top.trace_id, parent_id, is_remote=True)
        events = [Event(event.name, dict(event.attributes), event.time_ns) for event in span.events]
        made = Span(own, parent, span.name, KINDS[span.kind - 1], span.start_ns, dict(span.attributes), (), events)
        status = Status(StatusCode.ERROR, span.message or None) if span.is_failed else Status()
        self._export(made, span.end_ns, status, OF_TASKS)

    def _export(self, span: Span, end_ns: int, status: Status, scope: InstrumentationScope) -> None:
        self._processor.on_end(
            ReadableSpan(
                span.name,
                span.context,
                span.parent,
                self._resource,
                span.attributes,
                span.events,
                span.links,
                span.kind,
                status=status,
                start_time=span.start_ns,
                end_time=end_ns,
                instrumentation_scope=scope,
            )
        )

    async def stop(self) -> None:
        """Export the remaining spans, and close the exporter."""
        closing = asyncio.create_task(asyncio.to_thread(self.provider.shutdown))
        await within_limit(closing, self._exporter)


class _Parents(grpc.aio.ServerInterceptor):
    """Makes the span of the caller the current one of each call."""

    async def intercept_service(self, continuation: Any, handler_call_details: Any) -> Any:
        """Read the headers. The context is that of the call, and ends with it."""
        headers = dict(handler_call_details.invocation_metadata or ())
        context.attach(propagate.extract(headers))
        return await continuation(handler_call_details)


UNTRACED = ("Connect", "ExecuteWorkflows", "OpenRun", "Watch", "WatchRun")


def call_tracing(provider: Any = None) -> list[Any]:
    """Return the interceptors that trace calls, by default with the provider of the process."""
    # A span as long as the life of a worker is of no use. The runs of one stream are no parts of one trace.
    streams = (filters.method_name(name) for name in UNTRACED)
    calls = filters.negate(filters.any_of(*streams))
    return [_Parents(), aio_server_interceptor(provider, filter_=calls)]  # type: ignore[no-untyped-call]


def has_provider() -> bool:
    """Whether the process has a provider of its own, such as that of an application around the server."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
