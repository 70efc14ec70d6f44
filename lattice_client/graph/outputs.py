"""Owns outputs of tasks and parameters of workflows, as the user wires them into inputs.

Rule: a text that holds the `repr` of one of them is a mistake; `written_in` finds it.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.deferred import AS_VALUE, IN_TEXT, Deferred, DeferredValueError

# The reprs of tasks, outputs and parameters within an encoding, with any number of escapes before the quotes.
MARKS = (b"(task_id=", b"Parameter(name=")
WRITTEN = re.compile(rb"""(?:(?:LatticeTask|Outputs|TaskOutput)\(task_id|Parameter\(name)=\\*['"](.+?)\\*['"][,)]""")
# The contract's limit for the steps into a value.
MAX_PATH = 32


class Parameter(Deferred):
    """A value that each run of a workflow is given, to be wired into inputs of its tasks.

    `default` is the value of a run that is given none; UNSET when every run needs one.
    """

    __slots__ = ("default", "name")

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    def __repr__(self) -> str:
        return f"Parameter(name={self.name!r})"

    def __reduce__(self) -> NoReturn:
        raise DeferredValueError(f"{self!r} has no value yet: {AS_VALUE}")


class TaskOutput(Deferred):
    """One output of a task, to be wired into another task's inputs.

    `output["key"]` and `output[0]` select a part of it, and can be chained. `owner` is the task that produces it; None
    for an output named by task id, such as an output of a task that is added to the run later.

    Not a dataclass: `dataclasses.asdict` would convert it to a dict.
    """

    __slots__ = ("is_optional", "output", "owner", "path", "task_id")

    def __init__(
        self,
        task_id: str,
        output: str,
        is_optional: bool = False,
        owner: object = None,
        path: tuple[str | int, ...] = (),
    ) -> None:
        self.task_id = task_id
        self.output = output
        self.is_optional = is_optional
        self.owner = owner
        self.path = path

    def __getitem__(self, key: Any) -> "TaskOutput":
        """Return the part under a key of a dict, or at an index of a list. Raises TaskDefinitionError.

        The part is looked up after the task has run; a task wired to a missing part fails.
        """
        if type(key) is not str and type(key) is not int:
            text = f"a part of {self!r} is selected by a str or an int, not by {key!r}; {AS_VALUE}"
            raise TaskDefinitionError(text)
        if len(self.path) >= MAX_PATH:
            raise TaskDefinitionError(f"{self!r} has {MAX_PATH} steps, the most a part may have; {AS_VALUE}")
        return TaskOutput(self.task_id, self.output, self.is_optional, self.owner, (*self.path, key))

    def _is(self, other: Deferred) -> bool:
        return isinstance(other, TaskOutput) and self._key() == other._key()

    __eq__ = Deferred.__eq__

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        steps = "".join(f"[{step!r}]" for step in self.path)
        text = f"TaskOutput(task_id={self.task_id!r}, output={self.output!r}){steps}"
        return f"{text}.optional()" if self.is_optional else text

    def __reduce__(self) -> NoReturn:
        raise DeferredValueError(f"{self!r} has no value yet: {AS_VALUE}")

    def optional(self) -> "TaskOutput":
        """Return this output for a task that can run without it.

        Such a task gets None, instead of being skipped as well, when the task that produces the output was skipped or,
        under `finish_independent`, failed.
        """
        return TaskOutput(self.task_id, self.output, True, self.owner, self.path)

    def required(self) -> "TaskOutput":
        """Return this output for a task that cannot run without it."""
        return TaskOutput(self.task_id, self.output, False, self.owner, self.path)

    def _key(self) -> tuple[object, ...]:
        return self.task_id, self.output, self.is_optional, self.path


# A reference that an input can be wired to.
Wire = TaskOutput | Parameter
WIRES = (TaskOutput, Parameter)


class Outputs(Mapping[str, TaskOutput]):
    """A task's outputs by name. `why_missing` returns why an output, or any for an empty name, is not declared."""

    def __init__(
        self,
        task_id: str,
        names: tuple[str, ...],
        owner: object,
        why_missing: Callable[[str], str] = lambda name: "",
    ) -> None:
        self._task_id = task_id
        self._names = names
        self._owner = owner
        self._why_missing = why_missing

    def __getitem__(self, name: str) -> TaskOutput:
        if name not in self._names:
            offered = ", ".join(map(repr, self._names)) or "none"
            text = f"task {self._task_id!r} has no output {name!r}; its outputs: {offered}"
            why = self._why_missing(name)
            raise TaskDefinitionError(f"{text}; {why}" if why else text)
        return TaskOutput(self._task_id, name, owner=self._owner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"Outputs(task_id={self._task_id!r}, names={list(self._names)})"

    def __str__(self) -> str:
        raise TaskDefinitionError(f"the outputs of task {self._task_id!r} have no values yet: {IN_TEXT}")

    def __format__(self, spec: str) -> str:
        return str(self)

    def __reduce__(self) -> NoReturn:
        names = ", ".join(f'task.outputs["{name}"]' for name in self._names) or "the task declares none"
        raise TaskDefinitionError(
            f"the outputs of task {self._task_id!r} are not one value; wire each by name: {names}"
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """The outputs and parameters of one run, to which its inputs can be wired.

    Attributes:
        has: whether an output belongs to the run.
        task_ids: the ids of the run's tasks that this client knows.
        parameters: the run's parameters by name.
    """

    has: Callable[[TaskOutput], bool]
    task_ids: Container[str]
    parameters: Mapping[str, Parameter] = field(default_factory=dict)


def written_in(data: bytes, scope: Scope) -> str:
    """Return the first `repr` of a task, an output or a parameter of the run in encoded bytes; empty without one.

    Such a text comes from an f-string or from `str.join` over placeholders, and is a mistake.
    """
    if not any(mark in data for mark in MARKS):
        return ""
    for found in WRITTEN.finditer(data):
        known = scope.parameters if found[0].startswith(b"Parameter") else scope.task_ids
        if found[1].decode(errors="replace").replace("\\", "") in known:
            return found[0].decode(errors="replace").replace("\\", "").removesuffix(",").removesuffix(")") + ")"
    return ""
