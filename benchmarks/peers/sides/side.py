"""The common part of all sides. A side is a program of its own, run by the Python that has its system installed.

    python SIDE.py '{"cpus": 2, "warm": ["W1", "W2", "W3"], "repeats": {"W1": 20, "W2": 3, "W3": 1}}'

It starts its system, does the workloads to warm up once, measures, and prints one line of JSON: the seconds of each
workload, and the versions. It imports nothing of Lattice, but for the side of Lattice itself.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib.metadata import version
from typing import Any

LENGTH, WIDTH = 50, 1000
# The functions of one system: one no-op; a chain of `LENGTH`; one, then `WIDTH` side by side, then one.
Workloads = dict[str, Callable[[], Any]]


def noop(x: Any = None) -> Any:
    """Return the input."""
    return x


def count(values: list[Any]) -> int:
    """Return how many values there are."""
    return len(values)


def checked(workload: str, found: Any) -> None:
    """Raise RuntimeError when a workload has a wrong result."""
    wanted = {"W1": 1, "W2": 1, "W3": WIDTH}[workload]
    if found != wanted:
        raise RuntimeError(f"{workload} returned {found!r}, not {wanted}")


def run(started: Callable[[int], AbstractContextManager[Workloads]], *packages: str) -> None:
    """Measure one system; `started` takes the number of processors, and is its workloads while it runs."""
    order = json.loads(sys.argv[1])
    samples: dict[str, list[float]] = {}
    with started(order["cpus"]) as workloads:
        for name in order["warm"]:
            checked(name, workloads[name]())
        for name, repeats in order["repeats"].items():
            for _ in range(repeats):
                begun = time.perf_counter()
                found = workloads[name]()
                took_s = time.perf_counter() - begun
                checked(name, found)
                samples.setdefault(name, []).append(took_s / LENGTH if name == "W2" else took_s)
    versions = {package: version(package) for package in packages} | {"Python": platform.python_version()}
    print(json.dumps({"samples": samples, "versions": versions}), flush=True)
