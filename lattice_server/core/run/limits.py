"""Owns the limits of the growth of a run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lattice_server.core.errors import ExhaustedError, FieldViolation, InvalidError
from lattice_server.core.frozen import frozen
from lattice_server.core.model import OutputRef, Payload, TaskSpec
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TaskState


@frozen
class Bounds:
    """The most tasks of a run, items of one mapped task, and levels of tasks that spawn tasks."""

    max_tasks: int = 1_000_000
    max_items: int = 100_000
    max_depth: int = 100

    def refuse(self, size: int, depth: int) -> None:
        """Raise ExhaustedError when a run would have too many tasks, or too many levels of spawned tasks."""
        if size > self.max_tasks:
            raise ExhaustedError("RUN_TOO_LARGE", f"a run may have at most {self.max_tasks} tasks")
        if depth > self.max_depth:
            raise ExhaustedError("RUN_TOO_LARGE", f"tasks spawn tasks more than {self.max_depth} deep")

    def excess(self, items: int, size: int) -> str:
        """Return why a run of this size may not get so many items of a mapped task; empty when it may."""
        if items <= self.max_items and size + items <= self.max_tasks:
            return ""
        limits = f"the limits are {self.max_items} items of one map and {self.max_tasks} tasks of one run"
        return f"it would become {items} tasks; {limits}"


DEFAULT_BOUNDS = Bounds()


def items_of(spec: TaskSpec, payloads: Sequence[Payload]) -> list[TaskSpec]:
    """Return the items of a mapped task, one for each element of its list."""
    return [
        replace(
            spec,
            task_id=f"{spec.task_id}[{index}]",
            inputs={**spec.inputs, spec.over: payload},
            over="",
            condition=None,
            after=(),
        )
        for index, payload in enumerate(payloads)
    ]


def refuse_late_maps(
    mapped: Iterable[tuple[int, TaskSpec]], tasks: Mapping[str, TaskRecord], split: Mapping[str, Sequence[str]]
) -> None:
    """Raise InvalidError for a task mapped over a list of a task that was sent without a request for its items."""
    for index, spec in mapped:
        over = spec.inputs.get(spec.over)
        source = tasks.get(over.task_id) if isinstance(over, OutputRef) else None
        if not isinstance(over, OutputRef) or source is None or source.spec.over:
            continue
        is_sent = source.state is not TaskState.BLOCKED or source.is_promised
        if is_sent and over.output not in split.get(over.task_id, ()):
            field = f"tasks[{index}].over"
            text = "a list that nothing was mapped over when its task was handed out cannot be mapped over later"
            text += "; add a task that returns the list together with the map, and map over its output"
            raise InvalidError("INVALID_WORKFLOW", f"{field}: {text}", violations=[FieldViolation(field, text)])
