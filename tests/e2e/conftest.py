"""A real server as a process of its own, for each executor. All tests share it and close their resources."""

import re
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from lattice_client import LatticeClient
from tests.commands import START
from tests.e2e.net import starting
from tests.e2e.rooms import Room
from tests.leftovers import held_by
from tests.sandbox.conftest import delegated_group  # noqa: F401  # a fixture

CONFIG = Path(__file__).parent / "server.toml"
# An executor only starts workers. So `make test` runs on Ray these files, and the tests of others that depend on the
# processes and the environment of a worker. `make test-all` runs all files on both executors.
FILES_ON_RAY = frozenset({"test_runs.py", "test_ports.py"})
TESTS_ON_RAY = frozenset(
    {
        "test_a_task_sees_the_devices_it_was_given",
        "test_children_die_with_a_worker_that_is_killed",
    }
)
# The devices do not exist; only the ledger and `CUDA_VISIBLE_DEVICES` name them.
OFFERS = ["--num-cpus", "4", "--num-gpus", "2", "--gpu-memory", "8192", "--label", "zone=eu"]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark all tests here as slow, and as exhaustive the repetitions on Ray."""
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        item.add_marker(pytest.mark.slow)
        call = getattr(item, "callspec", None)
        is_on_ray = call is not None and call.params.get("address") == "ray"
        if is_on_ray and item.path.name not in FILES_ON_RAY and getattr(item, "originalname", "") not in TESTS_ON_RAY:
            item.add_marker(pytest.mark.exhaustive)


@contextmanager
def served(*flags: str, statuses: Sequence[int] = (0,)) -> Iterator[str]:
    """Run a server while the block runs; yield its address. It ends with such a status and leaves nothing."""
    command = [*START, "--head", "--port", "0", *flags]
    with starting("ray" if "ray" in flags else "local"):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
    found = re.search(r"127\.0\.0\.1:\d+", line)
    assert found, f"the server said {line!r}"
    try:
        yield found.group()
    finally:
        # Also when the test fails: the next one would share its cores with this server.
        started = [] if process.poll() is not None else psutil.Process(process.pid).children(recursive=True)
        folders = held_by([process.pid, *(child.pid for child in started)])
        process.terminate()
        status = process.wait(30)
    assert status in statuses
    assert not psutil.wait_procs(started, timeout=30)[1]
    # A worker is ended while a slow engine still removes its containers; the next worker deletes their folder.
    assert not [folder for folder in folders if folder.exists() and not folder.name.startswith("lattice-containers-")]


@pytest.fixture(scope="session")
def local() -> Iterator[str]:
    """The address of a running server with four CPUs and two GPUs, configured by `server.toml`."""
    with served("--executor", "local", *OFFERS, "--config", str(CONFIG)) as found:
        yield found


@pytest.fixture(scope="session", params=["local", "ray"])
def address(request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of each of the two servers.

    The server on Ray ends when a test asks for the other one (see `tests/groups.py`): an idle Ray takes a tenth of a
    processor.
    """
    if request.param == "local":
        yield str(request.getfixturevalue("local"))
    else:
        with served("--executor", "ray", *OFFERS, "--config", str(CONFIG)) as found:
            yield found


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
