"""A server on Ray for a benchmark, and the processor time of the processes that carry out its runs."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from lattice_client import LatticeClient

LATTICE = str(Path(sys.executable).parent / "lattice")


@contextmanager
def served(*flags: str, env: Mapping[str, str] | None = None) -> Iterator[tuple[str, int]]:
    """Serve while the block runs; yield the address and the id of the process."""
    command = [LATTICE, "start", "--head", "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, **(env or {})}) as process:
        assert process.stdout is not None
        found = re.search(r"127\.0\.0\.1:\d+", process.stdout.readline())
        assert found is not None, "the server has said its address"
        try:
            yield found.group(), process.pid
        finally:
            process.terminate()


def processor_s(client: LatticeClient, server: int) -> dict[str, float]:
    """Return the processor time that each part has used, in seconds: server, agents, runners and this process."""
    found = {"server": time_of(server), "agent": 0.0, "runners": 0.0, "client": time_of(os.getpid())}
    for node in client.nodes():
        found["agent"] += time_of(node.worker_pid)
        found["runners"] += sum(time_of(child.pid) for child in psutil.Process(node.worker_pid).children(True))
    return found


def time_of(pid: int) -> float:
    """Return the processor time of the threads of a process in seconds; that of psutil is exact to 10 ms only."""
    files = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(file.read_text().split()[0]) for file in files) / 1e9
