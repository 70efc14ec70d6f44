"""Owns the comparison of values with type annotations. Rule: only a value of a certainly wrong type does not match.

Annotations are often imprecise: any number matches a number type, any collection a collection type. An annotation that
cannot be evaluated, or that names a class other than Python's own, matches every value.
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
    """Return the annotations of a function's parameters by name, and of its return value under `return`.

    A decorated function may change arguments and the return value, so that its annotations are ignored.
    """
    if isinstance(function, types.MethodType):
        function = function.__func__
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        return {}
    found: dict[str, Any] = {}
    for name, annotation in function.__annotations__.items():
        # Each is evaluated alone, because one that cannot be evaluated must not hide the others.
        alone = types.SimpleNamespace(__annotations__={name: annotation})
        try:
            found[name] = typing.get_type_hints(alone, function.__globals__)[name]
        except Exception:  # evaluating an annotation runs code of the user
            continue
    return found


def may_be(annotation: Any, kind: type) -> bool:
    """Whether a value of one of the types PLAIN may match an annotation."""
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


def plain_type_of(annotation: Any) -> type | None:
    """Return the single type of PLAIN that an annotation allows; None when it allows others.

    None also for the annotation None: the output of such a function is wired to order tasks.
    """
    origin = typing.get_origin(annotation) or annotation
    if origin is types.NoneType:
        return None
    if typing.is_typeddict(origin):
        return dict
    return origin if isinstance(origin, type) and origin in PLAIN else None


def named(annotation: Any) -> str:
    """Return an annotation as source text."""
    return inspect.formatannotation(annotation)
