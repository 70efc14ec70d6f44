"""A real server as a process of its own, for each executor."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_client import LatticeClient

LATTICE = str(Path(sys.executable).parent / "lattice")


@pytest.fixture(scope="session", params=["local", "ray"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of a running server with four CPUs."""
    command = [LATTICE, "start", "--head", "--port", "0", "--num-cpus", "4", "--executor", request.param]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"127\.0\.0\.1:\d+", line)
    assert found, f"the server said {line!r}"
    yield found.group()
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture
def client(address: str) -> Iterator[LatticeClient]:
    """A client of that server."""
    with LatticeClient(address) as connected:
        yield connected
