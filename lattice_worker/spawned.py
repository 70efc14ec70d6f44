"""Outputs of spawned tasks, and how they are bound to inputs wherever in a value they lie.

Rule: whatever would read a value that no task has made yet raises.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

from lattice_worker.runner.artifacts import Encoder
from lattice_worker.runner.text import message_of, type_name
from lattice_worker.runner.values import WITH_OUTPUTS, PayloadError, among_json, encode_around, encode_value

# A message may be nested 100 deep; each level of a binding takes two of those.
MAX_LEVELS = 32


class DeferredValueError(PayloadError):
    """A value that no task has made yet was to be read or copied."""


class SpawnedOutput:
    """One output of a spawned task, to be wired into another one's inputs.

    Not a dataclass: `dataclasses.asdict` would turn it into a dict.
    """

    __slots__ = ("output", "task_id")

    def __init__(self, task_id: str, output: str) -> None:
        self.task_id = task_id
        self.output = output

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SpawnedOutput) and (self.task_id, self.output) == (other.task_id, other.output)

    def __hash__(self) -> int:
        return hash((self.task_id, self.output))

    def __repr__(self) -> str:
        return f"SpawnedOutput({self.task_id!r}, {self.output!r})"

    def _unknown(self) -> DeferredValueError:
        return DeferredValueError(f"{self!r} has no value yet: give it to a task as an input, and read it there")

    def __str__(self) -> str:
        raise self._unknown()

    def __format__(self, spec: str) -> str:
        raise self._unknown()

    def __bool__(self) -> bool:
        raise self._unknown()

    def __len__(self) -> int:
        raise self._unknown()

    def __iter__(self) -> Iterator[Any]:
        raise self._unknown()

    def __contains__(self, item: object) -> bool:
        raise self._unknown()

    def __getitem__(self, key: Any) -> Any:
        raise self._unknown()

    def __copy__(self) -> "SpawnedOutput":
        return self

    def __deepcopy__(self, memo: object) -> "SpawnedOutput":
        return self

    def __reduce__(self) -> NoReturn:
        raise self._unknown()


def binding_of(value: Any, encoder: Encoder) -> dict[str, Any]:
    """Return how an input is bound, its values encoded. Raises PayloadError.

    As the client does it: lists and dicts of JSON and outputs stay what they are; anything else with outputs in it is
    a list of its pickle and of the outputs that belong into it.
    """
    found = among_json(value, SpawnedOutput)
    holders: set[int] = set()
    if found and _note_holders(value, holders) <= MAX_LEVELS:
        return _tree(value, holders, encoder)
    try:
        if not found:
            return encoder.store(*encode_value(value))
    except DeferredValueError:
        pass
    except Exception as error:
        raise _refusal(value, error) from error
    try:
        parts, outputs = encode_around(value, SpawnedOutput)
    except Exception as error:
        raise _refusal(value, error) from error
    return {"items": [encoder.store(WITH_OUTPUTS, parts), *map(_reference, outputs)]}


def _refusal(value: Any, error: Exception) -> PayloadError:
    return PayloadError(f"an input of type {type_name(type(value))} cannot be pickled: {message_of(error)}")


def _note_holders(value: Any, holders: set[int]) -> int:
    """Add the identity of each container that holds an output; return how many lie one within the other."""
    if isinstance(value, SpawnedOutput):
        return 1
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    levels = max((_note_holders(item, holders) for item in items), default=0)
    if levels:
        holders.add(id(value))
        return levels + 1
    return 0


def _tree(value: Any, holders: set[int], encoder: Encoder) -> dict[str, Any]:
    if isinstance(value, SpawnedOutput):
        return _reference(value)
    if id(value) not in holders:
        return encoder.encode(value)
    if type(value) is dict:
        return {"entries": {key: _tree(item, holders, encoder) for key, item in value.items()}}
    return {"items": [_tree(item, holders, encoder) for item in value]}


def _reference(output: SpawnedOutput) -> dict[str, Any]:
    return {"task": output.task_id, "output": output.output}
