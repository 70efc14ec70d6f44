"""Owns the ends of a run's tasks: which tasks become ready by them, and which are skipped or stopped.

Rule: every task ends by `end`, which publishes how.
"""

from dataclasses import dataclass, replace

from lattice_server.core.messages import (
    CancelRequested,
    Fact,
    RunCancelling,
    TaskCancelled,
    TaskFailed,
    TaskSkipped,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind, FailurePolicy
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TASK_TERMINAL, RunState, TaskState


@dataclass(slots=True, eq=False)
class Endings:
    """The ends of the tasks of one run, and their consequences for the other tasks."""

    _status: RunStatus
    _table: TaskTable
    _dag: Dag
    _handover: Handover
    _policy: FailurePolicy

    def end(self, record: TaskRecord, state: TaskState, fact: Fact, now: float, ended_at: float | None = None) -> None:
        """End a task, and with its last item the mapped task it belongs to."""
        self._table.move(record, state)
        record.ended_at = now if ended_at is None else ended_at
        self._status.emit(fact)
        if record.item_of:
            mapped = self.note_item(record)
            if mapped.open_items == 0:
                self.end_mapped(record.item_of, mapped, now)

    def note_item(self, record: TaskRecord) -> TaskRecord:
        """Note that an item has ended; return its mapped task, which has the failure of its first failed item."""
        mapped = self._table.records[record.item_of]
        mapped.open_items -= 1
        if mapped.failure is None and record.failure is not None:
            mapped.failure = replace(record.failure, task_id=record.spec.task_id)
        return mapped

    def end_mapped(self, task_id: str, record: TaskRecord, now: float) -> None:
        """End a mapped task whose items have ended."""
        named = (self._status.run_id, task_id, 0)
        if record.failure is None:
            self.end(record, TaskState.SUCCEEDED, TaskSucceeded(*named, {}), now)
            self.satisfy_successors(task_id)
        elif record.failure.kind is FailureKind.CANCELLED:
            self.end(record, TaskState.CANCELLED, TaskCancelled(*named, record.failure), now)
        else:
            self.end(record, TaskState.FAILED, TaskFailed(*named, record.failure), now)
        if record.failure is not None and self._status.is_running:
            self.fail_after(task_id, record.failure, now)

    def fail_unstarted(self, record: TaskRecord, failure: Failure, now: float) -> None:
        """Fail a task that the scheduler does not have."""
        task_id = record.spec.task_id
        record.failure = failure
        self.end(record, TaskState.FAILED, TaskFailed(self._status.run_id, task_id, 0, failure), now)
        self.fail_after(task_id, failure, now)

    def fail_after(self, task_id: str, failure: Failure, now: float) -> None:
        """Apply the failure policy of the workflow after a task failed or was cancelled."""
        named = failure_of_run(task_id, failure)
        if self._table.records[task_id].is_called:
            # The task that called it has the failure, and decides.
            self.skip_dependents(task_id, named, now)
        elif self._policy is FailurePolicy.FINISH_INDEPENDENT:
            self._status.failure = self._status.failure or named
            self.skip_dependents(task_id, named, now)
        elif self._status.is_running:
            self.stop(named)

    def skip_dependents(self, task_id: str, failure: Failure | None, now: float) -> None:
        """Skip the tasks that need an output of a task that has none; those for which it is optional may start."""
        frontier = [task_id]
        while frontier:
            source = frontier.pop()
            for successor in self._dag.successors[source]:
                record = self._table.records[successor]
                if (source, successor) in self._dag.optional:
                    self._satisfy(successor)
                elif record.state is TaskState.BLOCKED:
                    self.skip(record, failure, now)
                    frontier.append(successor)

    def skip(self, record: TaskRecord, cause: Failure | None, now: float) -> None:
        """Skip a task. Without a cause, a condition was not met."""
        failure = None
        if cause is not None:
            what = f"task {cause.task_id!r} did not succeed" if cause.task_id else "the run was stopped"
            failure = Failure(FailureKind.UPSTREAM, what, task_id=cause.task_id)
        record.failure = failure
        skipped = TaskSkipped(self._status.run_id, record.spec.task_id, failure)
        self.end(record, TaskState.SKIPPED, skipped, now)

    def satisfy_successors(self, task_id: str) -> None:
        """Note that a task has ended, and its successors wait for one task less."""
        for successor in self._dag.successors[task_id]:
            self._satisfy(successor)

    def advance(self, task_id: str, record: TaskRecord) -> None:
        """Send a task that has its inputs; send one early that waits for a single task that the scheduler has."""
        if record.state is not TaskState.BLOCKED or not self._status.is_running:
            return
        if record.missing == 0:
            self._handover.ready.append(task_id)
        elif record.missing == 1 and not record.is_promised:
            records = self._table.records
            sources = self._dag.predecessors[task_id]
            last = next((source for source in sources if records[source].state not in TASK_TERMINAL), None)
            if last is not None and records[last].is_with_scheduler:
                self._handover.promise_after(last)

    def stop(self, failure: Failure) -> None:
        """Stop the run: no further task starts, and the tasks that the scheduler has are cancelled."""
        status = self._status
        status.failure = status.failure or failure
        status.is_open = False
        status.become(RunState.CANCELLING)
        if self._table.open_tasks:
            status.emit(RunCancelling(status.failure))
        self._handover.stop(self._table.records, failure)

    def stop_some(self, now: float) -> None:
        """Skip some of the tasks of a stopped run, or have the scheduler cancel them."""
        held, cause = [], self._handover.cause
        assert cause is not None
        stopped = Failure(FailureKind.CANCELLED, f"the run stopped: {cause.message}", cause=cause)
        for task_id in self._handover.next_stopping():
            record = self._table.records[task_id]
            if record.is_with_scheduler:
                record.cancelled = stopped
                held.append(task_id)
            if record.state is TaskState.BLOCKED:
                self.skip(record, cause, now)
        if held:
            self._status.emit(CancelRequested(self._status.run_id, tuple(held), stopped))

    def _satisfy(self, task_id: str) -> None:
        record = self._table.records[task_id]
        record.missing -= 1
        self.advance(task_id, record)


def failure_of_run(task_id: str, failure: Failure) -> Failure:
    """Return the failure of a task as that of its run."""
    return replace(failure, task_id=failure.task_id or task_id, cause=None)
