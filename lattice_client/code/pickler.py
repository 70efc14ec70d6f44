"""Owns how code that lives in one process only is pickled: cloudpickle, and the kinds of objects it cannot write.

Rule: pickle and cloudpickle alone read what is written here. The client and the runner each have this file.

A pickled function is a series of pickles: the function; dicts of names and values for its `__main__` module, which
share the function's memo, and None after the last; and a dict of facts, which stands alone: `sources`, the lines of its
source text by file and number, and `left_out`, the modules that were not sent, each with the reason.
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
# The file name that cloudpickle writes into all code.
BLANK = "<dynamic-code>"
STANDARD = os.path.dirname(os.__file__)
NAMES = re.compile(r"[^\W\d]\w*")
MAX_SOURCE_BYTES = 256 * 1024


def _named(rebuild: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a reducer of objects that pickle would only name: it names those that another process can import."""

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
        # As state, because what is in the cell may lead back to it.
        return CellType, (), (None, {"cell_contents": cell.cell_contents})
    except ValueError:  # it is empty
        return CellType, ()


def _module(module: ModuleType) -> Any:
    if module.__name__ in MAIN:
        return importlib.import_module, ("__main__",)
    return cloudpickle.Pickler.dispatch_table[ModuleType](module)


def _cached(function: Any) -> Any:
    found = function.cache_parameters()
    # What `functools.lru_cache` itself calls; the copy's cache is empty.
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
    """Return the arguments from which a class is made anew, completed."""
    if meta.__name__ == "_TypedDictMeta" and bases == (dict,):
        # What it inherits from others of its kind is its own as well.
        bases = (sys.modules[meta.__module__].TypedDict,)
    if "__slots__" in vars(cls) and typing.NamedTuple not in bases:
        # Without them, instances of the class that is made have a dict.
        members["__slots__"] = cls.__slots__
    return meta, name, bases, members, *more


class Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickles values; functions and classes that no other process can import are written whole."""

    dispatch_table: ClassVar = ChainMap(REDUCERS, *cloudpickle.Pickler.dispatch_table.maps)

    def __init__(self, file: Any, buffer_callback: Callable[[Any], Any] | None = None) -> None:
        super().__init__(file, protocol=5, buffer_callback=buffer_callback)
        # In a child of `multiprocessing` the script is a module of that name; elsewhere the name is an alias.
        if (script := sys.modules.get("__mp_main__")) is not None and script.__name__ == "__mp_main__":
            cloudpickle.register_pickle_by_value(script)

    def reducer_override(self, obj: Any) -> Any:
        """Return how to write a function or a class."""
        kind = type(obj)
        if kind is not FunctionType and not issubclass(kind, type):
            return NotImplemented
        if obj is functools._CacheInfo:
            return "_CacheInfo"  # its own name is another
        reduced = super().reducer_override(obj)
        if reduced is NotImplemented:
            return reduced
        make, args, *rest = reduced
        if make.__name__ == "_make_function":
            # Its own cells instead of copies: functions that share a variable still do.
            return make, (*args[:-1], obj.__closure__), *rest
        if make.__name__ == "_make_skeleton_class":
            return make, _class(obj, *args), *rest
        return reduced


def dumps(value: Any, buffer_callback: Callable[[Any], Any] | None = None) -> bytes:
    """Return a value's pickle."""
    file = io.BytesIO()
    Pickler(file, buffer_callback).dump(value)
    return file.getvalue()


class FunctionPickler(Pickler):
    """Pickles one function, and notes what it takes to run it elsewhere.

    `modules` are those that are imported to load it; `codes` all code that is written whole.
    """

    def __init__(self, function: Any) -> None:
        self._file = io.BytesIO()
        super().__init__(self._file)
        self.modules: set[str] = set()
        self.codes: list[CodeType] = []
        self._function = function
        self._script = vars(sys.modules["__main__"])
        # All functions of the script have the loading process's `__main__` for their globals.
        self._globals = _Globals()
        self.globals_ref[id(self._script)] = self._globals
        self._brought: dict[str, Any] = {}
        self._annotated: dict[str, None] = {}

    def reducer_override(self, obj: Any) -> Any:
        """Return how to write an object, and note what it is."""
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
        """Write the function, and what its `__main__` module has to hold."""
        self.dump(self._function)
        if self._globals:
            self._brought |= {name: self._script[name] for name in MAIN_ATTRIBUTES if name in self._script}
        # Classes that are written bring names of their own.
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
        """Whether a name that only annotations mention can be brought without modules that nothing else needs."""
        probe = FunctionPickler(self._script[name])
        try:
            probe.dump(self._script[name])
        except Exception:
            return False
        needed, there = ({name.partition(".")[0] for name in found} for found in (probe.modules, self.modules))
        return needed <= there | sys.stdlib_module_names

    def sources(self) -> dict[str, dict[int, str]]:
        """Return the lines of all code that is written whole, as far as they are known."""
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
        """Return all that was written, and the facts that are not empty."""
        said = {name: value for name, value in facts.items() if value}
        return self._file.getvalue() + (pickle.dumps(said, protocol=5) if said else b"")


class _Globals(dict[str, Any]):
    """Stands for the globals of the script while its functions are pickled."""


def _lines(code: CodeType) -> Iterator[int]:
    yield from (line for _, _, line in code.co_lines() if line is not None)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _lines(constant)
