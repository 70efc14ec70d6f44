"""The reports that end a lease. Rule: each attempt of a lease gets one outcome, even of a malformed answer."""

import time
from typing import Any, TypeAlias

from lattice.v1 import errors_pb2, payload_pb2, resources_pb2, worker_pb2

from lattice_worker import convert
from lattice_worker.runner.encoding.text import utf8

CLOUDPICKLE = "application/vnd.lattice.cloudpickle"
ENVELOPE_BYTES = 64  # The most that surrounds a report that travels alone, its number included.


Level: TypeAlias = resources_pb2.Isolation.ValueType


def reports_of(
    lease_id: str, answer: dict[str, Any], blobs: list[bytes], node_id: str, size: int, limit_bytes: int, level: Level
) -> list[worker_pb2.Report]:
    """Return the reports that end the members of a lease, each by its own answer or all by the one there is.

    Their values are marked with `level`, see `convert.produced_at`.
    An answer that cannot be read, or that does not fit into a message of `limit_bytes`, becomes a failure.
    """
    members = answer.get("items", [answer] * size)
    if not isinstance(members, list) or len(members) != size:
        members = [_internal("its process answered for another number of attempts")] * size
    reports = []
    for item, member in enumerate(members):
        made = convert.report(lease_id, time.time_ns())
        made.item = item
        try:
            duration_ns = int(answer.get("duration", 0.0) * 1e9)
            fill_outcome(made, member, blobs, node_id, duration_ns, level)
        except Exception as error:
            duration_ns = 0
            text = f"the answer of its process cannot be read: {type(error).__name__}: {error}"
            fill_outcome(made, _internal(text), [], node_id, duration_ns)
        if too_large := excess(made, limit_bytes):
            failed = {"failure": {"kind": "payload", "message": too_large}}
            fill_outcome(made, failed, [], node_id, duration_ns)
        reports.append(made)
    return reports


def fill_outcome(
    report: worker_pb2.Report,
    answer: dict[str, Any],
    blobs: list[bytes],
    node_id: str,
    duration_ns: int,
    level: Level = convert.UNMARKED,
) -> None:
    """Write into a report how one attempt ended."""
    report.ClearField("succeeded")
    if failure := answer.get("failure"):
        report.failed.failure.CopyFrom(failure_from_answer(failure, blobs))
        report.failed.duration.FromNanoseconds(duration_ns)
        return
    report.succeeded.duration.FromNanoseconds(duration_ns)
    for name, reference in answer["outputs"].items():
        report.succeeded.outputs[name].CopyFrom(convert.payload_from_answer(reference, blobs, node_id, level))
    for name, references in answer["split"].items():
        items = [convert.payload_from_answer(reference, blobs, node_id, level) for reference in references]
        report.succeeded.split[name].CopyFrom(payload_pb2.PayloadList(items=items))


def failure_from_answer(answer: dict[str, Any], blobs: list[bytes]) -> errors_pb2.Failure:
    """Return the failure a runner answered with, or was found to have died of."""
    exception = answer.get("exception")
    return errors_pb2.Failure(
        kind=errors_pb2.FailureKind.Value(f"FAILURE_KIND_{answer['kind'].upper()}"),
        type=answer.get("type", ""),
        message=answer["message"],
        traceback=answer.get("traceback", ""),
        exception=None if exception is None else payload_pb2.Payload(media_type=CLOUDPICKLE, data=blobs[exception]),
        exit_status=answer.get("exit_status"),
        base_types=answer.get("base_types", ()),
    )


def excess(report: worker_pb2.Report, limit_bytes: int) -> str:
    """Return for people why no message of at most `limit_bytes` holds a report; nothing when one does."""
    size = report.ByteSize()
    if size + ENVELOPE_BYTES <= limit_bytes:
        return ""
    match report.WhichOneof("fact"):
        case "succeeded":
            what = "what it returned takes"
            remedy = "return fewer items, or larger ones, which are stored where they were made"
        case "failed":
            what, remedy = "what it raised takes", "raise a shorter error"
        case _:
            what = "a task that it spawned takes"
            remedy = "give it fewer inputs, or larger ones, which are stored where they were made"
    return f"{what} {size} bytes, and a message to the server may have {limit_bytes}; {remedy}"


def has_crashed(answer: dict[str, Any]) -> bool:
    """Whether an answer says that the process died."""
    failure = answer.get("failure")
    return isinstance(failure, dict) and "exit_status" in failure


def _internal(text: str) -> dict[str, Any]:
    return {"failure": {"kind": "internal", "message": utf8(text)}}
