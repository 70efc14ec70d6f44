"""Graphs of LangGraph whose nodes run on a server: fan-out, commands, and what LangGraph offers to nodes."""

import asyncio
import operator
import os
import time
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.graph import END, START, StateGraph
from langgraph.runtime import Runtime
from langgraph.types import Command, Send

from lattice_client import LangGraphClient, TaskFailedError
from tests.e2e.rooms import Room, enter


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


def test_nodes_get_config_context_and_commands(address: str) -> None:
    lattice = LangGraphClient(address)

    @lattice.task
    def configured(state: State, config: RunnableConfig) -> Command[Any]:
        assert "callbacks" not in config
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


def test_a_node_fails_with_an_explanation_when_it_uses_the_stream_writer(address: str) -> None:
    @LangGraphClient(address).task
    def writes(state: State, runtime: Runtime[Context]) -> dict[str, Any]:
        runtime.stream_writer("lost")
        return {}

    graph = graph_of(writes)
    graph.add_edge(START, "writes")
    with pytest.raises(TaskFailedError, match="return the values instead"):
        graph.compile().invoke(given(), context=Context("ann"))
