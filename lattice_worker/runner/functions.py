"""Loading the user's functions, and what their signatures say."""

import importlib
import inspect
import linecache
import pickle
import sys
from collections.abc import Callable
from typing import Any

import cloudpickle

from lattice_worker.runner.values import PayloadError


def dump(function: Callable[..., Any]) -> bytes:
    """Return a function as it travels. Raises PayloadError."""
    try:
        return bytes(cloudpickle.dumps(function, protocol=5))
    except Exception as error:
        raise PayloadError(f"a function cannot be pickled: {error}") from error


def load_code(definition: dict[str, Any], blob: bytes) -> Callable[..., Any]:
    if definition["bundle"] and definition["bundle"] not in sys.path:
        sys.path.insert(0, definition["bundle"])
    if definition["code"] == "pickle":
        return pickle.loads(blob)  # type: ignore[no-any-return]
    if definition["code"] == "entrypoint":
        module, _, name = definition["entrypoint"].partition(":")
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        return getattr(found, "__wrapped__", found)  # type: ignore[no-any-return]
    source, filename = blob.decode(), f"<{definition['name'] or definition['function']}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    namespace: dict[str, Any] = {"__name__": "__lattice_source__"}
    exec(compile(source, filename, "exec"), namespace)
    return namespace[definition["function"]]  # type: ignore[no-any-return]


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
