"""Owns the graph of a workflow while the user builds it. Rule: nothing is sent before `run`, which sends it whole."""

from collections.abc import Callable, Mapping
from typing import Any, Generic, Never, TypeVar

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import UNSET
from lattice_client.graph.definition import BoundTask, TaskDefinition, define
from lattice_client.graph.environment import Env, checked
from lattice_client.graph.names import check_text
from lattice_client.graph.nodes import Condition, LatticeTask, called, condition_of, example_output
from lattice_client.graph.options import TaskOptions
from lattice_client.graph.outputs import Outputs, Parameter, Scope, TaskOutput
from lattice_client.graph.wiring import check_values

Client = TypeVar("Client")
FAILURE_POLICIES = ("fail_fast", "finish_independent")
MAX_ID_LENGTH = 128


class Graph(Generic[Client]):
    """The tasks and edges of a workflow, and the client that runs it."""

    def __init__(
        self,
        client: Client,
        name: str = "",
        workflow_id: str = "",
        failure_policy: str = "fail_fast",
        env: Env | None = None,
    ) -> None:
        if failure_policy not in FAILURE_POLICIES:
            raise TaskDefinitionError(f"failure_policy must be one of {', '.join(FAILURE_POLICIES)}")
        check_text("the name of a workflow", name)
        check_text("the id of a workflow", workflow_id)
        self.client = client
        self.name = name
        self.workflow_id = workflow_id
        self.failure_policy = failure_policy
        self.env = checked("the workflow", env)
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
        """Add a task; wire it by putting outputs of other tasks anywhere inside `inputs`, in objects of any type.

        Args:
            task_func: a `@task` or a plain function; `task.bind(...)` is a task with its inputs.
            inputs: values by name; None for a task with `bind`.
            task_name: the display name, which the server's batching rules use too; several tasks may have the same.
            task_id: names the task in this workflow and its outputs in results; by default the function's name, with a
                number when another task has that name.
            when: the task runs only if this output is true, or equals `equals`; otherwise the task is skipped, and so
                are the tasks that depend on it. Both values must be JSON.
            unless: the task runs only if this output is false, or does not equal `equals`.
            equals: the value that the output is compared with.

        Raises:
            TaskDefinitionError: an input is missing, unknown or of another type than the function's annotation, or the
                id is taken.
        """
        definition, given = self._call_of(task_func, inputs, misplaced, "add_task")
        return self._add(definition, given, task_name, task_id, condition=condition_of(when, unless, equals))

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
        """Add a task that runs once for each item of a list that another task returns.

        The length of the list is known only during the run. The outputs of the returned task are lists in the order of
        the items; wire them into a task that takes a list, or map over them again.

        Args:
            task_func: the function of one item.
            over: the list; its items become the first input not in `inputs`, or the input that a dict names:
                `{"page": crawl.outputs["pages"]}`.
            inputs: the other inputs, which are the same in every call.
            task_name: as in `add_task`.
            task_id: as in `add_task`.

        Raises:
            TaskDefinitionError: an input is missing or unknown, the id is taken, or `over` is not an output.
        """
        definition = self._definition(task_func)
        given = _given(definition, inputs, misplaced, "map")
        if isinstance(over, TaskOutput):
            free = [name for name in definition.inputs if name not in given]
            if not free:
                text = "has no input left for an item; name one: over={...}"
                raise TaskDefinitionError(f"task {definition.name!r} {text}")
            over = {free[0]: over}
        sources = dict(over) if isinstance(over, Mapping) and not isinstance(over, Outputs) else {"": over}
        if len(sources) != 1:
            text = f"can be mapped over exactly one output of another task, not over {len(sources)}"
            raise TaskDefinitionError(f"task {definition.name!r} {text}")
        ((name, source),) = sources.items()
        if not isinstance(source, TaskOutput):
            text = f"task {definition.name!r}: over is {called(source)}, not exactly one output of another task"
            if isinstance(source, LatticeTask | Outputs):
                raise TaskDefinitionError(f"{text}; give one: {example_output(source)}")
            raise TaskDefinitionError(f"{text}; for a list that is known now, add a task for each item")
        if source.path:
            text = f"task {definition.name!r}: over is {source!r}, a part of an output"
            raise TaskDefinitionError(f"{text}; have that task return the list as an output of its own")
        return self._add(definition, {**given, name: source.required()}, task_name, task_id, over=name)

    def parameter(self, name: str, default: Any = UNSET) -> Parameter:
        """Return a parameter, whose value a run is given by `run(parameters={name: ...})`; wire it like an output.

        Raises TaskDefinitionError when the workflow has a parameter of that name, or the name is not a non-empty text.
        """
        check_text("the name of a parameter", name)
        if not name or name in self.parameters:
            raise TaskDefinitionError(f"the name of a parameter must be new and not empty, not {name!r}")
        added = self.parameters[name] = Parameter(name, default)
        return added

    def add_edge(self, source_task: LatticeTask, target_task: LatticeTask) -> None:
        """Start `target_task` only after `source_task` succeeded."""
        for name, member in (("source_task", source_task), ("target_task", target_task)):
            if not isinstance(member, LatticeTask):
                text = f"add_edge: {name} must be a task that add_task returned, not {called(member)}"
                advice = f"; give the task {member.task_id!r} itself" if isinstance(member, TaskOutput) else ""
                raise TaskDefinitionError(f"{text}{advice}")
            if self.tasks.get(member.task_id) is not member:
                raise TaskDefinitionError(f"task {member.task_id!r} belongs to another workflow")
        target_task.after.append(source_task.task_id)

    def has(self, output: TaskOutput) -> bool:
        """Whether an output belongs to this workflow. The server checks an output that was named by task id."""
        return output.owner is None or self.tasks.get(output.task_id) is output.owner

    @property
    def scope(self) -> Scope:
        """The outputs and parameters that inputs of its tasks can be wired to."""
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
                raise TaskDefinitionError(f"task {definition.name!r} {text}: give {method} no inputs")
            return definition, bound
        definition = self._definition(task_func)
        return definition, _given(definition, inputs, misplaced, method)

    def _definition(self, task_func: TaskDefinition[..., Any] | Callable[..., Any]) -> TaskDefinition[..., Any]:
        if isinstance(task_func, TaskDefinition):
            return task_func
        if isinstance(task_func, LatticeTask | Outputs | TaskOutput | BoundTask):
            raise TaskDefinitionError(f"a task must be a function or a @task, not {called(task_func)}")
        # One definition for all tasks of a function: its code is checked, and sent, once.
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
        if self.workflow_id:
            text = f"workflow {self.workflow_id!r} is stored, and its tasks are on the server: run it as it is"
            raise TaskDefinitionError(f"{text}; add tasks to a run of it, by run.add_tasks, or make another workflow")
        definition.check_inputs(given)
        check_values(definition, {name: value for name, value in given.items() if name != over})
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
            raise TaskDefinitionError(f"{where} {found!r} is taken; leave task_id out, or choose another one")
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
    if options := [name for name in misplaced if name in TaskOptions.__annotations__ and name not in definition.inputs]:
        example = f"{definition.name}.with_({', '.join(f'{name}=...' for name in options)})"
        text = f"{method} has no argument {', '.join(options)}, which is an option of tasks: @task(...), or {example}"
        raise TaskDefinitionError(f"task {definition.name!r}: {text}")
    if misplaced:
        text = f"{method} has no argument {', '.join(misplaced)}; the inputs are one dict"
        raise TaskDefinitionError(f"task {definition.name!r}: {text}: {_example_call(definition, method)}")
    if inputs is None:
        return {}
    if not isinstance(inputs, Mapping):
        text = f"the inputs are one dict, {_example_call(definition, method)}, not {type(inputs).__name__}"
        raise TaskDefinitionError(f"task {definition.name!r}: {text}")
    return dict(inputs)


def _example_call(definition: TaskDefinition[..., Any], method: str) -> str:
    shown = ", ".join(f'"{name}": ...' for name in definition.inputs) or '"name": ...'
    return f"{method}({definition.name}, {'task.output, ' * (method == 'map')}{{{shown}}})"
