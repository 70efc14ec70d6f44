"""Owns the checks of names in a graph. Rule: a name that no message of the contract can hold raises at once."""

import functools
from collections.abc import Iterable, Mapping
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


def items_of(where: str, what: str, value: object) -> list[Any]:
    """Return the items of a list, or of another iterable of items. Raises TaskDefinitionError, which says `what`."""
    if (
        isinstance(value, str | bytes | bytearray | Mapping)
        or not isinstance(value, Iterable)
        or isinstance(value, type)
    ):
        raise TaskDefinitionError(f"{where} must be {what}, not {value!r}")
    return list(value)


def texts_of(where: str, what: str, value: object) -> list[str]:
    """Return the texts of a list. Raises TaskDefinitionError unless all of them are valid and not empty."""
    found = items_of(where, what, value)
    if not all(isinstance(item, str) and item for item in found):
        raise TaskDefinitionError(f"{where} must be {what}, not {value!r}")
    for item in found:
        check_text(f"{where}: a text of it", item)
    return found


def text_map_of(where: str, value: object) -> dict[str, str]:
    """Return a dict of texts. Raises TaskDefinitionError."""
    found = dict(value) if isinstance(value, Mapping) else None
    if found is None or not all(isinstance(text, str) for pair in found.items() for text in pair):
        raise TaskDefinitionError(f"{where} must be a dict of texts, not {value!r}")
    for pair in found.items():
        for text in pair:
            check_text(f"{where}: a text of it", text)
    return found


def names_of(label: str, what: str, names: object) -> tuple[str, ...]:
    """Return the names of inputs or outputs. Raises TaskDefinitionError unless they are a list of different texts."""
    where, expected = f"task {label!r}: {what}", "a list of different names"
    found = texts_of(where, expected, names)
    if len(set(found)) != len(found):
        raise TaskDefinitionError(f"{where} must be {expected}, not {names!r}")
    return tuple(found)


def function_name(function: Any) -> str:
    """Return the name of a function; of a partial function the name of the wrapped one."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__name__", type(function).__name__))
