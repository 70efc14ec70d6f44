"""Owns making the nodes of a compiled graph run on Lattice. Rule: everything but the bodies of nodes stays as it is.

Reducers, edges, commands, checkpoints, retries, caching and the loop itself are LangGraph's own code in this process.
"""

import copy
import functools
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from langchain_core.tools import BaseTool, StructuredTool
from langgraph._internal._runnable import RunnableCallable
from langgraph.graph import START
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel
from langgraph.pregel.protocol import PregelProtocol

from lattice_client.errors import TaskDefinitionError
from lattice_client.graph.settings import ISOLATIONS
from lattice_client.langgraph import reductions
from lattice_client.langgraph.invocation import Invocation, current
from lattice_client.langgraph.reductions import is_in_attempt
from lattice_client.langgraph.stubs import RunnableStub, Runner, check, ended_async, own
from lattice_client.langgraph.tasks import with_task_stubs

# More threads than LangGraph's default, since a thread of a synchronous node only waits for its result.
MAX_THREADS = 256
Settings = Mapping[str, Any]


@dataclass(eq=False)
class Plan:
    """Which nodes run where. `used` are the names that the graph has."""

    resources: Mapping[str, Settings]
    default: Settings
    isolation: str | Mapping[str, str]
    local: frozenset[str]
    used: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, resources: Any, default: Any, isolation: Any, local: Sequence[str]) -> "Plan":
        """Return the plan that arguments of `compile` describe. Raises TaskDefinitionError."""
        for name, settings in (resources or {}).items():
            if not isinstance(settings, Mapping):
                raise TaskDefinitionError(f"resources[{name!r}] must be a dict of options of @task, not {settings!r}")
        levels = isolation.values() if isinstance(isolation, Mapping) else [isolation]
        for level in levels:
            if level and level not in ISOLATIONS:
                raise TaskDefinitionError(f"isolation must be one of {', '.join(ISOLATIONS)}, not {level!r}")
        return cls(resources or {}, default or {}, isolation, frozenset(local))

    def settings(self, name: str) -> dict[str, Any]:
        """Return the options of the task of a node or a tool."""
        self.used.add(name)
        level = self.isolation.get(name, "") if isinstance(self.isolation, Mapping) else self.isolation
        found = {**self.default, **self.resources.get(name, {})}
        return {**found, "isolation": level} if level else found

    def is_local(self, name: str) -> bool:
        """Whether a node or a tool stays in the process of the graph."""
        self.used.add(name)
        return name in self.local

    def check_names(self) -> None:
        """Raise TaskDefinitionError for a name that the graph does not have."""
        isolated = self.isolation if isinstance(self.isolation, Mapping) else {}
        if unknown := sorted({*self.resources, *isolated, *self.local} - self.used):
            text = f"the graph has no node {', '.join(map(repr, unknown))}"
            raise TaskDefinitionError(f"{text}; its nodes and tools: {', '.join(sorted(self.used)) or 'none'}")


def compiled(runner: Runner, graph: Any, plan: Plan, arguments: dict[str, Any]) -> Any:
    """Return a graph that runs the nodes of another on Lattice. Raises TaskDefinitionError."""
    reductions.install()
    if isinstance(graph, Pregel):
        made = graph.copy(arguments)
        # `compile` sets attributes of the state's class that a copy is made without.
        vars(made).update({name: value for name, value in vars(graph).items() if name not in vars(made)})
        graph = made
    elif hasattr(graph, "compile"):
        graph = graph.compile(**arguments)
    else:
        raise TaskDefinitionError(f"compile takes a StateGraph, a compiled graph or an entrypoint, not {graph!r}")
    found = _swapped(runner, graph, plan, "")
    plan.check_names()
    return _attached(runner, found, graph)


def _swapped(runner: Runner, graph: Any, plan: Plan, prefix: str) -> Any:
    """Return a copy of a compiled graph whose nodes are stubs."""
    found = copy.copy(graph)
    if not hasattr(graph, "builder"):  # an entrypoint
        found.nodes = {name: with_task_stubs(node, runner, plan) for name, node in graph.nodes.items()}
        return found
    found.nodes = {name: _node(runner, name, node, plan, prefix) for name, node in graph.nodes.items()}
    return found


def _node(runner: Runner, name: str, node: Any, plan: Plan, prefix: str) -> Any:
    if name == START or name.startswith("__"):
        return node
    full = f"{prefix}{name}"
    if plan.is_local(full):
        return node
    bound = _bound(runner, full, node.bound, plan)
    if bound is node.bound:
        return node
    subgraphs = [bound] if isinstance(bound, PregelProtocol) else node.subgraphs
    return node.copy({"bound": bound, "subgraphs": subgraphs})


def _bound(runner: Runner, name: str, bound: Any, plan: Plan) -> Any:
    if isinstance(bound, LatticeGraph):
        return bound
    if isinstance(bound, Pregel):
        return _swapped(runner, bound, plan, f"{name}.")
    if isinstance(bound, PregelProtocol):
        return bound  # it runs on a server of its own
    if isinstance(bound, ToolNode):
        return _tool_node(runner, name, bound, plan)
    settings = plan.settings(name)
    if isinstance(bound, RunnableCallable):
        return _callable(runner, name, bound, settings)
    stub = RunnableStub(runner, bound, name, settings)
    for method in stub.stubs:
        check(method, f"node {name!r}")
    return stub


