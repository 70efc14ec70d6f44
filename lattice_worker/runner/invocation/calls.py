"""How functions are called: what their signatures say of inputs."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.encoding.values import PayloadError


def takes_params_alone(function: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(function).parameters) == ["params"]
    except (TypeError, ValueError):
        return False


def columns(function: Callable[..., Any], batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the inputs of a batch as one list for each keyword; an input that a member leaves out has its default.

    A parameter that no member gives is a list too, so that the arguments do not depend on the other members. Only a
    value that `functools.partial` has bound is one value for all, and no member may give it.
    """
    bound = _bound(function)
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        parameters = {}.values()
    keywords = [p for p in parameters if p.kind in {p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY} and p.name not in bound]
    defaults = {p.name: p.default for p in keywords if p.default is not p.empty}
    given = dict.fromkeys(name for inputs in batch for name in inputs)
    if clash := [name for name in given if name in bound]:
        text = (
            f"input {clash[0]!r} is bound for the whole batch by functools.partial, and a member of the batch gives it"
        )
        raise PayloadError(f"{text}: leave it out of the inputs, or do not bind it")
    names = dict.fromkeys([*(p.name for p in keywords if p.name in given or p.name in defaults), *sorted(given)])
    missing = [name for name in names if name not in defaults and any(name not in inputs for inputs in batch)]
    if missing:
        raise PayloadError(f"some members of the batch have no input {missing[0]!r}")
    return {name: [inputs[name] if name in inputs else defaults[name] for inputs in batch] for name in names}


def _bound(function: Any) -> set[str]:
    """Return the keywords that `functools.partial` has bound."""
    found: set[str] = set()
    while isinstance(function, functools.partial):
        found |= function.keywords.keys()
        function = function.func
    return found
