"""Owns a workflow while it is being written. Rule: nothing is sent before `run`, and then the whole graph at once."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from lattice_client.errors import TaskDefinitionError
from lattice_client.task import TaskDefinition, define

Client = TypeVar("Client")
FAILURE_POLICIES = ("fail_fast", "finish_independent")


@dataclass(frozen=True, slots=True)
class TaskOutput:
    """One output of a task, to be wired into another task's inputs."""

    task_id: str
    output: str
    is_optional: bool = False

    def optional(self) -> "TaskOutput":
        """Return this output for a task that can do without it.

        The task then gets None when the one that makes it was skipped or, under `finish_independent`, failed, instead
        of being skipped as well.
        """
        return replace(self, is_optional=True)


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

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass(frozen=True, slots=True)
class Condition:
    """Whether a task runs: when `output` is true, or equals `equals`; the opposite when `is_negated`."""

    output: TaskOutput
    equals: Any
    is_negated: bool


UNSET = object()


@dataclass(eq=False)
class LatticeTask:
    """One task of a workflow. `over` names the input whose list it is mapped over; its outputs are then lists."""

    task_id: str
    definition: TaskDefinition[..., Any]
    inputs: Mapping[str, Any]
    display_name: str
    after: list[str] = field(default_factory=list)
    over: str = ""
    condition: Condition | None = None

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

    def __init__(
        self, client: Client, name: str = "", workflow_id: str = "", failure_policy: str = "fail_fast"
    ) -> None:
        if failure_policy not in FAILURE_POLICIES:
            raise TaskDefinitionError(f"failure_policy must be one of {', '.join(FAILURE_POLICIES)}")
        self.client = client
        self.name = name
        self.workflow_id = workflow_id
        self.failure_policy = failure_policy
        self.tasks: dict[str, LatticeTask] = {}
        self._counts: dict[str, int] = {}
        self._definitions: dict[int, TaskDefinition[..., Any]] = {}

    def add_task(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        when: TaskOutput | None = None,
        unless: TaskOutput | None = None,
        equals: Any = UNSET,
    ) -> LatticeTask:
        """Add a task; wire it by putting other tasks' outputs anywhere inside `inputs`, in lists and dicts too.

        Args:
            task_func: a `@task` or a plain function.
            inputs: values by name.
            task_name: for people, and for the server's batching rules.
            when: the task runs only if this output is true, or equals `equals`; otherwise it is skipped, and with it
                what needs it. Whatever is compared must be JSON.
            unless: the same, the other way round.
            equals: what `when` or `unless` is compared with.

        Raises:
            TaskDefinitionError: an input is missing or unknown.
        """
        definition = self._definition(task_func)
        return self._add(definition, dict(inputs or {}), task_name, condition=_condition(when, unless, equals))

    def map(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        over: TaskOutput | Mapping[str, TaskOutput],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
    ) -> LatticeTask:
        """Add a task for each item of a list that another task makes, however long it turns out to be.

        The outputs of what is returned are lists, in the items' order, for a task that gathers them or another map.

        Args:
            task_func: called with one item each.
            over: the list; as the first input not in `inputs`, or by name: `{"page": crawl.outputs["pages"]}`.
            inputs: what every call is given besides.
            task_name: for people, and for the server's batching rules.

        Raises:
            TaskDefinitionError: an input is missing or unknown, or what it is to be mapped over is not an output.
        """
        definition, given = self._definition(task_func), dict(inputs or {})
        if isinstance(over, TaskOutput):
            free = [name for name in definition.inputs if name not in given]
            if not free:
                text = "has no input left for an item; say which: over={...}"
                raise TaskDefinitionError(f"task {definition.name!r} {text}")
            over = {free[0]: over}
        if not isinstance(over, Mapping) or len(over) != 1:
            raise TaskDefinitionError(f"task {definition.name!r} can be mapped over exactly one output of another task")
        ((name, source),) = over.items()
        if not isinstance(source, TaskOutput):
            text = f"it is mapped over a {type(source).__name__}; of a list that is known, add a task for each item"
            raise TaskDefinitionError(f"task {definition.name!r}: {text}")
        return self._add(definition, {**given, name: replace(source, is_optional=False)}, task_name, over=name)

    def add_edge(self, source_task: LatticeTask, target_task: LatticeTask) -> None:
        """Have `target_task` start after `source_task` succeeded."""
        for member in (source_task, target_task):
            if self.tasks.get(member.task_id) is not member:
                raise TaskDefinitionError(f"task {member.task_id!r} belongs to another workflow")
        target_task.after.append(source_task.task_id)

    def _definition(self, task_func: TaskDefinition[..., Any] | Callable[..., Any]) -> TaskDefinition[..., Any]:
        if isinstance(task_func, TaskDefinition):
            return task_func
        # One for all tasks of a function: its code is looked at, and sent, once.
        known = self._definitions.get(id(task_func))
        if known is None or known.function is not task_func:
            known = self._definitions[id(task_func)] = define(task_func)
        return known

    def _add(
        self,
        definition: TaskDefinition[..., Any],
        given: dict[str, Any],
        task_name: str | None,
        over: str = "",
        condition: Condition | None = None,
    ) -> LatticeTask:
        missing = sorted(definition.required - given.keys())
        unknown = sorted(given.keys() - set(definition.inputs)) if not definition.takes_any else []
        if missing or (unknown and definition.inputs):
            what = f"needs input {missing[0]!r}" if missing else f"has no input {unknown[0]!r}"
            declared = ", ".join(definition.inputs) or "none"
            raise TaskDefinitionError(f"task {definition.name!r} {what}; its inputs: {declared}")
        number = self._counts[definition.name] = self._counts.get(definition.name, 0) + 1
        task_id = definition.name if number == 1 else f"{definition.name}-{number}"
        added = LatticeTask(task_id, definition, given, task_name or definition.name, over=over, condition=condition)
        self.tasks[task_id] = added
        return added


def _condition(when: TaskOutput | None, unless: TaskOutput | None, equals: Any) -> Condition | None:
    if when is not None and unless is not None:
        raise TaskDefinitionError("a task can have `when` or `unless`, not both")
    output = when if when is not None else unless
    if output is None:
        if equals is not UNSET:
            raise TaskDefinitionError("`equals` needs `when` or `unless`")
        return None
    if not isinstance(output, TaskOutput):
        raise TaskDefinitionError(f"a condition must be an output of a task, not {type(output).__name__}")
    return Condition(output, equals, is_negated=unless is not None)