def _callable(runner: Runner, name: str, bound: Any, settings: Settings) -> Any:
    if hasattr(bound.func or bound.afunc, reductions.STUB):
        return bound  # the decorator has wrapped it
    found = copy.copy(bound)
    if bound.func is not None:
        found.func = runner.stub(bound.func, name, settings)
        check(found.func, f"node {name!r}")
    if bound.afunc is not None:
        is_own = not _runs_in_thread(bound.afunc, bound.func)
        function = bound.afunc if is_own else bound.func
        found.afunc = runner.stub(function, name, settings, is_async=True, stands_for=bound.afunc)
        if is_own:
            check(found.afunc, f"node {name!r}")
    return found


def _runs_in_thread(afunc: Any, func: Any) -> bool:
    """Whether a coroutine function only runs the plain function in a thread."""
    return func is not None and (
        getattr(afunc, "__wrapped__", None) is func
        or (isinstance(afunc, functools.partial) and func in (*afunc.args, *afunc.keywords.values()))
    )


def _tool_node(runner: Runner, name: str, node: Any, plan: Plan) -> Any:
    found = copy.copy(node)
    found.func, found.afunc = found._func, found._afunc
    found._tools_by_name = {
        key: tool if plan.is_local(f"{name}.{key}") else tool_stub(runner, tool, key, plan.settings(f"{name}.{key}"))
        for key, tool in node._tools_by_name.items()
    }
    return found


def tool_stub(runner: Runner, tool: BaseTool, name: str, settings: Settings) -> BaseTool:
    """Return a copy of a tool whose function runs on Lattice."""
    if isinstance(tool, StructuredTool):
        changes = {
            key: runner.stub(function, name, settings)
            for key in ("func", "coroutine")
            if (function := getattr(tool, key)) is not None and not hasattr(function, reductions.STUB)
        }
        for stub in changes.values():
            check(stub, f"tool {name!r}")
        return tool.model_copy(update=changes)
    made: BaseTool = tool.model_copy()
    for method in ("_run", "_arun"):
        if getattr(type(tool), method) is not getattr(BaseTool, method):
            stub = runner.stub(getattr(tool, method), name, settings)
            check(stub, f"tool {name!r}")
            object.__setattr__(made, method, stub)
    return made


class LatticeGraph:
    """A compiled graph whose invocations are open runs. A class of its own holds what `Pregel.copy` does not know.

    Attributes:
        last_run_id: the id of the run of the last invocation that ran a node.
    """

    lattice_runner: Runner
    lattice_plain: Any
    last_run_id: str
    name: str

    def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Iterator[Any]:
        """Stream the graph; see `Pregel.stream`."""
        source: Any = super()
        if is_in_attempt() or current.get() is not None:
            yield from source.stream(input, config, **kwargs)
            return
        config = {"max_concurrency": MAX_THREADS, **(config or {})}
        with own(self.lattice_runner.invocation(self.name)) as invocation:
            try:
                yield from _within(invocation, source.stream(input, config, **kwargs))
            finally:
                self._note(invocation)

    async def astream(self, input: Any, config: Any = None, **kwargs: Any) -> AsyncIterator[Any]:
        """As `stream`, for asyncio."""
        source: Any = super()
        if is_in_attempt() or current.get() is not None:
            async for item in source.astream(input, config, **kwargs):
                yield item
            return
        invocation = self.lattice_runner.invocation(self.name)
        try:
            async for item in _within_async(invocation, source.astream(input, config, **kwargs)):
                yield item
        finally:
            self._note(invocation)
            await ended_async(invocation)

    def get_graph(self, *args: Any, **kwargs: Any) -> Any:
        """Return the drawable graph, of the nodes as they were defined; see `Pregel.get_graph`."""
        return self.lattice_plain.get_graph(*args, **kwargs)

    async def aget_graph(self, *args: Any, **kwargs: Any) -> Any:
        """As `get_graph`, for asyncio."""
        return await self.lattice_plain.aget_graph(*args, **kwargs)

    def _note(self, invocation: Invocation) -> None:
        if invocation.run_id:
            type(self).last_run_id = invocation.run_id

    def __reduce__(self) -> Any:
        # In the code of a node it is the plain graph, whose stubs are their functions.
        return copy.copy, (_with_class(type(self).__mro__[2], self),)


def _attached(runner: Runner, graph: Any, plain: Any) -> Any:
    kind = type(graph)
    members = {"lattice_runner": runner, "lattice_plain": plain, "last_run_id": ""}
    members |= {"__module__": kind.__module__, "__doc__": kind.__doc__}
    return _with_class(type(kind.__name__, (LatticeGraph, kind), members), graph)


def _with_class(kind: type, graph: Any) -> Any:
    found: Any = object.__new__(kind)
    found.__dict__.update(graph.__dict__)
    return found


def _within(invocation: Invocation, source: Iterator[Any]) -> Iterator[Any]:
    """Yield the items of a generator, each step of which runs within an invocation."""
    try:
        while True:
            token = current.set(invocation)
            try:
                item = next(source)
            except StopIteration:
                return
            finally:
                current.reset(token)
            yield item
    finally:
        close: Callable[[], None] = source.close  # type: ignore[attr-defined]
        if invocation.must_not_wait:
            # It waits for its nodes, which end with the run.
            threading.Thread(target=close, name="lattice-close", daemon=True).start()
        else:
            close()


async def _within_async(invocation: Invocation, source: AsyncIterator[Any]) -> AsyncIterator[Any]:
    try:
        while True:
            token = current.set(invocation)
            try:
                item = await anext(source)
            except StopAsyncIteration:
                return
            finally:
                current.reset(token)
            yield item
    finally:
        await source.aclose()  # type: ignore[attr-defined]
