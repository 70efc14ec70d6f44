"""Owns the checks of names in a graph. Rule: a name that no message of the contract can hold raises at once."""

import functools
from collections.abc import Sequence
from typing import Any

from lattice_client.errors import TaskDefinitionError


def check_text(what: str, value: object) -> None:
    """Raise TaskDefinitionError unless a value is a text in valid Unicode. `what` names it in the error."""
    if not isinstance(value, str):
        raise TaskDefinitionError(f"{what} must be a text, not {value!r}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise TaskDefinitionError(f"{what} must be valid Unicode, not {value!r}") from None


def names_of(label: str, what: str, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of inputs or outputs. Raises TaskDefinitionError unless they are a list of different texts."""
    found = [] if isinstance(names, str) else list(names)
    if isinstance(names, str) or len(set(found)) != len(found) or not all(isinstance(n, str) and n for n in found):
        raise TaskDefinitionError(f"task {label!r}: {what} must be a list of different names, not {names!r}")
    for name in found:
        check_text(f"task {label!r}: a name among its {what}", name)
    return tuple(found)


def function_name(function: Any) -> str:
    """Return the name of a function; of a partial function the name of the wrapped one."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
