"""Owns functions that run on Lattice when called, such as LangGraph nodes. Rule: a call is a run of one task."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, Unpack

from lattice_client.graph.task import TaskDefinition, define
from lattice_client.sync import LatticeClient
from lattice_client.transport.security import SecurityOptions

# What of a LangGraph config says something about the call; the rest is how the graph is run.
CONFIG_KEYS = ("tags", "metadata", "run_name", "run_id", "max_concurrency", "recursion_limit")
PRIVATE = "__"
REACHING_BACK = ("store", "heartbeat", "control")


class LangGraphClient:
    """Wraps functions so that a call runs on a server and returns what the function returns.

    A node may ask for `config` and `runtime` as LangGraph offers them. Their data travels: `configurable`, tags and
    metadata; `context`, `previous` and what is known of the execution. What reaches back into the graph's own process
    does not: callbacks, the store, and the stream writer, which raises RuntimeError there.

    Connects as `LatticeClient` does.
    """

    def __init__(self, target: str | None = None, **security: Unpack[SecurityOptions]) -> None:
        self._client = LatticeClient(target, **security)

    def task(self, function: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
        """Wrap a function; bare, with `resources={...}`, or with resources directly, such as `cpu=2`."""
        if function is None:
            return lambda decorated: self._wrap(decorated, settings)
        return self._wrap(function, settings)

    def _wrap(self, function: Callable[..., Any], settings: dict[str, Any]) -> Callable[..., Any]:
        definition: TaskDefinition[..., Any] = define(_Call(function), name=function.__name__, **settings)
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments = {name: _portable(name, value) for name, value in bound.arguments.items()}
            return self._client.run_task(definition, {"args": list(bound.args), "kwargs": bound.kwargs})["result"]

        return call


def _portable(name: str, value: Any) -> Any:
    """Return an argument as it can travel: LangGraph offers two by name that hold on to the graph's process."""
    if name == "config" and isinstance(value, Mapping) and "configurable" in value:
        kept = {key: value[key] for key in CONFIG_KEYS if key in value}
        own = {key: item for key, item in value["configurable"].items() if not key.startswith(PRIVATE)}
        return {**kept, "configurable": own}
    if name == "runtime" and is_dataclass(value) and not isinstance(value, type) and hasattr(value, "stream_writer"):
        bare: Any = type(value)()
        unset = {field: getattr(bare, field) for field in REACHING_BACK if hasattr(bare, field)}
        return replace(value, stream_writer=_no_writer, **unset)
    return value


def _no_writer(chunk: Any) -> None:
    raise RuntimeError("the graph's stream is out of reach of a node that runs on Lattice: return what it is to show")


class _Call:
    """A function that takes its arguments as one list and one dict."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__module__ = function.__module__
        self.__name__ = function.__name__

    def __call__(self, args: Any, kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
