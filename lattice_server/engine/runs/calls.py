"""Owns which leases wait for which called tasks of a run. Rule: a wait ends once, by the end of the called task."""

from lattice_server.core.messages import CallEnded, CallOutputs, CallResult, RunFinished, TaskAwaits
from lattice_server.core.model import Failure, FailureKind, TaskSpec
from lattice_server.core.run.status import Effect
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TASK_TERMINAL, TaskState
from lattice_server.core.trust import is_trusted, unpickles
from lattice_server.engine.runs.entry import RunEntry
from lattice_server.engine.runs.log import ENDS

NOT_CALLED = "this task did not call {!r}"


def begin(entry: RunEntry, event: TaskAwaits) -> list[CallEnded]:
    """Take a wait; return its end if the called task has ended, or cannot be waited for."""
    record = entry.run.tasks.get(event.called_id)
    if record is None or not record.is_called or record.spawned_by != event.task_id:
        return [CallEnded(event.lease_id, event.number, NOT_CALLED.format(event.called_id))]
    if record.state in TASK_TERMINAL:
        return [CallEnded(event.lease_id, event.number, _result_for(entry, event.task_id, record))]
    entry.calls.setdefault(event.called_id, []).append((event.task_id, event.lease_id, event.number))
    return []


def ended(entry: RunEntry, fact: Effect) -> list[CallEnded]:
    """Return the ends of the waits for a task that has ended."""
    if isinstance(fact, RunFinished):
        entry.calls.clear()
    if not isinstance(fact, ENDS) or (waiting := entry.calls.pop(fact.task_id, None)) is None:
        return []
    record = entry.run.tasks[fact.task_id]
    return [CallEnded(lease_id, number, _result_for(entry, caller, record)) for caller, lease_id, number in waiting]


def _result_for(entry: RunEntry, caller_id: str, record: TaskRecord) -> CallResult:
    """Return how a called task ended, as its caller may be told."""
    if record.state is TaskState.SUCCEEDED:
        return _refusal(entry.run.tasks[caller_id].spec, record) or CallOutputs(record.outputs or {})
    if record.failure is not None:
        return record.failure
    return Failure(FailureKind.UPSTREAM, f"the called task was {record.state.value}")


def _refusal(caller: TaskSpec, record: TaskRecord) -> Failure | None:
    """Return why a caller may not be given the outputs of a task that is isolated more strictly."""
    for name, payload in (record.outputs or {}).items():
        if not is_trusted(payload, caller.isolation) and unpickles(caller):
            text = f"output {name!r} would have to be unpickled, which could run code of the called task's choice here"
            remedy = f"return JSON values or arrays, or give this task isolation {payload.produced_at.value!r}"
            return Failure(FailureKind.UNTRUSTED_INPUT, f"{text}: {remedy}", task_id=record.spec.task_id)
    return None
