"""Counts runners for the metrics of the server, by level of isolation."""

from collections import Counter
from collections.abc import Iterable

from lattice.v1 import worker_pb2

from lattice_worker.preparation import ISOLATIONS
from lattice_worker.runner_handle import Runner

LEVELS = {level: number for number, level in ISOLATIONS.items()}


def runner_counts(runners: Iterable[Runner], started: Counter[str]) -> list[worker_pb2.RunnerCount]:
    """Return a count for each level that has runners; `started` are those since the last heartbeat, and is cleared."""
    busy: Counter[str] = Counter()
    idle: Counter[str] = Counter()
    for runner in runners:
        level = "" if runner.sandbox is None else runner.sandbox.policy.level
        (busy if runner.running or runner.pipeline else idle)[level] += 1
    counts = [
        worker_pb2.RunnerCount(isolation=LEVELS[level], busy=busy[level], idle=idle[level], started=started[level])
        for level in LEVELS
        if busy[level] or idle[level] or started[level]
    ]
    started.clear()
    return counts
