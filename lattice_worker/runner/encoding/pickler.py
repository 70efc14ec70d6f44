"""Owns pickling code that other processes cannot import: cloudpickle, and objects that cloudpickle cannot pickle.

Rule: pickle and cloudpickle can load the result. The client and the runner have the same file.

A pickled function is a series of pickles: the function; dicts of names and values for its `__main__` module, which
share the function's memo, and None after the last; and a separate dict of `sources`, the source lines by file and line
number, and `left_out`, the modules that were not sent, each with the reason.
"""

import contextlib
import functools
import importlib
import inspect
import io
import linecache
import os
import pickle
import re
import sys
import typing
import weakref
from collections import ChainMap
from collections.abc import Callable, Iterator
from types import BuiltinFunctionType, CellType, CodeType, FunctionType, ModuleType
from typing import Any, ClassVar

import cloudpickle

MAIN = frozenset({"__main__", "__mp_main__"})
MAIN_ATTRIBUTES = ("__package__", "__file__", "__path__")
# The file name that cloudpickle writes into every code object.
BLANK = "<dynamic-code>"
STANDARD = os.path.dirname(os.__file__)
NAMES = re.compile(r"[^\W\d]\w*")
MAX_SOURCE_BYTES = 256 * 1024
PARENT_NAMESPACE = "__pydantic_parent_namespace__"


