"""The arguments of `spawn`: what each must be, and the id that the spawned task gets.

Rule: a wrong argument raises before anything is sent.
"""

import hashlib
import inspect
import threading
from collections.abc import Mapping, Sequence
from types import FunctionType, MethodType
from typing import Any

from lattice_worker.runner.encoding.text import utf8
from lattice_worker.task_context.spawned import SpawnedOutput, SpawnedTask

# How a plain function is spawned.
PLAIN: Mapping[str, Any] = {"spec": b"", "function": b"", "outputs": ("result",), "has_code": True}
# The server takes ids of 128 characters. A longer path is cut, which leaves room for a number after it.
MAX_PATH_CHARACTERS, PREFIX_CHARACTERS, DIGEST_CHARACTERS = 120, 95, 24
# A task may spawn in several threads.
_taking = threading.Lock()


class SpawnError(TypeError):
    """An argument of `spawn` is wrong; nothing was added."""

    __module__ = "lattice_worker.context"


def take_id(parent_id: str, label: str, taken: dict[str, int]) -> str:
    """Return the id of a new task, and add it to `taken`: `parent/label`, numbered from 2 on when that is taken.

    `taken` has each id with the last number that was given to it. An id is the path of names from the task that was
    first. A path that is too long is cut, and a digest of the whole path follows, so that the same path always has the
    same id.
    """
    path = f"{parent_id}/{label}"
    if len(path) > MAX_PATH_CHARACTERS:
        digest = hashlib.sha256(path.encode()).hexdigest()[:DIGEST_CHARACTERS]
        path = f"{path[:PREFIX_CHARACTERS]}~{digest}"
    with _taking:
        number, found = taken.get(path, 0), path
        while found in taken:
            # Numbers above the last one are taken too where labels end with them.
            number += 1
            found = f"{path}-{number}"
        taken[found] = 1
        taken[path] = max(number, 1)
    return found


def form_of(task: Any) -> Mapping[str, Any]:
    """Return the settings of a task: all of it besides its code. Raises SpawnError."""
    if not callable(task):
        text = "it needs a function, a @task or an entrypoint(...), not"
        raise SpawnError(f"spawn: {text} {'the text ' * isinstance(task, str)}{task!r}")
    form: Mapping[str, Any] | None = getattr(task, "__lattice__", None)
    if form is not None:
        return form
    return PLAIN


def label_of(task: Any, name: object) -> str:
    if name is not None and not isinstance(name, str):
        raise SpawnError(f"spawn: name must be a text, not {name!r}")
    label = utf8(name or str(getattr(task, "__name__", "task")))
    if "\n" in label:
        raise SpawnError(f"spawn: the name of a task must have no line break, not {label!r}; give name")
    return label


def inputs_of(where: str, task: Any, form: Mapping[str, Any], inputs: object, misplaced: object) -> dict[str, Any]:
    """Return the inputs by name, as they can be sent. Raises SpawnError unless the function takes those."""
    if misplaced or not isinstance(inputs, Mapping | None):
        found = f"the argument {next(iter(misplaced))!r}" if isinstance(misplaced, dict) and misplaced else repr(inputs)
        raise SpawnError(f'{where}: the inputs are one dict by name, spawn(task, {{"x": ...}}), not {found}')
    given = dict(inputs or {})
    for key in given:
        if not isinstance(key, str):
            raise SpawnError(f"{where}: the name of an input must be a text, not {key!r}")
    names, required, takes_any = _signature(task, form)
    missing = [key for key in required if key not in given]
    unknown = [] if takes_any else [key for key in given if key not in names]
    faults = [f"has no input {', '.join(map(repr, unknown))}"] * bool(unknown)
    faults += [f"needs input {', '.join(map(repr, missing))}"] * bool(missing)
    if faults:
        raise SpawnError(f"{where}: the task {' and '.join(faults)}; its inputs: {', '.join(names) or 'none'}")
    return {utf8(key): value for key, value in given.items()}


def _signature(task: Any, form: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str], bool]:
    """Return the names of a task's inputs, the names of the required ones, and whether it takes any input."""
    if "inputs" in form:
        return form["inputs"], form["required"], form["takes_any"]
    if not isinstance(task, FunctionType | MethodType):
        return (), (), True  # a callable not written in Python may have no signature; the call itself fails
    found = inspect.signature(task).parameters
    if list(found) == ["params"]:
        return (), (), True
    named = {p.name: p for p in found.values() if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    required = [name for name, p in named.items() if p.default is p.empty]
    return tuple(named), required, any(p.kind is p.VAR_KEYWORD for p in found.values())


def predecessors_of(where: str, after: Any) -> list[SpawnedTask]:
    if isinstance(after, SpawnedTask | SpawnedOutput | str) or not isinstance(after, Sequence):
        raise SpawnError(f"{where}: after must be a list of spawned tasks, after=[task], not {after!r}")
    for other in after:
        if isinstance(other, SpawnedOutput):
            raise SpawnError(f"{where}: after takes tasks, not their outputs: give the task of {other!r} itself")
        if not isinstance(other, SpawnedTask):
            raise SpawnError(f"{where}: after must hold tasks that spawn returned, not {other!r}")
    return list(after)
