"""Counts the passes of the scheduler, on its thread; the main thread reads the numbers."""

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Histogram, Reading


class SchedulerMeter:
    """An observer of the scheduler's thread."""

    def __init__(self) -> None:
        self._duration = Histogram(catalogue.PASS_DURATION)
        self._events = 0

    def note_pass(self, events: int, duration_s: float) -> None:
        """Count a pass that took some events."""
        self._duration.record(duration_s)
        self._events += events

    def read(self) -> list[Reading]:
        """Return all numbers."""
        return [self._duration.read(), Reading(catalogue.SCHEDULER_EVENTS, {(): self._events})]
