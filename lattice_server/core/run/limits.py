"""Owns how far and in what a run may grow. Rule: what was handed out already is not asked for more."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lattice_server.core.errors import ExhaustedError, FieldViolation, InvalidError
from lattice_server.core.model import OutputRef, Payload, TaskSpec
from lattice_server.core.run.task_table import TaskRecord
from lattice_server.core.states import TaskState


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far a run may grow: its tasks in all, the items of one map, and how deep tasks may spawn tasks."""

    max_tasks: int = 1_000_000
    max_items: int = 100_000
    max_depth: int = 100

    def refuse(self, size: int, depth: int) -> None:
        """Raise ExhaustedError when a run may not have this many tasks, or tasks spawned this deep."""
        if size > self.max_tasks:
            raise ExhaustedError("RUN_TOO_LARGE", f"a run may have at most {self.max_tasks} tasks")
        if depth > self.max_depth:
            raise ExhaustedError("RUN_TOO_LARGE", f"tasks spawn tasks more than {self.max_depth} deep")

    def excess(self, items: int, size: int) -> str:
        """Return why a run of this size may not map a task over so many items; empty when it may."""
        if items <= self.max_items and size + items <= self.max_tasks:
            return ""
        limits = f"the limits are {self.max_items} items of one map and {self.max_tasks} tasks of one run"
        return f"it would become {items} tasks; {limits}"


DEFAULT_BOUNDS = Bounds()


def items_of(spec: TaskSpec, payloads: Sequence[Payload]) -> list[TaskSpec]:
    """Return the tasks that a mapped one becomes, one for each item of its list."""
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
    """Raise InvalidError for a map over a list whose task was handed out without being asked for its items."""
    for index, spec in mapped:
        over = spec.inputs.get(spec.over)
        source = tasks.get(over.task_id) if isinstance(over, OutputRef) else None
        if not isinstance(over, OutputRef) or source is None or source.spec.over:
            continue
        is_handed_out = source.state is not TaskState.BLOCKED or source.is_promised
        if is_handed_out and over.output not in split.get(over.task_id, ()):
            field = f"tasks[{index}].over"
            text = "a list that nothing was mapped over when its task was handed out cannot be mapped over later"
            raise InvalidError("INVALID_WORKFLOW", f"{field}: {text}", violations=[FieldViolation(field, text)])
