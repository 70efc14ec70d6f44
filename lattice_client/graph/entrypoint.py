"""Owns `entrypoint`: a task that calls a function by its name on the workers. Rule: none of its code is sent."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.definition import TaskDefinition, define
from lattice_client.graph.names import names_of


def entrypoint(
    path: str,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    resources: Mapping[str, float] | None = None,
    name: str | None = None,
    **settings: Any,
) -> TaskDefinition[..., Any]:
    """Return a task that calls a function by its name on a worker, which may be written in any language.

    `entrypoint("js/word_count", inputs=["text"])` runs on a worker that offers `js/word_count`.
    `entrypoint("statistics:mean")`, a name of the form `package.module:name`, runs on any Python worker.

    Args:
        path: the name.
        inputs: the names of the required inputs; without it any inputs may be given.
        outputs: the names of the outputs; without it the return value is the output `result`.
        resources: `cpu`, `gpu`, `cpu_mem` and `gpu_mem` (MiB); each can be an argument of its own.
        name: the display name; by default the last part of the path.
        settings: see `TaskSettings`.

    Raises:
        TaskDefinitionError: a setting is unknown or out of range, or there is no path.
    """
    if not isinstance(path, str) or not path:
        raise TaskDefinitionError(f"an entry point must be a name, such as 'js/word_count', not {path!r}")
    label = name or path.replace(":", "/").rpartition("/")[2] or path
    made = define(_elsewhere(path, label), outputs=outputs, resources=resources, name=label, **settings)
    names = names_of(label, "inputs", inputs or ())
    return replace(made, entrypoint=path, inputs=names, required=frozenset(names), takes_any=inputs is None)


def _elsewhere(path: str, name: str) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        raise TypeError(f"{path!r} is an entry point: only a worker that offers it can call it")

    call.__name__ = name
    return call
