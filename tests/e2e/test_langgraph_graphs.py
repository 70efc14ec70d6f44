"""Each graph gives the same result in plain LangGraph and with its nodes on Lattice, for both kinds of callers."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from lattice_client import LangGraphClient, LatticeClient
from tests.e2e.graphs import control, nesting, reaching
from tests.e2e.graphs.cases import CASES, AsyncCaller, Caller, Case, comparable

REPEATED = [pytest.mark.exhaustive]
# With the other kind of caller a scenario repeats the behaviour; `make test` takes each kind for every second one.
PAIRS = [
    pytest.param(name, caller, id=f"{name}-{caller}", marks=[] if number == chosen % len(case.callers) else REPEATED)
    for chosen, (name, case) in enumerate(CASES.items())
    for number, caller in enumerate(case.callers)
]
MODULES = (control, nesting, reaching)  # their import adds the cases
# Graphs that run no node.
NO_NODES = {"drawing", "drawing_as_json"}


@pytest.fixture(scope="module")
def lattice(local: str) -> Iterator[LangGraphClient]:
    with LangGraphClient(local) as connected:
        yield connected


def plain(graph: Any, **arguments: Any) -> Any:
    """Compile a graph as LangGraph does."""
    if hasattr(graph, "compile"):
        return graph.compile(**arguments)
    return graph


def driven(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends, without an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("a synchronous scenario suspended")


def result_of(case: Case, compile: Any, caller: str) -> Any:
    if caller == "async":
        return comparable(asyncio.run(case.scenario(compile, AsyncCaller())))
    return comparable(driven(case.scenario(compile, Caller())))


@pytest.mark.parametrize(("name", "caller"), PAIRS)
def test_a_graph_gives_the_result_of_plain_langgraph(
    name: str, caller: str, lattice: LangGraphClient, local: str
) -> None:
    made: list[Any] = []

    def on_lattice(graph: Any, **arguments: Any) -> Any:
        made.append(lattice.compile(graph, **arguments))
        return made[-1]

    case = CASES[name]
    expected = result_of(case, plain, caller)
    assert result_of(case, on_lattice, caller) == expected
    if name not in NO_NODES:
        with LatticeClient(local) as client:
            assert client.list_tasks(made[-1].last_run_id), "its nodes were tasks of a run"
