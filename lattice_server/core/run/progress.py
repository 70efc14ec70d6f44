"""Owns the progress of a run's tasks: which start when they have their inputs, and what their events change."""

from dataclasses import dataclass
from typing import assert_never

from lattice_server.core.messages import (
    CancelRequested,
    TaskAccessedNetwork,
    TaskCancelled,
    TaskEvent,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TaskReturned,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.conditions import PathError
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.endings import Endings
from lattice_server.core.run.growth import Growth
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.reuse import Earlier
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TaskState


@dataclass(slots=True, eq=False)
class Progress:
    """The progress of the tasks of one run, which may retry an `earlier` one."""

    _status: RunStatus
    _table: TaskTable
    _dag: Dag
    _values: Values
    _handover: Handover
    _endings: Endings
    _growth: Growth
    earlier: Earlier | None

    def take(self, event: TaskEvent | TaskReturned, record: TaskRecord, now: float) -> None:
        """Take one event about a task that has not ended."""
        match event:
            case TaskStarted():
                self._table.move(record, TaskState.RUNNING)
                started_at = now if event.at is None else event.at
                record.attempt, record.node_id, record.started_at = event.attempt, event.node_id, started_at
                if record.first_started_at is None:
                    record.first_started_at = started_at
                self._status.emit(event)
            case TaskLogged() | TaskAccessedNetwork():
                self._status.emit(event)
            case TaskRetrying():
                if record.state is TaskState.RUNNING:
                    self._table.move(record, TaskState.QUEUED)
                record.attempt, record.failure = event.attempt, event.failure
                self._status.emit(event)
            case TaskSucceeded():
                refusal = record.cancelled
                if refusal is not None and refusal.kind is not FailureKind.CANCELLED:
                    self._refuse_success(event, record, refusal, now)
                    return
                record.outputs, record.split, record.failure = event.outputs, event.split or None, None
                record.duration_s = event.duration_s
                self._endings.end(record, TaskState.SUCCEEDED, event, now, event.at)
                self._endings.satisfy_successors(event.task_id)
            case TaskFailed():
                record.attempt, record.failure = event.attempt, event.failure
                self._endings.end(record, TaskState.FAILED, event, now, event.at)
                self._endings.fail_after(event.task_id, event.failure, now)
            case TaskCancelled():
                self._end_cancelled(event, record, now)
            case TaskSkipped():
                record.failure = event.failure
                self._endings.end(record, TaskState.SKIPPED, event, now)
            case TaskReturned():
                record.is_promised = False
                if record.cancelled is not None:
                    cancelled = TaskCancelled(self._status.run_id, event.task_id, 0, record.cancelled)
                    self._end_cancelled(cancelled, record, now)
                elif record.state is TaskState.QUEUED:
                    self._handover.send(record, now)
            case _:
                assert_never(event)

    def _end_cancelled(self, event: TaskCancelled, record: TaskRecord, now: float) -> None:
        record.failure = event.failure
        self._endings.end(record, TaskState.CANCELLED, event, now)
        if self._status.is_running:
            self._endings.fail_after(event.task_id, event.failure, now)

    def _refuse_success(self, event: TaskSucceeded, record: TaskRecord, refusal: Failure, now: float) -> None:
        """Fail a task that succeeded before the scheduler received the request to stop it."""
        # The scheduler has queued its followers.
        promised = [t for t in self._dag.descendants(event.task_id) if self._table.records[t].is_promised]
        record.failure = refusal
        failed = TaskFailed(self._status.run_id, event.task_id, event.attempt, refusal)
        self._endings.end(record, TaskState.FAILED, failed, now)
        self._endings.fail_after(event.task_id, refusal, now)
        if promised and self._status.is_running:
            stopped = Failure(FailureKind.CANCELLED, refusal.message)
            self._status.emit(CancelRequested(self._status.run_id, tuple(promised), stopped))

    def begin(self, task_id: str, record: TaskRecord, now: float) -> None:
        """Start a task that has its inputs: evaluate its condition, expand its map, reuse its outputs, or send it."""
        if record.spec.condition is not None and not self._is_condition_met(record, now):
            return
        # A task that was sent early has been checked.
        if not record.is_promised and (refusal := self._values.untrusted(record.spec)) is not None:
            self._endings.fail_unstarted(record, refusal, now)
            return
        if record.spec.over:
            self._growth.expand(task_id, record, now)
            return
        if self.earlier is not None and self._growth.reuse(task_id, record, self.earlier, now):
            return
        self._table.move(record, TaskState.QUEUED)
        record.queued_at = now
        if not record.is_promised:
            self._handover.send(record, now)
            self._handover.promise_after(task_id)

    def _is_condition_met(self, record: TaskRecord, now: float) -> bool:
        """Whether a task is to run; otherwise it is skipped or, if its condition cannot be evaluated, fails."""
        condition = record.spec.condition
        assert condition is not None
        source = f"its condition, output {condition.output.task_id}.{condition.output.output}"
        try:
            is_met = self._values.is_met(condition)
        except PathError as error:
            failure = Failure(FailureKind.PAYLOAD, f"{source}, cannot be evaluated: {error}")
            self._endings.fail_unstarted(record, failure, now)
            return False
        if is_met is None:
            text = f"{source}, is not JSON, so that only a task can read it"
            self._endings.fail_unstarted(record, Failure(FailureKind.PAYLOAD, text), now)
        elif not is_met:
            self._endings.skip(record, None, now)
            self._endings.skip_dependents(record.spec.task_id, None, now)
        return is_met is True
