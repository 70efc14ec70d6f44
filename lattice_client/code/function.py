"""Owns a function as it travels: its pickle, and the bundle of modules that the pickle needs.

Rule: code that cannot be sent is refused here, with the name of the variable that is in the way.
"""

import functools
from typing import Any

from lattice.v1 import task_pb2

from lattice_client.code.blame import blame
from lattice_client.code.bundle import Choice, bundle_for
from lattice_client.code.pickler import FunctionPickler
from lattice_client.errors import TaskDefinitionError


def pack(function: Any, label: str = "task", choice: Choice | None = None) -> tuple[bytes, task_pb2.CodeBundle | None]:
    """Return the pickle of a function and its bundle. Raises TaskDefinitionError, which names the task `label`."""
    pickler = FunctionPickler(function)
    try:
        pickler.dump_function()
    except Exception as error:
        raise TaskDefinitionError(f"task {label!r} {blame(function, error)}") from error
    # Its own module travels in any case: inputs are often instances of classes that are defined there.
    bundle, left_out = bundle_for({*pickler.modules, *_module_of(function)}, pickler.codes, choice)
    return pickler.getvalue(sources=pickler.sources(), left_out=left_out), bundle


def _module_of(function: Any) -> set[str]:
    while isinstance(function, functools.partial):
        function = function.func
    name = getattr(function, "__module__", None)
    return {name} if isinstance(name, str) else set()
