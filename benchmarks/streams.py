"""`python -m benchmarks.streams`: measures values that tasks stream out while they run, on an idle machine.

Three parts, on a server of its own with the local executor:

- `latency`: one task streams a value each 10 ms; the time from each value to its arrival at the reader.
- `rate`: tasks stream as fast as they can, each to a reader of its run; values a second, counted by the readers.
- `beside`: the time from a state event to its arrival at a reader, while other tasks stream 5,000 values a second
  in all, and while none does; rounds of the two alternate.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.figures import percentile
from benchmarks.lattice_side import APART, noop
from benchmarks.serving import served
from lattice_client import LatticeClient, Run, context, task

WAIT_S = 120.0
RATE_S = 3.0
TASKS = 8
STREAMS, A_SECOND = 5, 1_000
PROBES, PAUSE_S = 200, 0.01


@task(exclude=APART, cpu=0.01)
def paced(count: int, a_second: float) -> None:
    """Emit the time, at a steady rate."""
    begun = time.perf_counter()
    for number in range(count):
        time.sleep(max(0.0, begun + number / a_second - time.perf_counter()))
        context.emit(time.time())


@task(exclude=APART, cpu=0.01)
def unpaced(seconds: float) -> None:
    """Emit numbers as fast as they are taken."""
    ends, number = time.monotonic() + seconds, 0
    while time.monotonic() < ends:
        context.emit(number)
        number += 1


def latency(client: LatticeClient) -> None:
    """Print how long values take."""
    taken = []
    for _ in range(5):
        run = _start(client, (paced, {"count": 200, "a_second": 100.0}))
        for chunk in run.chunks(timeout=WAIT_S):
            taken.append((chunk.index, time.time() - chunk.value))
    first = [seconds for index, seconds in taken if index == 0]
    each = [seconds for _, seconds in taken]
    print(f"first value: median {_ms(first, 0.5)}; each: median {_ms(each, 0.5)}, p99 {_ms(each, 0.99)}")


def rate(client: LatticeClient, tasks: int) -> None:
    """Print how many values arrive from so many tasks in one run."""
    run = _start(client, *[(unpaced, {"seconds": RATE_S})] * tasks)
    arrived, count = 0.0, 0
    begun = 0.0
    for _ in run.chunks(timeout=WAIT_S):
        arrived = time.perf_counter()
        begun = begun or arrived
        count += 1
    print(f"{tasks} tasks: {count / (arrived - begun):,.0f} values a second")


def beside(client: LatticeClient, address: str, rounds: int) -> None:
    """Print how long state events take beside streams, and without them."""
    found: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(rounds):
        for is_beside in (False, True):
            with _streaming(client, address) if is_beside else _nothing():
                found[is_beside].append(percentile(_told(client), 0.99))
    without_s, with_s = (statistics.median(found[key]) for key in (False, True))
    print(f"p99 of state events: {1e3 * without_s:.1f} ms alone, {1e3 * with_s:.1f} ms beside streams")
    print("each round, ms:", [(round(1e3 * a, 1), round(1e3 * b, 1)) for a, b in zip(*found.values(), strict=True)])


def _told(client: LatticeClient) -> list[float]:
    """Return how long the events of some runs take to a reader, in seconds."""
    taken = []
    for _ in range(PROBES):
        for event in _start(client, (noop, {"x": 1})).events(timeout=WAIT_S):
            taken.append(time.time() - event.time_s)
        time.sleep(PAUSE_S)
    return taken


@contextmanager
def _streaming(client: LatticeClient, address: str) -> Iterator[None]:
    """Have tasks stream, and another process read, while the block runs."""
    run = _start(client, *[(paced, {"count": 60 * A_SECOND, "a_second": A_SECOND})] * STREAMS)
    command = [sys.executable, "-m", "benchmarks.streams", "--read", address, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield
        finally:
            run.cancel()
            print(f"  the reader got {process.stdout.readline().strip()} values a second")


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def read(address: str, run_id: str) -> None:
    """Read all values of a run; print how many came a second."""
    count, begun = 0, 0.0
    with LatticeClient(address) as client:
        for _ in client.get_run(run_id).chunks(timeout=WAIT_S):
            if not count:
                begun = time.perf_counter()
                print("reading", flush=True)
            count += 1
    print(f"{count / (time.perf_counter() - begun):,.0f}", flush=True)


def _start(client: LatticeClient, *tasks: tuple[Any, dict[str, Any]]) -> Run:
    workflow = client.create_workflow()
    for function, inputs in tasks:
        workflow.add_task(function, inputs)
    return workflow.run()


def _ms(values: list[float], share: float) -> str:
    return f"{1e3 * percentile(values, share):.1f} ms"


def main() -> None:
    """Measure, or read."""
    parser = argparse.ArgumentParser(prog="benchmarks.streams")
    parser.add_argument("--only", choices=["latency", "rate", "beside"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--read", nargs=2, metavar=("ADDRESS", "RUN"), help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.read:
        read(*flags.read)
        return
    cpus = os.cpu_count() or 2
    with served("--executor", "local", "--num-cpus", str(cpus)) as (address, _), LatticeClient(address) as client:
        parts: dict[str, list[Callable[[], None]]] = {
            "latency": [lambda: latency(client)],
            "rate": [lambda: rate(client, 1), lambda: rate(client, TASKS)],
            "beside": [lambda: beside(client, address, flags.rounds)],
        }
        for name, calls in parts.items():
            for call in calls if flags.only in (None, name) else []:
                call()


if __name__ == "__main__":
    main()
