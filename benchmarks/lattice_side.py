"""The workloads on Lattice, through its public client. Each function returns seconds, or what its docstring says."""

import asyncio
import time
from typing import Any

import numpy as np

from lattice_client import LatticeClient, context, task

# Another benchmark of this package needs the tests; these tasks do not.
APART = ["tests"]


@task(exclude=APART)
def noop(x: Any = None) -> Any:
    return x


@task(exclude=APART)
def gather(values: list[Any]) -> int:
    return len(values)


@task(exclude=APART)
def work(seconds: float, after: Any = None) -> None:
    time.sleep(seconds)


@task(exclude=APART)
def make(size: int) -> Any:
    return np.ones(size // 8)


@task(exclude=APART)
def grow(array: Any) -> Any:
    return array + 1


@task(exclude=APART)
def total(array: Any) -> float:
    return float(array[0])


@task(exclude=APART)
def numbers(count: int) -> list[int]:
    return list(range(count))


@task(exclude=APART)
def spread(count: int) -> None:
    for number in range(count):
        context.spawn(noop, {"x": number})


@task(exclude=APART)
async def wait(seconds: float) -> None:
    await asyncio.sleep(seconds)


def one(client: LatticeClient) -> float:
    """One no-op task, from the workflow's creation to its result."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    workflow.add_task(noop, {"x": 1})
    workflow.run().result()
    return time.perf_counter() - started


def chain(client: LatticeClient, length: int = 50) -> float:
    """Seconds a hop of a chain."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    last = workflow.add_task(noop, {"x": 1})
    for _ in range(length - 1):
        last = workflow.add_task(noop, {"x": last.output})
    workflow.run().result()
    return (time.perf_counter() - started) / length


def fan(client: LatticeClient, width: int = 1000) -> float:
    """One task, then `width` side by side, then one."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    first = workflow.add_task(noop, {"x": 1})
    middle = [workflow.add_task(noop, {"x": first.output}).output for _ in range(width)]
    workflow.add_task(gather, {"values": middle})
    workflow.run().result()
    return time.perf_counter() - started


def agent(client: LatticeClient) -> float:
    """An agent's graph: 50 ms, three times 300 ms side by side, 50 ms; seconds over the 400 ms it must take."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    first = workflow.add_task(work, {"seconds": 0.05})
    tools = [workflow.add_task(work, {"seconds": 0.3, "after": first.output}).output for _ in range(3)]
    workflow.add_task(work, {"seconds": 0.05, "after": tools})
    workflow.run().result()
    return time.perf_counter() - started - 0.4


def large(client: LatticeClient, size: int = 100_000_000) -> float:
    """An array of `size` bytes down five tasks."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    last = workflow.add_task(make, {"size": size})
    for _ in range(3):
        last = workflow.add_task(grow, {"array": last.output})
    workflow.add_task(total, {"array": last.output})
    workflow.run().result()
    return time.perf_counter() - started


def waiting(client: LatticeClient, count: int = 1000) -> float:
    """`count` async tasks of one second at once."""
    started = time.perf_counter()
    workflow = client.create_workflow()
    for _ in range(count):
        workflow.add_task(wait, {"seconds": 1.0})
    workflow.run().result()
    return time.perf_counter() - started


def scale(client: LatticeClient, count: int) -> float:
    """Seconds a task of one graph of `count` no-op tasks."""
    workflow = client.create_workflow()
    for _ in range(count):
        workflow.add_task(noop, {"x": 1})
    started = time.perf_counter()
    run = workflow.run()
    for _ in run.events():
        pass
    return (time.perf_counter() - started) / count


def scale_map(client: LatticeClient, count: int) -> float:
    """Seconds an item of a no-op task that is mapped over `count` items."""
    workflow = client.create_workflow()
    workflow.map(noop, {"x": workflow.add_task(numbers, {"count": count}).output})
    started = time.perf_counter()
    run = workflow.run()
    for _ in run.events():
        pass
    return (time.perf_counter() - started) / count


def scale_spawn(client: LatticeClient, count: int) -> float:
    """Seconds a no-op task of `count` that one task adds to its run."""
    workflow = client.create_workflow()
    workflow.add_task(spread, {"count": count})
    started = time.perf_counter()
    run = workflow.run()
    for _ in run.events():
        pass
    return (time.perf_counter() - started) / count


def chains_until(client: LatticeClient, deadline: float) -> int:
    """How many chains of three tasks one client finishes before `deadline`, in `time.time` seconds."""
    done = 0
    while time.time() < deadline:
        workflow = client.create_workflow()
        last = workflow.add_task(noop, {"x": 1})
        for _ in range(2):
            last = workflow.add_task(noop, {"x": last.output})
        workflow.run().result()
        done += 1
    return done
