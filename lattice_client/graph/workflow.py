"""Owns a workflow while it is being written. Rule: nothing is sent before `run`, and then the whole graph at once."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import Any, Generic, Never, NoReturn, TypeVar

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.outputs import IN_TEXT, UNSET, Outputs, Parameter, Scope, TaskOutput
from lattice_client.graph.task import BoundTask, TaskDefinition, check_text, define
from lattice_client.graph.wiring import check_values, kind_of_output

Client = TypeVar("Client")
FAILURE_POLICIES = ("fail_fast", "finish_independent")
MAX_ID_LENGTH = 128


@dataclass(frozen=True, slots=True)
class Condition:
    """Whether a task runs: when `output` is true, or equals `equals`; the opposite when `is_negated`."""

    output: TaskOutput
    equals: Any
    is_negated: bool


class LatticeTask:
    """One task of a workflow. `over` names the input whose list it is mapped over; its outputs are then lists.

    Not a dataclass: `dataclasses.asdict` would turn one that stands where an output is meant into a dict.
    """

    def __init__(
        self,
        task_id: str,
        definition: TaskDefinition[..., Any],
        inputs: Mapping[str, Any],
        display_name: str,
        over: str = "",
        condition: Condition | None = None,
    ) -> None:
        self.task_id = task_id
        self.definition = definition
        self.inputs = inputs
        self.display_name = display_name
        self.over = over
        self.condition = condition
        self.after: list[str] = []

    def __repr__(self) -> str:
        return f"LatticeTask(task_id={self.task_id!r})"

    def __str__(self) -> str:
        raise TaskDefinitionError(f"{self.task_id!r} is a task and no text: {IN_TEXT}")

    def __format__(self, spec: str) -> str:
        return str(self)

    def __reduce__(self) -> NoReturn:
        raise TaskDefinitionError(f'{self.task_id!r} is a task; wire one of its outputs: task.outputs["name"]')

    @property
    def outputs(self) -> Outputs:
        """The task's outputs by name."""
        return Outputs(self.task_id, self.definition.outputs, self, self.definition.why_unpromised)

    @property
    def output(self) -> TaskOutput:
        """The task's only output. Raises TaskDefinitionError when it has several."""
        names = self.definition.outputs
        if not names:
            raise TaskDefinitionError(f"task {self.task_id!r} promises no output: {self.definition.why_unpromised('')}")
        if len(names) > 1:
            ways = ", ".join(f"task.outputs[{name!r}]" for name in names)
            raise TaskDefinitionError(f"task {self.task_id!r} has {len(names)} outputs; name one: {ways}")
        return self.outputs[names[0]]


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
        self.parameters: dict[str, Parameter] = {}
        self._numbers: dict[str, int] = {}
        self._definitions: dict[int, TaskDefinition[..., Any]] = {}

    def add_task(
        self,
        task_func: TaskDefinition[..., Any] | BoundTask | Callable[..., Any],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        when: TaskOutput | None = None,
        unless: TaskOutput | None = None,
        equals: Any = UNSET,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task; wire it by putting other tasks' outputs anywhere inside `inputs`, in objects of any kind.

        Args:
            task_func: a `@task` or a plain function; `task.bind(...)` is a task with its inputs.
            inputs: values by name; none for a task that was bound.
            task_name: for people, and for the server's batching rules; may be that of several tasks.
            task_id: names the task in this workflow, and what it gives in results; by default the function's name,
                numbered when another task has it.
            when: the task runs only if this output is true, or equals `equals`; otherwise it is skipped, and with it
                what needs it. Whatever is compared must be JSON.
            unless: the same, the other way round.
            equals: what `when` or `unless` is compared with.

        Raises:
            TaskDefinitionError: an input is missing, unknown or of another kind than the function is annotated with,
                or the id is taken.
        """
        definition, given = self._call_of(task_func, inputs, misplaced, "add_task")
        return self._add(definition, given, task_name, task_id, condition=_condition(when, unless, equals))

    def map(
        self,
        task_func: TaskDefinition[..., Any] | Callable[..., Any],
        over: TaskOutput | Mapping[str, TaskOutput],
        inputs: Mapping[str, Any] | None = None,
        task_name: str | None = None,
        *,
        task_id: str | None = None,
        **misplaced: Never,
    ) -> LatticeTask:
        """Add a task for each item of a list that another task makes, however long it turns out to be.

        The outputs of what is returned are lists, in the items' order, for a task that gathers them or another map.

        Args:
            task_func: called with one item each.
            over: the list; as the first input not in `inputs`, or by name: `{"page": crawl.outputs["pages"]}`.
            inputs: what every call is given besides.
            task_name: for people, and for the server's batching rules; may be that of several tasks.
            task_id: as in `add_task`.

        Raises:
            TaskDefinitionError: an input is missing or unknown, the id is taken, or what the task is to be mapped over
                is not an output.
        """
        definition = self._definition(task_func)
        given = _given(definition, inputs, misplaced, "map")
        if isinstance(over, TaskOutput):
            free = [name for name in definition.inputs if name not in given]
            if not free:
                text = "has no input left for an item; say which: over={...}"
                raise TaskDefinitionError(f"task {definition.name!r} {text}")
            over = {free[0]: over}
        sources = dict(over) if isinstance(over, Mapping) and not isinstance(over, Outputs) else {"": over}
        if len(sources) != 1:
            raise TaskDefinitionError(f"task {definition.name!r} can be mapped over exactly one output of another task")
        ((name, source),) = sources.items()
        if not isinstance(source, TaskOutput):
            text = f"task {definition.name!r}: it is mapped over {_called(source)}, not over exactly one output"
            if isinstance(source, LatticeTask | Outputs):
                raise TaskDefinitionError(f"{text}; give one: {_an_output_of(source)}")
            raise TaskDefinitionError(f"{text} of another task; of a list that is known, add a task for each item")
        if source.path:
            text = f"task {definition.name!r}: it is mapped over {source!r}, a part of an output"
            raise TaskDefinitionError(f"{text}; have the task that makes it return the list as an output of its own")
        return self._add(definition, {**given, name: source.required()}, task_name, task_id, over=name)

    def parameter(self, name: str, default: Any = UNSET) -> Parameter:
        """Return a value that is given when the workflow is run, `run(parameters={name: ...})`; wire it as an output.

        Raises TaskDefinitionError when the workflow has a parameter of that name, or when the name is no text.
        """
        check_text("the name of a parameter", name)
        if not name or name in self.parameters:
            raise TaskDefinitionError(f"the name of a parameter must be new and not empty, not {name!r}")
        added = self.parameters[name] = Parameter(name, default)
        return added

    def add_edge(self, source_task: LatticeTask, target_task: LatticeTask) -> None:
        """Have `target_task` start after `source_task` succeeded."""
        for name, member in (("source_task", source_task), ("target_task", target_task)):
            if not isinstance(member, LatticeTask):
                text = f"add_edge: {name} must be a task that add_task returned, not {_called(member)}"
                advice = f"; give the task {member.task_id!r} itself" if isinstance(member, TaskOutput) else ""
                raise TaskDefinitionError(f"{text}{advice}")
            if self.tasks.get(member.task_id) is not member:
                raise TaskDefinitionError(f"task {member.task_id!r} belongs to another workflow")
        target_task.after.append(source_task.task_id)

    def has(self, output: TaskOutput) -> bool:
        """Whether an output is one of a task of this workflow; of one that was named by hand the server knows."""
        return output.owner is None or self.tasks.get(output.task_id) is output.owner

    @property
    def scope(self) -> Scope:
        """What inputs of its tasks may be wired to."""
        return Scope(self.has, self.tasks, self.parameters)

    def _call_of(
        self,
        task_func: TaskDefinition[..., Any] | BoundTask | Callable[..., Any],
        inputs: Mapping[str, Any] | None,
        misplaced: Mapping[str, object],
        method: str,
    ) -> tuple[TaskDefinition[..., Any], dict[str, Any]]:
        if isinstance(task_func, BoundTask):
            definition, bound = task_func.definition, dict(task_func.inputs)
            if inputs is not None or misplaced:
                text = "has its inputs from bind(...) already"
                raise TaskDefinitionError(f"task {definition.name!r} {text}: give {method} no others")
            return definition, bound
        definition = self._definition(task_func)
        return definition, _given(definition, inputs, misplaced, method)

    def _definition(self, task_func: TaskDefinition[..., Any] | Callable[..., Any]) -> TaskDefinition[..., Any]:
        if isinstance(task_func, TaskDefinition):
            return task_func
        if isinstance(task_func, LatticeTask | Outputs | TaskOutput | BoundTask):
            raise TaskDefinitionError(f"a task must be a function or a @task, not {_called(task_func)}")
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
        task_id: str | None,
        over: str = "",
        condition: Condition | None = None,
    ) -> LatticeTask:
        definition.check_inputs(given)
        check_values(definition, {name: value for name, value in given.items() if name != over}, _kind_made)
        if task_name is not None:
            check_text(f"task {definition.name!r}: task_name", task_name)
        found = self._next_id(definition.name) if task_id is None else task_id
        where = f"task {definition.name!r}: the task id"
        check_text(where, found)
        if not 1 <= len(found) <= MAX_ID_LENGTH or "\n" in found:
            raise TaskDefinitionError(
                f"{where} must have 1 to {MAX_ID_LENGTH} characters and no line break, not {found!r}; give task_id"
            )
        if found in self.tasks:
            raise TaskDefinitionError(f"{where} {found!r} is taken; leave task_id out, or take another one")
        added = LatticeTask(found, definition, given, task_name or definition.name, over, condition)
        self.tasks[found] = added
        return added

    def _next_id(self, name: str) -> str:
        """Return the first of `name`, `name-2`, `name-3` and so on that no task has."""
        number = self._numbers.get(name, 1)
        while (found := name if number == 1 else f"{name}-{number}") in self.tasks:
            number += 1
        self._numbers[name] = number
        return found


def single(task_func: Any, inputs: Mapping[str, Any] | None, misplaced: Mapping[str, object]) -> LatticeTask:
    """Return a task that runs alone. Raises TaskDefinitionError."""
    graph: Graph[None] = Graph(None)
    definition, given = graph._call_of(task_func, inputs, misplaced, "run_task")
    return graph.add_task(definition, given)


def _given(
    definition: TaskDefinition[..., Any], inputs: object, misplaced: Mapping[str, object], method: str
) -> dict[str, Any]:
    if misplaced:
        text = f"{method} has no argument {', '.join(misplaced)}; the inputs are one dict"
        raise TaskDefinitionError(f"task {definition.name!r}: {text}: {_example(definition, method)}")
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        text = f"the inputs are one dict, {_example(definition, method)}, not {type(inputs).__name__}"
        raise TaskDefinitionError(f"task {definition.name!r}: {text}")
    return dict(inputs)


def _kind_made(output: TaskOutput) -> type | None:
    """Return the kind of value an output has, None when it may have several."""
    owner = output.owner
    if not isinstance(owner, LatticeTask) or output.path or output.is_optional:
        return None
    return list if owner.over else kind_of_output(owner.definition, output.output)


def _example(definition: TaskDefinition[..., Any], method: str) -> str:
    shown = ", ".join(f'"{name}": ...' for name in definition.inputs) or '"name": ...'
    return f"{method}({definition.name}, {'task.output, ' * (method == 'map')}{{{shown}}})"


def _called(value: object) -> str:
    """Return what a value that is not what it should be is called in an error."""
    match value:
        case LatticeTask():
            return f"the task {value.task_id!r}"
        case TaskOutput():
            return f"the output {value.output!r} of task {value.task_id!r}"
        case Parameter():
            return f"the parameter {value.name!r}"
        case Outputs():
            return f"all outputs of a task, {value!r}"
        case TaskDefinition():
            return f"the function {value.name!r}"
        case BoundTask():
            return f"the task {value.definition.name!r} with inputs from bind(...)"
        case None:
            return "None"
        case FunctionType():
            return f"the function {value.__name__!r}"
        case _:
            return f"a {type(value).__name__}"


def _an_output_of(value: "LatticeTask | Outputs") -> str:
    names = list(value.outputs if isinstance(value, LatticeTask) else value)
    return f"task.outputs[{names[0]!r}]" if len(names) > 1 else "task.output"


def _condition(when: TaskOutput | None, unless: TaskOutput | None, equals: Any) -> Condition | None:
    if when is not None and unless is not None:
        raise TaskDefinitionError("a task can have `when` or `unless`, not both")
    output = when if when is not None else unless
    if output is None:
        if equals is not UNSET:
            raise TaskDefinitionError("`equals` needs `when` or `unless`")
        return None
    if not isinstance(output, TaskOutput):
        text = f"a condition must be an output of a task, not {_called(output)}"
        name = "when" if unless is None else "unless"
        is_known = isinstance(output, LatticeTask | Outputs)
        raise TaskDefinitionError(f"{text}: {name}={_an_output_of(output)}" if is_known else text)
    return Condition(output, equals, is_negated=unless is not None)
