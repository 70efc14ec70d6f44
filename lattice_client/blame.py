"""Owns saying which variable keeps a function from being pickled. Rule: its parts are tried one by one, inwards."""

import dis
import functools
import io
from collections.abc import Iterator, Mapping
from types import CodeType, FunctionType, MethodType
from typing import Any

from lattice_client.errors import TaskDefinitionError
from lattice_client.pickler import Pickler

GLOBAL_STEPS = frozenset({"LOAD_GLOBAL", "STORE_GLOBAL", "DELETE_GLOBAL"})
MAX_DEPTH = 8


def blame(function: Any, error: Exception) -> str:
    """Return what a task does that cannot be sent, and what to do about it."""
    path: list[str] = []
    found, seen = function, {id(function)}
    while len(path) < MAX_DEPTH:
        parts = ((name, part) for name, part in _parts(found) if id(part) not in seen and not _is_picklable(part))
        if (next_part := next(parts, None)) is None:
            break
        name, found = next_part
        seen.add(id(found))
        path.append(name)
    kind = type(found)
    label = (
        kind.__qualname__ if kind.__module__ in {"builtins", "__main__"} else f"{kind.__module__}.{kind.__qualname__}"
    )
    if not path:
        return f"cannot be sent to a worker: {error}"
    if isinstance(error, TaskDefinitionError):  # it says itself what to do
        return f"uses {', '.join(path)}: {error}"
    text = f"uses {', '.join(path)} ({label}), which cannot be pickled; create it inside the function"
    return text if type(error) is TypeError and "cannot pickle" in str(error) else f"{text}: {error}"


def _is_picklable(value: Any) -> bool:
    try:
        Pickler(io.BytesIO()).dump(value)
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
                    continue  # it has no value yet
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
