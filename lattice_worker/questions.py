"""The questions of attempts, from the process that asks to the server and back.

Rule: a question gets one answer, or ends with its lease; an answer that arrives twice, or late, is ignored.
"""

import time
from collections.abc import Callable
from typing import Any

from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.limits import Limits
from lattice_worker.runner_handle import Runner

# Of one lease. The server has a limit for a run.
MAX_UNANSWERED = 1000
NOT_HERE = "the server is of a version that puts no questions to callers"


class Questions:
    """The questions of all leases that have no answer yet. `emit` takes reports."""

    def __init__(self, emit: Callable[[worker_pb2.Report], None], limits: Limits) -> None:
        self._limits = limits
        self.last_answer = 0
        self._emit = emit
        self._unanswered: dict[str, dict[int, Runner]] = {}

    def ask(
        self, assignment: worker_pb2.Assignment, runner: Runner, header: dict[str, Any], blobs: list[bytes]
    ) -> None:
        """Report a question. Raises an exception when the header is not that of a question."""
        report, number = _report(assignment, header, blobs)
        lease_id = assignment.lease_id
        unanswered = self._unanswered.setdefault(lease_id, {})
        if number in unanswered:
            raise ValueError(f"question {number} is asked twice")
        size = report.asked.payload.ByteSize()
        limit_bytes = self._limits.question_bytes
        if limit_bytes and size <= limit_bytes and len(unanswered) < MAX_UNANSWERED:
            unanswered[number] = runner
            self._emit(report)
            return
        why = NOT_HERE
        if size > limit_bytes > 0:
            why = f"what is asked takes {size} bytes; a question may have {limit_bytes}, and so may its answer"
        elif limit_bytes:
            why = f"{MAX_UNANSWERED} questions of the attempt wait for an answer"
        runner.answer(lease_id, {"number": number, "unanswered": why}, ())

    def answer(self, message: worker_pb2.Answer) -> None:
        """Hand an answer of the server to the process that waits for it."""
        self.last_answer = max(self.last_answer, message.sequence)
        runner = self._unanswered.get(message.lease_id, {}).pop(message.number, None)
        if runner is not None:
            runner.answer(message.lease_id, *_frame(message))

    def forget(self, lease_id: str) -> None:
        """Drop the questions of a lease that is over."""
        self._unanswered.pop(lease_id, None)

    def reset(self) -> None:
        """Begin a new session: the server numbers its answers anew."""
        self.last_answer = 0


def _report(
    assignment: worker_pb2.Assignment, header: dict[str, Any], blobs: list[bytes]
) -> tuple[worker_pb2.Report, int]:
    number, item = header["number"], header["item"]
    if type(number) is not int or type(item) is not int or number < 1 or not 0 <= item < len(assignment.attempts):
        raise ValueError(f"there is no question {number!r} of item {item!r}")
    report, level = convert.report(assignment.lease_id, time.time_ns()), convert.produced_at(assignment)
    report.item = item
    report.asked.number, report.asked.name = number, header["name"]
    report.asked.payload.CopyFrom(convert.payload_from_answer(header["payload"], blobs, "", level))
    if report.asked.payload.HasField("artifact"):
        raise ValueError("a question has its value inline")
    return report, number


def _frame(message: worker_pb2.Answer) -> tuple[dict[str, Any], list[bytes]]:
    header: dict[str, Any] = {"number": message.number}
    match message.WhichOneof("answer"):
        case "payload":
            payload = message.payload
            data = payload.json.encode() if payload.WhichOneof("content") == "json" else payload.data
            return header | {"value": {"type": payload.media_type or convert.JSON, "blob": 0}}, [data]
        case "failure":
            failure = message.failure
            return header | {"failure": {"type": failure.type, "message": failure.message}}, []
        case _:
            return header | {"unanswered": message.unanswered}, []
