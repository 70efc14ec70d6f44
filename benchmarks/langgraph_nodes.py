"""Measures three LangGraph nodes that compute side by side: `python -m benchmarks.langgraph_nodes`, on an idle machine.

Plain LangGraph runs them in threads, of which only one computes at a time. The same graph, compiled by Lattice, runs
them in processes. Both take turns, after one invocation each that is not counted; medians and their ratio are printed.
The nodes take two thirds of a processor each, so that two processors run all three at once: the ratio can reach 2.
"""

import argparse
import operator
import statistics
import time
from typing import Annotated, Any, TypedDict

from langgraph.graph import START, StateGraph

from benchmarks.serving import served
from lattice_client import LangGraphClient

NODES = ("one", "two", "three")
CPUS = 2
ROUNDS = 6_000_000


class State(TypedDict):
    """The numbers that the nodes computed."""

    found: Annotated[list[int], operator.add]


def computes(rounds: int) -> Any:
    """Return a node that computes in Python."""

    def node(state: State) -> dict[str, list[int]]:
        total = 0
        for number in range(rounds):
            total = (total * 31 + number) % 1_000_003
        return {"found": [total]}

    return node


def graph(rounds: int) -> "StateGraph[State, None, State, State]":
    """Return a graph of three nodes side by side."""
    made = StateGraph(State)
    for name in NODES:
        made.add_node(name, computes(rounds))
        made.add_edge(START, name)
    return made


def seconds(app: Any) -> float:
    """Return how long an invocation takes."""
    started = time.perf_counter()
    found = app.invoke({"found": []})["found"]
    took_s = time.perf_counter() - started
    assert len(found) == len(NODES)
    return took_s


def measure(invocations: int, rounds: int = ROUNDS) -> dict[str, list[float]]:
    """Return how long invocations took, in seconds, by side: `plain` and `lattice`."""
    made = graph(rounds)
    with (
        served("--executor", "local", "--num-cpus", str(CPUS)) as (address, _),
        LangGraphClient(address) as client,
    ):
        apps = {"plain": made.compile(), "lattice": client.compile(made, default={"cpu": CPUS / len(NODES)})}
        samples: dict[str, list[float]] = {name: [] for name in apps}
        for number in range(invocations + 1):
            for name, app in apps.items():
                took_s = seconds(app)
                if number:
                    samples[name].append(took_s)
    return samples


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.langgraph_nodes")
    parser.add_argument("--invocations", type=int, default=9)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="how long each node computes")
    flags = parser.parse_args()
    samples = measure(flags.invocations, flags.rounds)
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    for name, median_s in medians.items():
        print(f"{name}: {median_s:.3f} s (from {min(samples[name]):.3f} to {max(samples[name]):.3f})")
    print(f"plain / lattice: {medians['plain'] / medians['lattice']:.2f}")


if __name__ == "__main__":
    main()
