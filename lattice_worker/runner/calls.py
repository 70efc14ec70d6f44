"""How functions are called: what their signatures say of inputs."""

import inspect
from collections.abc import Callable
from typing import Any

from lattice_worker.runner.values import PayloadError


def takes_params_alone(function: Callable[..., Any]) -> bool:
    try:
        return list(inspect.signature(function).parameters) == ["params"]
    except (TypeError, ValueError):
        return False


def columns(function: Callable[..., Any], batch: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """Return the inputs of a batch as one list for each keyword; what a member leaves out has its default."""
    names = dict.fromkeys(name for inputs in batch for name in inputs)
    try:
        defaults = {
            name: p.default for name, p in inspect.signature(function).parameters.items() if p.default is not p.empty
        }
    except (TypeError, ValueError):
        defaults = {}
    missing = [name for name in names if name not in defaults and any(name not in inputs for inputs in batch)]
    if missing:
        raise PayloadError(f"some members of the batch have no input {missing[0]!r}")
    return {name: [inputs[name] if name in inputs else defaults[name] for inputs in batch] for name in names}
