"""Owns the tasks of a workflow, and the names of wrong values in the errors about them."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import FunctionType
from typing import TYPE_CHECKING, Any, NoReturn

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import IN_TEXT, UNSET
from lattice_client.graph.definition import BoundTask, TaskDefinition
from lattice_client.graph.names import items_of
from lattice_client.graph.outputs import Outputs, Parameter, TaskOutput


@dataclass(frozen=True, slots=True)
class Condition:
    """Runs a task only if `output` is true, or equals `equals`; only if not when `is_negated`."""

    output: TaskOutput
    equals: Any
    is_negated: bool


class LatticeTask:
    """One task of a workflow. A mapped task runs once for each item of the input `over`, and its outputs are lists.

    Not a dataclass: `dataclasses.asdict` would convert it to a dict where a value holds it by mistake.
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
        raise TaskDefinitionError(f"{self.task_id!r} is a task, not a text: {IN_TEXT}")

    def __format__(self, spec: str) -> str:
        return str(self)

    if not TYPE_CHECKING:  # for which it has no other attributes

        def __getattr__(self, name: str) -> NoReturn:
            # Whatever probes an object asks for names with an underscore.
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}" if name.startswith("_") else self._advice())

        def __await__(self) -> NoReturn:
            raise TypeError(self._advice())

    def _advice(self) -> str:
        return f"{self!r} is a task of a graph, and its value belongs to a run: run.output(task) waits for it"

    def __reduce__(self) -> NoReturn:
        raise TaskDefinitionError(f'{self.task_id!r} is a task; wire one of its outputs: task.outputs["name"]')

    @property
    def outputs(self) -> Outputs:
        """The task's outputs by name."""
        return Outputs(self.task_id, self.definition.outputs, self, self.definition.why_missing)

    @property
    def output(self) -> TaskOutput:
        """The task's only output. Raises TaskDefinitionError when it has several."""
        names = self.definition.outputs
        if not names:
            raise TaskDefinitionError(f"task {self.task_id!r} declares no output: {self.definition.why_missing('')}")
        if len(names) > 1:
            ways = ", ".join(f"task.outputs[{name!r}]" for name in names)
            raise TaskDefinitionError(f"task {self.task_id!r} has {len(names)} outputs; name one: {ways}")
        return self.outputs[names[0]]


def tasks_in(tasks: object) -> list[LatticeTask]:
    """Return the tasks of a list. Raises TaskDefinitionError."""
    what = "a list of tasks that add_task or map returned"
    found = items_of("the tasks to add", what, tasks)
    for item in found:
        if not isinstance(item, LatticeTask):
            raise TaskDefinitionError(f"the tasks to add must be {what}; {called(item)} is none")
    return found


def condition_of(when: TaskOutput | None, unless: TaskOutput | None, equals: Any) -> Condition | None:
    """Return the condition of a task; None without one. Raises TaskDefinitionError."""
    if when is not None and unless is not None:
        raise TaskDefinitionError("a task can have `when` or `unless`, not both")
    output = when if when is not None else unless
    if output is None:
        if equals is not UNSET:
            raise TaskDefinitionError("`equals` needs `when` or `unless`")
        return None
    if not isinstance(output, TaskOutput):
        text = f"a condition must be an output of a task, not {called(output)}"
        name = "when" if unless is None else "unless"
        is_known = isinstance(output, LatticeTask | Outputs)
        raise TaskDefinitionError(f"{text}: {name}={example_output(output)}" if is_known else text)
    return Condition(output, equals, is_negated=unless is not None)


def called(value: object) -> str:
    """Return the name of a value of a wrong type for an error message."""
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


def example_output(value: LatticeTask | Outputs) -> str:
    """Return an expression for one output of a task, for an error message."""
    names = list(value.outputs if isinstance(value, LatticeTask) else value)
    return f"task.outputs[{names[0]!r}]" if len(names) > 1 else "task.output"