def _named(rebuild: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reducer that writes an importable object as its name, and rebuilds any other object."""

    def reduce(obj: Any) -> Any:
        module = getattr(obj, "__module__", None)
        name = str(getattr(obj, "__qualname__", None) or getattr(obj, "__name__", None))
        found: Any = sys.modules.get(module or "")
        for part in name.split("."):
            found = getattr(found, part, None)
        is_own = module in MAIN or module in cloudpickle.list_registry_pickle_by_value()
        return rebuild(obj) if is_own or found is not obj else name

    return reduce


def _code(code: CodeType) -> Any:
    make, args = cloudpickle.Pickler.dispatch_table[CodeType](code)
    return make, tuple(code.co_filename if arg == BLANK else arg for arg in args)


def _cell(cell: CellType) -> Any:
    try:
        # As state, because the content may refer to the cell.
        return CellType, (), (None, {"cell_contents": cell.cell_contents})
    except ValueError:  # the cell is empty
        return CellType, ()


def _module(module: ModuleType) -> Any:
    if module.__name__ in MAIN:
        return importlib.import_module, ("__main__",)
    return cloudpickle.Pickler.dispatch_table[ModuleType](module)


def _cached(function: Any) -> Any:
    found = function.cache_parameters()
    # The class that `functools.lru_cache` calls; the cache of the copy is empty.
    args = (function.__wrapped__, found["maxsize"], found["typed"], functools._CacheInfo)
    return functools._lru_cache_wrapper, args, vars(function)


def _new_type(made: typing.NewType) -> Any:
    return typing.NewType, (made.__name__, made.__supertype__), vars(made)


REDUCERS: dict[type, Callable[[Any], Any]] = {
    CodeType: _code,
    CellType: _cell,
    ModuleType: _module,
    functools._lru_cache_wrapper: _named(_cached),
    # Its lock cannot be pickled.
    functools.cached_property: lambda found: (functools.cached_property, (found.func,), {"attrname": found.attrname}),
    typing.NewType: _named(_new_type),
    typing.ParamSpec: _named(lambda found: (typing.ParamSpec, (found.__name__,))),
    typing.TypeVarTuple: _named(lambda found: (typing.TypeVarTuple, (found.__name__,))),
    weakref.WeakKeyDictionary: lambda found: (weakref.WeakKeyDictionary, (dict(found),)),
    weakref.WeakValueDictionary: lambda found: (weakref.WeakValueDictionary, (dict(found),)),
}


def _class(
    cls: Any, meta: Any, name: str, bases: tuple[Any, ...], members: dict[str, Any], *more: Any
) -> tuple[Any, ...]:
    """Return the complete arguments for creating a class again."""
    # Without it a class in a function or in a class has another name there, which no retry policy names.
    members["__qualname__"] = cls.__qualname__
    if meta.__name__ == "_TypedDictMeta" and bases == (dict,):
        # A TypedDict has the inherited keys as its own.
        bases = (sys.modules[meta.__module__].TypedDict,)
    if "__slots__" in vars(cls) and typing.NamedTuple not in bases:
        # Without them, instances of the new class have a `__dict__`.
        members["__slots__"] = cls.__slots__
    return meta, name, bases, members, *more


# Each returns the reduction of an object that another library makes, or None.
OVERRIDES: list[Callable[[Any], Any]] = []


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles values. Functions and classes that no other process can import are pickled by value."""

    dispatch_table: ClassVar = ChainMap(REDUCERS, *cloudpickle.Pickler.dispatch_table.maps)

    def __init__(self, file: Any, buffer_callback: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        # In a child of `multiprocessing` the script has this module name; elsewhere the name is an alias.
        if (script := sys.modules.get("__mp_main__")) is not None and script.__name__ == "__mp_main__":
            cloudpickle.register_pickle_by_value(script)

    def reducer_override(self, obj: Any) -> Any:
        """Return the reduction of a function, a class, or an object with a reduction in `OVERRIDES`."""
        for override in OVERRIDES:
            if (found := override(obj)) is not None:
                return found
        kind = type(obj)
        if kind is not FunctionType and not issubclass(kind, type):
            return NotImplemented
        if obj is functools._CacheInfo:
            return "_CacheInfo"  # its `__name__` differs from the attribute
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented:
            return reduced
        make, args, *rest = reduced
        if make.__name__ == "_make_function":
            # The cells themselves instead of copies, so that functions still share variables.
            return make, (*args[:-1], obj.__closure__), *rest
        if make.__name__ == "_make_skeleton_class":
            (attributes, *more), *others = rest
            if PARENT_NAMESPACE in attributes and getattr(obj, "__pydantic_complete__", False):
                # The variables of the function that made the class; only an incomplete class looks names up there.
                del attributes[PARENT_NAMESPACE]
            return make, _class(obj, *args), (attributes, *more), *others
        return reduced


def dumps(value: Any, buffer_callback: Callable[[Any], Any] | None = None) -> bytes:
    """Return a value's pickle."""
    file = io.BytesIO()
    Pickler(file, buffer_callback).dump(value)
    return file.getvalue()


class FunctionPickler(Pickler):
    """Pickles one function, and collects the modules and names that it needs.

    `modules` are the modules that loading imports; `codes` are the code objects in the pickle.
    """

    def __init__(self, function: Any) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self.modules: set[str] = set()
        self.codes: list[CodeType] = []
        self._function = function
        self._script = vars(sys.modules["__main__"])
        # The globals of all functions of the script are the `__main__` of the process that loads them.
        self._globals = _Globals()
        self.globals_ref[id(self._script)] = self._globals
        self._brought: dict[str, Any] = {}
        self._annotated: dict[str, None] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Return the reduction of an object, and collect its module, code and names."""
        if obj is self._globals:
            return vars, (sys.modules["__main__"],)
        reduced = super().reducer_override(obj)
        if not isinstance(obj, FunctionType | type):
            if isinstance(obj, ModuleType):
                self._refer(obj.__name__)
            else:
                self._refer((obj if isinstance(obj, BuiltinFunctionType) else type(obj)).__module__)
        elif reduced is NotImplemented or isinstance(reduced, str):
            self._refer(obj.__module__)
        else:
            self._note(obj)
        return reduced

    def _refer(self, module: Any) -> None:
        if isinstance(module, str) and module not in MAIN:
            self.modules.add(module)

    def _note(self, obj: Any) -> None:
        if isinstance(obj, FunctionType):
            self.codes.append(obj.__code__)
            linecache.checkcache(obj.__code__.co_filename)
            linecache.lazycache(obj.__code__.co_filename, obj.__globals__)
        if obj.__module__ not in MAIN:
            return
        name = str(obj.__qualname__)
        if obj is self._function or self._script.get(name) is obj:
            self._brought[name] = obj
        with contextlib.suppress(Exception):  # annotations are expressions
            for annotation in inspect.get_annotations(obj).values():
                self._annotated |= dict.fromkeys(NAMES.findall(str(annotation)))

    def dump_function(self) -> None:
        """Write the function, and the names that its `__main__` module needs."""
        self.dump(self._function)
        if self._globals:
            self._brought |= {name: self._script[name] for name in MAIN_ATTRIBUTES if name in self._script}
        # Pickled classes may need further names.
        written: set[str] = set()
        while True:
            for name in [name for name in self._annotated if name in self._script and name not in self._brought]:
                if self._is_at_hand(name):
                    self._brought[name] = self._script[name]
            self._annotated.clear()
            if not (names := self._brought.keys() - written):
                break
            written |= names
            self.dump({name: self._brought[name] for name in sorted(names)})
        self.dump(None)

    def _is_at_hand(self, name: str) -> bool:
        """Whether the value of a name used only in annotations needs no further modules."""
        probe = FunctionPickler(self._script[name])
        try:
            probe.dump(self._script[name])
        except Exception:
            return False
        needed, there = ({name.partition(".")[0] for name in found} for found in (probe.modules, self.modules))
        return needed <= there | sys.stdlib_module_names

    def sources(self) -> dict[str, dict[int, str]]:
        """Return the source lines of all code in the pickle, as far as they are available."""
        found: dict[str, dict[int, str]] = {}
        size = 0
        for code in self.codes:
            if code.co_filename.startswith(STANDARD) or "site-packages" in code.co_filename:
                continue
            lines = linecache.getlines(code.co_filename)
            first, last = code.co_firstlineno, max(_lines(code), default=0)
            text = "".join(lines[first - 1 : last])
            size += len(text)
            if text and size <= MAX_SOURCE_BYTES:
                found.setdefault(code.co_filename, {})[first] = text
        return {name: dict(sorted(found[name].items())) for name in sorted(found)}

    def getvalue(self, **facts: Any) -> bytes:
        """Return the pickles, and the facts that are not empty."""
        said = {name: value for name, value in facts.items() if value}
        return self._file.getvalue() + (pickle.dumps(said, protocol=5) if said else b"")


class _Globals(dict[str, Any]):
    """Replaces the globals of the script while its functions are pickled."""


def _lines(code: CodeType) -> Iterator[int]:
    yield from (line for _, _, line in code.co_lines() if line is not None)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)
