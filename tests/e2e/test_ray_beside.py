"""Lattice on Ray beside the user's own Ray on one machine: neither finds, moves or outlives the other's records."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from lattice.v1 import cluster_pb2

from lattice_client import LatticeClient, task
from tests.commands import LATTICE
from tests.e2e.net import starting
from tests.e2e.rays import ACCESS, machine_address, ray_head
from tests.e2e.rooms import WAIT_S
from tests.leftovers import unlocked

pytestmark = pytest.mark.timeout(240)

USERS = """
import ray
ray.init({address}log_to_driver=False)
print(ray.get_runtime_context().gcs_address, [name for name in ray.cluster_resources() if "lattice" in name])
ray.shutdown()
"""


@task
def where() -> str:
    return os.environ.get("RAY_ADDRESS", "")


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where every process of a test has its temporary files: short enough for the user's Ray."""
    found = Path(tempfile.mkdtemp(prefix="u-", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(found))
    yield found
    shutil.rmtree(found)


@contextmanager
def command(place: Path, *words: str, until: str) -> Iterator[tuple["subprocess.Popen[str]", str, Path]]:
    """Run a `lattice` command while the block runs; yield it, its first line, and where its stderr goes."""
    log = place / f"{words[1]}.err"
    with starting("ray"), log.open("wb") as file:
        process = subprocess.Popen([LATTICE, *words], stdout=subprocess.PIPE, stderr=file, text=True)
        assert process.stdout is not None
        line = process.stdout.readline()
    try:
        assert until in line, log.read_text()
        yield process, line.split()[-1], log
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait(WAIT_S)


@contextmanager
def lattice(place: Path) -> Iterator[tuple[LatticeClient, "subprocess.Popen[str]", Path]]:
    """A head and a machine that joined it, both this one; yield the machine's command and the head's log."""
    head = ("start", "--head", "--port", "0", "--num-cpus", "1")
    with command(place, *head, until="listening") as (process, address, log), LatticeClient(address) as client:
        join = ("start", "--worker", "--addr", address, "--node-id", "second", "--num-cpus", "1")
        with command(place, *join, until="Joined") as (worker, _, _):
            until_ready(client, {"ray-head", "second"})
            yield client, worker, log
        process.terminate()
        assert process.wait(WAIT_S) == 0


def until_ready(client: LatticeClient, names: set[str]) -> None:
    deadline = time.monotonic() + WAIT_S
    while {node.node_id for node in client.nodes() if node.state == cluster_pb2.NODE_STATE_READY} != names:
        assert time.monotonic() < deadline, client.nodes()
        time.sleep(0.1)


def users_ray(address: str = "") -> tuple[str, str]:
    """Start or find a Ray as a user does; return where it is, and what of it is Lattice's."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    script = USERS.format(address=address and f"{address!r}, ")
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    found, _, ours = done.stdout.splitlines()[-1].partition(" ")
    return found, ours


def records(place: Path) -> set[str]:
    """Return the files in a folder and in its `ray`, without the logs of this test."""
    return {str(path.relative_to(place)) for path in (*place.glob("*"), *place.glob("ray/*")) if path.suffix != ".err"}


# It starts Ray four times; `test_an_existing_ray_is_shared_and_left_running` has a Ray of a user too.
@pytest.mark.exhaustive
def test_the_ray_of_a_user_is_separate_from_that_of_lattice(place: Path) -> None:
    with lattice(place) as (client, worker, log):
        gcs = client.server_info().ray_address
        found, ours = users_ray()
        assert found != gcs
        assert ours == "[]"
        assert not (place / "ray" / "ray_current_cluster").exists()
        assert client.run_task(where, {}) == {"result": ""}
        worker.send_signal(signal.SIGKILL)
        until_ready(client, {"ray-head"})
    written = log.read_text()
    assert "state-dump" not in written
    assert "\x1b" not in written
    assert users_ray()[1] == "[]"
    assert not [name for name in records(place) if name.startswith("lattice-ray")]


@pytest.mark.exhaustive  # The same in the other order of starts.
def test_programs_of_a_user_find_the_users_ray(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ACCESS.items():
        monkeypatch.setenv(name, value)
    with ray_head(place, machine_address(), "--num-cpus", "1") as head:
        users = head.address
        # What leads the user's programs to it leads no part of Lattice there.
        monkeypatch.setenv("RAY_ADDRESS", users)
        before = records(place)
        assert (place / "ray" / "ray_current_cluster").read_text() == users
        with lattice(place) as (client, _, _):
            assert client.server_info().ray_address != users
            assert users_ray("auto") == (users, "[]")
            assert (place / "ray" / "ray_current_cluster").read_text() == users
        assert users_ray("auto") == (users, "[]")
        assert {name for name in records(place) if "lattice-ray" in name or "lattice-node" in name} == set()
        assert before <= records(place)


@pytest.mark.exhaustive  # The choice of the folder has tests of its own.
def test_a_head_starts_when_the_temporary_folder_does_not_suit_ray(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "caf\xe9" + "x" * 70
    (place / name).mkdir()
    monkeypatch.setenv("TMPDIR", str(place / name))
    with command(place, "start", "--head", "--port", "0", "--num-cpus", "1", until="listening") as (process, _, _):
        process.terminate()
        assert process.wait(WAIT_S) == 0


def test_the_server_fails_with_one_line_when_ray_cannot_start(place: Path) -> None:
    words = [LATTICE, "start", "--head", "--port", "0", "--node-ip", "no.such.host.invalid", "--num-cpus", "1"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        out, told = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (1, "")
    assert told.startswith("Error: its driver could not be started: ")
    assert told.count("\n") == 1
    assert not unlocked(place)
    assert not [name for name in records(place) if name.startswith("lattice-ray")]
