"""The search for folders and processes that tests leave."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import leftovers


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The temporary folder of a session, beside shared memory of its own."""
    monkeypatch.setattr(leftovers, "SHARED_MEMORY", tmp_path / "memory")
    monkeypatch.setattr(leftovers, "GONE_S", 0.0)
    (tmp_path / "memory").mkdir()
    (tmp_path / "own").mkdir()
    return tmp_path / "own"


def test_a_folder_is_left_when_it_is_unlocked_and_of_this_session(own: Path) -> None:
    store, on_disk = leftovers.SHARED_MEMORY / "lattice-head-1", own / "lattice-head-2"
    others = leftovers.SHARED_MEMORY / "lattice-head-3"
    for path in (store, on_disk, others):
        path.mkdir()
    (store / "disk").symlink_to(on_disk)
    (others / "disk").symlink_to(own.parent / "lattice-head-4")
    descriptor = os.open(store, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    assert leftovers.unlocked(own) == {on_disk}
    assert leftovers.held_by([os.getpid()]) >= {store}
    os.close(descriptor)
    assert leftovers.unlocked(own) == {store, on_disk}
    assert leftovers.held_by([os.getpid()]).isdisjoint({store, on_disk})
    assert leftovers.left(own) == []
    assert [path for path in (store, on_disk, others) if path.exists()] == [others]


def test_files_and_processes_are_left_when_they_are_of_this_session(own: Path) -> None:
    (own / leftovers.RUN).mkdir()
    (own / "file").touch()
    command = [sys.executable, "-c", "input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, env={**os.environ, "TMPDIR": str(own)}) as process:
        assert process.stdin is not None
        found = leftovers.left(own)
        process.stdin.close()
    assert found == [f"process {process.pid}: {' '.join(command)}", str(own / "file")]
    (own / "file").unlink()
    assert leftovers.left(own) == []


def test_a_folder_that_its_server_deletes_meanwhile_is_not_left(own: Path) -> None:
    (leftovers.SHARED_MEMORY / "lattice-head-1").mkdir()  # Its link is gone already.
    assert leftovers.folders(own) == set()
