"""Random histories of one run whose server is killed and started again: only the facts of the run survive."""

from typing import Any

from hypothesis.stateful import rule

from lattice_server.core.messages import RunStarted, TasksAdded
from lattice_server.core.run import dag
from lattice_server.core.run.limits import Bounds
from lattice_server.core.run.open_run import OpenRun
from lattice_server.core.run.run import Run
from lattice_server.core.states import TASK_TERMINAL, TaskState
from tests.server.core.run_histories import RunHistories


def restored(histories: RunHistories) -> Run:
    """Return a run that was made again from the facts of a run."""
    old = histories.run
    run = Run(
        "r",
        histories.spec,
        dag.build(histories.spec, ()),
        bounds=Bounds(60, 6, 2),
        is_open=old.is_open,
        slice_tasks=histories.slice_tasks,
    )
    run.provide({})
    restoration = run.restoring()
    for fact in histories.facts:
        added = [old.tasks[task_id].spec for task_id in fact.task_ids] if isinstance(fact, TasksAdded) else []
        is_called = isinstance(fact, TasksAdded) and any(old.tasks[task_id].is_called for task_id in fact.task_ids)
        restoration.apply(fact, histories.now, added=added, is_called=is_called)
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
    histories.perform(run.resume(restoration, histories.now))
    return run


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


class RestartHistories(RunHistories):
    """One run over several lives of its server."""

    @rule()
    def restarts(self) -> None:
        """Forget all but the facts, make the run again, and continue it."""
        self.to_scheduler.clear()
        self.to_run.clear()
        self.held.clear()
        self.asked.clear()
        assert isinstance(self.facts[0], RunStarted)
        self.run = restored(self)
        if self.caller is not None:
            self.caller = OpenRun(self.run, 5.0, self.now, max_questions=3)
