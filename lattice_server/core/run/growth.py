"""Owns how tasks are added to a run that has started: by callers, by running tasks, as items of mapped tasks.

Rule: an added task gets the state that it would have if it had been in the run from the start.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from lattice_server.core.errors import LatticeError, PreconditionError
from lattice_server.core.messages import TasksAdded, TaskSucceeded
from lattice_server.core.model import Failure, FailureKind, TaskSpec
from lattice_server.core.run.additions import Addition, adding
from lattice_server.core.run.bindings import Values
from lattice_server.core.run.dag import Dag
from lattice_server.core.run.endings import Endings
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.limits import Bounds, items_of, refuse_late_maps
from lattice_server.core.run.reuse import Earlier
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TASK_TERMINAL, TaskState
from lattice_server.core.steps import Steps, finish
from lattice_server.core.tenancy import id_of


@dataclass(slots=True, eq=False)
class Growth:
    """The growth of one run; `revision` counts how often tasks were added."""

    _status: RunStatus
    _table: TaskTable
    _dag: Dag
    _values: Values
    _handover: Handover
    _endings: Endings
    _bounds: Bounds
    revision: int = 1

    def checking(self, added: Sequence[TaskSpec], parent: str = "", depth: int = 0) -> Steps[Addition]:
        """Check tasks that a caller, or the running task `parent`, wants to add, in steps. Raises as `Run.append`."""
        self._refuse(len(added), depth)
        return (yield from adding(self._dag, added, self._values.parameters.keys(), parent, depth))

    def add(self, addition: Addition, parent: str = "") -> None:
        """Add tasks that were checked at the revision that the run still has. Raises as `Run.append`."""
        self._refuse(len(addition.records), 0)
        records = self._table.records
        refuse_late_maps(addition.mapped, records, self._dag.split)
        addition.extension.apply(self._dag)
        self._table.extend(addition.records)
        for source, targets in addition.extension.behind.items():
            if records[source].state in TASK_TERMINAL:
                for target in targets:
                    records[target].missing -= self._is_satisfied(source, target)
        self._publish(tuple(addition.records), parent)
        self._handover.added += addition.arrivals

    def expand(self, task_id: str, record: TaskRecord, now: float) -> None:
        """Add one task for each item of the list that a task is mapped over."""
        payloads = self._values.mapped_over(record.spec)
        if payloads is None:
            text = "the list it is mapped over came without its items"
            self._endings.fail_unstarted(record, Failure(FailureKind.PAYLOAD, text), now)
            return
        if excess := self._bounds.excess(len(payloads), len(self._table.records)):
            self._endings.fail_unstarted(record, Failure(FailureKind.RESOURCES, excess), now)
            return
        record.items = []
        record.started_at = now
        for spec in items_of(record.spec, payloads):
            self._dag.add_item(spec)
            self._table.add(TaskRecord(spec, missing=0, item_of=task_id, depth=record.depth))
            record.items.append(spec.task_id)
        record.open_items = len(record.items)
        self._table.move(record, TaskState.RUNNING)
        self._publish(tuple(record.items), task_id)
        self._handover.ready.extendleft(reversed(record.items))
        if not record.items:
            self._endings.end_mapped(task_id, record, now)

    def reuse(self, task_id: str, record: TaskRecord, earlier: Earlier, now: float) -> bool:
        """Have a task succeed with its outputs of the run that this one retries; return whether that is possible."""
        found = earlier.success_of(record.spec)
        sources = self._dag.predecessors[record.item_of or task_id]
        if found is None or not all(self._is_reused(source, earlier) for source in sources):
            return False
        if spawned := earlier.spawned_by(task_id):
            try:
                self.add(finish(self.checking(spawned, task_id, record.depth + 1)), task_id)
            except LatticeError:
                return False  # It runs, and adds them again.
        record.outputs, record.split, record.duration_s = found.outputs, found.split, found.duration_s
        record.is_reused = True
        fact = TaskSucceeded(
            self._status.run_id, task_id, 0, found.outputs or {}, found.split or {}, found.duration_s or 0.0
        )
        self._endings.end(record, TaskState.SUCCEEDED, fact, now)
        self._endings.satisfy_successors(task_id)
        return True

    def is_spawn_of(self, parent: str, task_id: str) -> bool:
        """Whether a task was added by another one."""
        record = self._table.records.get(task_id)
        return record is not None and record.spawned_by == parent

    def _refuse(self, count: int, depth: int) -> None:
        if not self._status.is_running:
            text = f"run {id_of(self._status.run_id)!r} is {self._status.state.value}; nothing can be added to it"
            raise PreconditionError("RUN_ENDED", text)
        self._bounds.refuse(len(self._table.records) + count, depth)

    def _publish(self, task_ids: tuple[str, ...], parent: str) -> None:
        self.revision += 1
        self._status.emit(TasksAdded(task_ids, parent, self.revision))

    def _is_satisfied(self, source: str, task_id: str) -> bool:
        """Whether a task need not wait for another one, which may be one that is only being added."""
        record = self._table.records.get(source)
        if record is None or record.state not in TASK_TERMINAL:
            return False
        return record.state is TaskState.SUCCEEDED or (source, task_id) in self._dag.optional

    def catch_up(self, task_id: str, now: float) -> None:
        """Skip an added task if one that it needs has ended without success; send it if it has its inputs."""
        record = self._table.records[task_id]
        for source in self._dag.predecessors[task_id]:
            other = self._table.records[source]
            is_lost = other.state in TASK_TERMINAL and not self._is_satisfied(source, task_id)
            if is_lost and record.state is TaskState.BLOCKED:
                failure = other.failure
                cause = None if failure is None else replace(failure, task_id=failure.task_id or source)
                self._endings.skip(record, cause, now)
                self._endings.skip_dependents(task_id, cause, now)
        self._endings.advance(task_id, record)

    def _is_reused(self, task_id: str, earlier: Earlier) -> bool:
        record = self._table.records[task_id]
        if record.items is not None:
            return all(self._table.records[item].is_reused for item in record.items)
        return record.is_reused or (record.state is TaskState.SKIPPED and earlier.was_skipped(task_id))
