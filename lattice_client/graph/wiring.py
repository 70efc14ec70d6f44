"""Owns the check of inputs against a function's annotations. Rule: an input of a possibly right type is accepted."""

import inspect
from collections.abc import Mapping
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.annotations import PLAIN, may_be, named, plain_type_of
from lattice_client.graph.definition import TaskDefinition
from lattice_client.graph.nodes import LatticeTask
from lattice_client.graph.outputs import TaskOutput

MAX_SHOWN = 60


def check_values(definition: TaskDefinition[..., Any], given: Mapping[str, Any]) -> None:
    """Raise TaskDefinitionError for an input that is certainly of another type than its annotation."""
    hints = definition.hints
    for name, value in given.items():
        annotation = hints.get(name, Any)
        if annotation is Any:
            continue
        kind = _type_of_output(value) if isinstance(value, TaskOutput) else type(value)
        # The class of a template or a parameter is not the type of the value that replaces it.
        if kind is None or kind not in PLAIN or may_be(annotation, kind):
            continue
        if kind is type(_default_of(definition, name)):
            continue
        shown = repr(value) if len(repr(value)) <= MAX_SHOWN else f"{repr(value)[:MAX_SHOWN]}..."
        text = f"input {name!r} of task {definition.name!r} is {shown}, which is of type {kind.__name__}"
        raise TaskDefinitionError(f"{text}; the function's annotation asks for {named(annotation)}")


def _type_of_output(output: TaskOutput) -> type | None:
    """Return the type of an output by the annotations of its task; None when it may have several types."""
    owner = output.owner
    if not isinstance(owner, LatticeTask) or output.path or output.is_optional:
        return None
    if owner.over:
        return list
    definition = owner.definition
    if "return" not in definition.hints:
        return None
    annotation = definition.hints["return"]
    if definition.returns_value:
        return plain_type_of(annotation)
    return plain_type_of(getattr(annotation, "__annotations__", {}).get(output.output, Any))


def _default_of(definition: TaskDefinition[..., Any], name: str) -> Any:
    found = inspect.signature(definition.function).parameters.get(name)
    return inspect.Parameter.empty if found is None else found.default
