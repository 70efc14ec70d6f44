"""The reports that the server has not acknowledged. PURE: no clock, no I/O, no protobuf.

Rule: reports of a session are numbered from 1, and each is kept until its number is acknowledged.
"""

from collections import deque
from typing import Generic, TypeVar

Report = TypeVar("Report")


class ReportQueue(Generic[Report]):
    """The unacknowledged reports of one session, in order."""

    def __init__(self) -> None:
        self._reports: deque[tuple[int, str, Report]] = deque()
        self._last_sequence = 0
        self._marks = (0, 0)  # The last numbers when `overdue` was called before last, and last.

    def add(self, lease_id: str, report: Report) -> int:
        """Add a report about a lease; return its number."""
        self._last_sequence += 1
        self._reports.append((self._last_sequence, lease_id, report))
        return self._last_sequence

    def acknowledge(self, sequence: int) -> list[Report]:
        """Remove the reports up to a number, and return them."""
        done = []
        while self._reports and self._reports[0][0] <= sequence:
            done.append(self._reports.popleft()[2])
        return done

    def leases(self) -> list[str]:
        """Return the leases of the reports, repeated."""
        return [lease_id for _, lease_id, _ in self._reports]

    def items(self) -> list[tuple[str, Report]]:
        """Return all reports, each with its lease."""
        return [(lease_id, report) for _, lease_id, report in self._reports]

    def unacknowledged(self) -> list[Report]:
        """Return all reports, to be sent again on a new stream."""
        return [report for _, _, report in self._reports]

    def overdue(self) -> list[Report]:
        """Return the reports that were here when this was called before last."""
        late = [report for sequence, _, report in self._reports if sequence <= self._marks[0]]
        self._marks = (self._marks[1], self._last_sequence)
        return late
