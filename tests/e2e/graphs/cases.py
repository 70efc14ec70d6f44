"""The scenarios by name, the callers that run them, and how their results are compared."""

import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.messages import BaseMessage
from langgraph.types import Interrupt

from lattice_client.langgraph.exceptions import RemoteTraceback

BOTH = ("sync", "async")
Compile = Callable[..., Any]


class Caller:
    """Calls the synchronous methods of a graph."""

    name = "sync"

    async def invoke(self, app: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the result of an invocation."""
        return app.invoke(*args, **kwargs)

    async def stream(self, app: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the items of a stream."""
        return list(app.stream(*args, **kwargs))

    async def state(self, app: Any, config: Any, **kwargs: Any) -> Any:
        """Return the state of a thread."""
        return app.get_state(config, **kwargs)

    async def batch(self, app: Any, inputs: list[Any]) -> list[Any]:
        """Return the results of several invocations."""
        found: list[Any] = app.batch(inputs)
        return found

    async def error(self, call: Awaitable[Any]) -> tuple[str, str, str]:
        """Return the class and text of the exception that a call raises, and the class of its cause."""
        try:
            await call
        except Exception as error:
            cause = error.__cause__
            shown = "" if cause is None or isinstance(cause, RemoteTraceback) else type(cause).__name__
            return type(error).__name__, str(error), shown
        raise AssertionError("the call raised nothing")


class AsyncCaller(Caller):
    """Calls the methods for asyncio."""

    name = "async"

    async def invoke(self, app: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the result of an invocation."""
        return await app.ainvoke(*args, **kwargs)

    async def stream(self, app: Any, *args: Any, **kwargs: Any) -> list[Any]:
        """Return the items of a stream."""
        items: AsyncIterator[Any] = app.astream(*args, **kwargs)
        return [item async for item in items]

    async def state(self, app: Any, config: Any, **kwargs: Any) -> Any:
        """Return the state of a thread."""
        return await app.aget_state(config, **kwargs)

    async def batch(self, app: Any, inputs: list[Any]) -> list[Any]:
        """Return the results of several invocations."""
        found: list[Any] = await app.abatch(inputs)
        return found


Scenario = Callable[[Compile, Caller], Coroutine[Any, Any, Any]]


@dataclass(frozen=True)
class Case:
    """A scenario, the feature it uses in words, and the callers that it works with."""

    feature: str
    scenario: Scenario
    callers: tuple[str, ...]


CASES: dict[str, Case] = {}


def case(feature: str, callers: tuple[str, ...] = BOTH) -> Callable[[Scenario], Scenario]:
    """Add a scenario."""

    def add(scenario: Scenario) -> Scenario:
        CASES[scenario.__name__] = Case(feature, scenario, callers)
        return scenario

    return add


def comparable(value: Any) -> Any:
    """Return a value without what differs between two runs of one graph: ids, times and objects of the process."""
    match value:
        case Interrupt():
            return ("interrupt", value.value)
        case BaseMessage():
            calls = getattr(value, "tool_calls", [])
            return (type(value).__name__, value.content, comparable(calls))
        case BaseException():
            return (type(value).__name__, str(value))
        case Mapping():
            hidden = ("id", "checkpoint_id", "timestamp", "ts", "config", "parent_config", "checkpoint", "metadata")
            return {key: comparable(item) for key, item in value.items() if key not in hidden}
        case tuple() | list():
            return [comparable(item) for item in value]
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return (type(value).__name__, repr(value))
        case _:
            return value
