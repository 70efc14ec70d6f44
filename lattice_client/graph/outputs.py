"""Owns what stands for values that tasks will make. Rule: whatever would read such a value here raises.

Their `repr` is for people, and is all that can be had of them as a text. A text with one among the inputs of a task is
a mistake: `written_in` finds it.
"""

import re
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

from lattice_client.errors import TaskDefinitionError

IN_TEXT = 'to put it into a text, use template("... {x} ...", x=task.output)'
AS_VALUE = "give it to a task as an input, and look into it inside that task"
AS_CONDITION = "to run a task only if it is true, use add_task(..., when=task.output)"
# What would compute with a value: operators, calls and conversions.
BINARY = [
    "add",
    "sub",
    "mul",
    "matmul",
    "truediv",
    "floordiv",
    "mod",
    "divmod",
    "pow",
    "lshift",
    "rshift",
    "and",
    "xor",
]
UNARY = ["neg", "pos", "abs", "invert", "int", "float", "complex", "index", "round", "call", "lt", "le", "gt", "ge"]
OPERATORS = [f"__{side}{name}__" for name in [*BINARY, "or"] for side in ("", "r")] + [f"__{name}__" for name in UNARY]
# The reprs of tasks, outputs and parameters, wherever an encoding holds them, and however they were quoted there.
MARKS = (b"(task_id=", b"Parameter(name=")
WRITTEN = re.compile(rb"""(?:(?:LatticeTask|Outputs|TaskOutput)\(task_id|Parameter\(name)=\\*['"](.+?)\\*['"][,)]""")


# How many steps into a value the contract allows.
MAX_PATH = 32


UNSET = object()


class DeferredValueError(TaskDefinitionError):
    """A value that exists only while a run goes on was to be copied here."""


class DeferredAttributeError(TaskDefinitionError, AttributeError):
    """An attribute of a value that exists only while a run goes on was to be read here."""


@dataclass(frozen=True, slots=True)
class Scope:
    """What an input may be wired to.

    `has` says whether an output is one of the run's; `task_ids` are those known here to be its own, and `parameters`
    are its parameters by name.
    """

    has: Callable[["TaskOutput"], bool]
    task_ids: Container[str]
    parameters: Mapping[str, "Parameter"] = field(default_factory=dict)


if TYPE_CHECKING:

    class _AnyValue(Any):  # type: ignore[misc]  # a value of any type, as `TaskDefinition.bind` takes it
        pass
else:

    class _AnyValue:
        __slots__ = ()


class Deferred(_AnyValue):
    """A value that is known only once tasks have run. To type checkers it is of every type."""

    __slots__ = ()

    def _unknown(self, advice: str) -> TaskDefinitionError:
        return TaskDefinitionError(f"{self!r} has no value yet: {advice}")

    if not TYPE_CHECKING:  # whose idea of it is `_AnyValue`

        def __getattr__(self, name: str) -> NoReturn:
            # Whatever probes an object asks for names with an underscore, and for no others of this one.
            if name.startswith("_") or name in self.__slots__:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            raise DeferredAttributeError(f"{self!r} has no value yet: {AS_VALUE}")

    def __str__(self) -> str:
        raise self._unknown(IN_TEXT)

    def __format__(self, spec: str) -> str:
        raise self._unknown(IN_TEXT)

    def __bytes__(self) -> bytes:
        raise self._unknown(IN_TEXT)

    def __iter__(self) -> Iterator[Any]:
        raise self._unknown(AS_VALUE)

    def __len__(self) -> int:
        raise self._unknown(AS_VALUE)

    def __contains__(self, item: object) -> bool:
        raise self._unknown(AS_VALUE)

    def __getitem__(self, key: Any) -> Any:
        raise self._unknown(AS_VALUE)

    def __bool__(self) -> bool:
        raise self._unknown(AS_CONDITION)

    def __copy__(self) -> "Deferred":
        return self

    def __deepcopy__(self, memo: object) -> "Deferred":
        return self


def _unreadable(self: Deferred, *_: object, **__: object) -> NoReturn:
    raise self._unknown(AS_VALUE)


