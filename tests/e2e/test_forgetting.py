"""Code that is called no more leaves the memory of workers and of their processes."""

import os

import psutil
import pytest

from lattice_client import LatticeClient, task
from lattice_client.graph.definition import TaskDefinition
from lattice_server.engine.stores.code_store import WORKER_CODE_BYTES
from tests.e2e.conftest import served

MIB = 1024 * 1024
SIZE_BYTES = 4 * MIB
FILLED = WORKER_CODE_BYTES // SIZE_BYTES


def large() -> TaskDefinition[[], int]:
    """Return a task whose code is large, and like no other's."""
    data = os.urandom(SIZE_BYTES)

    @task
    def measure() -> int:
        return len(data)

    return measure


def memory_bytes(worker: psutil.Process) -> int:
    """Return the memory that a worker and its processes have for themselves."""
    return sum(process.memory_full_info().uss for process in (worker, *worker.children(recursive=True)))


@pytest.mark.exhaustive  # Tests of the worker have it forget bundles, and ask for them again.
def test_memory_of_a_worker_stays_when_many_functions_are_called_once() -> None:
    with served("--executor", "local", "--num-cpus", "1") as address, LatticeClient(address) as client:
        for _ in range(FILLED + 1):
            assert client.run_task(large()) == {"result": SIZE_BYTES}
        (node,) = client.nodes()
        worker = psutil.Process(node.worker_pid)
        before = memory_bytes(worker)
        first = large()
        for _ in range(FILLED):
            client.run_task(large())
        client.run_task(first)
        for _ in range(FILLED + 1):
            client.run_task(large())
        assert memory_bytes(worker) < before + WORKER_CODE_BYTES
        assert client.run_task(first) == {"result": SIZE_BYTES}, "what was forgotten comes again"
