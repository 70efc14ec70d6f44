"""The chunks of attempts, from the processes that stream them to the server.

Rule: chunks of one attempt that come close together share a report, and a report ends no later than its attempt. A
process may have a window of chunks whose reports the server has not acknowledged; one that sends more is ended.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.pool.runner_handle import Runner
from lattice_worker.session.limits import Limits

# After a report the next one has the chunks of so many seconds; the first chunk after a pause is reported at once.
FLUSH_S = 0.005
REPORT_BYTES = 256 * 1024
WINDOW_CHUNKS = 256
WINDOW_BYTES = 4 * 1024 * 1024  # At least four times the longest chunk that a server allows.


@dataclass(slots=True)
class _Flow:
    """The chunks of one lease: in reports that are not acknowledged, and acknowledged without word to the process."""

    runner: Runner
    chunks: int = 0
    size: int = 0
    reported: deque[tuple[int, int]] = field(default_factory=deque)
    owed_chunks: int = 0
    owed_bytes: int = 0


@dataclass(slots=True)
class _Pending:
    """The chunks of one attempt that are not reported yet."""

    report: worker_pb2.Report
    size: int = 0


class Streams:
    """The streams of all leases. `emit` takes reports."""

    def __init__(self, emit: Callable[[worker_pb2.Report], None], limits: Limits) -> None:
        self._emit = emit
        self._limits = limits
        self._flows: dict[str, _Flow] = {}
        self._pending: dict[tuple[str, int], _Pending] = {}
        self._progress: dict[tuple[str, int], worker_pb2.Report] = {}
        self._timer: asyncio.Handle | None = None
        self._flushed_at = 0.0

    def take(
        self, assignment: worker_pb2.Assignment, runner: Runner, header: dict[str, Any], blobs: list[bytes]
    ) -> None:
        """Take a chunk. Raises an exception when the header is not that of a chunk, or the process may not send it."""
        lease_id, item = assignment.lease_id, _item(assignment, header)
        size = len(blobs[0])
        flow = self._flows.get(lease_id)
        if flow is None:
            flow = self._flows[lease_id] = _Flow(runner)
        if size > self._limits.chunk_bytes:
            raise ValueError(f"a chunk takes {size} bytes; it may have {self._limits.chunk_bytes}")
        if flow.chunks >= WINDOW_CHUNKS or (flow.chunks and flow.size + size > WINDOW_BYTES):
            raise ValueError("it streams more than it may before the server has taken it")
        flow.chunks += 1
        flow.size += size
        pending = self._pending.get((lease_id, item))
        if pending is None:
            report = convert.report(lease_id, time.time_ns())
            report.item = item
            pending = self._pending[lease_id, item] = _Pending(report)
        reference = {"type": str(header["type"]), "blob": 0}
        level = convert.produced_at(assignment)
        pending.report.streamed.chunks.append(convert.payload_from_answer(reference, blobs, "", level))
        pending.size += size
        if pending.size > REPORT_BYTES:
            self._report(lease_id, item)
        else:
            self._flush_soon()

    def take_progress(self, assignment: worker_pb2.Assignment, header: dict[str, Any]) -> None:
        """Take how far an attempt is. Raises an exception when the header does not say that."""
        report = convert.report(assignment.lease_id, time.time_ns())
        report.item = _item(assignment, header)
        report.progressed.done = header["done"]
        if header["total"] is not None:
            report.progressed.total = header["total"]
        if self._limits.chunk_bytes:
            self._progress[assignment.lease_id, report.item] = report
            self._flush_soon()

    def acknowledge(self, reports: Iterable[worker_pb2.Report]) -> None:
        """Take the reports that the server has acknowledged, and let processes stream as much again."""
        for report in reports if self._flows else ():
            flow = self._flows.get(report.lease_id)
            if flow is None or not report.HasField("streamed"):
                continue
            chunks, size = flow.reported.popleft()
            flow.owed_chunks += chunks
            flow.owed_bytes += size
            # A frame for each report would cost the process more than the chunks.
            if flow.owed_chunks * 4 >= WINDOW_CHUNKS or flow.owed_bytes * 4 >= WINDOW_BYTES:
                flow.chunks -= flow.owed_chunks
                flow.size -= flow.owed_bytes
                flow.runner.credit(report.lease_id, flow.owed_chunks, flow.owed_bytes)
                flow.owed_chunks = flow.owed_bytes = 0

    def end(self, lease_id: str) -> None:
        """Report what is left of a lease that is over."""
        for lease, item in [key for key in self._pending if key[0] == lease_id] if self._pending else ():
            self._report(lease, item)
        for key in [key for key in self._progress if key[0] == lease_id] if self._progress else ():
            self._emit(self._progress.pop(key))
        self._flows.pop(lease_id, None)

    def _flush_soon(self) -> None:
        if self._timer is None:
            loop = asyncio.get_running_loop()
            due_at = self._flushed_at + FLUSH_S
            # The frames that have arrived with this one are taken first.
            self._timer = loop.call_soon(self._flush) if due_at <= loop.time() else loop.call_at(due_at, self._flush)

    def _flush(self) -> None:
        self._timer = None
        self._flushed_at = asyncio.get_running_loop().time()
        for lease_id, item in list(self._pending):
            self._report(lease_id, item)
        progress, self._progress = self._progress, {}
        for report in progress.values():
            self._emit(report)

    def _report(self, lease_id: str, item: int) -> None:
        pending = self._pending.pop((lease_id, item))
        self._flows[lease_id].reported.append((len(pending.report.streamed.chunks), pending.size))
        self._emit(pending.report)


def _item(assignment: worker_pb2.Assignment, header: dict[str, Any]) -> int:
    item = header["item"]
    if type(item) is not int or not 0 <= item < len(assignment.attempts):
        raise ValueError(f"there is no item {item!r}")
    return item
