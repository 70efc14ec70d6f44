"""Measures the processor time that metrics cost a task: `python -m benchmarks.telemetry_cost`, on an idle machine.

A server without metrics and one with metrics take turns with graphs of tasks that do nothing. The processor time of
each server, of its workers and of the client is divided by the number of tasks.
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
TASKS = 1000
ROUNDS = 10


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


def cpu_s(process: psutil.Process) -> float:
    """Return the processor time of a process and all below it, and of this process."""
    total = sum(os.times()[:2])
    for found in (process, *process.children(recursive=True)):
        times = found.cpu_times()
        total += times.user + times.system
    return total


def main() -> None:
    """Measure and print medians."""
    with ExitStack() as stack:
        servers = {}
        for name, flags in VARIANTS.items():
            address, process = stack.enter_context(served(*flags))
            servers[name] = stack.enter_context(LatticeClient(address)), process
        costs: dict[str, list[float]] = {name: [] for name in servers}
        for number in range(ROUNDS + 1):
            for name, (client, process) in servers.items():
                workflow = client.create_workflow("cost")
                for index in range(TASKS):
                    workflow.add_task(nothing, {"x": index}, f"t{index}")
                before = cpu_s(process)
                workflow.run().result(timeout=300)
                if number:  # The first round warms up.
                    costs[name].append((cpu_s(process) - before) / TASKS * 1e6)
        for name, found in costs.items():
            differences = [own - bare for own, bare in zip(found, costs["none"], strict=True)]
            more = f"{statistics.median(differences):+.0f} (from {min(differences):+.0f} to {max(differences):+.0f})"
            print(f"{name:20} {statistics.median(found):6.0f} us a task, {more}")


if __name__ == "__main__":
    main()
