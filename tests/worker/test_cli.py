"""The command line of a worker, and its own store of artifacts, which is deleted when it ends or by the next worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lattice_worker import cli


def test_a_store_is_deleted_with_its_worker_and_with_stores_of_killed_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_is_roomy", lambda _: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    left = tmp_path / "lattice-worker-left"
    left.mkdir()
    (left / "large").write_bytes(b"x")
    os.utime(left, (0, 0))
    with cli.store(None) as first:
        assert [str(path) for path in tmp_path.iterdir()] == [first]
        os.utime(first, (0, 0))
        with cli.store(None) as second:
            assert sorted(map(str, tmp_path.iterdir())) == sorted([first, second])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["0", "65536", "-1", "many", "7443.5"])
def test_worker_does_not_start_when_the_port_of_its_gateway_is_none(text: str) -> None:
    command = [sys.executable, "-m", "lattice_worker", "--addr", "127.0.0.1:1", "--node-id", "a"]
    environment = {**os.environ, "LATTICE_GATEWAY_PORT": text}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert ended.stderr == f"lattice_worker: LATTICE_GATEWAY_PORT must be a port from 1 to 65535, not {text!r}\n"


def test_a_store_in_memory_has_a_folder_on_disk_which_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    monkeypatch.setattr(cli, "SHARED_MEMORY", memory)
    monkeypatch.setattr(cli, "_is_roomy", lambda _: True)
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with cli.store(None) as made:
        assert Path(made).parent == memory
        assert (Path(made) / "disk").resolve().parent == disk
    assert not [*memory.iterdir(), *disk.iterdir()]
