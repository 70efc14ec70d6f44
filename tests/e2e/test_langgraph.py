"""Graphs of LangGraph whose nodes run on a server: fan-out, commands, and what LangGraph offers to nodes."""

import asyncio
import decimal
import gc
import operator
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig, RunnableLambda
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.pregel._loop import PregelLoop
from langgraph.runtime import Runtime
from langgraph.store.base import BaseStore
from langgraph.store.memory import InMemoryStore
from langgraph.types import Command, Send, interrupt

from lattice_client import (
    ClientClosedError,
    LangGraphClient,
    LatticeClient,
    RequestError,
    RunCancelledError,
    TaskDefinitionError,
)
from lattice_client.runs.open_run import AsyncOpenRun
from tests.e2e import rooms
from tests.e2e.graphs import control, reaching
from tests.e2e.graphs.control import QuotaError
from tests.e2e.rooms import WAIT_S, Room, enter, note


class State(TypedDict):
    """The state of the graph."""

    words: Annotated[list[str], operator.add]
    text: str


@dataclass
class Context:
    """The context of a run of the graph."""

    user: str


def graph_of(*nodes: Any) -> "StateGraph[State, Context, State, State]":
    """Return a graph with these nodes and no edges."""
    graph = StateGraph(State, context_schema=Context)
    for node in nodes:
        graph.add_node(node.__name__, node)
    return graph


@pytest.fixture
def client_of_local(local: str) -> Iterator[LatticeClient]:
    with LatticeClient(local) as client:
        yield client


def given(text: str = "") -> State:
    return {"words": [], "text": text}


@pytest.mark.parametrize("is_async", [False, True])
def test_nodes_of_one_step_run_side_by_side(is_async: bool, address: str, room: Room) -> None:
    lattice = LangGraphClient(address)

    @lattice.task(cpu=0.5)
    def split(state: State) -> dict[str, Any]:
        return {}

    @lattice.task(cpu=0.5)
    def each(state: State) -> dict[str, Any]:
        enter(room, state["text"])
        return {"words": [state["text"]]}

    @lattice.task
    def opened(state: State) -> dict[str, Any]:
        # Only once the others are in.
        while len(room.notes()) < 2:
            time.sleep(0.01)
        room.open()
        return {"words": [str(os.getpid())]}

    graph = graph_of(split, each, opened)
    graph.add_edge(START, "split")
    graph.add_edge("split", "opened")
    graph.add_conditional_edges("split", lambda state: [Send("each", given(name)) for name in ("a", "b")], ["each"])
    graph.add_edge(["each", "opened"], END)
    app = graph.compile()
    found = asyncio.run(app.ainvoke(given())) if is_async else app.invoke(given())
    process, *words = sorted(found["words"])
    assert words == ["a", "b"]
    assert process != str(os.getpid())


@pytest.mark.parametrize("is_async", [False, True])
def test_a_graph_raises_when_its_client_is_closed(is_async: bool, address: str, room: Room) -> None:
    lattice = LangGraphClient(address)

    @lattice.task(cpu=0.1)
    def waits(state: State) -> dict[str, Any]:
        enter(room, "waits")
        return {"words": ["out"]}

    graph = graph_of(waits)
    graph.add_edge(START, "waits")
    graph.add_edge("waits", END)
    app = graph.compile()

    def close() -> None:
        rooms.noted(room, "+waits")
        lattice.close()

    closing = threading.Thread(target=close)
    closing.start()
    for _ in range(2):
        with pytest.raises(ClientClosedError, match="is closed: create another one"):
            asyncio.run(app.ainvoke(given())) if is_async else app.invoke(given())
    closing.join()
    room.open()


