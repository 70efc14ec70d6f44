"""Fixtures of the sandboxes."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from lattice_worker.machine import cgroup


@pytest.fixture
def delegated_group() -> Iterator[Path]:
    """A control group of a test's own, below which others can be made."""
    # In version 2 a group with processes, such as this process's own, has no others below that count memory.
    top = Path("/sys/fs/cgroup")
    base = top if (top / "cgroup.controllers").exists() else cgroup.own("memory")
    if base is None:
        pytest.skip("there are no control groups")
    folder = base / f"lattice-test-{uuid4().hex}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    yield folder
    with contextlib.suppress(OSError):
        folder.rmdir()
    assert not folder.exists(), "groups are left"
