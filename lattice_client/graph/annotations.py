"""Owns what annotations say of the values of inputs. Rule: only what is certainly of another kind is refused.

Annotations are not always true: numbers stand for numbers, and collections for collections. An annotation that cannot
be read, or whose class is not one of Python's own, says nothing.
"""

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any

COLLECTIONS = frozenset({list, tuple, set, frozenset})
NUMBERS = frozenset({bool, int, float, complex})
PLAIN = frozenset({str, bytes, dict, types.NoneType, *COLLECTIONS, *NUMBERS})
ABSTRACT = "collections.abc"


def hints_of(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Return what a function's parameters are annotated with, and under `return` what it returns.

    A function that stands for another one, as those of decorators do, may change the values of either: it says nothing.
    """
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return {}
    found: dict[str, Any] = {}
    for name, annotation in function.__annotations__.items():
        # By itself: one that cannot be read says nothing about the others.
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found[name] = typing.get_type_hints(alone, function.__globals__)[name]
        except Exception:  # any text can stand there, and reading it runs it
            continue
    return found


def may_be(annotation: Any, kind: type) -> bool:
    """Whether a value of a plain kind may stand where an annotation asks for one."""
    origin = typing.get_origin(annotation) or annotation
    if origin in {typing.Union, types.UnionType}:
        return any(may_be(one, kind) for one in typing.get_args(annotation))
    if origin is typing.Literal:
        return any(may_be(type(one), kind) for one in typing.get_args(annotation))
    if origin is None:
        return kind is types.NoneType
    if not isinstance(origin, type):
        return True
    if typing.is_typeddict(origin):
        return kind is dict
    if origin in PLAIN:
        return kind is origin or any({kind, origin} <= group for group in (COLLECTIONS, NUMBERS))
    return origin.__module__ != ABSTRACT or issubclass(kind, origin)


def kind_of(annotation: Any) -> type | None:
    """Return the one plain kind that a value of an annotation has; None when there may be others.

    Of a function that returns nothing too: its output is wired for the order of tasks.
    """
    origin = typing.get_origin(annotation) or annotation
    if origin is types.NoneType:
        return None
    if typing.is_typeddict(origin):
        return dict
    return origin if isinstance(origin, type) and origin in PLAIN else None


def named(annotation: Any) -> str:
    """Return an annotation as it is written."""
    return inspect.formatannotation(annotation)
