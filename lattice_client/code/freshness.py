"""Owns the check whether a task's code changed since it was pickled. Rule: the check runs no code of the user.

It compares the function; the functions and classes that are sent with it because no worker can import them; their
closures, defaults and the globals they name. Objects are compared by identity; numbers, texts and builtin containers of
up to 64 KiB by value; modules by their files. A change within any other object is not detected.
"""

import dis
import functools
import marshal
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

LIMIT_BYTES = 64 * 1024
LIMIT_ITEMS = 8192
# A format that does not depend on the number of references to an object.
MARSHAL_VERSION = 2
SCALARS = frozenset({int, float, complex, str, bytes, bool, type(None)})
CONTAINERS = frozenset({list, dict, set, frozenset, tuple, bytearray})
MAIN = frozenset({"__main__", "__mp_main__"})
NAMES = re.compile(r"[^\W\d]\w*")
NAMING = frozenset({"LOAD_GLOBAL", "LOAD_NAME"})
ABSENT = object()

# The path of a file, its modification time in nanoseconds, and its size.
FileState = tuple[str, int, int]
StateOf = Callable[[str], FileState]


class Snapshot:
    """The state of a function, and of all objects it uses, at one time."""

    def __init__(self, function: Any) -> None:
        self._files: tuple[FileState, ...] = ()
        self._functions: list[tuple[types.FunctionType, Any, Any, Any]] = []
        self._cells: list[tuple[types.CellType, Any]] = []
        self._names: list[tuple[Mapping[str, Any], str, Any]] = []
        self._classes: list[tuple[type, int]] = []
        self._contents: list[tuple[Any, Any]] = []
        seen: dict[int, Any] = {}
        owner = function.__self__ if isinstance(function, types.MethodType) else function
        pending = [function, *self._add_names(_attributes(owner))]
        while pending:
            found = pending.pop()
            if id(found) not in seen and type(found) not in SCALARS:
                seen[id(found)] = found
                pending += self._add(found)

    def with_files(self, files: Iterable[FileState]) -> Self:
        """Add the files of modules that are sent with the function."""
        self._files = tuple(files)
        return self

    def is_current(self, state_of: StateOf | None = None) -> bool:
        """Whether nothing changed. `state_of` returns the present state of a file; by default `file_at`."""
        state_of = state_of or file_at
        for function, code, defaults, keyword_defaults in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults:
                return False
            if function.__kwdefaults__ is not keyword_defaults:
                return False
        for names, name, value in self._names:
            if (found := names.get(name, ABSENT)) is not value and not _is_equal(found, value):
                return False
        for cell, value in self._cells:
            if (found := _content(cell)) is not value and not _is_equal(found, value):
                return False
        for found, size in self._classes:
            if _size(found) != size:
                return False
        for container, digest in self._contents:
            if _digest(container) != digest:
                return False
        return all(state_of(file[0]) == file for file in self._files)

    def _add(self, found: Any) -> Iterable[Any]:
        """Add an object; return the objects it uses."""
        if isinstance(found, types.ModuleType) or _is_importable(found):
            return ()
        kind = type(found)
        if kind in CONTAINERS:
            return self._add_container(found)
        match found:
            case types.FunctionType():
                return self._add_function(found)
            case type():
                self._classes.append((found, _size(found)))
                return [*found.__bases__, *self._add_names(vars(found))]
            case types.MethodType():
                return (found.__func__, found.__self__)
            case functools.partial():
                return (found.func, found.args, found.keywords)
            case staticmethod() | classmethod():
                return (found.__func__,)
            case property():
                return (found.fget, found.fset, found.fdel)
        return (kind, _attributes(found).get("__wrapped__"))

    def _add_function(self, found: types.FunctionType) -> Iterator[Any]:
        self._functions.append((found, found.__code__, found.__defaults__, found.__kwdefaults__))
        yield from (found.__defaults__, found.__kwdefaults__, found.__dict__)
        for cell in found.__closure__ or ():
            value = _content(cell)
            self._cells.append((cell, value))
            yield value
        named = set(_globals_of(found.__code__))
        for annotation in found.__annotations__.values():
            yield annotation
            # An annotation that is a text is evaluated with the globals of the function.
            named |= set(NAMES.findall(annotation) if isinstance(annotation, str) else ()) & found.__globals__.keys()
        for name in named:
            # The name may be a builtin, or not be defined yet.
            value = found.__globals__.get(name, ABSENT)
            self._names.append((found.__globals__, name, value))
            yield value

    def _add_names(self, names: Mapping[str, Any]) -> Iterator[Any]:
        for name, value in list(names.items()):
            self._names.append((names, name, value))
            yield value

    def _add_container(self, found: Any) -> Iterable[Any]:
        digest = _digest(found)
        if digest is None:
            return ()
        self._contents.append((found, digest))
        if isinstance(digest, bytes):  # it contains only values
            return ()
        return [*found.keys(), *found.values()] if isinstance(found, dict) else list(found)


