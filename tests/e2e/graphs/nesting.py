"""Scenarios of nodes whose code or config refers to other graphs, and to objects that pickle does not handle well."""

import threading
from typing import Any

from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
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
