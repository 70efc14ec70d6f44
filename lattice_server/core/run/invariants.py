"""Owns the invariants of a run. Rule: it reads the parts of the machine and changes nothing."""

from collections.abc import Container, Mapping

from lattice_server.core.run.dag import Dag
from lattice_server.core.run.handover import Handover
from lattice_server.core.run.status import RunStatus
from lattice_server.core.run.task_table import TaskRecord, TaskTable
from lattice_server.core.states import TASK_TERMINAL, RunState, TaskState

AFTER_INPUTS = frozenset({TaskState.QUEUED, TaskState.RUNNING, TaskState.SUCCEEDED})


def check(status: RunStatus, table: TaskTable, dag: Dag, handover: Handover) -> None:
    """Assert the invariants of a run that has started."""
    records = table.records
    assert table.counts == {state: sum(r.state is state for r in records.values()) for state in TaskState}
    assert table.open_tasks == sum(record.state not in TASK_TERMINAL for record in records.values())
    assert status.is_terminal == (table.open_tasks == 0 and not status.is_open), "a run ends with its last task"
    assert not status.is_open or status.is_running, "a stopped run is open"
    assert records.keys() == dag.tasks.keys()
    to_come = {*handover.added, *handover.ready, *handover.stopping}
    for task_id, record in records.items():
        _check_inputs(status, records, dag, task_id, to_come)
        _check_end(records, record)
    if status.state is RunState.SUCCEEDED:
        assert status.failure is None
        ended_badly = (r for r in records.values() if r.state in {TaskState.FAILED, TaskState.CANCELLED})
        assert all(r.is_called for r in ended_badly), "only the failures of called tasks do not fail a run"
    if status.state is RunState.FAILED:
        assert status.failure is not None


def _check_inputs(
    status: RunStatus, records: Mapping[str, TaskRecord], dag: Dag, task_id: str, to_come: Container[str]
) -> None:
    record = records[task_id]
    states = [(source, records[source].state) for source in dag.predecessors[task_id]]
    met = [
        state is TaskState.SUCCEEDED or (state in TASK_TERMINAL and (source, task_id) in dag.optional)
        for source, state in states
    ]
    if record.state is TaskState.BLOCKED and status.is_running:
        assert record.missing == len(met) - sum(met)
    if record.state is TaskState.BLOCKED and task_id not in to_come:
        assert record.missing > 0, f"{task_id} has its inputs and is not sent to the scheduler"
        assert status.is_running, f"{task_id} waits in a run that stops"
        assert all(state not in TASK_TERMINAL or ok for (_, state), ok in zip(states, met, strict=True))
    if record.state in AFTER_INPUTS:
        assert all(met), f"{task_id} started before its inputs were there"


def _check_end(records: Mapping[str, TaskRecord], record: TaskRecord) -> None:
    if record.state is TaskState.SUCCEEDED:
        assert record.failure is None
        assert record.items is not None or record.outputs is not None
    if record.items is not None:
        states = [records[item].state for item in record.items]
        assert record.open_items == sum(state not in TASK_TERMINAL for state in states)
        assert (record.open_items == 0) == (record.state in TASK_TERMINAL)
        assert (record.state is TaskState.SUCCEEDED) == all(state is TaskState.SUCCEEDED for state in states)
    assert (record.ended_at is not None) == (record.state in TASK_TERMINAL)
