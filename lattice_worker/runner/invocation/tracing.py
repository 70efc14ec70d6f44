"""Collects the spans of a traced attempt, and sends them to the agent when it ends.

Rule: nothing is imported unless the attempt is traced and its code uses OpenTelemetry. Frames of spans name no trace:
the server puts them into that of their attempt.
"""

import contextlib
import json
import os
import sys
from typing import Any, cast

from lattice_worker.runner.encoding.text import utf8
from lattice_worker.runner.invocation.output import Output
from lattice_worker.runner.invocation.output import current as running

MAX_SPANS = 512
MAX_BYTES = 256 * 1024  # Of the text of all spans of an attempt.
MAX_ITEMS = 64
MAX_NAME, MAX_TEXT = 256, 4096
ENTERED = "trace_entered"


def enter(header: dict[str, Any]) -> None:
    """Make the span of an attempt the current one, if it is traced and its code has loaded OpenTelemetry."""
    if header.get("trace") and ENTERED not in header and "opentelemetry.trace" in sys.modules:
        header[ENTERED] = True
        # Without the SDK spans are not recorded, and code that makes some works as if it were not traced.
        with contextlib.suppress(ImportError):
            _enter(header["trace"])


def tracer(header: dict[str, Any]) -> Any:
    """Return a tracer for the code of an attempt. Raises ImportError."""
    from opentelemetry import trace

    enter(header)
    return trace.get_tracer("lattice_task")


def _enter(parent: str) -> None:
    from opentelemetry import context, trace
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

    _provide()
    _, trace_id, span_id, flags = parent.split("-")
    above = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=TraceFlags(int(flags, 16)))
    # Never detached: the context is that of the invocation, and ends with it.
    context.attach(trace.set_span_in_context(NonRecordingSpan(above)))


def _provide() -> None:
    """Have the spans of this process collected, by the provider of the task's code if it has set one."""
    from opentelemetry import trace
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

    class Ids(IdGenerator):
        """Ids that are not from the generator of `random`: a task may seed it, or depend on its numbers."""

        def generate_span_id(self) -> int:
            return int.from_bytes(os.urandom(8)) or 1

        def generate_trace_id(self) -> int:
            return int.from_bytes(os.urandom(16)) or 1

    class Collector(SpanProcessor):
        """Gives each span that ends to the invocation in whose context that happens."""

        def on_end(self, span: Any) -> None:
            output = running.get()
            if output is not None and output.header.get("trace"):
                _collect(output, span)

    provider = trace.get_tracer_provider()
    if getattr(provider, "_lattice_collects", False):
        return
    if not hasattr(provider, "add_span_processor"):
        # Spans outside of a traced attempt have no parent and are not recorded.
        made = TracerProvider(ParentBased(ALWAYS_OFF), Resource.get_empty(), shutdown_on_exit=False, id_generator=Ids())
        trace.set_tracer_provider(made)
        provider = made
    cast(Any, provider).add_span_processor(Collector())
    cast(Any, provider)._lattice_collects = True


def _collect(output: Output, span: Any) -> None:
    kept = output.spans
    if len(kept) < MAX_SPANS:
        found = _span(span)
        output.span_bytes += len(json.dumps(found))
        if output.span_bytes <= MAX_BYTES:
            kept.append(found)
            return
    output.spans_dropped += 1


def _span(span: Any) -> dict[str, Any]:
    own, parent = span.get_span_context(), span.parent
    return {
        "id": f"{own.span_id:016x}",
        "parent": "" if parent is None else f"{parent.span_id:016x}",
        "name": utf8(str(span.name))[:MAX_NAME],
        "kind": span.kind.value + 1,  # As in messages of OpenTelemetry, where they begin at 1.
        "start": span.start_time,
        "end": span.end_time,
        "attributes": _attributes(span.attributes),
        "events": [
            {"name": utf8(str(e.name))[:MAX_NAME], "time": e.timestamp, "attributes": _attributes(e.attributes)}
            for e in span.events[:MAX_ITEMS]
        ],
        "failed": span.status.status_code.name == "ERROR",
        "message": utf8(str(span.status.description or ""))[:MAX_TEXT],
    }


def _attributes(given: Any) -> dict[str, Any]:
    items = list((given or {}).items())[:MAX_ITEMS]
    return {utf8(str(name))[:MAX_NAME]: _scalar(value) for name, value in items}


def _scalar(value: Any) -> str | int | float | bool:
    if isinstance(value, bool | float) or (isinstance(value, int) and -(1 << 63) <= value < 1 << 63):
        return value
    text = value if isinstance(value, str) else str(list(value) if isinstance(value, tuple) else value)
    return utf8(text)[:MAX_TEXT]
