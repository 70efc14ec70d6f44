"""Owns functions that run on Lattice when called, such as LangGraph nodes. Rule: a call is a run of one task."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass, replace
from typing import Any, Unpack

from lattice_client.graph.definition import TaskDefinition, define
from lattice_client.sync import LatticeClient
from lattice_client.transport.security import SecurityOptions

# The keys of a LangGraph config that describe the call; the others configure the graph's own process.
CONFIG_KEYS = ("tags", "metadata", "run_name", "run_id", "max_concurrency", "recursion_limit")
PRIVATE = "__"
REACHING_BACK = ("store", "heartbeat", "control")


class LangGraphClient:
    """Wraps functions so that a call runs on a server and returns the function's result.

    A node may have LangGraph's parameters `config` and `runtime`. Their data is sent: `configurable`, tags, metadata,
    `context`, `previous` and the execution info. Objects of the graph's own process are not sent: callbacks, the store,
    and the stream writer, which raises RuntimeError in the node.

    It connects as `LatticeClient` does.
    """

    def __init__(self, target: str | None = None, **security: Unpack[SecurityOptions]) -> None:
        self._client = LatticeClient(target, **security)

    def task(self, function: Callable[..., Any] | None = None, /, **settings: Any) -> Any:
        """Wrap a function; bare, with `resources={...}`, or with a resource as an option, such as `cpu=2`."""
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
    """Return an argument that can be sent: `config` and `runtime` refer to objects of the graph's process."""
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
    raise RuntimeError("a node that runs on Lattice cannot write to the graph's stream: return the values instead")


class _Call:
    """A function that takes its arguments as one list and one dict."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__module__ = function.__module__
        self.__name__ = function.__name__

    def __call__(self, args: Any, kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
