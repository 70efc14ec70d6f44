"""The spans of tasks between a runner and the server. Rule: a runner is not trusted with their form or number."""

from collections.abc import Sequence
from itertools import islice
from typing import Any

from lattice.v1 import worker_pb2

from lattice_worker import convert

MAX_SPANS = 512


def trace_parent(assignment: worker_pb2.Assignment) -> str:
    """Return the span that the code of a lease is part of: of a batch, that of the first traced attempt."""
    return next((parent for parent in assignment.trace_parents if parent), "")


def traced_item(assignment: worker_pb2.Assignment) -> int:
    """Return the position of that attempt."""
    return next((item for item, parent in enumerate(assignment.trace_parents) if parent), 0)


def traced_from_frame(frame: dict[str, Any]) -> worker_pb2.AttemptTraced:
    """Return the message of a runner's frame. Raises when the frame is malformed."""
    found: Sequence[dict[str, Any]] = frame["spans"]
    traced = worker_pb2.AttemptTraced(dropped=max(0, int(frame["dropped"])) + max(0, len(found) - MAX_SPANS))
    for span in islice(found, MAX_SPANS):
        message = traced.spans.add(
            span_id=bytes.fromhex(span["id"]),
            parent_span_id=bytes.fromhex(span["parent"]),
            name=span["name"],
            kind=span["kind"],
            start_time=convert.timestamp(span["start"]),
            end_time=convert.timestamp(span["end"]),
            failed=span["failed"],
            message=span["message"],
        )
        _fill(message.attributes, span["attributes"])
        for event in span["events"]:
            made = message.events.add(name=event["name"], time=convert.timestamp(event["time"]))
            _fill(made.attributes, event["attributes"])
    return traced


def _fill(attributes: Any, given: dict[str, Any]) -> None:
    for name, value in given.items():
        match value:
            case bool():
                attributes[name].truth = value
            case int():
                attributes[name].integer = value
            case float():
                attributes[name].number = value
            case _:
                attributes[name].text = str(value)
