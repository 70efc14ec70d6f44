"""Owns a workflow while it is being written. Rule: nothing is sent before `run`, and then the whole graph at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from lattice_client.errors import TaskDefinitionError
from lattice_client.task import TaskDefinition, define

Client = TypeVar("Client")


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """One output of a task, to be wired into another task's inputs."""

    task_id: str
    output: str


class Outputs(Mapping[str, TaskOutput]):
    """A task's outputs by name."""

    def __init__(self, task_id: str, names: tuple[str, ...]) -> None:
        self._task_id = task_id
        self._names = names

    def __getitem__(self, name: str) -> TaskOutput:
        if name not in self._names:
            offered = ", ".join(map(repr, self._names)) or "none"
            raise TaskDefinitionError(f"task {self._task_id!r} has no output {name!r}; its outputs: {offered}")
        return TaskOutput(self._task_id, name)

    def __iter__(self) -> Any:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(eq=False)
class LatticeTask:
    """One task of a workflow."""

    task_id: str
    definition: TaskDefinition[..., Any]
    inputs: Mapping[str, Any]
    display_name: str
    after: list[str]

    @property
    def outputs(self) -> Outputs:
        """The task's outputs by name."""
        return Outputs(self.task_id, self.definition.outputs)

    @property
    def output(self) -> TaskOutput:
        """The task's only output. Raises TaskDefinitionError when it has several."""
        if len(self.definition.outputs) != 1:
            raise TaskDefinitionError(f"task {self.task_id!r} has {len(self.definition.outputs)} outputs; name one")
        return self.outputs[self.definition.outputs[0]]


class Graph(Generic[Client]):
    """The tasks and edges of a workflow, and the client that can run it."""

    def __init__(self, client: Client, name: str = "", workflow_id: str = "") -> None:
        self.client = client
        self.name = name
        self.workflow_id = workflow_id
        self.tasks: dict[str, LatticeTask] = {}
        self._counts: dict[str, int] = {}

    def add_task(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
    ) -> LatticeTask:
        """Add a task; wire it by putting other tasks' outputs anywhere inside `inputs`, in lists and dicts too.

        Raises:
            TaskDefinitionError: an input is missing or unknown.
        """
        definition = task_func if isinstance(task_func, TaskDefinition) else define(task_func)
        given = dict(inputs or {})
        missing = sorted(definition.required - given.keys())
        unknown = sorted(given.keys() - set(definition.inputs)) if not definition.takes_any else []
        if missing or (unknown and definition.inputs):
            what = f"needs input {missing[0]!r}" if missing else f"has no input {unknown[0]!r}"
            declared = ", ".join(definition.inputs) or "none"
            raise TaskDefinitionError(f"task {definition.name!r} {what}; its inputs: {declared}")
        number = self._counts[definition.name] = self._counts.get(definition.name, 0) + 1
        task_id = definition.name if number == 1 else f"{definition.name}-{number}"
        added = LatticeTask(task_id, definition, given, task_name or definition.name, [])
        self.tasks[task_id] = added
        return added

    def add_edge(self, source_task: LatticeTask, target_task: LatticeTask) -> None:
        """Have `target_task` start after `source_task` succeeded."""
        for member in (source_task, target_task):
            if self.tasks.get(member.task_id) is not member:
                raise TaskDefinitionError(f"task {member.task_id!r} belongs to another workflow")
        target_task.after.append(source_task.task_id)
