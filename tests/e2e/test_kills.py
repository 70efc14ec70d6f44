"""A killed server leaves files in the folder of large values, which the next server removes."""

import signal
import subprocess
from pathlib import Path

import psutil
import pytest

from lattice_client import LatticeClient, task
from tests.commands import START

pytestmark = pytest.mark.slow


@task
def echo(value: bytes) -> bytes:
    return value


def started(folder: Path) -> tuple["subprocess.Popen[str]", str]:
    """Start a server that keeps large values in `folder`; return it and its address."""
    (folder.parent / "lattice.toml").write_text(f'store_folder = "{folder}"\n')
    command = [*START, "--head", "--port", "0", "--executor", "local", "--num-cpus", "1"]
    command += ["--config", str(folder.parent / "lattice.toml")]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    return server, server.stdout.readline().strip().rpartition(" ")[2]


def test_a_killed_server_and_its_workers_leave_nothing_to_the_next_server(short_path: Path) -> None:
    folder = short_path / "store"
    folder.mkdir()
    server, address = started(folder)
    value = b"x" * 2_000_000
    with LatticeClient(address) as client:
        assert client.run_task(echo, {"value": value}) == {"result": value}
        workers = psutil.Process(server.pid).children(recursive=True)
    (left,) = folder.iterdir()
    assert sum(path.stat().st_size for path in left.rglob("*") if path.is_file()) > len(value)
    server.send_signal(signal.SIGKILL)
    server.wait(30)
    assert not psutil.wait_procs(workers, 30)[1], "the worker and its processes ended by themselves"
    server, address = started(folder)
    try:
        with LatticeClient(address) as client:
            assert client.run_task(echo, {"value": value}) == {"result": value}
        (only,) = folder.iterdir()
        assert only != left
    finally:
        server.terminate()
        server.wait(30)
    assert list(folder.iterdir()) == []
