"""Measures the level `docker`: `python -m benchmarks.containers [COUNT]`, as root, with Docker installed.

It starts an engine of its own. Per container: the time to make one that waits, and the time from an invocation that is
sent to a waiting one until its answer.
"""

import asyncio
import os
import statistics
import sys
import time
from pathlib import Path

from lattice_worker.containers.config import EngineConfig
from lattice_worker.containers.containers import Containers
from lattice_worker.containers.supervisor import ContainerSupervisor
from lattice_worker.sandbox.policy import container_policy
from tests.containers.engines import engine
from tests.sandbox.boxes import Box


async def measure(address: str, count: int) -> None:
    """Use containers one after the other, and print the times."""
    policy, containers = container_policy(), Containers(EngineConfig(address))
    await containers.open()
    made, handed_over = [], []
    for _ in range(count):
        box = Box(policy, Path(), supervisor := ContainerSupervisor(policy, containers))
        started = time.perf_counter()
        await box.start(supervisor)
        sent = time.perf_counter()
        assert await box.run(abs, -1) == 1
        made.append(sent - started)
        handed_over.append(time.perf_counter() - sent)
        await box.close()
    await containers.close()
    print(f"{count} containers; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    for name, times in (("no container waits", made), ("one waits", handed_over)):
        ordered = sorted(times)
        p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
        print(f"{name}: p50 {statistics.median(times) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms")


if __name__ == "__main__":
    with engine() as found:
        asyncio.run(measure(found, int(sys.argv[1]) if sys.argv[1:] else 50))
