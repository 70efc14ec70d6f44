"""Owns how references in bindings are found and replaced by values. Rule: no value is decoded."""

from collections.abc import Callable

from lattice_server.core.model import (
    Binding,
    BindingList,
    BindingMap,
    OutputRef,
    Parameter,
    Path,
    Payload,
    Selection,
)

Leaf = Payload | OutputRef | Parameter


def leaves(binding: Binding) -> list[Leaf]:
    """Return the values and references in a binding, in order."""
    match binding:
        case BindingList(items):
            return [found for item in items for found in leaves(item)]
        case BindingMap(entries):
            return [found for item in entries.values() for found in leaves(item)]
        case Selection(value):
            return leaves(value)
        case _:
            return [binding]


def part_of(value: Binding, path: Path) -> Binding:
    """Return the part of a known value that a reference selects; the value itself when it selects none."""
    return Selection(value, path) if path else value


def resolve(binding: Binding, value_of: Callable[[OutputRef | Parameter], Binding]) -> Binding:
    """Return `binding` with every reference replaced by the result of `value_of`."""
    match binding:
        case Payload() | Selection():
            return binding
        case OutputRef() | Parameter():
            return value_of(binding)
        case BindingList(items):
            return BindingList(tuple(resolve(item, value_of) for item in items))
        case BindingMap(entries):
            return BindingMap({key: resolve(item, value_of) for key, item in entries.items()})


def inline_bytes(binding: Binding) -> int:
    """Return how many bytes the values in a binding have; references do not count."""
    match binding:
        case Payload(content=str() as text):
            return len(text) if text.isascii() else len(text.encode())
        case Payload(content=bytes() as data):
            return len(data)
        case BindingList(items):
            return sum(map(inline_bytes, items))
        case BindingMap(entries):
            return sum(map(inline_bytes, entries.values()))
        case Selection(value):
            return inline_bytes(value)
        case _:
            return 0
