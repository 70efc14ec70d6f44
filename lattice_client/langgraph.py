"""Owns functions that run on Lattice when called, such as LangGraph nodes. Rule: a call is a run of one task."""

import functools
import inspect
from collections.abc import Callable
from typing import Any, Unpack

from lattice_client.security import SecurityOptions
from lattice_client.sync import LatticeClient
from lattice_client.task import TaskDefinition, define


class LangGraphClient:
    """Wraps functions so that a call runs on a server and returns what the function returns.

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
            return self._client.run_task(definition, {"args": list(bound.args), "kwargs": bound.kwargs})["result"]

        return call


class _Call:
    """A function that takes its arguments as one list and one dict."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__module__ = function.__module__
        self.__name__ = function.__name__

    def __call__(self, args: Any, kwargs: Any) -> Any:
        return self.function(*args, **kwargs)
