"""Measures the processor time of a server and of an agent that have nothing to do: `python -m benchmarks.idle`."""

import argparse
import time
from collections.abc import Mapping, Sequence

from benchmarks.lattice_side import fan
from benchmarks.serving import served, time_of
from lattice_client import LatticeClient

EXECUTORS = ("local", "ray")
# What still runs after the last task: full collections of garbage, idle runners that end, Ray's own reports.
SETTLE_S = 10.0
SECONDS = 20.0


def measure(
    executors: Sequence[str] = EXECUTORS, seconds: float = SECONDS, settle_s: float = SETTLE_S
) -> dict[str, float]:
    """Return the part of one processor that each idle process uses, by its name and executor.

    Tasks have run before, and a client stays connected.
    """
    found: dict[str, float] = {}
    for executor in executors:
        with served("--executor", executor, "--num-cpus", "2") as (address, pid), LatticeClient(address) as client:
            fan(client, 100)
            (node,) = client.nodes()
            pids = {"server": pid, "agent": node.worker_pid}
            time.sleep(settle_s)
            before, started = _times(pids), time.perf_counter()
            time.sleep(seconds)
            after, took_s = _times(pids), time.perf_counter() - started
            found |= {f"{part}, {executor}": (after[part] - before[part]) / took_s for part in pids}
    return found


def _times(pids: Mapping[str, int]) -> dict[str, float]:
    return {part: time_of(pid) for part, pid in pids.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="benchmarks.idle")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--executor", choices=EXECUTORS, nargs="+", default=EXECUTORS)
    flags = parser.parse_args()
    for part, share in measure(flags.executor, flags.seconds).items():
        print(f"{part}: {100 * share:.2f} % of a processor")


if __name__ == "__main__":
    main()
