"""The spans that workers report, and the port of what takes them. Rule: a report names no trace, only its attempt."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from lattice_server.core.frozen import frozen

Scalar = str | int | float | bool


@frozen
class SpanEvent:
    """A timed event during a span; the time is in nanoseconds since the epoch."""

    name: str
    time_ns: int
    attributes: Mapping[str, Scalar]


@frozen
class ReportedSpan:
    """A span of a task, with times of the server in nanoseconds since the epoch; see `Span` in the contract."""

    span_id: int
    parent_id: int
    name: str
    kind: int
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Scalar]
    events: Sequence[SpanEvent]
    is_failed: bool
    message: str


class SpanSink(Protocol):
    """Takes the spans that workers report, on the main thread."""

    def take_spans(self, session_id: str, lease_id: str, item: int, spans: Sequence[ReportedSpan]) -> None:
        """Take spans of an attempt that a session has; those of any other attempt are ignored."""
