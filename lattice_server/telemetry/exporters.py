"""Makes the exporters of OpenTelemetry, with limits. Rule: their packages are imported when one is made."""

import asyncio
import logging
import os
import pkgutil
from typing import Any, Protocol

from lattice_server.telemetry import TelemetryError

log = logging.getLogger(__name__)

INTERVAL = "OTEL_METRIC_EXPORT_INTERVAL"
INTERVAL_MS = 60_000.0
# For the last export. A collector that does not answer must not keep the server from stopping.
LAST_EXPORT_S = 5.0


class Closable(Protocol):
    """An exporter."""

    def shutdown(self) -> None:
        """End the exports in progress."""


# The exporters by the kind of `--metrics` and of `--traces`; `OTEL_EXPORTER_OTLP_*` say where they send.
EXPORTERS = {
    ("metrics", "otlp"): "opentelemetry.exporter.otlp.proto.grpc.metric_exporter:OTLPMetricExporter",
    ("metrics", "otlp-http"): "opentelemetry.exporter.otlp.proto.http.metric_exporter:OTLPMetricExporter",
    ("metrics", "console"): "opentelemetry.sdk.metrics.export:ConsoleMetricExporter",
    ("traces", "otlp"): "opentelemetry.exporter.otlp.proto.grpc.trace_exporter:OTLPSpanExporter",
    ("traces", "otlp-http"): "opentelemetry.exporter.otlp.proto.http.trace_exporter:OTLPSpanExporter",
    ("traces", "console"): "opentelemetry.sdk.trace.export:ConsoleSpanExporter",
}


def _without_values(record: logging.LogRecord) -> bool:
    record.args = ("***",) * len(record.args or ())
    return True


# It logs a malformed list of headers as a whole, with the credentials in it.
logging.getLogger("opentelemetry.util.re").addFilter(_without_values)


def exporter(signal: str, kind: str) -> Any:
    """Return the exporter of a kind for `metrics` or for `traces`.

    Raises ImportError when its package is missing, TelemetryError for an endpoint with a password, which gRPC logs.
    """
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", f"OTEL_EXPORTER_OTLP_{signal.upper()}_ENDPOINT"):
        if kind == "otlp" and "@" in os.environ.get(name, ""):
            raise TelemetryError(f"{name} cannot have a password for gRPC: set OTEL_EXPORTER_OTLP_HEADERS")
    return pkgutil.resolve_name(EXPORTERS[signal, kind])()


def interval_ms() -> float:
    """Return the time between two exports of metrics. Raises TelemetryError."""
    text = os.environ.get(INTERVAL) or str(INTERVAL_MS)
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        raise TelemetryError(f"{INTERVAL} must be a number of milliseconds above 0, not {text!r}")
    return found


async def within_limit(last: "asyncio.Task[None]", exporter: Closable) -> bool:
    """Wait for the last export; return whether it ended within `LAST_EXPORT_S`.

    Otherwise the exporter is closed, which ends the call and its repetitions.
    """
    await asyncio.wait([last], timeout=LAST_EXPORT_S)
    if is_over := not last.done():
        log.warning("the collector has not answered for %.0f s: the last export is given up", LAST_EXPORT_S)
        await asyncio.to_thread(exporter.shutdown)
    await last
    return not is_over
