"""Plain LangGraph: nodes run in the process of the caller. A graph is built for each run, as the others do."""

import operator
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, TypedDict

import side
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send


class State(TypedDict, total=False):
    """The value that nodes hand on, and the values of the nodes that run side by side."""

    x: int
    found: Annotated[list[int], operator.add]


def step(state: State) -> State:
    """Return the value."""
    return {"x": side.noop(state["x"])}


def branch(state: State) -> State:
    """Return the value of one node of many."""
    return {"found": [side.noop(state["x"])]}


def gather(state: State) -> State:
    """Return how many values there are."""
    return {"x": side.count(state["found"])}


def one() -> Any:
    return _run(StateGraph(State).add_node("a", step).add_edge(START, "a").add_edge("a", END))


def chain() -> Any:
    names = [f"n{number}" for number in range(side.LENGTH)]
    made = StateGraph(State)
    for name, before in zip(names, [START, *names], strict=False):
        made.add_node(name, step)
        made.add_edge(before, name)
    return _run(made.add_edge(names[-1], END))


def fan() -> Any:
    made = StateGraph(State).add_node("first", step).add_node("branch", branch).add_node("gather", gather)
    made.add_edge(START, "first")
    made.add_conditional_edges("first", lambda state: [Send("branch", {"x": state["x"]})] * side.WIDTH, ["branch"])
    return _run(made.add_edge("branch", "gather").add_edge("gather", END))


def _run(made: Any) -> Any:
    return made.compile().invoke({"x": 1}, {"recursion_limit": 2 * side.LENGTH})["x"]


@contextmanager
def started(cpus: int) -> Iterator[side.Workloads]:
    """Run nothing besides this process."""
    yield {"W1": one, "W2": chain, "W3": fan}


if __name__ == "__main__":
    side.run(started, "langgraph")
