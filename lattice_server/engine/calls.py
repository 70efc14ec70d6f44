"""Owns which leases wait for which called tasks of a run. Rule: a wait ends once, by the end of the called task."""

from lattice_server.core.messages import CallEnded, CallOutputs, CallResult, RunFinished, TaskAwaits
from lattice_server.core.model import Failure, FailureKind
from lattice_server.core.run.status import Effect
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL, TaskState
from lattice_server.engine.run_entry import RunEntry
from lattice_server.engine.run_log import ENDS

NOT_CALLED = "this task did not call {!r}"


def begin(entry: RunEntry, event: TaskAwaits) -> list[CallEnded]:
    """Take a wait; return its end if the called task has ended, or cannot be waited for."""
    record = entry.run.tasks.get(event.called_id)
    if record is None or not record.is_called or record.spawned_by != event.task_id:
        return [CallEnded(event.lease_id, event.number, NOT_CALLED.format(event.called_id))]
    if record.state in TASK_TERMINAL:
        return [CallEnded(event.lease_id, event.number, _result_of(record))]
    entry.calls.setdefault(event.called_id, []).append((event.lease_id, event.number))
    return []


def ended(entry: RunEntry, fact: Effect) -> list[CallEnded]:
    """Return the ends of the waits for a task that has ended."""
    if isinstance(fact, RunFinished):
        entry.calls.clear()
    if not isinstance(fact, ENDS) or (waiting := entry.calls.pop(fact.task_id, None)) is None:
        return []
    result = _result_of(entry.run.tasks[fact.task_id])
    return [CallEnded(lease_id, number, result) for lease_id, number in waiting]


def _result_of(record: TaskRecord) -> CallResult:
    if record.state is TaskState.SUCCEEDED:
        return CallOutputs(record.outputs or {})
    if record.failure is not None:
        return record.failure
    return Failure(FailureKind.UPSTREAM, f"the called task was {record.state.value}")
