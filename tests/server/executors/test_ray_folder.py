"""The folder of a server's Ray: where it lies when the usual place is not fit, and that none is left."""

import os
import shutil
import tempfile
import time
from collections import namedtuple
from pathlib import Path

import pytest

from lattice_server.executors import ray_folder as of_server
from lattice_worker.machine import ray_folder as of_worker

Usage = namedtuple("Usage", "total used free")
# What Ray adds for its longest socket, with the largest process id.
SOCKET = "/session_2026-11-29_03-06-44_123456_4194304/sockets/plasma_store"
SOCKET_BYTES = 107
both = pytest.mark.parametrize("module", [of_server, of_worker])


@both
@pytest.mark.parametrize("name", ["x" * 60, "caf\xe9", ""], ids=["long", "not ASCII", "short"])
def test_a_folder_is_short_and_ascii_wherever_temporary_files_lie(
    module: object, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = tmp_path / name if name else Path("/tmp")
    parent.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(parent))
    folder = module.RayFolder()  # type: ignore[attr-defined]
    try:
        assert str(folder.path).isascii()
        assert len(f"{folder.path}{SOCKET}") <= SOCKET_BYTES
        assert folder.path.stat().st_mode & 0o777 == 0o700
    finally:
        folder.close()
    assert not folder.path.exists()


@both
def test_a_place_that_is_full_or_missing_is_passed_over(module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage
    full = Usage(1, 1, 0)
    monkeypatch.setattr(tempfile, "tempdir", "/no/such/place")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full if path == "/tmp" else usage(path))
    folder = module.RayFolder()  # type: ignore[attr-defined]
    assert folder.path.parent in {Path("/var/tmp"), Path("/dev/shm")}
    folder.close()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(OSError, match=r"no folder for Ray's files.*/tmp: only 0 bytes are free"):
        module.RayFolder()  # type: ignore[attr-defined]


@both
def test_the_folder_of_a_server_that_was_killed_is_deleted_and_no_other(
    module: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = module.RayFolder()  # type: ignore[attr-defined]
    left = Path(tempfile.mkdtemp(prefix=module.PREFIX, dir=held.path.parent))  # type: ignore[attr-defined]
    new = Path(tempfile.mkdtemp(prefix=module.PREFIX, dir=held.path.parent))  # type: ignore[attr-defined]
    for path in (held.path, left):
        os.utime(path, (0, time.time() - 60))
    other = module.RayFolder()  # type: ignore[attr-defined]
    try:
        assert (held.path.exists(), left.exists(), new.exists()) == (True, False, True)
    finally:
        for folder in (held, other):
            folder.close()
        new.rmdir()
