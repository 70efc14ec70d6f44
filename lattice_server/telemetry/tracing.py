"""Builds the traces of one server: those of calls, and with an exporter those of runs."""

from typing import Any

from lattice_server.telemetry import otel
from lattice_server.telemetry.exporters import exporter
from lattice_server.telemetry.run_tracer import RunTracer


class Tracing:
    """The traces of one server, exported as `kind` says: `otlp`, `otlp-http` or `console`.

    With `none` only calls are traced, and only when an application around the server has a provider of spans.

    Attributes:
        interceptors: those of the gRPC server, outside of all others: they have to see the status of an error.
        runs: writes the traces of runs.
    """

    def __init__(self, kind: str, version: str, epoch: str) -> None:
        self.interceptors: list[Any] = []
        self.runs: RunTracer | None = None
        self._spans: otel.Spans | None = None
        if kind != "none":
            self._spans = otel.Spans(exporter("traces", kind), otel.resource_of(version, epoch))
            self.runs = RunTracer(self._spans)
            self.interceptors = otel.call_tracing(self._spans.provider)
        elif otel.has_provider():
            self.interceptors = otel.call_tracing()

    async def stop(self) -> None:
        """Export the remaining spans."""
        if self._spans is not None:
            await self._spans.stop()
