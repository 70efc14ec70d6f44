"""The starts and the output of attempts, from their processes to the server.

Rule: the start of a lease is reported before anything else of it, with its time; an end that follows at once implies
the start. Text of one attempt that comes close together shares a report, and is reported before whatever else is
reported of the attempt after it. Text that arrived here is not lost when the process of its attempt dies.
"""

import asyncio
import time
from collections.abc import Callable

from lattice.v1 import worker_pb2

from lattice_worker import convert

# A start is reported late, so that a short attempt needs one message instead of two.
START_DELAY_S = 0.002
# After a report the next one has the text of so many seconds; the first text after a pause is reported at once.
FLUSH_S = 0.005
REPORT_CHARACTERS = 256 * 1024  # The most of an attempt's output that one report holds.


class _Pending:
    """Text of one attempt and one stream that is not reported yet."""

    __slots__ = ("at_ns", "is_truncated", "size", "stream", "texts")

    def __init__(self, stream: str, is_truncated: bool) -> None:
        self.stream, self.is_truncated = stream, is_truncated
        self.texts: list[str] = []
        self.size = 0
        self.at_ns = time.time_ns()


class OutputReports:
    """The starts and the output of all leases. `emit` takes reports; other parts of the worker use `report`."""

    def __init__(self, emit: Callable[[worker_pb2.Report], None]) -> None:
        self._emit = emit
        self._pending: dict[str, _Pending] = {}
        self._timer: asyncio.Handle | None = None
        self._flushed_at = 0.0
        self._starts: dict[str, int] = {}  # Unreported starts, in nanoseconds since the epoch.
        self._start_timer: asyncio.TimerHandle | None = None

    @property
    def has_starts(self) -> bool:
        """Whether a start is still to be reported."""
        return bool(self._starts)

    def start(self, lease_id: str) -> None:
        """Report the start of a lease, unless it ends within `START_DELAY_S`."""
        self._starts[lease_id] = time.time_ns()
        if self._start_timer is None:
            self._start_timer = asyncio.get_running_loop().call_later(START_DELAY_S, self._report_starts)

    def end(self, lease_id: str) -> None:
        """Report the output of a lease whose end is reported next."""
        if lease_id in self._pending:
            self._flush(lease_id)
        self._starts.pop(lease_id, None)

    def _report_starts(self) -> None:
        self._start_timer = None
        for lease_id in list(self._starts):
            self._report_start(lease_id)

    def _report_start(self, lease_id: str) -> None:
        """Report the start of a lease, unless that is done."""
        if (started_ns := self._starts.pop(lease_id, None)) is not None:
            report = convert.report(lease_id, started_ns)
            report.started.SetInParent()
            self._emit(report)

    def report(self, report: worker_pb2.Report) -> None:
        """Report anything else about a lease, after its output so far."""
        if report.lease_id in self._pending:
            self._flush(report.lease_id)
        self._report_start(report.lease_id)
        self._emit(report)

    def log(self, lease_id: str, stream: str, text: str, is_truncated: bool) -> None:
        """Take output."""
        found = self._pending.get(lease_id)
        if found is None or found.stream != stream or found.is_truncated or is_truncated:
            if found is not None:
                self._flush(lease_id)
            found = self._pending[lease_id] = _Pending(stream, is_truncated)
        found.texts.append(text)
        found.size += len(text)
        if found.size >= REPORT_CHARACTERS:
            self._flush(lease_id)
        elif self._timer is None:
            loop = asyncio.get_running_loop()
            due_at = self._flushed_at + FLUSH_S
            # The frames that have arrived with this one are taken first.
            is_due = due_at <= loop.time()
            self._timer = loop.call_soon(self._flush_all) if is_due else loop.call_at(due_at, self._flush_all)

    def _flush_all(self) -> None:
        self._timer = None
        self._flushed_at = asyncio.get_running_loop().time()
        for lease_id in list(self._pending):
            self._flush(lease_id)

    def _flush(self, lease_id: str) -> None:
        found = self._pending.pop(lease_id)
        self._report_start(lease_id)
        text = "".join(found.texts)
        for start in range(0, len(text), REPORT_CHARACTERS):
            report = convert.report(lease_id, found.at_ns)
            report.log.stream = convert.log_stream(found.stream)
            report.log.text = text[start : start + REPORT_CHARACTERS]
            report.log.truncated = found.is_truncated
            self._emit(report)
