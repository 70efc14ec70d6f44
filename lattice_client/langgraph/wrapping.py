"""Owns what `LangGraphClient.task` returns for functions, tools, Runnables and graphs. Rule: it has the same kind."""

from collections.abc import Mapping
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
        isolation = options.pop("isolation", "none")
        return compiled(runner, function, Plan.of({}, options, isolation, ()), {})
    if isinstance(function, BaseTool):
        return tool_stub(runner, function, name, options)
    if isinstance(function, Runnable):
        return RunnableStub(runner, function, name, options)
    if not callable(function):
        raise TaskDefinitionError(f"a task must be a function, a tool, a Runnable or a graph, not {function!r}")
    captures.check(function, f"{name!r}")
    return runner.stub(function, name, options)
