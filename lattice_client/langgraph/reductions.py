"""Owns the reductions of LangChain's and LangGraph's objects that pickle loses or refuses.

`install` adds them to the pickler of code, since a node's function may refer to such objects too.
"""

import functools
import sys
from types import FunctionType
from typing import Any

from langchain_core.load import Serializable

from lattice_client.code import pickler
from lattice_client.langgraph import proxies, references

STUB = "__lattice_function__"
IS_STUB = "__lattice_stub__"
# Modules that hold bare objects, and a default of nodes, as markers that they compare by identity.
MARKING = ("langgraph", "langchain_core")


def is_in_attempt() -> bool:
    """Whether this code runs in an attempt on a worker: a stub is then the function itself."""
    output = sys.modules.get("lattice_worker.runner.invocation.output")
    return output is not None and output.current.get() is not None


def reduction(obj: Any) -> Any:
    """Return the reduction of an object; None for one that needs no other than its own."""
    kind: Any = type(obj)
    if kind is object or kind.__name__ == "RunnableCallable":
        name = _marker(id(obj))
        if name is not None or kind is object:
            return name and (_attribute, name)
    if (kind is FunctionType or getattr(kind, IS_STUB, False)) and (function := obj.__dict__.get(STUB)) is not None:
        return _same, (function,)
    if not is_in_attempt() and (found := references.captured(obj)) is not None:
        return proxies.captured, found
    if isinstance(obj, Serializable) and _has_lock(obj):
        return _rebuilt, (kind, {name: getattr(obj, name) for name in obj.model_fields_set})
    if _answers_all_names(kind):
        return object.__new__, (kind,), dict(vars(obj)), None, None, _fill
    return None


@functools.lru_cache(maxsize=4096)
def _answers_all_names(kind: Any) -> bool:
    """Whether a class computes missing attributes, and does not pickle itself.

    Unpickling looks `__setstate__` up on the empty instance, where such a class often calls itself without end.
    """
    computes = any("__getattr__" in vars(base) for base in kind.__mro__)
    plain: Any = object
    own = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setstate__", "__getnewargs__")
    return (
        computes
        and kind.__dictoffset__ != 0
        and all(getattr(kind, name, None) is getattr(plain, name, None) for name in own)
    )


def _fill(made: Any, attributes: dict[str, Any]) -> None:
    vars(made).update(attributes)


def _marker(identity: int) -> tuple[str, str] | None:
    found = _markers(len(sys.modules))
    return found.get(identity)


@functools.lru_cache(maxsize=1)
def _markers(_modules: int) -> dict[int, tuple[str, str]]:
    """Return the bare objects of imported modules by identity; computed again when a module was imported."""
    return {
        id(value): (module, name)
        for module, loaded in list(sys.modules.items())
        if module.startswith(MARKING) and loaded is not None
        for name, value in list(vars(loaded).items())
        if type(value) is object or name == "DEFAULT_BOUND"
    }


def _attribute(module: str, name: str) -> Any:
    __import__(module)
    return getattr(sys.modules[module], name)


def _same(value: Any) -> Any:
    return value


def _has_lock(model: Serializable) -> bool:
    """Whether a model, such as a chat model, holds a client that cannot be pickled."""
    holders = (model.__dict__, getattr(model, "__pydantic_private__", None) or {})
    return any(hasattr(value, "_client") or hasattr(value, "acquire") for held in holders for value in held.values())


def _rebuilt(kind: type[Serializable], fields: dict[str, Any]) -> Serializable:
    return kind(**fields)


def install() -> None:
    """Have the pickler of code use these reductions too."""
    if reduction not in pickler.OVERRIDES:
        pickler.OVERRIDES.append(reduction)
