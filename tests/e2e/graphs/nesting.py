"""Scenarios of nodes whose code or config refers to other graphs, and to objects that pickle does not handle well."""

import itertools
import threading
from dataclasses import dataclass
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langchain_core.tools import tool
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import MessagesState
from langgraph.prebuilt import ToolNode, ToolRuntime
from langgraph.runtime import Runtime, get_runtime
from langgraph.types import Send
from pydantic import BaseModel

from tests.e2e.graphs.cases import Caller, Compile, case
from tests.e2e.graphs.control import State, first, graph_of, second

EMPTY: State = {"words": [], "text": ""}


class User:
    """A user as servers of graphs pass it: its attributes are looked up in a dict."""

    def __init__(self, data: dict[str, Any]) -> None:
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return self._data[name]


class Typed(BaseModel):
    """A state with a class of its own."""

    words: list[str]


@case("a coroutine that calls another graph, whose nodes are plain functions", ("async",))
async def awaited_graph(compile: Compile, call: Caller) -> Any:
    inner = compile(graph_of(first, second))

    async def calls(state: State) -> State:
        found = await inner.ainvoke(EMPTY)
        return {"words": found["words"]}

    return await call.invoke(compile(graph_of(calls)), EMPTY)


@case("a node that calls an entrypoint")
async def called_entrypoint(compile: Compile, call: Caller) -> Any:
    @task
    def doubled(number: int) -> int:
        return 2 * number

    def quadruples(number: int) -> int:
        return doubled(doubled(number).result()).result()

    inner = compile(entrypoint()(quadruples))

    def calls(state: State) -> State:
        return {"words": [inner.invoke(5)]}

    return await call.invoke(compile(graph_of(calls)), EMPTY)


@case("a graph with Runnables drawn as JSON")
async def drawing_as_json(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("sequence", RunnableLambda(first) | RunnableLambda(second))
    graph.add_edge(START, "sequence")
    return compile(graph).get_graph().to_json()


def worded(state: Typed) -> dict[str, Any]:
    return {"words": [*state.words, "worded"]}


@case("`version='v2'`: values of the state's class, of a graph that was compiled before")
async def typed_values(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(worded, schema=Typed).compile())
    return [repr(item["data"]) for item in await call.stream(app, {"words": []}, version="v2", stream_mode="values")]


def named(state: State, config: RunnableConfig) -> State:
    return {"words": [config["configurable"]["user"].identity]}


@case("an object with computed attributes in the config")
async def computed_attributes(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(named)), EMPTY, {"configurable": {"user": User({"identity": "ann"})}})


@case("a Pydantic model of a function that has a lock")
async def local_model(compile: Compile, call: Caller) -> Any:
    lock = threading.Lock()

    class Found(BaseModel):
        words: list[str]

    def finds(state: State) -> Found:
        return Found(words=["found"])

    with lock:
        return await call.invoke(compile(graph_of(finds)), EMPTY)


@case("a dataclass of a function, as the context")
async def local_dataclass(compile: Compile, call: Caller) -> Any:
    @dataclass
    class Context:
        user: str

    def greets(state: State, runtime: Runtime[Context]) -> State:
        return {"words": [runtime.context.user, get_runtime(Context).context.user, type(runtime.context).__name__]}

    graph = graph_of(greets, context_schema=Context)
    return await call.invoke(compile(graph), EMPTY, context=Context("ann"))


class Connection:
    """An object that cannot be pickled, as connections cannot."""

    def __init__(self) -> None:
        self.lock = threading.Lock()


@dataclass
class Connected:
    """A context with such an object."""

    user: str
    connection: Connection


class ModelOfContext(BaseModel):
    """The same as a Pydantic model."""

    model_config = {"arbitrary_types_allowed": True}
    user: str
    connection: Connection


def writes_user(state: State, runtime: Runtime[Connected], config: RunnableConfig) -> State:
    runtime.stream_writer(runtime.context.user)
    return {"words": [get_runtime(Connected).context.user, config["configurable"]["user"]]}


def writes_key(state: State, runtime: Runtime[dict[str, Any]]) -> State:
    runtime.stream_writer("written")
    return {"words": [runtime.context["user"]]}


@tool
def told(runtime: ToolRuntime[Connected, Any]) -> str:
    """Return a user."""
    runtime.stream_writer("told")
    return f"{runtime.context.user} {runtime.config['configurable']['user']}"


@case("objects in the context, the config and the metadata that cannot be pickled, and that no node uses")
async def unused_connections(compile: Compile, call: Caller) -> Any:
    one = Connection()
    config = {"configurable": {"user": "ann", "connection": one}, "metadata": {"connection": one}}
    config["callbacks"] = [BaseCallbackHandler()]  # type: ignore[assignment]
    calls: list[Any] = [{"name": "told", "args": {}, "id": "1"}]
    tools: StateGraph[Any] = StateGraph(MessagesState, context_schema=Connected)
    tools.add_node("tools", ToolNode([told]))
    tools.add_edge(START, "tools")
    messages = {"messages": [AIMessage("", tool_calls=calls)]}
    found = []
    for graph, given, context in (
        (graph_of(writes_user, context_schema=Connected), EMPTY, Connected("ann", one)),
        (graph_of(writes_user, context_schema=ModelOfContext), EMPTY, ModelOfContext(user="ann", connection=one)),
        (graph_of(writes_key, context_schema=dict), EMPTY, {"user": "ann", "connection": one}),
        (tools, messages, Connected("ann", one)),
    ):
        app = compile(graph)
        found += await call.stream(app, given, config, context=context, stream_mode=["custom", "updates"])
    return found


def numbered(state: Any) -> State:
    return {"words": [state.get("number", "one")]}


@case("names of nodes: long, with line breaks, and like the number of another node")
async def names(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    for name in ("sent", "sent-1", "with\nlines", "long" * 100, "\N{SNOWMAN}"):
        graph.add_node(name, numbered)
    graph.add_conditional_edges(START, lambda state: [Send("sent", {"number": n}) for n in range(3)], ["sent"])
    for before, after in itertools.pairwise(graph.nodes):
        graph.add_edge(before, after)
    return await call.invoke(compile(graph), EMPTY)
