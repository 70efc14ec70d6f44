"""Owns whether the inputs of a task suit its function's annotations. Rule: a doubt speaks for the input."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.annotations import PLAIN, kind_of, may_be, named
from lattice_client.graph.outputs import TaskOutput
from lattice_client.graph.task import TaskDefinition

MAX_SHOWN = 60


def check_values(
    definition: TaskDefinition[..., Any], given: Mapping[str, Any], kind_made: Callable[[TaskOutput], type | None]
) -> None:
    """Raise TaskDefinitionError for an input that is certainly of another kind than its annotation asks for.

    `kind_made` tells what kind of value is wired, None where several are possible.
    """
    hints = definition.hints
    for name, value in given.items():
        annotation = hints.get(name, Any)
        if annotation is Any:
            continue
        kind = kind_made(value) if isinstance(value, TaskOutput) else type(value)
        # That of a template or a parameter says nothing of what stands in its place.
        if kind is None or kind not in PLAIN or may_be(annotation, kind):
            continue
        if kind is type(_default_of(definition, name)):
            continue
        shown = repr(value) if len(repr(value)) <= MAX_SHOWN else f"{repr(value)[:MAX_SHOWN]}..."
        text = f"input {name!r} of task {definition.name!r} is {shown}, which is of type {kind.__name__}"
        raise TaskDefinitionError(f"{text}; the function's annotation asks for {named(annotation)}")


def kind_of_output(definition: TaskDefinition[..., Any], name: str) -> type | None:
    """Return the kind of an output by the annotations of its task; None when they do not say one."""
    if "return" not in definition.hints:
        return None
    annotation = definition.hints["return"]
    if definition.returns_value:
        return kind_of(annotation)
    return kind_of(getattr(annotation, "__annotations__", {}).get(name, Any))


def _default_of(definition: TaskDefinition[..., Any], name: str) -> Any:
    found = inspect.signature(definition.function).parameters.get(name)
    return inspect.Parameter.empty if found is None else found.default