def test_nodes_get_config_context_and_commands(address: str) -> None:
    lattice = LangGraphClient(address)

    @lattice.task
    def configured(state: State, config: RunnableConfig) -> Command[Any]:
        return Command(goto="told", update={"words": [config["configurable"]["thread"], *config["tags"]]})

    @lattice.task
    def told(state: State, *, runtime: Runtime[Context]) -> dict[str, Any]:
        assert runtime.execution_info is not None
        assert runtime.store is None
        return {"words": [runtime.context.user]}

    graph = graph_of(configured, told)
    graph.add_edge(START, "configured")
    graph.add_edge("told", END)
    config: RunnableConfig = {"configurable": {"thread": "t1"}, "tags": ["tagged"]}
    found = graph.compile().invoke(given(), config, context=Context("ann"))
    assert found["words"] == ["t1", "tagged", "ann"]


def test_context_variables_environment_and_folder_of_the_caller_do_not_travel(
    local: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seen(state: State) -> dict[str, Any]:
        return {"words": [decimal.getcontext().prec, os.environ.get("OF_CALLER", "none"), os.getcwd()]}

    graph = graph_of(seen)
    graph.add_edge(START, "seen")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OF_CALLER", "set")
    with decimal.localcontext(prec=5):  # A context variable.
        found = LangGraphClient(local).compile(graph).invoke(given("x"))["words"]
    assert found[:2] == [decimal.DefaultContext.prec, "none"]
    assert found[2] != str(tmp_path)


def test_a_decorated_node_reaches_the_stream_the_store_and_interrupts(local: str) -> None:
    @LangGraphClient(local).task
    def reaches(state: State, runtime: Runtime[Context], store: BaseStore) -> dict[str, Any]:
        runtime.stream_writer("written")
        store.put(("n",), "key", {"v": state["text"]})
        return {"words": [interrupt("sure?")]}

    graph, kept = graph_of(reaches), InMemoryStore()
    graph.add_edge(START, "reaches")
    app = graph.compile(checkpointer=InMemorySaver(), store=kept)
    config: RunnableConfig = {"configurable": {"thread_id": "t"}}
    assert list(app.stream(given("x"), config, context=Context("ann"), stream_mode="custom")) == ["written"]
    assert app.invoke(Command(resume="yes"), config, context=Context("ann"))["words"] == ["yes"]
    item = kept.get(("n",), "key")
    assert item is not None
    assert item.value == {"v": "x"}


def test_node_exception_is_restored_when_its_arguments_do_not_fit_its_class(local: str) -> None:
    @LangGraphClient(local).task
    async def fails(text: str) -> None:
        raise QuotaError("ann", 5)

    with pytest.raises(QuotaError, match="ann has used 5") as caught:
        asyncio.run(fails("x"))
    assert caught.value.limit == 5
    assert "in fails" in str(caught.value.__cause__), "the traceback of the worker is the last cause"


def test_fifty_coroutines_wait_at_once(local: str, room: Room) -> None:
    @LangGraphClient(local).task
    async def waits(number: int) -> int:
        note(room, str(number))
        while len(room.notes()) < 50:
            await asyncio.sleep(0.01)
        return os.getpid()

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(waits(number) for number in range(50)))

    found = asyncio.run(all_of_them())
    assert len(found) == 50
    assert os.getpid() not in found


def test_nodes_are_named_tasks_of_one_run_in_their_order(local: str, client_of_local: LatticeClient) -> None:
    app = LangGraphClient(local).compile(control.graph_of(control.first, control.second))
    app.invoke({"words": [], "text": ""})
    run_id = app.last_run_id
    assert [found.task_id for found in client_of_local.list_tasks(run_id)] == ["first-1", "second-2"]
    assert client_of_local.get_run(run_id).status() == "succeeded"


def test_a_cancelled_invocation_ends_its_nodes(local: str, client_of_local: LatticeClient, room: Room) -> None:
    @LangGraphClient(local).task
    def waits(state: State) -> dict[str, Any]:
        enter(room, "in")
        return {}

    graph = graph_of(waits)
    graph.add_edge(START, "waits")
    app = LangGraphClient(local).compile(graph)

    async def cancelled() -> None:
        invocation = asyncio.create_task(app.ainvoke(given()))
        while not room.notes():
            await asyncio.sleep(0.01)
        invocation.cancel()
        with pytest.raises(asyncio.CancelledError):
            await invocation

    asyncio.run(cancelled())
    run = client_of_local.list_runs(1)[0]
    assert client_of_local.get_run(run.run_id).status() == "cancelled"
    room.open()
    assert room.notes() == ["+in"]


