"""Owns the search for the part of a function or a value that cannot be pickled.

Rule: the parts are pickled one by one, from the outside to the inside, until one raises an error of its own class.
"""

import dis
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from types import CodeType, FunctionType, MethodType
from typing import Any

from lattice_client.code import pickler
from lattice_client.errors import LatticeError

PACKAGE = os.path.dirname(os.path.dirname(__file__)) + os.sep
GLOBAL_STEPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})
MAX_DEPTH = 8
# The most parts of one value: a list may have millions of items, and each needs a pickler.
MAX_PARTS = 10_000


def blame(function: Any, error: Exception) -> str:
    """Return the part of a task's function that cannot be sent, and how to correct it."""
    path, found = _path(function, lambda part: pickler.dumps(part, [].append))
    if len(path) > 1 and isinstance(function, FunctionType) and function.__code__.co_filename.startswith(PACKAGE):
        path = path[1:]  # The function of the user within one of this package.
    if not path:
        return f"cannot be sent to a worker: {error}"
    if (own := _own_refusal(found)) is not None:
        return f"uses {', '.join(path)}{_told(own, ', which')}"
    text = f"uses {', '.join(path)} ({_kind(found)}), which cannot be pickled; create it inside the function"
    return text if type(error) is TypeError and "cannot pickle" in str(error) else f"{text}: {error}"


def blame_value(where: str, value: Any, error: Exception, dump: Callable[[Any], object], advice: str = "") -> str:
    """Return the part of a value that cannot be sent.

    Args:
        where: the name of the value in the message, such as the name of an input.
        value: the value.
        error: the error of pickling the value.
        dump: pickles a part; raises for a part that cannot be sent.
        advice: how to correct it, unless the class of the value says so itself.
    """
    path, found = _path(value, dump)
    where = ", ".join([where, *path])
    if (own := _own_refusal(found)) is not None:
        return f"{where}{_told(own)}"
    return f"{where} ({_kind(found)}) cannot be pickled: {error}{advice and '; '}{advice}"


def _path(value: Any, dump: Callable[[Any], object]) -> tuple[list[str], Any]:
    """Return the path to the part of a value that cannot be pickled, and that part."""
    path: list[str] = []
    found, seen = value, {id(value)}
    while _own_refusal(found) is None:
        parts = islice(_parts(found), MAX_PARTS)
        fault = next(((name, part) for name, part in parts if id(part) not in seen and not _can(dump, part)), None)
        if fault is None:
            break
        if len(path) == MAX_DEPTH:  # the value is nested too deep
            return [], value
        name, found = fault
        seen.add(id(found))
        path.append(name)
    return path, found


def _own_refusal(value: Any) -> Exception | None:
    """Return the error that the value's own class raises when it is pickled."""
    if isinstance(value, type):
        return None
    for name, args in (("__reduce_ex__", (5,)), ("__reduce__", ())):
        if isinstance(method := getattr(type(value), name), FunctionType):
            try:
                method(value, *args)
            except Exception as error:
                return error
    return None


def _told(own: Exception, which: str = "") -> str:
    """Return the error of a class that refuses to be pickled; the topic is added unless its text names it."""
    if isinstance(own, LatticeError) or "pickle" in str(own):
        return f": {own}"
    return f"{which} cannot be pickled: {type(own).__name__}: {own}"


def _kind(value: Any) -> str:
    kind = type(value)
    is_plain = kind.__module__ in {"builtins", "__main__"}
    return kind.__qualname__ if is_plain else f"{kind.__module__}.{kind.__qualname__}"


def _can(dump: Callable[[Any], object], value: Any) -> bool:
    try:
        dump(value)
    except Exception:
        return False
    return True


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    match value:
        case FunctionType():
            yield from ((f"global {name!r}", value.__globals__[name]) for name in _globals(value))
            for name, cell in zip(value.__code__.co_freevars, value.__closure__ or (), strict=True):
                try:
                    yield f"variable {name!r} of an enclosing function", cell.cell_contents
                except ValueError:
                    continue  # the cell is empty
            names = value.__code__.co_varnames[: value.__code__.co_argcount]
            defaults = value.__defaults__ or ()
            yield from ((f"the default of {name!r}", d) for name, d in zip(names[::-1], defaults[::-1], strict=False))
            yield from ((f"the default of {name!r}", d) for name, d in (value.__kwdefaults__ or {}).items())
            yield from _attributes(vars(value))
        case MethodType():
            yield "its object", value.__self__
            yield "its function", value.__func__
        case functools.partial():
            yield "its function", value.func
            yield from ((f"argument {place + 1}", argument) for place, argument in enumerate(value.args))
            yield from ((f"argument {name!r}", argument) for name, argument in value.keywords.items())
        case Mapping():
            yield from ((f"entry {key!r}", item) for key, item in value.items())
        case list() | tuple() | set() | frozenset():
            yield from ((f"item {place}", item) for place, item in enumerate(value))
        case staticmethod() | classmethod():
            yield "its function", value.__func__
        case property():
            yield "its function", value.fget
        case _:
            yield from _attributes(getattr(value, "__dict__", {}))
            if not isinstance(value, type):
                yield "its class", type(value)


def _attributes(found: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((f"attribute {name!r}", item) for name, item in found.items())


def _globals(function: FunctionType) -> dict[str, None]:
    def names(code: CodeType) -> Iterator[str]:
        yield from (step.argval for step in dis.get_instructions(code) if step.opname in GLOBAL_STEPS)
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                yield from names(constant)

    return dict.fromkeys(name for name in names(function.__code__) if name in function.__globals__)
