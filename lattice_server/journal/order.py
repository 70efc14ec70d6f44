"""Owns the check that records come in order. Rule: records out of order are refused before anything is written."""

from collections.abc import Iterable
from typing import assert_never

from lattice_server.engine.recording.journal_records import (
    EventRecorded,
    Record,
    ResultsRead,
    RunAccepted,
    RunDeleted,
    RunEnded,
    TasksDefined,
    WorkflowDeleted,
    WorkflowStored,
)


class Order:
    """The newest event of each run that has not ended, and the newest numbers of runs and workflows."""

    def __init__(self, live: dict[int, int], last_run: int = 0, last_workflow: int = 0) -> None:
        self._live = live
        self.last_run = last_run
        self.last_workflow = last_workflow

    @property
    def live_runs(self) -> int:
        """How many runs have not ended."""
        return len(self._live)

    def check(self, records: Iterable[Record]) -> None:
        """Take records as the next ones, all or none. Raises ValueError."""
        changed: dict[int, int | None] = {}
        last_run, last_workflow = self.last_run, self.last_workflow
        for record in records:
            match record:
                case RunAccepted(run=run):
                    if run <= last_run:
                        raise ValueError(f"run {run} is not above {last_run}")
                    last_run, changed[run] = run, 0
                case EventRecorded(run=run, sequence=sequence):
                    if sequence != self._live_at(run, changed) + 1:
                        raise ValueError(f"event {sequence} of run {run} does not follow the one before")
                    changed[run] = sequence
                case TasksDefined(run=run):
                    self._live_at(run, changed)
                case RunEnded(run=run):
                    self._live_at(run, changed)
                    changed[run] = None
                case ResultsRead(run=run) | RunDeleted(run=run):
                    if self._newest(run, changed) is not None or run > last_run:
                        raise ValueError(f"run {run} has not ended")
                case WorkflowStored(number=number):
                    last_workflow = max(last_workflow, number)
                case WorkflowDeleted():
                    pass
                case _:
                    assert_never(record)
        self.last_run, self.last_workflow = last_run, last_workflow
        for run, newest in changed.items():
            if newest is None:
                self._live.pop(run, None)
            else:
                self._live[run] = newest

    def _newest(self, run: int, changed: dict[int, int | None]) -> int | None:
        return changed[run] if run in changed else self._live.get(run)

    def _live_at(self, run: int, changed: dict[int, int | None]) -> int:
        newest = self._newest(run, changed)
        if newest is None:
            raise ValueError(f"run {run} has ended, or there is none")
        return newest