def test_compile_refuses_a_node_that_cannot_be_pickled_and_unknown_options(local: str) -> None:
    lattice, lock = LangGraphClient(local), threading.Lock()

    def holds_lock(state: State) -> dict[str, Any]:
        with lock:
            return {}

    graph = graph_of(holds_lock)
    graph.add_edge(START, "holds_lock")
    with pytest.raises(TaskDefinitionError, match=r"node 'holds_lock' cannot run on Lattice: .*lock.*local="):
        lattice.compile(graph)
    with pytest.raises(TaskDefinitionError, match="no node 'unknown'; its nodes and tools: holds_lock"):
        lattice.compile(graph, local=["holds_lock", "unknown"])
    with pytest.raises(TaskDefinitionError, match="isolation must be one of"):
        lattice.compile(graph, isolation="jail")
    assert lattice.compile(graph, local=["holds_lock"]).invoke(given()) == given()


def test_values_that_cannot_be_pickled_are_named_with_the_node(local: str) -> None:
    def reads(state: State, config: RunnableConfig) -> dict[str, Any]:
        with config["configurable"]["lock"]:
            return {}

    def returns(state: State) -> dict[str, Any]:
        return {"words": [threading.Lock()]}

    lattice, lock = LangGraphClient(local), threading.Lock()
    advice = r"name the node in local=\[...\] to run it here"
    for node, state, match in (
        (reads, given(), rf"config\['configurable'\]\['lock'\] was not sent to the node .*; {advice}"),
        (reads, {"words": [lock]}, rf"node 'reads' .* its input, entry 'words', item 0 \(_thread.lock\) .*; {advice}"),
        (returns, given(), rf"the result of the node, entry 'words', item 0 \(_thread.lock\) .*; {advice}"),
    ):
        graph = graph_of(node)
        graph.add_edge(START, node.__name__)
        with pytest.raises((TypeError, RuntimeError), match=match):
            lattice.compile(graph).invoke(state, {"configurable": {"lock": lock}})


def test_a_node_in_a_sandbox_returns_data_and_exceptions_by_name(local: str) -> None:
    @LangGraphClient(local).task(isolation="subprocess")
    def sealed(state: State) -> dict[str, Any]:
        if state["text"] == "fail":
            raise LookupError("nothing there")
        return {"words": [state["text"], os.getpid()]}

    @LangGraphClient(local).task(isolation="subprocess")
    def lossy(state: State) -> Any:
        return {1, 2}

    found = sealed(given("x"))
    assert found["words"][0] == "x"
    assert found["words"][1] != os.getpid()
    with pytest.raises(LookupError, match="nothing there"):
        sealed(given("fail"))
    with pytest.raises(TypeError, match="returned a set that JSON does not represent"):
        lossy(given())


RESUMES = """
import sys
from langgraph.checkpoint.sqlite import SqliteSaver
from langgraph.types import Command
from lattice_client import LangGraphClient
from tests.e2e.graphs import reaching

target, path = sys.argv[1:]
with SqliteSaver.from_conn_string(path) as saver, LangGraphClient(target) as lattice:
    app = lattice.compile(reaching.graph_of(reaching.asks), checkpointer=saver)
    print(app.invoke(Command(resume="yes"), reaching.THREAD)["words"])
"""


