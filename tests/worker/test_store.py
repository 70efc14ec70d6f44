"""A worker's own store of large values: there while it runs, gone with it, and with whoever was killed before."""

import os
from pathlib import Path

import pytest

from lattice_worker import cli


def test_a_store_goes_with_its_worker_and_takes_along_what_a_killed_one_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "SHARED_MEMORY", str(tmp_path))
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
