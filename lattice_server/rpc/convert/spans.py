"""Converts the spans of attempts. Rule: a worker is not trusted with sizes: content over a limit is cut or left out."""

from collections.abc import Mapping
from itertools import islice

from lattice.v1 import worker_pb2

from lattice_server.engine.workers.spans import ReportedSpan, Scalar, SpanEvent

MAX_SPANS = 512
MAX_ITEMS = 64
MAX_NAME, MAX_TEXT = 256, 4096
SPAN_ID_BYTES = 8
MAX_KIND = 5


def spans_from_proto(traced: worker_pb2.AttemptTraced, ahead_ns: int) -> list[ReportedSpan]:
    """Return the spans of an attempt that have an id; `ahead_ns` is by how much the worker's clock is ahead."""
    found = []
    for span in islice(traced.spans, MAX_SPANS):
        span_id = int.from_bytes(span.span_id)
        if len(span.span_id) != SPAN_ID_BYTES or not span_id:
            continue
        start_ns = span.start_time.ToNanoseconds() - ahead_ns
        events = [
            SpanEvent(event.name[:MAX_NAME], event.time.ToNanoseconds() - ahead_ns, _attributes(event.attributes))
            for event in islice(span.events, MAX_ITEMS)
        ]
        found.append(
            ReportedSpan(
                span_id=span_id,
                parent_id=int.from_bytes(span.parent_span_id[:SPAN_ID_BYTES]),
                name=span.name[:MAX_NAME],
                kind=span.kind if 1 <= span.kind <= MAX_KIND else 1,
                start_ns=start_ns,
                end_ns=max(start_ns, span.end_time.ToNanoseconds() - ahead_ns),
                attributes=_attributes(span.attributes),
                events=events,
                is_failed=span.failed,
                message=span.message[:MAX_TEXT],
            )
        )
    return found


def _attributes(given: Mapping[str, worker_pb2.SpanValue]) -> dict[str, Scalar]:
    found: dict[str, Scalar] = {}
    for name, value in islice(given.items(), MAX_ITEMS):
        match value.WhichOneof("value"):
            case "text":
                found[name[:MAX_NAME]] = value.text[:MAX_TEXT]
            case "integer":
                found[name[:MAX_NAME]] = value.integer
            case "number":
                found[name[:MAX_NAME]] = value.number
            case "truth":
                found[name[:MAX_NAME]] = value.truth
            case _:
                pass
    return found
