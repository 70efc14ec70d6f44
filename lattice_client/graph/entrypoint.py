"""Owns `entrypoint`: a task made of a function that workers have by name. Rule: nothing of its code is known here."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.task import TaskDefinition, define, names_of


def entrypoint(
    path: str,
    *,
    inputs: Sequence[str] | None = None,
    outputs: Sequence[str] | None = None,
    resources: Mapping[str, float] | None = None,
    name: str | None = None,
    **settings: Any,
) -> TaskDefinition[..., Any]:
    """Return a task that calls a function by the name workers have for it, in whatever language they are written.

    `entrypoint("js/word_count", inputs=["text"])` is run by a worker that says it has `js/word_count`;
    `entrypoint("statistics:mean")`, a name of the form `package.module:name`, by any Python worker.

    Args:
        path: the name.
        inputs: the inputs' names, all of which are needed; left out, any may be given.
        outputs: the names under which the function returns them; left out, what it returns is `result`.
        resources: `cpu`, `gpu`, `cpu_mem` and `gpu_mem` in MiB, which may be given directly as well.
        name: for people; the last part of the path when left out.
        settings: see `TaskSettings`.

    Raises:
        TaskDefinitionError: a setting is unknown or out of range, or there is no path.
    """
    if not isinstance(path, str) or not path:
        raise TaskDefinitionError(f"an entry point is a name, such as 'js/word_count', not {path!r}")
    label = name or path.replace(":", "/").rpartition("/")[2] or path
    made = define(_elsewhere(path, label), outputs=outputs, resources=resources, name=label, **settings)
    names = names_of(label, "inputs", inputs or ())
    return replace(made, entrypoint=path, inputs=names, required=frozenset(names), takes_any=inputs is None)


def _elsewhere(path: str, name: str) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        raise TypeError(f"{path!r} is an entry point: only a worker that has it can call it")

    call.__name__ = name
    return call
