"""Reports about leases: spawned tasks and ends.

Rule: a lease ends in one report for each of its attempts, or in one that returns it, and then `on_ended` is called.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from lattice.v1 import task_pb2, worker_pb2

from lattice_worker import background, convert
from lattice_worker.attempts import outcomes
from lattice_worker.attempts.output_reports import OutputReports
from lattice_worker.attempts.tracing import traced_from_frame, traced_item
from lattice_worker.egress.agent import Connection
from lattice_worker.pool.invocation import failed
from lattice_worker.session.limits import Limits
from lattice_worker.store.local_store import LocalStore

# Answers of so many values, or so many bytes, are converted away from the event loop.
LARGE_ANSWER_BLOBS = 500
LARGE_ANSWER_BYTES = 1024 * 1024


class AttemptReports:
    """Makes reports. `output` takes each; `on_ended` takes a lease that is over, and its outputs if it succeeded."""

    def __init__(
        self,
        local_store: LocalStore,
        limits: Limits,
        output: OutputReports,
        on_ended: Callable[[str, convert.Outputs | None], None],
    ) -> None:
        self._local_store, self._limits = local_store, limits
        self._output, self._emit, self._on_ended = output, output.report, on_ended
        self.start, self.log = output.start, output.log
        self._converting: set[asyncio.Task[None]] = set()

    @property
    def is_idle(self) -> bool:
        """Whether no report is still to be made."""
        return not self._output.has_starts and not self._converting

    def access(self, lease_id: str, access: dict[str, Any], *, is_final: bool = False) -> None:
        """Report the accesses of a sandbox to a server: the first of them, or all of them."""
        report = convert.report(lease_id, time.time_ns())
        report.network_access.CopyFrom(convert.network_access(access))
        report.network_access.final = is_final
        self._emit(report)

    def spawn(
        self, assignment: worker_pb2.Assignment, function: task_pb2.Function, task: dict[str, Any], blobs: list[bytes]
    ) -> str:
        """Report a spawned task; return why it cannot be reported, and nothing when it was."""
        report, level = convert.report(assignment.lease_id, time.time_ns()), convert.produced_at(assignment)
        report.spawned.CopyFrom(convert.spawned_from_frame(task, blobs, function, self._local_store.name, level))
        if excess := outcomes.excess(report, self._limits.message_bytes):
            self._local_store.drop(convert.artifacts_in(report))
        else:
            self._emit(report)
        return excess

    def trace(self, assignment: worker_pb2.Assignment, frame: dict[str, Any]) -> None:
        """Report the spans of a traced attempt; leave out spans that are too large for a message."""
        if not any(assignment.trace_parents):
            return
        report = convert.report(assignment.lease_id, time.time_ns())
        report.item = traced_item(assignment)
        report.traced.CopyFrom(traced_from_frame(frame))
        if not outcomes.excess(report, self._limits.message_bytes):
            self._emit(report)

    def give_back(self, lease_id: str, reason: str) -> None:
        """Return a lease that started and did not end by itself."""
        # Its start is reported before, so its attempts cannot have the same numbers again.
        self._emit(convert.returned(lease_id, reason))
        self._on_ended(lease_id, None)

    def end(
        self,
        assignment: worker_pb2.Assignment,
        answer: dict[str, Any],
        blobs: list[bytes],
        connection: Connection | None = None,
    ) -> None:
        """Report the end of every attempt of a lease; before it all accesses of a sandbox with a `connection`."""
        if connection is not None:
            self._keep(assignment, answer, self._end_connected(assignment, answer, blobs, connection))
            return
        self._output.end(assignment.lease_id)
        size, limit_bytes = len(assignment.attempts), self._limits.message_bytes
        level = convert.produced_at(assignment)
        asked = (assignment.lease_id, answer, blobs, self._local_store.name, size, limit_bytes, level)
        if len(blobs) < LARGE_ANSWER_BLOBS and sum(map(len, blobs)) < LARGE_ANSWER_BYTES:
            self._report_end(assignment.lease_id, answer, outcomes.reports_of(*asked))
            return
        # Meanwhile the event loop sends heartbeats and serves other leases.
        self._keep(assignment, answer, self._end_large(asked, answer))

    def _keep(
        self, assignment: worker_pb2.Assignment, answer: dict[str, Any], ending: Coroutine[Any, Any, None]
    ) -> None:
        task = background.start(ending, partial(self._end_failed, assignment, answer))
        self._converting.add(task)
        task.add_done_callback(self._converting.discard)

    def _end_failed(self, assignment: worker_pb2.Assignment, answer: dict[str, Any], error: BaseException) -> None:
        """End a lease whose own answer could not be reported."""
        text = f"its end could not be reported: {type(error).__name__}: {error}"
        self.end(assignment, failed("internal", text) | {"made": answer.get("made", ())}, [])

    async def _end_connected(
        self, assignment: worker_pb2.Assignment, answer: dict[str, Any], blobs: list[bytes], connection: Connection
    ) -> None:
        for access in await connection.close():
            self.access(assignment.lease_id, access, is_final=True)
        self.end(assignment, answer, blobs)

    async def _end_large(self, asked: tuple[Any, ...], answer: dict[str, Any]) -> None:
        try:
            reports = await asyncio.to_thread(outcomes.reports_of, *asked)
        except RuntimeError:  # The machine is short of threads.
            reports = outcomes.reports_of(*asked)
        self._report_end(asked[0], answer, reports)

    def _report_end(self, lease_id: str, answer: dict[str, Any], reports: list[worker_pb2.Report]) -> None:
        outputs: convert.Outputs | None = None
        unnamed = set(answer.get("made", ()))
        for report in reports:
            outputs = report.succeeded.outputs if report.HasField("succeeded") else None
            if unnamed:
                unnamed -= convert.artifacts_in(report)
            self._emit(report)
        # Artifacts of an answer that could not be reported are named by nothing.
        if unnamed:
            with contextlib.suppress(OSError):
                self._local_store.drop(unnamed)
        self._on_ended(lease_id, outputs)
