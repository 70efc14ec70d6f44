"""Owns what stands for values that tasks will make. Rule: whatever would read such a value here raises."""

from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from lattice_client.errors import TaskDefinitionError

IN_TEXT = 'to put it into a text, use template("... {x} ...", x=task.output)'
AS_VALUE = "give it to a task as an input, and look into it inside that task"
AS_CONDITION = "to run a task only if it is true, use add_task(..., when=task.output)"


class DeferredValueError(TaskDefinitionError):
    """A value that exists only while a run goes on was to be copied here."""


class Deferred:
    """A value that is known only once tasks have run."""

    __slots__ = ()

    def _unknown(self, advice: str) -> TaskDefinitionError:
        return TaskDefinitionError(f"{self!r} has no value yet: {advice}")

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


class TaskOutput(Deferred):
    """One output of a task, to be wired into another task's inputs.

    `owner` is the task it was taken from; None for an output that was named by hand, such as one of a task that the run
    will have by then. Not a dataclass: `dataclasses.asdict` would turn it into a dict.
    """

    __slots__ = ("is_optional", "output", "owner", "task_id")

    def __init__(self, task_id: str, output: str, is_optional: bool = False, owner: object = None) -> None:
        self.task_id = task_id
        self.output = output
        self.is_optional = is_optional
        self.owner = owner

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskOutput) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        text = f"TaskOutput(task_id={self.task_id!r}, output={self.output!r})"
        return f"{text}.optional()" if self.is_optional else text

    def __reduce__(self) -> NoReturn:
        raise DeferredValueError(f"{self!r} has no value yet: {AS_VALUE}")

    def optional(self) -> "TaskOutput":
        """Return this output for a task that can do without it.

        The task then gets None when the one that makes it was skipped or, under `finish_independent`, failed, instead
        of being skipped as well.
        """
        return TaskOutput(self.task_id, self.output, True, self.owner)

    def required(self) -> "TaskOutput":
        """Return this output for a task that cannot do without it."""
        return TaskOutput(self.task_id, self.output, False, self.owner)

    def _key(self) -> tuple[str, str, bool]:
        return self.task_id, self.output, self.is_optional


class Outputs(Mapping[str, TaskOutput]):
    """A task's outputs by name."""

    def __init__(self, task_id: str, names: tuple[str, ...], owner: object) -> None:
        self._task_id = task_id
        self._names = names
        self._owner = owner

    def __getitem__(self, name: str) -> TaskOutput:
        if name not in self._names:
            offered = ", ".join(map(repr, self._names)) or "none"
            raise TaskDefinitionError(f"task {self._task_id!r} has no output {name!r}; its outputs: {offered}")
        return TaskOutput(self._task_id, name, owner=self._owner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<outputs of task {self._task_id!r}: {', '.join(self._names) or 'none'}>"

    def __reduce__(self) -> NoReturn:
        names = ", ".join(f'task.outputs["{name}"]' for name in self._names) or "it declares none"
        raise TaskDefinitionError(f"the outputs of task {self._task_id!r} are no value; wire them one by one: {names}")
