"""Scenarios of nodes that use objects of the graph's process: stores, streams, interrupts, callbacks, models, tools."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

from langchain_core.callbacks import BaseCallbackHandler, dispatch_custom_event
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_config, get_store, get_stream_writer
from langgraph.func import entrypoint, task
from langgraph.graph import START, StateGraph
from langgraph.graph.message import add_messages, push_message
from langgraph.prebuilt import InjectedState, InjectedStore, ToolNode, ToolRuntime, create_react_agent
from langgraph.runtime import Runtime, get_runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, StreamWriter, interrupt

from tests.e2e.graphs.cases import Caller, Compile, case
from tests.e2e.graphs.control import State, first, graph_of, second

THREAD: RunnableConfig = {"configurable": {"thread_id": "one"}}
EMPTY: dict[str, Any] = {"words": [], "text": ""}


def stores(state: State, store: BaseStore) -> State:
    store.put(("users", "ann"), "food", {"likes": "rice"})
    store.put(("users", "ann"), "drink", {"likes": "tea"})
    found = store.get(("users", "ann"), "food")
    names = sorted(item.key for item in store.search(("users",)))
    return {"words": [found and found.value, names, store.get(("users",), "nobody"), store.list_namespaces()]}


def stored(state: State) -> State:
    found = get_store().get(("users", "ann"), "drink")
    return {"words": [found and found.value]}


@case("the store: reads and writes")
async def store(compile: Compile, call: Caller) -> Any:
    store = InMemoryStore()
    found = await call.invoke(compile(graph_of(stores, stored), store=store), EMPTY)
    return found, sorted(item.key for item in store.search(("users",)))


async def stores_async(state: State, runtime: Runtime[Any]) -> State:
    assert runtime.store is not None
    await asyncio.gather(*(runtime.store.aput(("n",), str(n), {"n": n}) for n in range(5)))
    found = await asyncio.gather(*(runtime.store.aget(("n",), str(n)) for n in range(5)))
    return {"words": [item.value["n"] for item in found if item]}


@case("the store in coroutines", ("async",))
async def store_async(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(stores_async), store=InMemoryStore()), EMPTY)


def fails_in_store(state: State, store: BaseStore) -> State:
    try:
        store.put((), "key", {"v": 1})
    except ValueError as error:
        return {"words": [type(error).__name__]}
    return {}


@case("an exception of the store")
async def store_error(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(fails_in_store), store=InMemoryStore()), EMPTY)


def writes(state: State, writer: StreamWriter) -> State:
    for n in range(3):
        writer({"n": n})
    get_stream_writer()("last")
    return {"words": ["wrote"]}


@case('`stream_mode="custom"`, with other modes')
async def custom(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(writes, first))
    return [
        await call.stream(app, EMPTY, stream_mode="custom"),
        await call.stream(app, EMPTY, stream_mode=["custom", "updates", "values"]),
    ]


@case('`stream_mode` `"values"`, `"updates"`, `"debug"`, `"tasks"`, `"checkpoints"`')
async def modes(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(first, second), checkpointer=InMemorySaver())
    found = []
    for mode in ("values", "updates", "debug", "tasks", "checkpoints"):
        config: RunnableConfig = {"configurable": {"thread_id": mode}}
        found.append(await call.stream(app, EMPTY, config, stream_mode=mode))
    return found


@case("custom chunks from a subgraph, with namespaces")
async def custom_in_subgraph(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("inner", graph_of(writes).compile())
    graph.add_edge(START, "inner")
    items = await call.stream(compile(graph), EMPTY, stream_mode="custom", subgraphs=True)
    return [([part.partition(":")[0] for part in namespace], chunk) for namespace, chunk in items]


def asks(state: State) -> State:
    return {"words": [interrupt({"question": "sure?"})]}


@case("`interrupt` and resume")
async def interrupts(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(first, asks, second), checkpointer=InMemorySaver())
    return [
        await call.stream(app, EMPTY, THREAD),
        (await call.state(app, THREAD)).next,
        await call.invoke(app, Command(resume="yes"), THREAD),
    ]


def asks_twice(state: State) -> State:
    return {"words": [interrupt("one?"), interrupt("two?"), interrupt("three?")]}


@case("several interrupts in one node")
async def several_interrupts(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(asks_twice), checkpointer=InMemorySaver())
    found = [await call.stream(app, EMPTY, THREAD)]
    found += [await call.stream(app, Command(resume=answer), THREAD) for answer in ("a", "b", "c")]
    return found


def _asks_name(state: Any) -> State:
    return {"words": [state["text"], interrupt(state["text"])]}


@case("parallel interrupts, answered by id")
async def parallel_interrupts(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    for name in ("a", "b"):
        graph.add_node(name, _asks_name)
        graph.add_edge(START, name)
    app = compile(graph, checkpointer=InMemorySaver())
    await call.invoke(app, {"words": [], "text": "q"}, THREAD)
    state = await call.state(app, THREAD)
    answers = {found.id: f"answer {n}" for n, found in enumerate(sorted(state.interrupts, key=lambda i: i.id))}
    found = await call.invoke(app, Command(resume=answers), THREAD)
    return len(state.interrupts), sorted(map(str, found["words"]))


@case("an interrupt in a subgraph")
async def interrupt_in_subgraph(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(State)
    graph.add_node("inner", graph_of(first, asks).compile())
    graph.add_edge(START, "inner")
    app = compile(graph, checkpointer=InMemorySaver())
    before = await call.invoke(app, EMPTY, THREAD)
    inner = (await call.state(app, THREAD, subgraphs=True)).tasks[0].state.values
    return before, inner, await call.invoke(app, Command(resume="yes"), THREAD)


@case("`interrupt_before` and `interrupt_after`")
async def static_interrupts(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(first, second), checkpointer=InMemorySaver(), interrupt_before=["second"])
    return [await call.invoke(app, EMPTY, THREAD), await call.invoke(app, None, THREAD)]


@case("checkpoints: history, `update_state`, time travel")
async def time_travel(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(first, second), checkpointer=InMemorySaver())
    await call.invoke(app, EMPTY, THREAD)
    history = list(app.get_state_history(THREAD))
    before = next(found for found in history if found.next == ("second",))
    changed = app.update_state(before.config, {"text": "changed"})
    return [(found.next, found.values) for found in history], await call.invoke(app, None, changed)


@case("threads of a checkpointer")
async def threads(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(first), checkpointer=InMemorySaver())
    configs: list[RunnableConfig] = [{"configurable": {"thread_id": name}} for name in ("a", "b", "a")]
    return [await call.invoke(app, {"words": []}, config) for config in configs]


def configured(state: State, config: RunnableConfig) -> State:
    inner = get_config()
    own = config["configurable"]["user"]
    return {"words": [own, inner["configurable"]["user"], sorted(config["tags"]), config["metadata"]["team"]]}


@case("config: user keys, tags, metadata, `get_config`")
async def config(compile: Compile, call: Caller) -> Any:
    given: RunnableConfig = {"configurable": {"user": "ann"}, "tags": ["t1", "t2"], "metadata": {"team": "red"}}
    return await call.invoke(compile(graph_of(configured)), EMPTY, given)


@dataclass
class Context:
    """The context of a run."""

    user: str


def in_context(state: State, runtime: Runtime[Context]) -> State:
    info = runtime.execution_info
    return {"words": [runtime.context.user, get_runtime(Context).context.user, info and info.node_attempt]}


@case("context, `Runtime`, `get_runtime`")
async def context(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(in_context, context_schema=Context)), EMPTY, context=Context("ann"))


class Recorder(BaseCallbackHandler):
    """Records the events of runs."""

    def __init__(self) -> None:
        self.events: list[Any] = []

    def on_chain_start(self, *args: Any, **kwargs: Any) -> None:
        self.events.append(("start", kwargs.get("name")))

    def on_chain_end(self, *args: Any, **kwargs: Any) -> None:
        self.events.append("end")

    def on_custom_event(self, name: str, data: Any, **kwargs: Any) -> None:
        self.events.append((name, data))


def dispatches(state: State, config: RunnableConfig) -> State:
    dispatch_custom_event("progress", {"n": 1}, config=config)
    return {"words": ["dispatched"]}


@case("callbacks and custom events")
async def callbacks(compile: Compile, call: Caller) -> Any:
    recorder = Recorder()
    await call.invoke(compile(graph_of(dispatches, first)), EMPTY, {"callbacks": [recorder]})
    return recorder.events


class Model(BaseChatModel):
    """A chat model without network: it calls each bound tool once, and then repeats their results."""

    tools: tuple[str, ...] = ()

    @property
    def _llm_type(self) -> str:
        return "local"

    def bind_tools(self, tools: Any, **kwargs: Any) -> Any:
        return self.model_copy(update={"tools": tuple(found.name for found in tools)})

    def _answer(self, messages: list[Any]) -> AIMessage:
        if self.tools and messages[-1].type == "human":
            calls = [
                {"name": name, "args": {"text": messages[-1].content}, "id": f"call-{name}"} for name in self.tools
            ]
            return AIMessage("", tool_calls=calls)
        return AIMessage(" and ".join(str(found.content) for found in messages if found.type in ("tool", "human")))

    def _generate(self, messages: list[Any], stop: Any = None, run_manager: Any = None, **kwargs: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=self._answer(messages))])

    def _stream(
        self, messages: list[Any], stop: Any = None, run_manager: Any = None, **kwargs: Any
    ) -> Iterator[ChatGenerationChunk]:
        answer = self._answer(messages)
        if answer.tool_calls:
            parts = [
                {"name": found["name"], "args": json.dumps(found["args"]), "id": found["id"], "index": n}
                for n, found in enumerate(answer.tool_calls)
            ]
            yield ChatGenerationChunk(message=AIMessageChunk("", tool_call_chunks=parts))
            return
        for word in str(answer.content).split(" "):
            chunk = ChatGenerationChunk(message=AIMessageChunk(word))
            if run_manager:
                run_manager.on_llm_new_token(word, chunk=chunk)
            yield chunk


class Messages(TypedDict):
    """A conversation."""

    messages: Annotated[list[AnyMessage], add_messages]


def chats(state: Messages) -> Any:
    return {"messages": [Model().invoke(state["messages"])]}


async def chats_async(state: Messages) -> Any:
    return {"messages": [await Model().ainvoke(state["messages"])]}


ASKED = {"messages": [HumanMessage("one two three")]}


@case('`stream_mode="messages"`: the tokens of a chat model')
async def tokens(compile: Compile, call: Caller) -> Any:
    items = await call.stream(compile(graph_of(chats, schema=Messages)), ASKED, stream_mode="messages")
    return [(message, about["langgraph_node"]) for message, about in items]


@case("tokens from a coroutine", ("async",))
async def tokens_async(compile: Compile, call: Caller) -> Any:
    items = await call.stream(compile(graph_of(chats_async, schema=Messages)), ASKED, stream_mode="messages")
    return [(message, about["langgraph_node"]) for message, about in items]


@case("a chat model as a node")
async def model_node(compile: Compile, call: Caller) -> Any:
    graph: StateGraph[Any] = StateGraph(Messages)
    graph.add_node("model", (lambda state: state["messages"]) | Model() | (lambda message: {"messages": [message]}))
    graph.add_edge(START, "model")
    return await call.invoke(compile(graph), ASKED)


def pushes(state: Messages) -> Any:
    push_message(AIMessage("pushed", id="m1"))
    return {}


@case("`push_message`")
async def pushed(compile: Compile, call: Caller) -> Any:
    items = await call.stream(compile(graph_of(pushes, schema=Messages)), ASKED, stream_mode="messages")
    return [message for message, _ in items]


@tool
def upper(text: str) -> str:
    """Return a text in capitals."""
    return text.upper()


@tool
async def reversed_text(text: str) -> str:
    """Return a text from its end."""
    return text[::-1]


@tool
def failing(text: str) -> str:
    """Fail."""
    raise ValueError(f"cannot use {text}")


@tool
def injected(
    text: str, state: Annotated[Any, InjectedState], store: Annotated[Any, InjectedStore], config: RunnableConfig
) -> str:
    """Use the arguments that the graph injects."""
    store.put(("tools",), "used", {"text": text})
    get_stream_writer()(f"tool of {len(state['messages'])}")
    return f"{text} {config['configurable']['user']}"


def _calling(*names: str) -> Any:
    calls = [{"name": name, "args": {"text": "abc"}, "id": name, "type": "tool_call"} for name in names]
    return {"messages": [HumanMessage("x"), AIMessage("", tool_calls=calls)]}


def _tools(*tools: Any) -> StateGraph[Any]:
    graph: StateGraph[Any] = StateGraph(Messages)
    graph.add_node("tools", ToolNode(list(tools), handle_tool_errors=True))
    graph.add_edge(START, "tools")
    return graph


@case("`ToolNode`: parallel tools, and errors that it handles")
async def tools(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(_tools(upper, failing)), _calling("upper", "failing", "unknown"))


@case("`ToolNode` with coroutine tools", ("async",))
async def tools_async(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(_tools(upper, reversed_text)), _calling("upper", "reversed_text"))


@case("tools with injected state, store and config, that write to the stream")
async def injected_tools(compile: Compile, call: Caller) -> Any:
    store = InMemoryStore()
    app = compile(_tools(injected), store=store)
    found = await call.stream(
        app, _calling("injected"), {"configurable": {"user": "ann"}}, stream_mode=["custom", "values"]
    )
    item = store.get(("tools",), "used")
    return found, item and item.value


@case("an agent with tools, its tokens streamed")
async def agent(compile: Compile, call: Caller) -> Any:
    app = compile(create_react_agent(Model(), [upper, failing_softly]))
    asked = {"messages": [("user", "hello")]}
    items = await call.stream(app, asked, stream_mode="messages")
    # Tools of one step end in any order.
    results = sorted(message.content for message, about in items if about["langgraph_node"] == "tools")
    spoken = [message for message, about in items if about["langgraph_node"] == "agent"]
    return await call.invoke(app, asked), results, spoken


@tool
def failing_softly(text: str) -> str:
    """Return nothing of use."""
    return f"nothing for {text}"


@tool
def approves(text: str) -> str:
    """Ask a person."""
    return f"{text}: {interrupt('allowed?')}"


@case("an interrupt in a tool of an agent")
async def agent_interrupt(compile: Compile, call: Caller) -> Any:
    app = compile(create_react_agent(Model(), [approves], checkpointer=InMemorySaver()))
    before = await call.invoke(app, {"messages": [("user", "hello")]}, THREAD)
    return before, await call.invoke(app, Command(resume="yes"), THREAD)


@task
def doubled(n: int) -> int:
    return 2 * n


@task
def noted(text: str) -> str:
    get_stream_writer()(text)
    return text + str(interrupt("note?"))


@case("a store, a graph and a list of callbacks that the code of a node captures")
async def captured(compile: Compile, call: Caller) -> Any:
    kept, recorder = InMemoryStore(), Recorder()
    inner = graph_of(dispatches).compile(checkpointer=InMemorySaver())

    def captures(state: State) -> State:
        kept.put(("n",), "key", {"v": 1})
        inner.invoke({"words": []}, {"configurable": {"thread_id": "inner"}, "callbacks": [recorder]})
        return {"words": [len(kept.search(("n",)))]}

    found = await call.invoke(compile(graph_of(captures)), EMPTY)
    item = kept.get(("n",), "key")
    state = inner.get_state({"configurable": {"thread_id": "inner"}})
    return found, item and item.value, recorder.events, state.values


@tool
def telling(text: str, runtime: ToolRuntime) -> str:
    """Tell its progress."""
    runtime.emit_output_delta("half")
    runtime.emit_output_delta("all")
    return text


@case('`stream_mode="tools"`, with deltas of a tool')
async def tool_stream(compile: Compile, call: Caller) -> Any:
    return await call.stream(compile(_tools(telling)), _calling("telling"), stream_mode="tools")


@case("a drain that a node requests")
async def drain(compile: Compile, call: Caller) -> Any:
    from langgraph.runtime import RunControl

    control = RunControl()

    def requests(state: State) -> State:
        control.request_drain("enough")
        return {"words": ["requested"]}

    error = await call.error(call.invoke(compile(graph_of(requests, first)), EMPTY, control=control))
    return error, control.drain_reason


@case("an entrypoint with `@task` functions")
async def functional(compile: Compile, call: Caller) -> Any:
    @entrypoint()
    def flow(n: int) -> int:
        futures = [doubled(i) for i in range(n)]
        return sum(future.result() for future in futures)

    return await call.invoke(compile(flow), 4)


@case("an entrypoint with an interrupt in a task, and `previous`")
async def functional_interrupt(compile: Compile, call: Caller) -> Any:
    @entrypoint(checkpointer=InMemorySaver())
    def flow(text: str, *, previous: Any = None) -> Any:
        return noted(text).result(), previous

    app = compile(flow)
    found = []
    for given in ("a", Command(resume="!"), "b", Command(resume="?")):
        found.append(await call.stream(app, given, THREAD, stream_mode=["custom", "updates"]))
    return found


def calls_task(state: State) -> State:
    futures = [doubled(n) for n in (1, 2)]
    return {"words": [future.result() for future in futures]}


@case("a node that calls `@task` functions")
async def task_in_node(compile: Compile, call: Caller) -> Any:
    return await call.invoke(compile(graph_of(calls_task)), EMPTY)


def _inner_saved(state: State) -> State:
    found = _PERSISTENT.invoke({"words": ["given"], "text": ""})
    return {"words": [len(found["words"])]}


_PERSISTENT = graph_of(first).compile(checkpointer=True)


@case("a node that calls a graph with `checkpointer=True`")
async def persistent_subgraph(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(_inner_saved), checkpointer=InMemorySaver())
    return [await call.invoke(app, EMPTY, THREAD) for _ in range(2)]


async def events(app: Any, given: Any) -> AsyncIterator[Any]:
    async for event in app.astream_events(given, version="v2"):
        yield event


@case("`astream_events`", ("async",))
async def stream_events(compile: Compile, call: Caller) -> Any:
    app = compile(graph_of(chats_async, schema=Messages))
    return [
        (event["event"], event["name"])
        async for event in events(app, ASKED)
        if event["event"].startswith("on_chat_model")
    ]


def identified(state: State) -> State:
    return {"words": [uuid.UUID(int=5), {"a": {1, 2}}, b"bytes", ("a", 1)]}


@case("SQLite checkpoints")
async def sqlite(compile: Compile, call: Caller) -> Any:
    import tempfile

    from langgraph.checkpoint.sqlite import SqliteSaver
    from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

    graph = graph_of(identified, asks)
    with tempfile.TemporaryDirectory() as folder:
        if call.name == "sync":
            with SqliteSaver.from_conn_string(f"{folder}/saved.db") as saver:
                app = compile(graph, checkpointer=saver)
                await call.invoke(app, EMPTY, THREAD)
                return await call.invoke(app, Command(resume="yes"), THREAD)
        async with AsyncSqliteSaver.from_conn_string(f"{folder}/saved.db") as saver_async:
            app = compile(graph, checkpointer=saver_async)
            await call.invoke(app, EMPTY, THREAD)
            return await call.invoke(app, Command(resume="yes"), THREAD)
