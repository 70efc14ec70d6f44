"""Spawned tasks and their outputs, and how outputs anywhere in a value are bound to inputs.

Rule: reading the value of an output that no task has made yet raises.
"""

import re
from collections.abc import Container
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from lattice_worker.runner.encoding.artifacts import Encoder
from lattice_worker.runner.encoding.blame import refusal
from lattice_worker.runner.encoding.deferred import Deferred, DeferredValueError
from lattice_worker.runner.encoding.values import WITH_OUTPUTS, PayloadError, among_json, encode_around, encode_value

# A message may be nested 100 deep; each level of a binding takes two of those.
MAX_LEVELS = 32
# The text of a spawned task or an output of it, wherever an encoding holds it, and however it was quoted.
WRITTEN = re.compile(rb"""Spawned(?:Task|Output)\(task_id=\\*['"](.+?)\\*['"], """)
IN_TEXT = "give the output itself to the task as an input, and make the text there"
# How many steps into a value the contract allows.
MAX_PATH = 32


class SpawnedOutput(Deferred):
    """One output of a spawned task, to be wired into another one's inputs.

    `output["key"]` and `output[0]` select a part of it; they may follow each other. Not a dataclass:
    `dataclasses.asdict` would turn it into a dict.
    """

    __slots__ = ("output", "path", "task_id")

    def __init__(self, task_id: str, output: str, path: tuple[str | int, ...] = ()) -> None:
        self.task_id = task_id
        self.output = output
        self.path = path

    def __getitem__(self, key: Any) -> "SpawnedOutput":
        """Return the part under a key of a dict, or at a position of a list. Raises DeferredValueError."""
        if (type(key) is not str and type(key) is not int) or len(self.path) >= MAX_PATH:
            text = f"a part of {self!r} is selected by up to {MAX_PATH} texts and whole numbers, not by {key!r}"
            raise DeferredValueError(text)
        return SpawnedOutput(self.task_id, self.output, (*self.path, key))

    def _is(self, other: Deferred) -> bool:
        return isinstance(other, SpawnedOutput) and self._key() == other._key()

    __eq__ = Deferred.__eq__

    def __hash__(self) -> int:
        return hash(self._key())

    def __repr__(self) -> str:
        steps = "".join(f"[{step!r}]" for step in self.path)
        return f"SpawnedOutput(task_id={self.task_id!r}, output={self.output!r}){steps}"

    def _key(self) -> tuple[object, ...]:
        return self.task_id, self.output, self.path

    def _advice(self) -> str:
        return f"{self!r} has no value yet: give it to a task as an input, and read it there"


@dataclass(frozen=True, slots=True)
class SpawnedTask:
    """A task that was added to the run."""

    task_id: str
    output_names: tuple[str, ...]

    def __str__(self) -> str:
        raise PayloadError(f"{self!r} has no text: give one of its outputs to a task, and make the text there")

    def __format__(self, spec: str) -> str:
        return str(self)

    if not TYPE_CHECKING:  # for which it has no other attributes

        def __getattr__(self, name: str) -> NoReturn:
            # Whatever probes an object asks for names with an underscore.
            raise AttributeError(f"{type(self).__name__!r} has no {name!r}" if name.startswith("_") else self._advice())

        def __await__(self) -> NoReturn:
            raise TypeError(self._advice())

    def _advice(self) -> str:
        text = f"{self!r} was added to the run, and this task does not wait for it"
        return f"{text}: wire its output to another task, or wait for a value with context.call(task, inputs)"

    @property
    def outputs(self) -> dict[str, SpawnedOutput]:
        """The task's outputs by name."""
        return {name: SpawnedOutput(self.task_id, name) for name in self.output_names}

    @property
    def output(self) -> SpawnedOutput:
        """The task's only output. Raises ValueError when it has several."""
        if len(self.output_names) != 1:
            raise ValueError(f"task {self.task_id!r} has {len(self.output_names)} outputs; name one")
        return SpawnedOutput(self.task_id, self.output_names[0])

    def __reduce__(self) -> NoReturn:
        raise PayloadError(f"{self.task_id!r} is a task; give one of its outputs: task.output")


@dataclass(frozen=True, slots=True)
class Binder:
    """Binds one input of a task. `what` names the input in errors; `siblings` are the tasks that were spawned here."""

    what: str
    encoder: Encoder
    siblings: Container[str]
    is_for_python: bool = True

    def bind(self, value: Any) -> dict[str, Any]:
        """Return how a value is bound, its parts encoded. Raises PayloadError.

        As the client does it: lists and dicts of JSON and outputs stay lists and dicts; any other value with outputs in
        it is a list of its pickle and of the outputs that belong into it. So is a dict of several keys for a task in
        Python, since the contract's maps have no order.
        """
        found = among_json(value, SpawnedOutput)
        holders: dict[int, Any] = {}
        if found and _note_holders(value, holders) <= MAX_LEVELS and self._may_be_tree(holders):
            return self._tree(value, holders)
        try:
            if not found:
                return self._stored(*encode_value(value, as_data=self.encoder.as_data))
        except DeferredValueError:
            pass
        except Exception as error:
            raise self._refusal(value, error) from error
        try:
            parts, outputs = encode_around(value, SpawnedOutput)
        except Exception as error:
            raise self._refusal(value, error) from error
        return {"items": [self._stored(WITH_OUTPUTS, parts), *map(_reference, outputs)]}

    def _may_be_tree(self, holders: dict[int, Any]) -> bool:
        has_order = any(type(holder) is dict and len(holder) > 1 for holder in holders.values())
        return not (has_order and self.is_for_python)

    def _tree(self, value: Any, holders: dict[int, Any]) -> dict[str, Any]:
        if isinstance(value, SpawnedOutput):
            return _reference(value)
        if id(value) not in holders:
            return self._stored(*encode_value(value, as_data=self.encoder.as_data))
        if type(value) is dict:
            self._check_texts("".join(value).encode())
            return {"entries": {key: self._tree(item, holders) for key, item in value.items()}}
        return {"items": [self._tree(item, holders) for item in value]}

    def _stored(self, media_type: str, parts: list[Any]) -> dict[str, Any]:
        # The head and the pickle; the other parts are the buffers of arrays.
        for part in parts[:3]:
            self._check_texts(part)
        return self.encoder.store(media_type, parts)

    def _check_texts(self, data: Any) -> None:
        """Raise PayloadError for an encoding with a text that an output, or a task, was written into."""
        for found in WRITTEN.finditer(data):
            if found[1].decode(errors="replace").replace("\\", "") in self.siblings:
                text = f"holds {found[0].decode(errors='replace')}...) as a text, which has no value yet"
                raise DeferredValueError(f"{self.what} {text}: {IN_TEXT}")

    def _refusal(self, value: Any, error: Exception) -> PayloadError:
        if isinstance(error, PayloadError):  # it says itself what to do
            return PayloadError(f"{self.what}: {error}")
        return PayloadError(refusal(self.what, value, error, partial(encode_around, kind=SpawnedOutput)))


def _note_holders(value: Any, holders: dict[int, Any]) -> int:
    """Note each container that holds an output, by its identity; return how many lie one within the other."""
    if isinstance(value, SpawnedOutput):
        return 1
    items = value.values() if type(value) is dict else value if type(value) is list else ()
    levels = max((_note_holders(item, holders) for item in items), default=0)
    if levels:
        holders[id(value)] = value
        return levels + 1
    return 0


def _reference(output: SpawnedOutput) -> dict[str, Any]:
    return {"task": output.task_id, "output": output.output, "select": list(output.path)}
