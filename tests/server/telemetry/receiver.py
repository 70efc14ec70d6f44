"""Receivers of OTLP: a gRPC server with the collector's services, and an HTTP server with its paths."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.trace.v1 import trace_pb2


class Receiver(metrics_service_pb2_grpc.MetricsServiceServicer, trace_service_pb2_grpc.TraceServiceServicer):
    """Keeps the requests that it received, and listens at `address`."""

    def __init__(self) -> None:
        self.address = ""
        self.resource_metrics: list[metrics_pb2.ResourceMetrics] = []
        self.resource_spans: list[trace_pb2.ResourceSpans] = []

    def name_to(self, patch: pytest.MonkeyPatch) -> None:
        """Have exporters of this process send here, and give a busy machine time."""
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://{self.address}")
        patch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "60")

    async def Export(self, request: Any, context: object) -> Any:
        """Take an export of either service."""
        return self.take(request)

    def take(self, request: Any) -> Any:
        """Keep a request, and return the answer."""
        if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest):
            self.resource_metrics += request.resource_metrics
            return metrics_service_pb2.ExportMetricsServiceResponse()
        self.resource_spans += request.resource_spans
        return trace_service_pb2.ExportTraceServiceResponse()

    def metrics(self) -> dict[str, metrics_pb2.Metric]:
        """Return the newest state of each metric by name."""
        return {
            metric.name: metric
            for resource in self.resource_metrics
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }

    def spans(self) -> list[trace_pb2.Span]:
        """Return all spans."""
        return [span for resource in self.resource_spans for scope in resource.scope_spans for span in scope.spans]


@asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    """Receive while the block runs."""
    server, receiver = grpc.aio.server(), Receiver()
    metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(receiver, server)
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(receiver, server)
    receiver.address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    await server.start()
    try:
        yield receiver
    finally:
        await server.stop(None)


PATHS = {
    "/v1/metrics": metrics_service_pb2.ExportMetricsServiceRequest,
    "/v1/traces": trace_service_pb2.ExportTraceServiceRequest,
}


@asynccontextmanager
async def receiving_http() -> AsyncIterator[Receiver]:
    """Receive over HTTP while the block runs."""
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                body = gzip.decompress(body)
            assert self.headers["content-type"] == "application/x-protobuf"
            answer = receiver.take(PATHS[self.path].FromString(body)).SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Write no line for each request."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.address = f"127.0.0.1:{server.server_port}"
        serving = asyncio.create_task(asyncio.to_thread(server.serve_forever, 0.05))
        try:
            yield receiver
        finally:
            await asyncio.to_thread(server.shutdown)
            await serving


def attributes_of(found: Any) -> dict[str, Any]:
    """Return the attributes of a span, a point or a resource."""
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in found.attributes}
