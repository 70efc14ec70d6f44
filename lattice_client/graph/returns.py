"""Owns finding a function's outputs by its return annotation. Rule: an output that may be missing is not declared."""

import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lattice.v1 import task_pb2

MAPPING, VALUE = task_pb2.RETURN_STYLE_MAPPING, task_pb2.RETURN_STYLE_VALUE
EITHER = task_pb2.RETURN_STYLE_UNSPECIFIED


class Returned(NamedTuple):
    """The outputs that a function declares.

    Attributes:
        names: the outputs.
        style: how they are read from the return value.
        may_be_more: whether the function may return others.
        optional: the keys of the returned TypedDict that may be missing.
    """

    names: tuple[str, ...]
    style: task_pb2.ReturnStyle.ValueType
    may_be_more: bool = False
    optional: tuple[str, ...] = ()


def returned(function: Callable[..., Any], outputs: tuple[str, ...] | None, is_params: bool) -> Returned:
    """Return the outputs of a function.

    Args:
        function: the function.
        outputs: the names given to `@task`, if any.
        is_params: whether it takes one dict of inputs; it may then also return a dict of outputs.
    """
    if outputs is not None:
        return Returned(outputs, MAPPING)
    found, namespace = _annotation(function)
    if isinstance(found, type) and issubclass(found, dict) and hasattr(found, "__required_keys__"):  # a TypedDict
        keys = _keys(found, namespace)
        optional = tuple(name for name in keys if not keys[name])
        return Returned(tuple(name for name in keys if keys[name]), MAPPING, bool(optional), optional)
    if not is_params:
        return Returned(("result",), VALUE)
    kind = typing.get_origin(found) or found
    is_unclear = kind in {Any, object, inspect.Parameter.empty, typing.Union, types.UnionType}
    if is_unclear or not isinstance(kind, type) or issubclass(kind, Mapping):
        return Returned((), EITHER, may_be_more=True)
    return Returned(("result",), VALUE)


def _annotation(function: Callable[..., Any]) -> tuple[Any, dict[str, Any]]:
    """Return a function's return annotation, empty when it cannot be evaluated, and the function's globals."""
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if not isinstance(function, types.FunctionType | types.MethodType):
        function = type(function).__call__
    namespace = getattr(function, "__globals__", {})
    try:
        found = function.__annotations__["return"]
        # It is evaluated alone, because a parameter's annotation may be one that cannot be evaluated.
        alone = types.SimpleNamespace(__annotations__={"return": found})
        return typing.get_type_hints(alone, namespace)["return"], namespace
    except Exception:  # evaluating an annotation runs code of the user
        return inspect.Parameter.empty, namespace


def _keys(found: type, namespace: dict[str, Any]) -> dict[str, bool]:
    """Return the keys of a TypedDict, each with whether it is always present."""
    required: frozenset[str] = vars(found)["__required_keys__"]
    try:
        # A class whose annotations are texts does not know which keys are marked.
        hints = typing.get_type_hints(found, localns=namespace, include_extras=True)
    except Exception:  # a name in an annotation is not defined here
        hints = dict(found.__annotations__)
    marks = {name: typing.get_origin(hint) for name, hint in hints.items()}
    return {
        name: mark is typing.Required or (name in required and mark is not typing.NotRequired)
        for name, mark in marks.items()
    }
