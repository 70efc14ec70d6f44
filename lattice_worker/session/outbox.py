"""The messages to the server: reports, heartbeats and requests that are due, and when they are sent.

Rule: one message has all reports that are due; it is delayed only while more reports are sure to follow.
"""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator

from lattice.v1 import worker_pb2

from lattice_worker import convert
from lattice_worker.session.lease_machine import LeaseMachine
from lattice_worker.session.limits import Limits

CHUNK_BYTES = 1024 * 1024
PART_BYTES = 2 * CHUNK_BYTES
COALESCE_S = 0.001

Leases = LeaseMachine[worker_pb2.Assignment, worker_pb2.Report, convert.Outputs]


class Outbox:
    """The outgoing messages of one worker. `open` begins a stream; nothing is sent on it before `resume`.

    `last_answer` returns the number of the last answer to a question that has arrived, `runners` the counts of runners
    for a heartbeat.
    """

    def __init__(
        self,
        leases: Leases,
        limits: Limits,
        last_answer: Callable[[], int] = lambda: 0,
        runners: Callable[[], Iterable[worker_pb2.RunnerCount]] = tuple,
    ) -> None:
        self._limits = limits
        self._leases = leases
        self._last_answer = last_answer
        self._runners = runners
        self._pending: list[worker_pb2.Report] = []
        self._unknown: list[str] = []
        self._is_beat_due = False
        self._draining: worker_pb2.Draining | None = None
        self._has_said_draining = False
        self._is_welcome = False
        self._wake = asyncio.Event()

    def open(self, hello: worker_pb2.Hello) -> AsyncIterator[worker_pb2.ConnectRequest]:
        """Return the messages of a new stream; those of the stream before end."""
        self.close()
        self._has_said_draining = False
        return self._requests(hello, self._wake)

    def close(self) -> None:
        """End the messages of the stream: gRPC waits for the next one also when the stream has broken."""
        self._is_welcome = False
        wake, self._wake = self._wake, asyncio.Event()
        wake.set()

    def resume(self, reports: list[worker_pb2.Report]) -> None:
        """Begin to send: the server has welcomed the worker, and may not have these reports."""
        self._pending, self._unknown = reports, []
        self._is_welcome = True
        self._wake.set()

    def report(self, report: worker_pb2.Report) -> None:
        """Send a report."""
        self._pending.append(report)
        self._wake.set()

    def ask(self, digests: Iterable[str]) -> None:
        """Ask for functions that leases name and this worker does not have."""
        self._unknown += digests
        self._wake.set()

    def beat(self) -> None:
        """Send a heartbeat."""
        self._is_beat_due = True
        self._wake.set()

    def drain(self, draining: worker_pb2.Draining) -> None:
        """Ask the server to drain the worker, on this stream and on every later one."""
        self._draining = draining
        self._wake.set()

    async def _requests(self, hello: worker_pb2.Hello, wake: asyncio.Event) -> AsyncIterator[worker_pb2.ConnectRequest]:
        yield worker_pb2.ConnectRequest(hello=hello)
        loop = asyncio.get_running_loop()
        sent_at = -math.inf
        while True:
            await wake.wait()
            wake.clear()
            if wake is not self._wake:
                return
            if not self._is_welcome:
                continue
            if self._leases.slots.has_waiting and (wait_s := sent_at + COALESCE_S - loop.time()) > 0:
                # A message costs both sides more than the reports in it. The leases that wait behind others will be
                # reported in quick succession, and the server has no use for their slots before they are through.
                await asyncio.sleep(wait_s)
                if wake is not self._wake:
                    return
            sent_at = loop.time()
            for request in self._due():
                yield request

    def _due(self) -> list[worker_pb2.ConnectRequest]:
        """Return the messages that carry all that is due: one, unless its reports would make it too large."""
        reports, self._pending = self._pending, []
        heartbeat: worker_pb2.Heartbeat | None = None
        if self._is_beat_due:
            self._is_beat_due = False
            reports = self._leases.reports.overdue() + reports
            heartbeat = worker_pb2.Heartbeat(
                held_lease_ids=self._leases.held(),
                assignment_sequence=self._leases.received,
                send_time=convert.timestamp(time.time_ns()),
                runners=self._runners(),
            )
        is_draining = self._draining is not None and not self._has_said_draining
        unknown, self._unknown = self._unknown, []
        if not (reports or heartbeat or unknown or is_draining):
            return []
        requests = [worker_pb2.ConnectRequest(reports=part) for part in self._in_parts(reports)]
        if heartbeat is not None:
            requests[-1].heartbeat.CopyFrom(heartbeat)
        requests[-1].unknown_digests.extend(unknown)
        requests[-1].acknowledged_answer = self._last_answer()
        if self._draining is not None and is_draining:
            self._has_said_draining = True
            requests[-1].draining.CopyFrom(self._draining)
        return requests

    def _in_parts(self, reports: list[worker_pb2.Report]) -> Iterator[list[worker_pb2.Report]]:
        """Yield reports in lists that are well below the limit of a message."""
        # The envelope of each report is not counted.
        part_bytes = min(PART_BYTES, self._limits.message_bytes * 3 // 4)
        start, size = 0, 0
        for end, report in enumerate(reports if len(reports) > 1 else ()):
            own = report.ByteSize()
            if size + own > part_bytes and end > start:
                yield reports[start:end]
                start, size = end, 0
            size += own
        yield reports[start:]
