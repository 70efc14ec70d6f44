"""Owns what keeps a function from being a task: its signature, or how it returns. Rule: it is said at once."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lattice_client.errors import TaskDefinitionError


def parameters_of(function: Callable[..., Any], label: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function. Raises TaskDefinitionError when Python knows none."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        text = f"Python knows no signature of it ({error}); call it in a function of your own and make that the task"
        raise TaskDefinitionError(f"task {label!r}: {text}") from error


def check_params(label: str, parameters: Mapping[str, inspect.Parameter], names: Sequence[str]) -> None:
    """Raise TaskDefinitionError unless a function can be called with one dict of inputs of these names."""
    first = next(iter(parameters.values()), None)
    if first is not None and first.kind not in {first.KEYWORD_ONLY, first.VAR_KEYWORD} and first.name not in names:
        others = [p for p in parameters.values() if p is not first and p.default is p.empty]
        if all(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in others):
            return
    text = "with inputs=[...] the function is called with one dict that has them all: def f(params)"
    raise TaskDefinitionError(f"task {label!r}: {text}; leave inputs= out for a function that takes each by its name")


def check_keywords(label: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise TaskDefinitionError unless a function can be called with each input by its name."""
    for found in parameters.values():
        if found.kind is found.POSITIONAL_ONLY and found.default is found.empty:
            text = f"its parameter {found.name!r} is positional-only, and inputs are given by keyword"
            raise TaskDefinitionError(f"task {label!r}: {text}; call it in a function of your own")


def check_returns(label: str, function: Any, *, is_batched: bool) -> None:
    """Raise TaskDefinitionError for a generator function, but one whose items are those of a batch."""
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    if not inspect.isroutine(called) and not isinstance(called, type):
        called = type(called).__call__
    if inspect.isasyncgenfunction(called) or (inspect.isgeneratorfunction(called) and not is_batched):
        text = "is a generator function, whose values come one by one; a task returns once"
        raise TaskDefinitionError(f"task {label!r} {text}: collect them in a list and return that")


def named_arguments(
    function: Callable[..., Any], label: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name; some may be missing. Raises TaskDefinitionError for others."""
    signature = inspect.signature(function)
    try:
        arguments = signature.bind_partial(*args, **kwargs).arguments
    except TypeError as error:
        known = ", ".join(signature.parameters) or "none"
        raise TaskDefinitionError(f"task {label!r}: {error}; its parameters: {known}") from None
    found: dict[str, Any] = {}
    for name, value in arguments.items():
        match signature.parameters[name].kind:
            case inspect.Parameter.VAR_KEYWORD:
                found.update(value)
            case inspect.Parameter.VAR_POSITIONAL:
                raise TaskDefinitionError(f"task {label!r}: inputs have names, and {value!r} would have none")
            case _:
                found[name] = value
    return found
