"""A worker's own store of artifacts: deleted when it ends, and by the next worker when it was killed."""

import os
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