def test_another_process_resumes_an_interrupted_graph(local: str, tmp_path: Path) -> None:
    path = str(tmp_path / "saved.db")
    with SqliteSaver.from_conn_string(path) as saver, LangGraphClient(local) as lattice:
        app = lattice.compile(reaching.graph_of(reaching.asks), checkpointer=saver)
        assert app.invoke(reaching.EMPTY, reaching.THREAD)["words"] == []
    command = [sys.executable, "-c", RESUMES, local, path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout.strip() == "['yes']"


FORKS = """
import asyncio, os, signal, sys
from lattice_client import ForkError, LangGraphClient
from tests.e2e.graphs import control

lattice = LangGraphClient(sys.argv[1])
app, first = lattice.compile(control.graph_of(control.first)), lattice.task(control.first)
app.invoke({"words": []})
if (child := os.fork()) == 0:
    signal.alarm(20)  # ends a child that waits
    calls = [app.invoke, lambda given: asyncio.run(app.ainvoke(given)), first]
    refused = 0
    for call in calls:
        try:
            call({"words": []})
        except ForkError:
            refused += 1
    os._exit(refused)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), app.invoke({"words": []})["words"])
"""


def test_a_forked_process_raises_instead_of_waiting(local: str) -> None:
    command = [sys.executable, "-W", "ignore", "-c", FORKS, local]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=True)
    assert done.stdout == "3 ['first']\n"


def test_generator_functions_can_be_wrapped(local: str) -> None:
    lattice = LangGraphClient(local)

    @lattice.task
    def counts(number: int) -> Iterator[int]:
        yield from range(number)

    @lattice.task
    async def yields(state: State) -> AsyncIterator[dict[str, Any]]:
        yield {"words": ["a"]}
        yield {"words": ["b"]}

    def takes(state: State) -> dict[str, Any]:
        return {"words": list(counts(2))}

    assert list(counts(3)) == [0, 1, 2]
    graph = graph_of(yields, takes)
    graph.add_edge(START, "yields")
    graph.add_edge("yields", "takes")
    compiled = lattice.compile(graph)
    found, plain = asyncio.run(compiled.ainvoke(given())), asyncio.run(graph.compile().ainvoke(given()))
    assert found["words"] == plain["words"] == ["b", 0, 1]


def test_a_method_that_only_the_own_store_has_is_refused_with_advice(local: str) -> None:
    class Store(InMemoryStore):
        def count(self) -> int:
            return 0

    def counts(state: State, store: BaseStore) -> dict[str, Any]:
        return {"words": [store.count()]}  # type: ignore[attr-defined]

    graph = graph_of(counts)
    graph.add_edge(START, "counts")
    with pytest.raises(AttributeError, match=r"'count': .* the methods of BaseStore only; name the node in local="):
        LangGraphClient(local).compile(graph, store=Store()).invoke(given())


def test_tools_runnables_and_graphs_can_be_wrapped(local: str) -> None:
    lattice = LangGraphClient(local)
    wrapped = lattice.task(reaching.upper)
    assert isinstance(wrapped, type(reaching.upper))
    assert wrapped.invoke({"text": "abc"}) == "ABC"
    assert lattice.task(RunnableLambda(control.first)).invoke({"text": "x"}) == {"words": ["first"], "text": "x1"}
    app = lattice.task(control.graph_of(control.first).compile())
    assert app.invoke({"words": []}) == {"words": ["first"], "text": "1"}
    assert app.last_run_id


def test_values_larger_than_a_question_cross_in_both_directions(local: str) -> None:
    size = 1_500_000

    @LangGraphClient(local).task
    def stores(state: State, store: BaseStore, runtime: Runtime[Context]) -> dict[str, Any]:
        store.put(("n",), "large", {"text": "x" * size})
        runtime.stream_writer("y" * size)
        found = store.get(("n",), "large")
        return {"words": [len(found.value["text"]) if found else 0]}

    graph = graph_of(stores)
    graph.add_edge(START, "stores")
    app = graph.compile(store=InMemoryStore())
    items = list(app.stream(given(), context=Context("ann"), stream_mode=["custom", "updates"]))
    assert [len(items[0][1]), items[1][1]["stores"]["words"]] == [size, [size]]


