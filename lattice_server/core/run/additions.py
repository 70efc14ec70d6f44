"""Checks tasks that are to be added to a run. Rule: the check does not change the run."""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field

from lattice_server.core.model import TaskSpec
from lattice_server.core.run.dag import Dag, Extension, extending
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.steps import Steps, stepwise

CLEARED_ITEMS = 5000


@dataclass(slots=True)
class Addition:
    """New tasks of a run and their records.

    `mapped` are the mapped tasks with their position. `arrivals` depend on no task, or on a task that was in the run
    before: only they may be ready, or skipped, at once.
    """

    extension: Extension
    records: dict[str, TaskRecord] = field(default_factory=dict)
    mapped: list[tuple[int, TaskSpec]] = field(default_factory=list)
    arrivals: list[str] = field(default_factory=list)

    def clear(self) -> Steps[None]:
        """Free the parts of the addition, in steps: freeing them at once takes as long as adding the tasks."""
        extension = self.extension
        for part in (self.records, extension.tasks, extension.successors, extension.predecessors):
            for _, is_step in stepwise(range(len(part)), CLEARED_ITEMS):
                part.popitem()
                if is_step:
                    yield


def adding(
    dag: Dag, added: Iterable[TaskSpec], parameters: Container[str] | None, parent: str = "", depth: int = 0
) -> Steps[Addition]:
    """Check tasks against the graph of a run, in steps.

    Raises:
        InvalidError: as `dag.build` does.
    """
    extension = yield from extending(dag, added, parameters)
    addition = Addition(extension)
    behind = {target for targets in extension.behind.values() for target in targets}
    for (index, (task_id, spec)), is_step in stepwise(enumerate(extension.tasks.items())):
        sources = extension.predecessors[task_id]
        addition.records[task_id] = TaskRecord(spec, len(sources), spawned_by=parent, depth=depth)
        if spec.over:
            addition.mapped.append((index, spec))
        if not sources or task_id in behind:
            addition.arrivals.append(task_id)
        if is_step:
            yield
    return addition
