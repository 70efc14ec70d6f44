"""Counts runners for the metrics of the server, by level of isolation."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from functools import partial

from google.protobuf.duration_pb2 import Duration
from lattice.v1 import worker_pb2

from lattice_worker.convert import ISOLATIONS
from lattice_worker.pool.runner_handle import Runner

LEVELS = {level: number for number, level in ISOLATIONS.items()}
MAX_DURATIONS = 1000  # Of one heartbeat.


class RunnerCounts:
    """Counts since the last heartbeat; a level is the name of a sandbox, or "" for none.

    Attributes:
        started: processes that were started.
        waited: attempts for which no process waited.
    """

    def __init__(self) -> None:
        self.started: Counter[str] = Counter()
        self.waited: Counter[str] = Counter()
        self._durations: defaultdict[str, deque[Duration]] = defaultdict(partial(deque, maxlen=MAX_DURATIONS))

    def note_ready(self, level: str, seconds: float) -> None:
        """Count a process that became ready `seconds` after its start began."""
        self._durations[level].append(Duration(seconds=int(seconds), nanos=int(seconds % 1 * 1e9)))

    def take(self, runners: Iterable[Runner]) -> list[worker_pb2.RunnerCount]:
        """Return a count for each level that has runners, or had some, and begin anew."""
        busy: Counter[str] = Counter()
        idle: Counter[str] = Counter()
        for runner in runners:
            (busy if runner.running or runner.pipeline else idle)[_level_of(runner)] += 1
        counts = [
            worker_pb2.RunnerCount(
                isolation=LEVELS[level],
                busy=busy[level],
                idle=idle[level],
                started=self.started[level],
                waited=self.waited[level],
                start_durations=self._durations[level],
            )
            for level in LEVELS
            if any(counted[level] for counted in (busy, idle, self.started, self.waited, self._durations))
        ]
        for counted in (self.started, self.waited, self._durations):
            counted.clear()
        return counts


def _level_of(runner: Runner) -> str:
    return "" if runner.sandbox is None else runner.sandbox.policy.level
