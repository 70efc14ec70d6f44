"""Memory on huge pages: of the server and of workers, where Linux has them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import lattice_worker
from lattice_server import huge_pages

USES = """
import mmap
from pathlib import Path

import {module}
from {module} import use_huge_pages

def number(name, text):
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name))

full, sparse = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE), mmap.mmap(-1, 64 << 20, flags=mmap.MAP_PRIVATE)
full.write(bytes(range(256)) * (8 << 12))
for page in range(0, 64 << 20, 2 << 20):
    sparse[page] = 1
before = Path("/proc/self/smaps_rollup").read_text()
moved = use_huge_pages()
after = Path("/proc/self/smaps_rollup").read_text()
assert full[:] == bytes(range(256)) * (8 << 12)
print(moved, use_huge_pages(), number("AnonHugePages", after), number("Rss", after) - number("Rss", before))
"""


def kernel() -> tuple[int, ...]:
    """Return the version of Linux."""
    release = Path("/proc/sys/kernel/osrelease").read_text()
    return tuple(int(part) for part in re.findall(r"\d+", release)[:2])


@pytest.mark.parametrize("module", ["lattice_server.huge_pages", "lattice_worker.machine.huge_pages"])
def test_used_memory_is_moved_and_unused_memory_is_not_taken(module: str) -> None:
    command = [sys.executable, "-c", USES.format(module=module)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    moved, again, huge, grown = map(int, done.stdout.split())
    if not huge_pages._is_allowed() or kernel() < (6, 1):
        assert moved == 0
        return
    # How many pages Linux can move depends on how much of its free memory is in one piece.
    assert 0 < moved <= again
    assert huge >= moved
    assert grown < 32 << 20, "the pages of the sparse range would take 62 MiB"


def test_a_machine_without_huge_pages_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "SETTING", tmp_path / "none")
    assert huge_pages.use_huge_pages() == 0
    (tmp_path / "none").write_text("always madvise [never]")
    assert huge_pages.use_huge_pages() == 0
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.use_huge_pages() == 0


def test_both_packages_do_the_same() -> None:
    """They share the contract only."""
    of_worker = Path(lattice_worker.__path__[0]) / "machine" / "huge_pages.py"
    assert Path(huge_pages.__file__).read_text() == of_worker.read_text()
