"""Measures the processor time that metrics cost: `python -m benchmarks.telemetry_cost`, on an idle machine.

A server without metrics and one with metrics take turns with graphs of tasks that do nothing, and with runs of one such
task. The processor time of each server, and that of the server, its workers and the client together, is given in
seconds for 10,000 tasks.
"""

import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil

from lattice_client import LatticeClient, task

LATTICE = str(Path(sys.executable).parent / "lattice")
VARIANTS = {"none": [], "metrics": ["--metrics", "prometheus"]}
ROUNDS = 16
PER = 10_000


@task
def nothing(x: int) -> int:
    """Return the input."""
    return x


@contextmanager
def served(*flags: str) -> Iterator[tuple[str, psutil.Process]]:
    """Serve while the block runs; yield the address and the process."""
    command = [LATTICE, "start", "--head", "--port", "0", "--executor", "local", "--num-cpus", "2", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None
        try:
            yield found.group(), psutil.Process(process.pid)
        finally:
            process.terminate()


def cpu_s(process: psutil.Process) -> tuple[float, float]:
    """Return the processor time of a process, and of it, all below it and this process together."""
    own = _time_of(process.pid)
    return own, own + sum(_time_of(found.pid) for found in process.children(recursive=True)) + _time_of(os.getpid())


def _time_of(pid: int) -> float:
    """Return the processor time of the threads of a process; that of psutil is exact to 10 ms only."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9


def graph(client: LatticeClient) -> int:
    """Run a graph; return how many tasks it has."""
    workflow = client.create_workflow("cost")
    for index in range(2000):
        workflow.add_task(nothing, {"x": index}, f"t{index}")
    workflow.run().result(timeout=300)
    return 2000


def runs(client: LatticeClient) -> int:
    """Run tasks one by one; return how many."""
    for index in range(300):
        client.run_task(nothing, {"x": index})
    return 300


def main() -> None:
    """Measure and print means, and the standard errors of differences."""
    with ExitStack() as stack:
        servers = {}
        for name, flags in VARIANTS.items():
            address, process = stack.enter_context(served(*flags))
            servers[name] = stack.enter_context(LatticeClient(address)), process
        for work in (graph, runs):
            costs: dict[str, list[tuple[float, float]]] = {name: [] for name in servers}
            for number in range(ROUNDS + 1):
                for name in sorted(servers, reverse=bool(number % 2)):
                    client, process = servers[name]
                    before = cpu_s(process)
                    tasks = work(client)
                    after = cpu_s(process)
                    if number:  # The first round warms up.
                        server, everyone = (
                            (end - start) / tasks * PER for start, end in zip(before, after, strict=True)
                        )
                        costs[name].append((server, everyone))
            _print(work.__name__, costs)


def _print(work: str, costs: dict[str, list[tuple[float, float]]]) -> None:
    for position, where in enumerate(("server", "all processes")):
        bare, own = ([cost[position] for cost in costs[name]] for name in ("none", "metrics"))
        differences = [one - other for one, other in zip(own, bare, strict=True)]
        error = statistics.stdev(differences) / len(differences) ** 0.5
        means = f"{statistics.mean(bare):.2f} s without, {statistics.mean(own):.2f} s with"
        print(f"{work:6} {where:14} {means}: {statistics.mean(differences):+.3f} s (± {error:.3f}) for {PER} tasks")


if __name__ == "__main__":
    main()
