"""Owns how a run gets back the state that its recorded facts tell, after a restart of the server.

Rule: facts are applied and not decided again, because another version of the server may have published them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lattice_server.core.messages import (
    NO_HISTORY,
    AttemptHistory,
    EarlierLease,
    Fact,
    RunCancelling,
    RunFinished,
    RunStarted,
    SignalAwaited,
    SignalReceived,
    SignalTaken,
    TaskAccessedNetwork,
    TaskCancelled,
    TaskFailed,
    TaskLogged,
    TaskRetrying,
    TasksAdded,
    TaskSkipped,
    TaskStarted,
    TaskSucceeded,
)
from lattice_server.core.model import Failure, FailureKind, FailurePolicy, TaskSpec
from lattice_server.core.run.additions import adding
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.endings import Endings, failure_of_run
from lattice_server.core.run.growth import Growth
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.limits import items_of
from lattice_server.core.run.signals import Signals
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TASK_TERMINAL, RunState, TaskState
from lattice_server.core.steps import finish

RESTARTED = Failure(FailureKind.WORKER_LOST, "the server was restarted while the attempt ran")
ENDED_AS = {
    TaskSucceeded: TaskState.SUCCEEDED,
    TaskFailed: TaskState.FAILED,
    TaskCancelled: TaskState.CANCELLED,
    TaskSkipped: TaskState.SKIPPED,
}


class RestorationError(Exception):
    """The recorded facts of a run do not fit together."""


@dataclass(slots=True, eq=False)
class _Attempts:
    """The attempts at one task: the number of the newest, its lease, and how many failed."""

    newest: int = 0
    failures: int = 0
    lease: EarlierLease | None = None


@dataclass(slots=True, eq=False)
class Restoration:
    """The restoration of one run that was made from its definition and has not started.

    `apply` takes its facts in order, then `resume` continues the run. Times are monotonic seconds. No transition of a
    state is checked: the steps before one may have had no fact.
    """

    _status: RunStatus
    _table: TaskTable
    _dag: Dag
    _values: Values
    _handover: Handover
    _endings: Endings
    _growth: Growth
    _signals: Signals
    _policy: FailurePolicy
    _attempts: dict[str, _Attempts] = field(default_factory=dict)

    def apply(
        self,
        fact: Fact,
        at: float,
        *,
        added: Sequence[TaskSpec] = (),
        queued_s: float | None = None,
        is_called: bool = False,
    ) -> None:
        """Apply one fact.

        Args:
            fact: the fact.
            at: when it was recorded.
            added: the definitions of the tasks that it added, unless they are items of a mapped task.
            is_called: whether a task called the tasks that it added.
            queued_s: how long its task was queued before the first attempt, if the fact tells it.

        Raises:
            RestorationError, LatticeError: it does not fit the facts before it.
        """
        match fact:
            case RunStarted():
                self._status.started_at = at
            case RunCancelling():
                self._status.failure, self._status.is_open = fact.failure, False
                self._become(RunState.CANCELLING)
            case RunFinished():
                self._status.failure, self._status.is_open = fact.failure, False
                self._become(fact.state)
            case TasksAdded():
                self._add(fact, at, added, is_called=is_called)
            case TaskStarted():
                self._start(self._record(fact.task_id), fact, at)
            case TaskRetrying():
                self._retry(self._record(fact.task_id), fact)
            case SignalReceived() | SignalAwaited() | SignalTaken():
                self._signals.apply(fact)
            case TaskLogged() | TaskAccessedNetwork():
                pass
            case _:
                self._end(self._record(fact.task_id), fact, at, queued_s)

    def resume(self, now: float) -> None:
        """Send the tasks that can continue to the scheduler, and end the tasks that the run was to stop.

        The scheduler knows by the lease of an attempt whether it still runs. An attempt without one is over, and its
        task is queued again, which is no retry of its policy.
        """
        status = self._status
        if status.is_terminal:
            return
        for task_id, record in list(self._table.records.items()):
            if record.state in TASK_TERMINAL or record.items is not None:
                continue
            if not status.is_running and record.state is not TaskState.BLOCKED:
                failure = Failure(FailureKind.CANCELLED, "the run stopped, and the server was restarted")
                record.failure = failure
                cancelled = TaskCancelled(status.run_id, task_id, record.attempt, failure)
                self._endings.end(record, TaskState.CANCELLED, cancelled, now)
            elif record.state is TaskState.RUNNING and self._lease(task_id) is None:
                self._table.move(record, TaskState.QUEUED)
                record.failure = RESTARTED
                status.emit(TaskRetrying(status.run_id, task_id, record.attempt, RESTARTED, 0.0))
        self._count_missing()
        if status.is_running:
            self._send(now)
        elif status.failure is not None:
            self._handover.stop(self._table.records, status.failure)

    def _send(self, now: float) -> None:
        handover = self._handover
        for task_id, record in self._table.records.items():
            if record.state is TaskState.QUEUED:
                record.queued_at = now if record.queued_at is None else record.queued_at
                handover.send(record, now, history=self._history(task_id))
            elif record.state is TaskState.RUNNING and record.items is None:
                handover.send(record, now, history=self._history(task_id), earlier=self._lease(task_id))
            elif record.state is TaskState.BLOCKED:
                # The predecessors of each are looked at, as for tasks that are added to a run.
                handover.added.append(task_id)

    def _count_missing(self) -> None:
        """Count again for which predecessors each blocked task waits."""
        records, optional = self._table.records, self._dag.optional
        for task_id, record in records.items():
            if record.state is TaskState.BLOCKED:
                record.missing = sum(
                    not (
                        records[source].state is TaskState.SUCCEEDED
                        or (records[source].state in TASK_TERMINAL and (source, task_id) in optional)
                    )
                    for source in self._dag.predecessors[task_id]
                )
            elif not record.item_of:
                record.missing = 0

    def _history(self, task_id: str) -> AttemptHistory:
        found = self._attempts.get(task_id)
        return NO_HISTORY if found is None else AttemptHistory(found.newest, found.failures)

    def _lease(self, task_id: str) -> EarlierLease | None:
        found = self._attempts.get(task_id)
        return None if found is None else found.lease

    def _record(self, task_id: str) -> TaskRecord:
        record = self._table.records.get(task_id)
        if record is None:
            raise RestorationError(f"an event names task {task_id!r}, which the run does not have")
        return record

    def _start(self, record: TaskRecord, fact: TaskStarted, at: float) -> None:
        self._table.place(record, TaskState.RUNNING)
        record.attempt, record.node_id, record.started_at = fact.attempt, fact.node_id, at
        if record.first_started_at is None:
            record.first_started_at = at
        attempts = self._attempts.setdefault(fact.task_id, _Attempts())
        attempts.newest = fact.attempt
        where = (fact.node_id, fact.gpu_indices)
        attempts.lease = EarlierLease(fact.lease_id, fact.item, *where, at) if fact.lease_id else None

    def _retry(self, record: TaskRecord, fact: TaskRetrying) -> None:
        self._table.place(record, TaskState.QUEUED)
        record.attempt, record.failure = fact.attempt, fact.failure
        attempts = self._attempts.setdefault(fact.task_id, _Attempts())
        attempts.newest = max(attempts.newest, fact.attempt)
        if fact.failure.kind is not FailureKind.WORKER_LOST:
            # Some of them were not charged to the task, so the next attempt is always allowed.
            attempts.failures = min(attempts.failures + 1, record.spec.retry.max_attempts - 1)

    def _end(
        self,
        record: TaskRecord,
        fact: TaskSucceeded | TaskFailed | TaskCancelled | TaskSkipped,
        at: float,
        queued_s: float | None,
    ) -> None:
        self._table.place(record, ENDED_AS[type(fact)])
        record.ended_at = at
        if queued_s is not None and record.first_started_at is not None:
            record.queued_at = record.first_started_at - queued_s
        if isinstance(fact, TaskSucceeded):
            if record.items is None:
                record.outputs, record.split, record.duration_s = fact.outputs, fact.split or None, fact.duration_s
                record.is_reused = fact.attempt == 0
            record.failure = None
        else:
            record.failure = fact.failure
        if not isinstance(fact, TaskSkipped | TaskSucceeded):
            record.attempt = fact.attempt
            is_own = self._policy is FailurePolicy.FINISH_INDEPENDENT and not record.is_called
            if is_own and self._status.failure is None:
                self._status.failure = failure_of_run(fact.task_id, fact.failure)
        if record.item_of:
            self._endings.note_item(record)

    def _add(self, fact: TasksAdded, at: float, added: Sequence[TaskSpec], *, is_called: bool) -> None:
        parent = self._table.records.get(fact.parent_task_id)
        if parent is not None and parent.spec.over:
            self._expand(parent, fact, at)
        else:
            depth = 0 if parent is None else parent.depth + 1
            addition = finish(adding(self._dag, added, self._values.parameters.keys(), fact.parent_task_id, depth))
            if tuple(addition.records) != fact.task_ids:
                raise RestorationError("the definitions of added tasks do not match the task ids of their event")
            addition.extension.apply(self._dag)
            self._table.extend(addition.records)
            if parent is not None and is_called:
                for record in addition.records.values():
                    record.is_called = True
                parent.calls += fact.task_ids
        self._growth.revision = fact.revision

    def _expand(self, record: TaskRecord, fact: TasksAdded, at: float) -> None:
        payloads = self._values.mapped_over(record.spec)
        if payloads is None or len(payloads) != len(fact.task_ids):
            raise RestorationError(f"the list of the mapped task {record.spec.task_id!r} is not the recorded one")
        record.items, record.started_at = [], at
        for spec in items_of(record.spec, payloads):
            self._dag.add_item(spec)
            self._table.add(TaskRecord(spec, missing=0, item_of=record.spec.task_id, depth=record.depth))
            record.items.append(spec.task_id)
        record.open_items = len(record.items)
        self._table.place(record, TaskState.RUNNING)

    def _become(self, state: RunState) -> None:
        self._status.state = state
