"""Counts the processes of workers by what their heartbeats say, on the main thread."""

from collections.abc import Sequence

from lattice_server.telemetry import catalogue
from lattice_server.telemetry.meters import Counter, Histogram, Reading


class WorkerMeter:
    """An observer of heartbeats."""

    def __init__(self) -> None:
        self._starts, self._waits = Counter(catalogue.RUNNER_STARTS), Counter(catalogue.RUNNER_WAITS)
        self._start_duration = Histogram(catalogue.RUNNER_START)

    def note_runners(self, isolation: str, started: int, waited: int, start_s: Sequence[float]) -> None:
        """Count the processes of one level of isolation since the last heartbeat; see `OnRunners`."""
        if started:
            self._starts.add(isolation, by=started)
        if waited:
            self._waits.add(isolation, by=waited)
        for seconds in start_s:
            self._start_duration.record(seconds, isolation)

    def read(self) -> list[Reading]:
        """Return all numbers."""
        return [self._starts.read(), self._waits.read(), self._start_duration.read()]
