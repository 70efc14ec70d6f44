"""A real server as a process of its own, for each executor. All tests share it, so what they leave open they close."""

import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lattice_client import LatticeClient
from tests.e2e.net import starting
from tests.e2e.rooms import Room

LATTICE = str(Path(sys.executable).parent / "lattice")
CONFIG = Path(__file__).parent / "server.toml"
# The devices are made up: nothing but the ledger and `CUDA_VISIBLE_DEVICES` knows of them.
# The executor starts workers, and these files are about what happens after that, which is the same on Ray:
# `make test-all` runs them there.
SAME_ON_RAY = frozenset(
    f"test_{name}.py"
    for name in ("adding", "batches", "examples", "growth", "langgraph", "limits", "open_runs", "other_languages")
)
OFFERS = ["--num-cpus", "4", "--num-gpus", "2", "--gpu-memory", "8192", "--label", "zone=eu"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out what is the same on Ray, and have `make check` leave out all that starts a server."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.slow)
        call = getattr(item, "callspec", None)
        if item.path.name in SAME_ON_RAY and call is not None and call.params.get("address") == "ray":
            item.add_marker(pytest.mark.exhaustive)


@contextmanager
def served(*flags: str) -> Iterator[str]:
    """Run a server while the block runs; yield its address."""
    command = [LATTICE, "start", "--head", "--port", "0", *flags]
    with starting("ray" if "ray" in flags else "local"):
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
