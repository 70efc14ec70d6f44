"""`python -m benchmarks`: runs all workloads on Lattice and on raw Ray, interleaved, and writes a page and a plot."""

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import psutil
import ray

from benchmarks import idle, langgraph_nodes, lattice_side, ray_side, readers, variants
from benchmarks.report import Measurements, Samples, write
from benchmarks.serving import processor_s, served
from lattice_client import LatticeClient

# The processes and threads of the sixteen clients of W4. Ray is at its best with one driver: several thrash.
CLIENTS = {"lattice": (4, 4), "ray tasks": (1, 16), "ray actors": (1, 16)}
COUNTS = (1_000, 10_000, 100_000)
SHAPES = {
    "one graph": lattice_side.scale,
    "items of a mapped task": lattice_side.scale_map,
    "tasks that a task adds": lattice_side.scale_spawn,
}
PER = 10_000


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(prog="benchmarks")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", help="workloads to run, such as W1 W4")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 4)
    parser.add_argument("--page", type=Path, default=Path("benchmarks/results/table.md"))
    flags = parser.parse_args()
    with served("--num-cpus", str(flags.cpus)) as (address, pid), LatticeClient(address) as client:
        ray.init(
            address="local", num_cpus=flags.cpus, log_to_driver=False, logging_level="ERROR", include_dashboard=False,
            _node_ip_address="127.0.0.1",
        )  # fmt: skip
        try:
            samples = measure(client, address, flags.rounds, set(flags.only or ()), flags.cpus)
        finally:
            ray.shutdown()
        found = Measurements(_machine(flags.rounds), samples)
        if not flags.only:
            count_processor(client, pid, found)
            found.variants = variants.measure(client, flags.cpus, flags.rounds)
            scale(client, pid, found)
    if not flags.only:  # On servers of their own: Ray would use processors too.
        found.langgraph = langgraph_nodes.measure(flags.rounds)
        found.readers = readers.measure_alone(flags.cpus, flags.rounds).samples()
        found.idle = idle.measure()
    write(flags.page, found)


def _machine(rounds: int) -> list[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {version(name)}" for name in ("ray", "grpcio", "protobuf"))
    return [
        f"{os.cpu_count()} processors, {model}; {psutil.virtual_memory().total / 2**30:.0f} GiB of memory",
        f"Linux {platform.release()}; Python {platform.python_version()}; {versions}",
        f"{rounds} rounds",
    ]


def measure(client: LatticeClient, address: str, rounds: int, only: set[str], cpus: int) -> Samples:
    """Return the samples of each workload by side; the sides take turns within every round."""
    tasks, actors = ray_side.Tasks(), ray_side.Actors(cpus)
    async_actor = ray.remote(ray_side.AsyncActor).options(num_cpus=0, max_concurrency=2000).remote()
    gcs = ray.get_runtime_context().gcs_address
    workloads: dict[str, tuple[int, dict[str, Callable[[], float]]]] = {
        "W1": (40, _sides(lattice_side.one, ray_side.one, client, tasks, actors)),
        "W2": (3, _sides(lattice_side.chain, ray_side.chain, client, tasks, actors)),
        "W3": (2, _sides(lattice_side.fan, ray_side.fan, client, tasks, actors)),
        "W4": (
            1,
            {side: _many(side, a) for side, a in (("lattice", address), ("ray tasks", gcs), ("ray actors", gcs))},
        ),
        "W5": (2, _sides(lattice_side.agent, ray_side.agent, client, tasks, actors)),
        "W6": (2, _sides(lattice_side.large, ray_side.large, client, tasks, actors)),
        "W8": (
            1,
            {"lattice": lambda: lattice_side.waiting(client), "ray actors": lambda: ray_side.waiting(async_actor)},
        ),
    }
    samples: Samples = defaultdict(lambda: defaultdict(list))
    for number in range(-1, rounds):  # round -1 warms up
        for name, (repeats, sides) in workloads.items():
            if only and name not in only:
                continue
            if number < 0 and name == "W4":
                continue
            for _ in range(repeats):
                for side, function in sides.items():
                    value = function()
                    if number >= 0:
                        samples[name][side].append(value)
            medians = {side: round(statistics.median(v), 5) for side, v in samples[name].items()}
            print(f"round {number + 1}/{rounds} {name} {medians}", flush=True)
    return {name: dict(sides) for name, sides in samples.items()}


def _sides(
    ours: Callable[[LatticeClient], float],
    theirs: Callable[[ray_side.Caller], float],
    client: LatticeClient,
    tasks: ray_side.Caller,
    actors: ray_side.Caller,
) -> dict[str, Callable[[], float]]:
    return {
        "lattice": lambda: ours(client),
        "ray tasks": lambda: theirs(tasks),
        "ray actors": lambda: theirs(actors),
    }


def _many(side: str, address: str, seconds: float = 4.0) -> Callable[[], float]:
    def run() -> float:
        processes, threads = CLIENTS[side]
        command = [sys.executable, "-m", "benchmarks.clients", side, address, str(threads), str(seconds)]
        pipes: dict[str, int] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started = [subprocess.Popen(command, text=True, **pipes) for _ in range(processes)]  # type: ignore[call-overload]
        for process in started:
            _said(process, "ready")
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        done = sum(int(_said(process, "done")) for process in started)
        for process in started:
            process.communicate()
        return done / seconds

    return run


def _said(process: "subprocess.Popen[str]", word: str) -> str:
    """Return the rest of the first line of a client that starts with a word; other lines are skipped."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return line.removeprefix(word).strip()
    raise RuntimeError(f"a client ended with status {process.wait()} before it said {word!r}")


def count_processor(client: LatticeClient, pid: int, found: Measurements) -> None:
    """Measure the processor time of each part in W1 and W3."""
    for name, function, tasks, runs in (("W1", lattice_side.one, 1, 2000), ("W3", lattice_side.fan, 1002, 10)):
        before, started = processor_s(client, pid), time.perf_counter()
        for _ in range(runs):
            function(client)
        factor = PER / (tasks * runs)
        found.wall_s[name] = (time.perf_counter() - started) * factor
        after = processor_s(client, pid)
        found.processor_s[name] = {part: (after[part] - before[part]) * factor for part in after}


def scale(client: LatticeClient, pid: int, found: Measurements) -> None:
    """Measure the cost of a task in larger and larger graphs, and the server's memory for it."""
    process = psutil.Process(pid)
    for shape, function in SHAPES.items():
        for count in COUNTS:
            before = process.memory_info().rss
            cost = function(client, count)
            memory = (process.memory_info().rss - before) / count
            found.graphs.append((shape, count, cost, memory))
            print(f"{shape}, {count}: {cost * 1e6:.0f} us a task, {memory:.0f} bytes a task", flush=True)


if __name__ == "__main__":
    main()