def _unreadable_in_text(self: Deferred, other: object) -> NoReturn:
    raise self._unknown(IN_TEXT if isinstance(other, str) else AS_VALUE)


for _name in OPERATORS:
    setattr(Deferred, _name, _unreadable_in_text if _name in {"__add__", "__radd__"} else _unreadable)


def written_in(data: bytes, scope: Scope) -> str:
    """Return the `repr` of a task, of its outputs or of a parameter of a run, that an encoding holds as a text.

    Empty when it holds none.
    """
    if not any(mark in data for mark in MARKS):
        return ""
    for found in WRITTEN.finditer(data):
        known = scope.parameters if found[0].startswith(b"Parameter") else scope.task_ids
        if found[1].decode(errors="replace").replace("\\", "") in known:
            return found[0].decode(errors="replace").replace("\\", "").removesuffix(",").removesuffix(")") + ")"
    return ""


class Parameter(Deferred):
    """A value that is given when a workflow is run, to be wired into inputs of its tasks.

    `default` is the value of runs that are given none; UNSET when each run needs one.
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

    `output["key"]` and `output[0]` select a part of it; they may follow each other. `owner` is the task it was taken
    from; None for an output that was named by hand, such as one of a task that the run will have by then. Not a
    dataclass: `dataclasses.asdict` would turn it into a dict.
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
        """Return the part under a key of a dict, or at a position of a list. Raises TaskDefinitionError.

        Whether there is such a part is known once the task has run; a task that is wired to one that is missing fails.
        """
        if type(key) is not str and type(key) is not int:
            text = f"a part of {self!r} is selected by a text or a whole number, not by {key!r}; {AS_VALUE}"
            raise TaskDefinitionError(text)
        if len(self.path) >= MAX_PATH:
            raise TaskDefinitionError(f"{self!r} is as deep as a part may lie: {MAX_PATH} steps; {AS_VALUE}")
        return TaskOutput(self.task_id, self.output, self.is_optional, self.owner, (*self.path, key))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskOutput) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        steps = "".join(f"[{step!r}]" for step in self.path)
        text = f"TaskOutput(task_id={self.task_id!r}, output={self.output!r}){steps}"
        return f"{text}.optional()" if self.is_optional else text

    def __reduce__(self) -> NoReturn:
        raise DeferredValueError(f"{self!r} has no value yet: {AS_VALUE}")

    def optional(self) -> "TaskOutput":
        """Return this output for a task that can do without it.

        The task then gets None when the one that makes it was skipped or, under `finish_independent`, failed, instead
        of being skipped as well.
        """
        return TaskOutput(self.task_id, self.output, True, self.owner, self.path)

    def required(self) -> "TaskOutput":
        """Return this output for a task that cannot do without it."""
        return TaskOutput(self.task_id, self.output, False, self.owner, self.path)

    def _key(self) -> tuple[object, ...]:
        return self.task_id, self.output, self.is_optional, self.path


# What an input may be wired to.
Wire = TaskOutput | Parameter
WIRES = (TaskOutput, Parameter)


class Outputs(Mapping[str, TaskOutput]):
    """A task's outputs by name. `why_unpromised` tells why one of a name, or any if it is empty, is not among them."""

    def __init__(
        self,
        task_id: str,
        names: tuple[str, ...],
        owner: object,
        why_unpromised: Callable[[str], str] = lambda name: "",
    ) -> None:
        self._task_id = task_id
        self._names = names
        self._owner = owner
        self._why_unpromised = why_unpromised

    def __getitem__(self, name: str) -> TaskOutput:
        if name not in self._names:
            offered = ", ".join(map(repr, self._names)) or "none"
            text = f"task {self._task_id!r} has no output {name!r}; its outputs: {offered}"
            why = self._why_unpromised(name)
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
        names = ", ".join(f'task.outputs["{name}"]' for name in self._names) or "it declares none"
        raise TaskDefinitionError(f"the outputs of task {self._task_id!r} are no value; wire them one by one: {names}")
