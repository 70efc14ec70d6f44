"""A real server as a process of its own, for each executor. All tests share it, so what they leave open they close."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lattice_client import LatticeClient
from tests.e2e.rooms import Room

LATTICE = str(Path(sys.executable).parent / "lattice")
CONFIG = Path(__file__).parent / "server.toml"
# The devices are made up: nothing but the ledger and `CUDA_VISIBLE_DEVICES` knows of them.
OFFERS = ["--num-cpus", "4", "--num-gpus", "2", "--gpu-memory", "8192", "--label", "zone=eu"]


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """Run a server while the block runs; yield its address."""
    command = [LATTICE, "start", "--head", "--port", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"127\.0\.0\.1:\d+", line)
    assert found, f"the server said {line!r}"
    yield found.group()
    process.terminate()
    assert process.wait(30) == 0


@pytest.fixture(scope="session")
def local() -> Iterator[str]:
    """The address of a running server with four CPUs and two GPUs, configured by `server.toml`."""
    with served("--executor", "local", *OFFERS, "--config", str(CONFIG)) as found:
        yield found


@pytest.fixture(scope="session")
def ray() -> Iterator[str]:
    """The address of such a server on Ray."""
    with served("--executor", "ray", *OFFERS, "--config", str(CONFIG)) as found:
        yield found


@pytest.fixture(scope="session", params=["local", "ray"])
def address(request: pytest.FixtureRequest) -> str:
    """The address of each of the two servers. Both run until the session ends."""
    return str(request.getfixturevalue(request.param))


@pytest.fixture
def client(address: str) -> Iterator[LatticeClient]:
    """A client of that server."""
    with LatticeClient(address) as connected:
        yield connected


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    """A room, opened at the latest when the test ends."""
    found = Room(tmp_path)
    yield found
    found.open()
