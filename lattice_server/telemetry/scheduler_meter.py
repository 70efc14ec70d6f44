"""Counts the passes of the scheduler, on its thread.

The main thread copies the numbers while the scheduler's thread may change them. A copy of a list or a dict is one step
of the interpreter, so at worst the sum of a histogram has one value more than its buckets.
"""

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Reading


class SchedulerMeter:
    """An observer of the scheduler's thread."""

    def __init__(self) -> None:
        self._duration = Histogram(catalogue.PASS_DURATION)
        self._events = Counter(catalogue.SCHEDULER_EVENTS)

    def note_pass(self, events: int, duration_s: float) -> None:
        """Count a pass that took some events."""
        self._duration.record(duration_s)
        self._events.add(by=events)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        return [self._duration.read(), self._events.read()]
