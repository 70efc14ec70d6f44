"""A run that is made again from its facts, as after a restart of the server, and compared with the original."""

from collections.abc import Iterable
from typing import Any

from lattice_server.core.messages import TasksAdded
from lattice_server.core.run import dag
from lattice_server.core.run.restoration import Restoration
from lattice_server.core.run.run import Run
from lattice_server.core.states import TASK_TERMINAL, TaskState


def made_again(old: Run, facts: Iterable[tuple[float, Any]], **settings: Any) -> tuple[Run, Restoration]:
    """Make a run again from its facts and their times; assert that it is as the old one. It has yet to be resumed."""
    run = Run(old.run_id, old.spec, dag.build(old.spec, ()), is_open=old.is_open, **settings)
    run.provide({})
    restoration = run.restoring()
    for at, fact in facts:
        added = [old.tasks[task_id].spec for task_id in fact.task_ids] if isinstance(fact, TasksAdded) else []
        is_called = isinstance(fact, TasksAdded) and any(old.tasks[task_id].is_called for task_id in fact.task_ids)
        restoration.apply(fact, at, added=added, is_called=is_called)
    assert (run.state, run.revision, run.is_open) == (old.state, old.revision, old.is_open)
    assert list(run.tasks) == list(old.tasks)
    assert run.dag == old.dag
    for task_id, record in old.tasks.items():
        found = run.tasks[task_id]
        # A task that was handed over, and did not start, has no fact.
        state = TaskState.BLOCKED if record.state is TaskState.QUEUED and not record.attempt else record.state
        assert found.state is state or (record.state, found.state) == (TaskState.QUEUED, TaskState.BLOCKED)
        if record.state in TASK_TERMINAL:
            assert comparable(found) == comparable(record)
    return run, restoration


def comparable(record: Any) -> tuple[Any, ...]:
    """Return the fields of an ended task that a reader can see."""
    return (
        record.is_called,
        record.spec,
        record.outputs,
        record.split,
        record.failure,
        record.items,
        record.open_items,
        record.duration_s,
    )
