"""Scenarios of the control flow of graphs: edges, fan-out, commands, subgraphs, retries, limits."""

import asyncio
import operator
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypedDict

from langchain_core.runnables import RunnableLambda, RunnableParallel
from langgraph.cache.memory import InMemoryCache
from langgraph.graph import END, START, StateGraph
from langgraph.types import CachePolicy, Command, Overwrite, RetryPolicy, Send
from pydantic import BaseModel

from tests.e2e.graphs.cases import Caller, Compile, case


class State(TypedDict, total=False):
    """Words that nodes append, and a text that they replace."""

    words: Annotated[list[Any], operator.add]
    text: str
    count: int


def graph_of(*nodes: Any, schema: Any = State, **settings: Any) -> StateGraph[Any]:
    """Return a graph whose nodes are a chain."""
    graph: StateGraph[Any] = StateGraph(schema, **settings)
    before = START
    for node in nodes:
        name = getattr(node, "__name__", None) or type(node).__name__
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    graph.add_edge(before, END)
    return graph


def first(state: State) -> State:
    return {"words": ["first"], "text": state.get("text", "") + "1"}


def second(state: State) -> State:
    return {"words": ["second", state["text"]]}


async def waiting(state: State) -> State:
    await asyncio.sleep(0.01)
    return {"words": ["waited"]}


@case("nodes in a chain, a reducer")
async def chain(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(first, second)), {"words": ["in"], "text": "x"})


@case("coroutine functions as nodes", ("async",))
async def coroutines(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(first, waiting)), {"words": []})


