"""Owns the tasks that return a list, so that its items are known one by one.

Rule: such a task has the modules and the level of isolation of the mapped task, so that it decodes the same values.
"""

from functools import partial
from typing import Any

from lattice_client.graph.definition import TaskDefinition, define

# The options of a task that decide which values it can decode.
DECODING = ("isolation", "modules", "exclude")


def relay_of(definition: TaskDefinition[..., Any]) -> TaskDefinition[..., Any]:
    """Return a task `items`, which returns its input `values`, a list of inputs of another task."""

    def items(values):  # type: ignore[no-untyped-def]  # without annotations, its input is any value
        return values

    function: Any = definition.function
    while isinstance(function, partial):
        function = function.func
    # The files of this module are sent with it: items are often of its classes.
    items.__module__ = getattr(function, "__module__", None) or type(function).__module__
    options = {name: found for name in DECODING if (found := definition.given_options.get(name)) is not None}
    return define(items, cpu=0, **options)
