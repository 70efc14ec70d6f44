"""Owns the reading of a function's signature. Rule: a function that cannot be called as a task raises at once."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.names import names_of


class Accepted(NamedTuple):
    """The inputs that a function accepts. `is_params`: they are one dict; `takes_any`: others may be given as well."""

    names: tuple[str, ...]
    required: frozenset[str]
    takes_any: bool
    is_params: bool


def accepted_inputs(function: Callable[..., Any], label: str, inputs: Sequence[str] | None) -> Accepted:
    """Return the inputs of a function, by the declared names or else by its parameters. Raises TaskDefinitionError."""
    parameters = _parameters_of(function, label)
    if inputs is not None or list(parameters) == ["params"]:
        names = names_of(label, "inputs", () if inputs is None else inputs)
        _check_params(label, parameters, names)
        return Accepted(names, frozenset(names), inputs is None, True)
    kinds = {p.name: p for p in parameters.values() if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY}}
    _check_keywords(label, parameters)
    required = frozenset(name for name, p in kinds.items() if p.default is p.empty)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return Accepted(tuple(kinds), required, takes_any, False)


def _parameters_of(function: Callable[..., Any], label: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function. Raises TaskDefinitionError for a function without a signature."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError) as error:
        text = f"it has no signature ({error}); call it in a function of your own and make that function the task"
        raise TaskDefinitionError(f"task {label!r}: {text}") from error


def _check_params(label: str, parameters: Mapping[str, inspect.Parameter], names: Sequence[str]) -> None:
    """Raise TaskDefinitionError unless a function can be called with one dict of inputs of these names."""
    first = next(iter(parameters.values()), None)
    if first is not None and first.kind not in {first.KEYWORD_ONLY, first.VAR_KEYWORD} and first.name not in names:
        others = [p for p in parameters.values() if p is not first and p.default is p.empty]
        if all(p.kind in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in others):
            return
    text = "with inputs=[...] the function is called with one dict of all inputs: def f(params)"
    raise TaskDefinitionError(f"task {label!r}: {text}; leave inputs= out for a function that takes each by its name")


def _check_keywords(label: str, parameters: Mapping[str, inspect.Parameter]) -> None:
    """Raise TaskDefinitionError unless a function can be called with each input by its name."""
    for found in parameters.values():
        if found.kind is found.POSITIONAL_ONLY and found.default is found.empty:
            text = f"its parameter {found.name!r} is positional-only, and inputs are given by keyword"
            raise TaskDefinitionError(f"task {label!r}: {text}; call it in a function of your own")


def check_returns(label: str, function: Any, *, is_batched: bool) -> None:
    """Raise TaskDefinitionError for a batched asynchronous generator function: a batch returns its items at once."""
    called = function
    while isinstance(called, functools.partial):
        called = called.func
    if not inspect.isroutine(called) and not isinstance(called, type):
        called = type(called).__call__
    if is_batched and inspect.isasyncgenfunction(called):
        text = "is an asynchronous generator function, and a batch returns the values of its members at once"
        raise TaskDefinitionError(f"task {label!r} {text}: return a list of them, and stream with context.emit")


def check_combine(label: str, combine: object, *, is_batched: bool) -> None:
    """Raise TaskDefinitionError unless an option `combine` is None, or a function for a task that is not batched."""
    if combine is not None and not callable(combine):
        raise TaskDefinitionError(f"task {label!r}: combine must be a function of the list of chunks, not {combine!r}")
    if combine is not None and is_batched:
        raise TaskDefinitionError(f"task {label!r}: combine is for a generator function, which cannot be batched")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a function is a coroutine function, or an asynchronous generator function."""
    return inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function)


def named_arguments(
    function: Callable[..., Any], label: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a call by name; arguments may be missing. Raises TaskDefinitionError for a wrong one."""
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
                text = f"inputs are given by name, and {value!r} of *{name} have none; take one list in their place"
                raise TaskDefinitionError(f"task {label!r}: {text}")
            case _:
                found[name] = value
    return found