@case("parallel branches, joined")
async def branches(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    for name in ("a", "b", "c", "join"):
        graph.add_node(name, partial(_named, name))
    for name in ("a", "b", "c"):
        graph.add_edge(START, name)
    graph.add_edge(["a", "b", "c"], "join")
    return await call.invoke(compile(graph), {"words": []})


def _named(name: str, state: State) -> State:
    return {"words": [name, len(state["words"])]}


def _route(state: State) -> str:
    return "second" if state["text"] == "go1" else END


@case("conditional edges")
async def conditions(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("first", first)
    graph.add_node("second", second)
    graph.add_edge(START, "first")
    graph.add_conditional_edges("first", _route, ["second", END])
    app = compile(graph)
    return [await call.invoke(app, {"words": [], "text": text}) for text in ("go", "stop")]


def _square(state: Any) -> State:
    return {"words": [state["n"] ** 2]}


@case("`Send`: map and reduce")
async def sends(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("first", first)
    graph.add_node("square", _square)
    graph.add_edge(START, "first")
    graph.add_conditional_edges("first", lambda state: [Send("square", {"n": n}) for n in range(8)], ["square"])
    return await call.invoke(compile(graph), {"words": []})


def _commands(state: State) -> Command[Any]:
    return Command(update={"words": ["went"]}, goto=[Send("square", {"n": 3}), "second"])


@case("`Command` with an update, nodes and sends")
async def commands(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("commands", _commands, destinations=("square", "second"))
    graph.add_node("square", _square)
    graph.add_node("second", second)
    graph.add_edge(START, "commands")
    return await call.invoke(compile(graph), {"words": [], "text": "t"})


def _count(state: State) -> State:
    return {"count": state.get("count", 0) + 1, "words": [state.get("count", 0)]}


@case("a cycle")
async def cycle(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("count", _count)
    graph.add_edge(START, "count")
    graph.add_conditional_edges("count", lambda state: END if state["count"] == 4 else "count")
    return await call.invoke(compile(graph), {"words": []})


@case("the recursion limit")
async def recursion(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("count", _count)
    graph.add_edge(START, "count")
    graph.add_edge("count", "count")
    return await call.error(call.invoke(compile(graph), {"words": []}, {"recursion_limit": 4}))


@case("a subgraph as a node")
async def subgraph(compile: Compile, call: Caller) -> Any:
    inner = graph_of(first, second).compile(name="inner")
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("outer", first)
    graph.add_node("inner", inner)
    graph.add_edge(START, "outer")
    graph.add_edge("outer", "inner")
    app = compile(graph)
    return [
        await call.invoke(app, {"words": [], "text": ""}),
        [
            ([part.partition(":")[0] for part in namespace], update)
            for namespace, update in await call.stream(
                app, {"words": [], "text": ""}, stream_mode="updates", subgraphs=True
            )
        ],
    ]


def _to_parent(state: State) -> Command[Any]:
    return Command(graph=Command.PARENT, goto="second", update={"words": ["to parent"], "text": "p"})


@case("`Command` to the parent graph")
async def parent_command(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("inner", graph_of(_to_parent).compile(), destinations=("second",))
    graph.add_node("second", second)
    graph.add_edge(START, "inner")
    return await call.invoke(compile(graph), {"words": []})


def _calls_graph(state: State) -> State:
    found = _INNER.invoke({"words": ["given"], "text": "i"})
    return {"words": found["words"]}


_INNER = graph_of(first, second).compile()


@case("a node that calls another compiled graph")
async def graph_in_function(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(_calls_graph)), {"words": []})


class Flaky:
    """Fails twice; it counts by the file that the input names, since each attempt may have its own process."""

    def __call__(self, state: State) -> State:
        with open(state["text"], "a+") as log:
            log.write("x")
            log.seek(0)
            count = len(log.read())
        if count < 3:
            raise ConnectionError(f"attempt {count}")
        return {"words": [count]}


@case("a retry policy")
async def retries(compile: Compile, call: Caller) -> Any:
    import tempfile

    graph: StateGraph[Any] = StateGraph(State)
    policy = RetryPolicy(initial_interval=0.01, max_attempts=3, jitter=False, retry_on=ConnectionError)
    graph.add_node("flaky", Flaky(), retry_policy=policy)
    graph.add_edge(START, "flaky")
    with tempfile.NamedTemporaryFile() as log:
        found = await call.invoke(compile(graph), {"words": [], "text": log.name})
    return found["words"]


class QuotaError(Exception):
    """An exception with another constructor than its arguments, and an attribute."""

    def __init__(self, user: str, limit: int) -> None:
        super().__init__(f"{user} has used {limit}")
        self.limit = limit


def _fails(state: State) -> State:
    try:
        raise KeyError("inner")
    except KeyError as error:
        raise QuotaError("ann", 5) from error


@case("an exception of a node, with its cause")
async def errors(compile: Compile, call: Caller) -> Any:
    return await call.error(call.invoke(compile(graph_of(_fails)), {"words": []}))


def _handled(state: State, error: Any) -> State:
    return {"words": [type(error.error).__name__, str(error.error), error.error.limit, error.node]}


@case("an error handler of a node")
async def error_handler(compile: Compile, call: Caller) -> Any:
    from langgraph.errors import NodeError

    def handler(state: State, error: NodeError) -> State:
        return _handled(state, error)

    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("fails", _fails, error_handler=handler)
    graph.add_edge(START, "fails")
    return await call.invoke(compile(graph), {"words": []})


@case("node caching")
async def caching(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("first", first, cache_policy=CachePolicy())
    graph.add_edge(START, "first")
    app = compile(graph, cache=InMemoryCache())
    return [await call.stream(app, {"words": [], "text": "c"}, stream_mode="updates") for _ in range(2)]


async def _slow(state: State) -> State:
    await asyncio.sleep(30)
    return {}


@case("a timeout of a node", ("async",))
async def timeout(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("slow", _slow, timeout=0.3)
    graph.add_edge(START, "slow")
    name, text, _ = await call.error(call.invoke(compile(graph), {"words": []}))
    return name, text.partition(" after ")[0][:30]


def _sleeps(state: State) -> State:
    time.sleep(0.2)
    return {"words": ["slept"]}


@case("`max_concurrency`")
async def concurrency(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    for name in ("a", "b", "c"):
        graph.add_node(name, _sleeps)
        graph.add_edge(START, name)
    return await call.invoke(compile(graph), {"words": []}, {"max_concurrency": 2})


@case("a deferred node")
async def deferred(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("first", first)
    graph.add_node("second", second)
    graph.add_node("last", partial(_named, "last"), defer=True)
    graph.add_edge(START, "first")
    graph.add_edge("first", "second")
    graph.add_edge("first", "last")
    graph.add_edge("second", "last")
    return await call.invoke(compile(graph), {"words": [], "text": "d"})


class Model(BaseModel):
    """A state as a model."""

    name: str
    parts: Annotated[list[str], operator.add] = []


def _of_model(state: Model) -> dict[str, Any]:
    return {"parts": [state.name.upper(), type(state).__name__]}


@case("a Pydantic model as the state")
async def pydantic_state(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(_of_model, schema=Model)), {"name": "ann"})


@dataclass
class Record:
    """A state as a dataclass."""

    name: str
    parts: Annotated[list[str], operator.add] = field(default_factory=list)


def _of_record(state: Record) -> dict[str, Any]:
    return {"parts": [state.name.upper(), type(state).__name__]}


@case("a dataclass as the state")
async def dataclass_state(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(_of_record, schema=Record)), {"name": "ann"})


class Private(TypedDict):
    """A channel that is neither input nor output."""

    secret: str


class Output(TypedDict):
    """The output of a graph."""

    text: str


def _hides(state: State) -> Private:
    return {"secret": state["text"] * 2}


def _shows(state: Private) -> Output:
    return {"text": state["secret"] + "!"}


@case("private state, input and output schemas")
async def schemas(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(_hides, _shows, output_schema=Output)), {"text": "x"})


def _overwrites(state: State) -> State:
    return {"words": Overwrite(["new"])}  # type: ignore[typeddict-item]


@case("`Overwrite` of a reducer")
async def overwrite(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(first, _overwrites)), {"words": ["old"]})


def _counted(state: Any) -> Any:
    return {"counter": Counter(state["counter"]), "extra": frozenset({1, 2})}


@case("values that JSON does not represent")
async def values(compile: Compile, call: Caller) -> Any:
    class Counted(TypedDict, total=False):
        counter: Annotated[Counter[str], operator.add]
        extra: frozenset[int]

    found = await call.invoke(compile(graph_of(_counted, schema=Counted)), {"counter": Counter("aab")})
    return type(found["counter"]).__name__, sorted(found["counter"].items()), found["extra"]


@case("Runnables as nodes: lambdas, sequences, parallels")
async def runnables(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("sequence", RunnableLambda(first) | RunnableLambda(_loud))
    graph.add_node("parallel", RunnableParallel(words=RunnableLambda(_listed), text=RunnableLambda(_text)))
    graph.add_edge(START, "sequence")
    graph.add_edge("sequence", "parallel")
    return await call.invoke(compile(graph), {"words": [], "text": "r"})


def _loud(state: State) -> State:
    return {"words": [word.upper() for word in state["words"]]}


def _listed(state: State) -> list[Any]:
    return ["parallel"]


def _text(state: State) -> str:
    return "parallel"


class Callable_:
    """An object that can be called, with state of its own."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def __call__(self, state: State) -> State:
        return {"words": [self.factor * 2]}

    def method(self, state: State) -> State:
        return {"words": [self.factor]}


@case("partial functions, methods, lambdas, objects that can be called, closures")
async def callables(compile: Compile, call: Caller) -> Any:
    held = Callable_(21)
    graph: StateGraph[Any] = StateGraph(State)
    nodes = {
        "partial": partial(_named, "partial"),
        "method": held.method,
        "lambda": lambda state: {"words": ["lambda"]},
        "object": held,
        "closure": _closure("closed over"),
    }
    before = START
    for name, node in nodes.items():
        graph.add_node(name, node)
        graph.add_edge(before, name)
        before = name
    return await call.invoke(compile(graph), {"words": []})


def _closure(text: str) -> Any:
    def node(state: State) -> State:
        return {"words": [text]}

    return node


@case("`batch`")
async def batch(compile: Compile, call: Caller) -> Any:
    return await call.batch(compile(graph_of(first, second)), [{"words": [n], "text": "b"} for n in range(3)])


def _none(state: State) -> None:
    return None


@case("a node that returns nothing")
async def nothing(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(_none, first)), {"words": []})


def _invalid(state: State) -> Any:
    return 5


@case("a node that returns no update")
async def invalid(compile: Compile, call: Caller) -> Any:
    name, text, _ = await call.error(call.invoke(compile(graph_of(_invalid)), {"words": []}))
    return name, text


@case("a tool's graph drawn as text")
async def drawing(compile: Compile, call: Caller) -> Any:
    return compile(graph_of(first, second)).get_graph().draw_mermaid()
