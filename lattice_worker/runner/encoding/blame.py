"""Which part of a value keeps it from being pickled. Rule: its parts are tried one by one, inwards."""

from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from lattice_worker.runner.encoding import pickler
from lattice_worker.runner.encoding.text import message_of, type_name, utf8

MAX_DEPTH = 8
# Of one value: a list may have millions of items, each of which takes a pickler of its own.
MAX_PARTS = 10_000


def refusal(what: str, value: Any, error: BaseException, dump: Callable[[Any], object] = pickler.dumps) -> str:
    """Return that a value cannot be pickled, and which part of it cannot.

    It runs code of the value's own, which has failed before.

    Args:
        what: a description of the value, such as an output by name.
        value: the value.
        error: why it cannot be pickled.
        dump: raises for a part of it that cannot be pickled.
    """
    path, found = _path(value, dump)
    return f"{', '.join([what, *path])} ({type_name(type(found))}) cannot be pickled: {message_of(error)}"


def _path(value: Any, dump: Callable[[Any], object]) -> tuple[list[str], Any]:
    """Return the names that lead to the part of a value that is at fault, and that part."""
    path: list[str] = []
    found, seen = value, {id(value)}
    while (fault := _fault(found, seen, dump)) is not None:
        if len(path) == MAX_DEPTH:  # it is the nesting that is at fault
            return [], value
        name, found = fault
        seen.add(id(found))
        path.append(utf8(name))
    return path, found


def _fault(value: Any, seen: set[int], dump: Callable[[Any], object]) -> tuple[str, Any] | None:
    try:
        parts = islice(_parts(value), MAX_PARTS)
        return next(((name, part) for name, part in parts if id(part) not in seen and not _can(dump, part)), None)
    except BaseException:  # the value cannot be looked into
        return None


def _can(dump: Callable[[Any], object], value: Any) -> bool:
    try:
        dump(value)
    except BaseException:  # SystemExit too: pickling runs code of the value's own
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield f"entry {key!r}", item
    elif isinstance(value, list | tuple | set | frozenset):
        for place, item in enumerate(value):
            yield f"item {place}", item
    else:
        for name, item in getattr(value, "__dict__", {}).items():
            yield f"attribute {name!r}", item
