"""Owns what `LangGraphClient.task` returns for functions, tools, Runnables and graphs. Rule: it has the same kind."""

import functools
import inspect
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

from langchain_core.runnables import Runnable
from langchain_core.tools import BaseTool
from langgraph.pregel import Pregel

from lattice_client.errors import TaskDefinitionError
from lattice_client.langgraph import captures, reductions
from lattice_client.langgraph.compiling import Plan, compiled, tool_stub
from lattice_client.langgraph.stubs import RunnableStub, Runner, name_of


def wrapped(runner: Runner, function: Any, settings: Mapping[str, Any]) -> Any:
    """Return the stub of a node, a tool or a task of a graph. Raises TaskDefinitionError."""
    reductions.install()
    options = dict(settings)
    name = options.pop("name", None) or name_of(function)
    if isinstance(function, Pregel):
        isolation = options.pop("isolation", "")
        return compiled(runner, function, Plan.of({}, options, isolation, ()), {})
    if isinstance(function, BaseTool):
        return tool_stub(runner, function, name, options)
    if isinstance(function, Runnable):
        return RunnableStub(runner, function, name, options)
    if not callable(function):
        raise TaskDefinitionError(f"a task must be a function, a tool, a Runnable or a graph, not {function!r}")
    captures.check(function, f"{name!r}")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        return _generator_stub(runner, function, name, options)
    return runner.stub(function, name, options)


def _generator_stub(runner: Runner, function: Any, name: str, settings: Mapping[str, Any]) -> Any:
    """Return a generator function that yields the items of another, which runs on Lattice, when that has ended."""
    made: Any
    if inspect.isasyncgenfunction(function):

        @functools.wraps(function)
        async def items_async(*args: Any, **kwargs: Any) -> list[Any]:
            return [item async for item in function(*args, **kwargs)]

        listed = runner.stub(items_async, name, settings)

        async def made(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
            for item in await listed(*args, **kwargs):
                yield item

    else:

        @functools.wraps(function)
        def items(*args: Any, **kwargs: Any) -> list[Any]:
            return list(function(*args, **kwargs))

        listed = runner.stub(items, name, settings)

        def made(*args: Any, **kwargs: Any) -> Iterator[Any]:
            yield from listed(*args, **kwargs)

    functools.update_wrapper(made, listed)
    setattr(made, reductions.STUB, function)
    return made