def file_at(path: str) -> FileState:
    """Return a file's path, modification time and size; zeros when it does not exist."""
    try:
        found = os.stat(path)
    except OSError:
        return path, 0, 0
    return path, found.st_mtime_ns, found.st_size


def _attributes(found: Any) -> Mapping[str, Any]:
    """Return an object's own attributes, without calling its code."""
    if isinstance(found, type):
        return vars(found)
    try:
        attributes: dict[str, Any] = object.__getattribute__(found, "__dict__")
    except AttributeError:
        return {}
    return attributes


def _size(cls: type) -> int:
    # Pickling an instance adds this attribute to its class.
    return len(vars(cls)) - ("__slotnames__" in vars(cls))


def _is_equal(one: Any, other: Any) -> bool:
    kind = type(one)
    return kind is type(other) and kind in SCALARS and bool(one == other)


def _content(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # the cell is empty
        return ABSENT


def _is_importable(found: Any) -> bool:
    """Whether a function or class is pickled by name: an importable module other than the script has it."""
    if not isinstance(found, types.FunctionType | types.BuiltinFunctionType | type) or found.__module__ in MAIN:
        return False
    place: Any = sys.modules.get(found.__module__ or "")
    for part in found.__qualname__.split("."):
        place = _attributes(place).get(part)
    return place is found


@functools.lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> frozenset[str]:
    """Return the names of globals in a function's code and in its nested functions."""
    found = {step.argval for step in dis.get_instructions(code) if step.opname in NAMING}
    inner = [_globals_of(constant) for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return frozenset(found.union(*inner))


def _digest(container: Any) -> Any:
    """Return a value that differs when a container's content changed; None for a container too large to compare."""
    if len(container) > LIMIT_ITEMS and type(container) is not bytearray:
        return None
    try:
        data = marshal.dumps(container, MARSHAL_VERSION)
    except ValueError:  # it holds other objects, or itself
        outline = _Outline()
        content = outline.of(container)
        return content if outline.items <= LIMIT_ITEMS else None
    return data if len(data) <= LIMIT_BYTES else None


class _Same:
    """Compares an object by identity."""

    __slots__ = ("_value",)

    def __init__(self, value: Any) -> None:
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._value is self._value

    __hash__ = None  # type: ignore[assignment]  # it is never a key


class _Outline:
    """The content of a container as tuples, in which other objects are compared by identity."""

    def __init__(self) -> None:
        self.items = 0
        self._within: dict[int, int] = {}

    def of(self, value: Any) -> Any:
        kind = type(value)
        if kind in SCALARS or self.items > LIMIT_ITEMS:
            return kind, value
        if kind not in CONTAINERS:
            return _Same(value)
        if id(value) in self._within:
            return kind, self._within[id(value)]
        self._within[id(value)] = len(self._within)
        self.items += len(value)
        if kind is dict:
            return kind, tuple((self.of(key), self.of(item)) for key, item in value.items())
        return kind, tuple(map(self.of, value))
