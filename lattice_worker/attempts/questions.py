"""The questions, calls and awaited signals of attempts, from the process that asks to the server and back.

Rule: each gets one answer, or ends with its lease; an answer that arrives twice, or late, is ignored.
"""

import asyncio
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lattice.v1 import errors_pb2, payload_pb2, worker_pb2

from lattice_worker import background, convert
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.sandbox.results import InputError, inlined
from lattice_worker.session.limits import Limits
from lattice_worker.store.local_store import LocalStore, MissingError

# Of one lease. The server has a limit for a run.
MAX_UNANSWERED = 1000
MAX_NAME_LENGTH = 128
NOT_HERE = "the server is of a version that puts no questions to callers"


class Questions:
    """The questions of all leases that have no answer yet. `emit` takes reports."""

    def __init__(self, emit: Callable[[worker_pb2.Report], None], limits: Limits, local_store: LocalStore) -> None:
        self._limits = limits
        self._local_store = local_store
        self.last_answer = 0
        self._emit = emit
        self._reading: set[str] = set()
        self._unanswered: dict[str, dict[int, tuple[Runner, worker_pb2.Report]]] = {}

    def ask(
        self, assignment: worker_pb2.Assignment, runner: Runner, header: dict[str, Any], blobs: list[bytes]
    ) -> None:
        """Report a question, or a wait for a call or a signal. Raises an exception when the header is of none."""
        is_call = header["kind"] == "await"
        report, number = (_wait if is_call else _report)(assignment, header, blobs)
        lease_id = assignment.lease_id
        if report.awaits.HasField("signal"):
            self._reading.add(lease_id)
        unanswered = self._unanswered.setdefault(lease_id, {})
        if number in unanswered:
            raise ValueError(f"question {number} is asked twice")
        size = report.asked.payload.ByteSize()
        limit_bytes = self._limits.question_bytes
        if (is_call or limit_bytes) and (is_call or size <= limit_bytes) and len(unanswered) < MAX_UNANSWERED:
            unanswered[number] = runner, report
            self._emit(report)
            return
        why = NOT_HERE
        if size > limit_bytes > 0 and not is_call:
            why = f"what is asked takes {size} bytes; a question may have {limit_bytes}, and so may its answer"
        elif limit_bytes or is_call:
            why = f"{MAX_UNANSWERED} questions of the attempt wait for an answer"
        runner.answer(lease_id, {"number": number, "unanswered": why}, ())

    def answer(self, message: worker_pb2.Answer) -> None:
        """Hand an answer of the server to the process that waits for it."""
        self.last_answer = max(self.last_answer, message.sequence)
        asked = self._unanswered.get(message.lease_id, {}).pop(message.number, None)
        if asked is None:
            return
        runner = asked[0]
        if not message.HasField("outputs"):
            runner.answer(message.lease_id, *_frame(message))
        elif missing := self._local_store.fetching(message.outputs.outputs.values()):
            background.start(self._answer_call(message, runner, missing), partial(_answer_failed, message, runner))
        else:
            runner.answer(message.lease_id, *self._outputs_frame(message, runner))

    async def _answer_call(self, message: worker_pb2.Answer, runner: Runner, missing: list[asyncio.Task[Any]]) -> None:
        """Answer a call once the large values of its answer are here."""
        try:
            for wait in missing:
                await asyncio.shield(wait)  # Others may wait for the same.
            header, blobs = self._outputs_frame(message, runner)
        except (MissingError, OSError) as error:
            header, blobs = _failed(message, f"the value of the called task is not here: {error}"), []
        runner.answer(message.lease_id, header, blobs)

    def _outputs_frame(self, message: worker_pb2.Answer, runner: Runner) -> tuple[dict[str, Any], list[bytes]]:
        blobs: list[bytes] = []
        found = {}
        for name, payload in sorted(message.outputs.outputs.items()):
            binding = payload_pb2.Binding(payload=payload)
            found[name] = convert.binding_tree(binding, self._local_store.directory, blobs, {})
        if runner.sandbox is not None:
            try:
                found = {name: inlined(tree, blobs) for name, tree in found.items()}
            except InputError as error:
                return _failed(message, str(error)), []
        return {"number": message.number, "outputs": found}, blobs

    def forget(self, lease_id: str) -> None:
        """Drop the questions of a lease that is over."""
        self._unanswered.pop(lease_id, None)
        self._reading.discard(lease_id)

    def reads_signals(self, lease_id: str) -> bool:
        """Whether an attempt has waited for a signal: only the present server knows which values it has got."""
        return lease_id in self._reading

    def waits(self, lease_id: str) -> list[worker_pb2.AttemptAwaits]:
        """Return the waits of a lease that have no answer."""
        return [report.awaits for report in self._reports(lease_id) if report.HasField("awaits")]

    def reset(self, adopted: Iterable[str]) -> list[worker_pb2.Report]:
        """Begin a new session: the server numbers its answers anew. Return the open questions of adopted leases."""
        self.last_answer = 0
        return [report for lease in adopted for report in self._reports(lease) if report.HasField("asked")]

    def _reports(self, lease_id: str) -> list[worker_pb2.Report]:
        return [report for _, report in self._unanswered.get(lease_id, {}).values()]


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


def _wait(assignment: worker_pb2.Assignment, header: dict[str, Any], _: list[bytes]) -> tuple[worker_pb2.Report, int]:
    number = header["number"]
    if type(number) is not int or number < 1:
        raise ValueError(f"there is no wait {number!r}")
    report = convert.report(assignment.lease_id, time.time_ns())
    report.awaits.number = number
    if "signal" not in header:
        report.awaits.task_id = str(header["task"])
        return report, number
    report.awaits.signal.name = str(header["signal"])[:MAX_NAME_LENGTH]
    if (timeout_s := header["timeout"]) is not None:
        report.awaits.signal.timeout.FromNanoseconds(int(timeout_s * 1e9))
    return report, number


def _failed(message: worker_pb2.Answer, text: str) -> dict[str, Any]:
    return {"number": message.number, "failure": {"type": "", "message": text, "kind": "PAYLOAD"}}


def _answer_failed(message: worker_pb2.Answer, runner: Runner, error: BaseException) -> None:
    text = f"the value of the called task could not be fetched: {type(error).__name__}: {error}"
    runner.answer(message.lease_id, _failed(message, text), [])


def _kind(failure: errors_pb2.Failure) -> str:
    if failure.kind not in errors_pb2.FailureKind.values():  # Of a server of a later version.
        return str(failure.kind)
    return errors_pb2.FailureKind.Name(failure.kind).removeprefix("FAILURE_KIND_")


def _frame(message: worker_pb2.Answer) -> tuple[dict[str, Any], list[bytes]]:
    header: dict[str, Any] = {"number": message.number}
    match message.WhichOneof("answer"):
        case "payload":
            payload = message.payload
            data = payload.json.encode() if payload.WhichOneof("content") == "json" else payload.data
            return header | {"value": {"type": payload.media_type or convert.JSON, "blob": 0}}, [data]
        case "failure":
            failure = message.failure
            return header | {"failure": {"type": failure.type, "message": failure.message, "kind": _kind(failure)}}, []
        case _:
            return header | {"unanswered": message.unanswered}, []