def test_call_of_a_node_fails_when_its_attempt_was_lost_after_writing_to_the_stream(local: str, tmp_path: Path) -> None:
    first = tmp_path / "first"

    @LangGraphClient(local).task(retries=1)
    def dies_once(state: State, runtime: Runtime[Context], store: BaseStore) -> dict[str, Any]:
        runtime.stream_writer("written")
        store.get(("n",), "the answer says that the chunk has arrived")
        if not first.exists():
            first.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {}

    graph = graph_of(dies_once)
    graph.add_edge(START, "dies_once")
    app, items = graph.compile(store=InMemoryStore()), list[Any]()
    with pytest.raises(ConnectionError, match="had written or asked something before its attempt was lost"):
        items.extend(app.stream(given(), stream_mode="custom"))
    assert items == ["written"]


@pytest.mark.parametrize("is_async", [False, True])
def test_retries_of_a_task_repeat_a_node_that_raises_before_it_reaches_anything(
    is_async: bool, local: str, tmp_path: Path
) -> None:
    tries = tmp_path / "tries"

    def begin() -> None:
        with tries.open("a") as file:
            file.write("x")
        if len(tries.read_text()) < 3:
            raise QuotaError("ann", 1)

    @LangGraphClient(local).task(retries=2, retry_backoff=0)
    def fails_twice(state: State, store: BaseStore) -> dict[str, Any]:
        begin()
        store.put(("n",), "k", {"x": 1})
        return {"words": ["done"]}

    @LangGraphClient(local).task(retries=2, retry_backoff=0)
    async def fails_twice_as_coroutine(state: State, store: BaseStore) -> dict[str, Any]:
        begin()
        await store.aput(("n",), "k", {"x": 1})
        return {"words": ["done"]}

    node = fails_twice_as_coroutine if is_async else fails_twice
    graph = graph_of(node)
    graph.add_edge(START, node.__name__)
    app = graph.compile(store=InMemoryStore())
    found = asyncio.run(app.ainvoke(given())) if is_async else app.invoke(given())
    assert (found["words"], tries.read_text()) == (["done"], "xxx")


def test_node_raises_its_own_exception_when_its_attempts_are_used_up(local: str) -> None:
    @LangGraphClient(local).task(retries=1, retry_backoff=0)
    def fails(state: State) -> dict[str, Any]:
        raise QuotaError("ann", 7)

    graph = graph_of(fails)
    graph.add_edge(START, "fails")
    with pytest.raises(QuotaError):
        graph.compile().invoke(given())


def test_node_that_raises_after_it_has_written_is_not_repeated(local: str) -> None:
    @LangGraphClient(local).task(retries=3, retry_backoff=0)
    def writes(state: State, runtime: Runtime[Context], store: BaseStore) -> dict[str, Any]:
        runtime.stream_writer("written")
        store.get(("n",), "the answer says that the chunk has arrived")
        raise QuotaError("ann", 7)

    graph = graph_of(writes)
    graph.add_edge(START, "writes")
    app, items = graph.compile(store=InMemoryStore()), list[Any]()
    with pytest.raises(QuotaError):
        items.extend(app.stream(given(), stream_mode="custom"))
    assert items == ["written"]


