"""Owns the results that a run reuses of the run that it retries.

Rule: a result is reused only if the task and all of its inputs are the same.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

from lattice_server.core.model import Artifact, TaskSpec, WorkflowSpec
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TaskState


class Earlier:
    """The tasks of a run that has ended. `is_kept` tells whether an artifact of it can still be read."""

    def __init__(self, run_id: str, tasks: Mapping[str, TaskRecord], is_kept: Callable[[Artifact], bool]) -> None:
        self.run_id = run_id
        self._tasks = tasks
        self._is_kept = is_kept
        self._spawned: dict[str, list[TaskSpec]] = defaultdict(list)
        for record in tasks.values():
            if record.spawned_by:
                self._spawned[record.spawned_by].append(record.spec)

    def success_of(self, spec: TaskSpec) -> TaskRecord | None:
        """Return the record of a task, if it succeeded and its outputs are kept."""
        found = self._tasks.get(spec.task_id)
        if found is None or found.state is not TaskState.SUCCEEDED or found.outputs is None or found.spec != spec:
            return None
        items = [payload for split in (found.split or {}).values() for payload in split]
        values = [*found.outputs.values(), *items]
        is_whole = all(self._is_kept(v.content) for v in values if isinstance(v.content, Artifact))
        return found if is_whole else None

    def was_skipped(self, task_id: str) -> bool:
        """Whether a task was skipped."""
        found = self._tasks.get(task_id)
        return found is not None and found.state is TaskState.SKIPPED

    def spawned_by(self, task_id: str) -> list[TaskSpec]:
        """Return the tasks that a task added."""
        return self._spawned.get(task_id, [])


def workflow_of(spec: WorkflowSpec, tasks: Mapping[str, TaskRecord]) -> WorkflowSpec:
    """Return the workflow of a run with the tasks that callers added, but without items and spawned tasks, which are
    added again when it runs."""
    return replace(spec, tasks=tuple(r.spec for r in tasks.values() if not r.item_of and not r.spawned_by))
