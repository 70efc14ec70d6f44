"""Metrics and traces. Rule: `otel` is the only importer of OpenTelemetry; nothing here decides about work."""


class TelemetryError(Exception):
    """Metrics or traces cannot be exported as they were asked for; the message says why, in one line."""