def test_coroutines_of_a_superstep_are_added_by_one_message(local: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    add = AsyncOpenRun.add_tasks

    async def counted(run: AsyncOpenRun, tasks: Any, *more: Any) -> int:
        sizes.append(len(tasks))
        return await add(run, tasks, *more)

    monkeypatch.setattr(AsyncOpenRun, "add_tasks", counted)
    graph = graph_of(words_of("first"), words_of("last"))
    names = [f"node{number}" for number in range(5)]
    for name in names:
        graph.add_node(name, words_of(name))
        graph.add_edge("first", name)
    graph.add_edge(START, "first")
    graph.add_edge(names, "last")
    with LangGraphClient(local) as lattice:
        found = asyncio.run(lattice.compile(graph).ainvoke(given()))
    assert sorted(found["words"]) == ["first", "last", *names]
    assert sizes == [1, 5, 1]


def words_of(name: str) -> Any:
    def node(state: State) -> dict[str, Any]:
        return {"words": [name]}

    node.__name__ = name
    return node


@pytest.mark.parametrize("is_async", [False, True])
def test_an_ended_invocation_is_forgotten(is_async: bool, local: str) -> None:
    def loops() -> list[PregelLoop]:
        gc.collect()
        return [found for found in gc.get_objects() if isinstance(found, PregelLoop)]

    others = loops()  # Of the errors of other tests.
    with LangGraphClient(local) as lattice:
        app = lattice.compile(graph_of_first())
        for _ in range(2):
            asyncio.run(app.ainvoke(given())) if is_async else app.invoke(given())
        assert not [found for found in loops() if found not in others]


def test_compile_refuses_a_node_that_changes_captured_variables(local: str) -> None:
    seen: list[str] = []

    def sees(state: State) -> dict[str, Any]:
        seen.append(state["text"])
        return {}

    graph = graph_of(sees)
    graph.add_edge(START, "sees")
    with LangGraphClient(local) as lattice:
        with pytest.raises(TaskDefinitionError, match=r"node 'sees' cannot run on Lattice: its code changes seen \("):
            lattice.compile(graph)
        lattice.compile(graph, local=["sees"]).invoke(given("x"))
    assert seen == ["x"]


@task
def sends(word: str) -> tuple[str, int]:
    return word, os.getpid()


def test_tasks_of_an_entrypoint_have_options_and_may_stay_here(local: str, client_of_local: LatticeClient) -> None:
    seen: list[str] = []

    @task(name="records")
    def records(word: str) -> int:
        seen.append(word)
        return os.getpid()

    def body(word: str) -> Any:
        return sends(word).result(), records(word).result()

    with LangGraphClient(local) as lattice:
        with pytest.raises(TaskDefinitionError, match="no node 'send'; its nodes and tools: records, sends"):
            lattice.compile(entrypoint()(body), local=["send"])
        with pytest.raises(TaskDefinitionError, match="task 'records' cannot run on Lattice: its code changes seen"):
            lattice.compile(entrypoint()(body)).invoke("a")
        app = lattice.compile(entrypoint()(body), local=["records"], resources={"sends": {"cpu": 0.25}})
        (word, elsewhere), here = app.invoke("b")
        assert (word, seen) == ("b", ["b"])
        assert elsewhere != here == os.getpid()
        assert [sent.function_name for sent in client_of_local.run_graph(app.last_run_id)] == ["sends"]
        too_large = lattice.compile(entrypoint()(body), local=["records"], resources={"sends": {"cpu": 100_000}})
        with pytest.raises(RequestError, match="100000"):
            too_large.invoke("c")


def test_a_forgotten_stream_ends_in_the_thread_of_the_streams(
    local: str, client_of_local: LatticeClient, room: Room
) -> None:
    def waits(state: State) -> dict[str, Any]:
        enter(room, "waits")
        return {}

    graph = graph_of(words_of("first"), waits)
    graph.add_edge(START, "first")
    graph.add_edge(START, "waits")
    with LangGraphClient(local) as lattice:
        app = lattice.compile(graph)
        held = [app.stream(given())]
        assert next(held[0]) == {"first": {"words": ["first"]}}
        # As when the collector runs there.
        lattice._loop.call(held.clear)
        run_id = lattice._loop.submit(noted(app)).result(30)
        with pytest.raises(RunCancelledError):
            client_of_local.get_run(run_id).result(timeout=30)
        assert lattice.compile(graph_of_first()).invoke(given())["words"] == ["first"]


async def noted(app: Any) -> str:
    return str(app.last_run_id)


def graph_of_first() -> Any:
    graph = graph_of(words_of("first"))
    graph.add_edge(START, "first")
    return graph
