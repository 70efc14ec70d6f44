"""How values get into files: whole, whatever pages a file has, and never by a way that ends the process."""

import errno
import io
import mmap
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lattice_worker.runner.encoding import pages
from lattice_worker.runner.encoding.pages import (
    HUGE_PAGE_BYTES,
    MIN_HUGE_BYTES,
    MIN_MAPPED_BYTES,
    WINDOW_BYTES,
    HugePages,
    fill,
)

ROOT = Path(__file__).resolve().parents[2]
IN_A_NAMESPACE = pytest.mark.skipif(os.geteuid() != 0, reason="a file system is mounted")
SIZES = [0, 1, MIN_MAPPED_BYTES - 1, MIN_MAPPED_BYTES, MIN_HUGE_BYTES + 4097, WINDOW_BYTES - 1, WINDOW_BYTES + 1]


@pytest.fixture(params=["memory", "disk"])
def path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """The path of a file."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if request.param == "memory" else None) as folder:
        yield Path(folder) / "value"


def parts_of(rng: random.Random) -> list[bytes]:
    return [rng.randbytes(rng.choice(SIZES)) for _ in range(rng.randint(0, 5))]


def written(path: Path, parts: list[bytes], pages_for: int | None = None) -> bytes:
    """Write a value to a file, with huge pages for `pages_for` bytes first; return the content of the file."""
    with io.FileIO(path, "r+" if path.exists() else "x+") as file:
        if pages_for is not None:
            HugePages().give(file.fileno(), pages_for)
        fill(file, parts, sum(map(len, parts)))
    return path.read_bytes()


# Between them these two write to new files and to old ones, with and without huge pages.
@pytest.mark.parametrize("seed", [0, 5, *(pytest.param(seed, marks=pytest.mark.exhaustive) for seed in range(1, 5))])
def test_value_is_in_its_file_as_it_is_when_that_is_new_or_written_again(seed: int, path: Path) -> None:
    rng = random.Random(seed)
    for number in range(4):
        parts = parts_of(rng)
        size = sum(map(len, parts))
        pages_for = rng.choice([size, 0]) if number == 0 else None
        assert written(path, parts, pages_for) == b"".join(parts)


@pytest.mark.parametrize("hole", [0, 1, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES - 1])
def test_value_is_in_its_file_as_it_is_when_that_has_holes(hole: int, path: Path) -> None:
    with path.open("wb") as file:
        file.write(os.urandom(hole))
        file.seek(5 * HUGE_PAGE_BYTES)
        file.write(b"after the hole")
    data = os.urandom(6 * HUGE_PAGE_BYTES)
    assert written(path, [data[:100], data[100:]]) == data


def test_value_is_written_when_the_task_has_limited_its_address_space(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    path.write_bytes(bytes(3 * HUGE_PAGE_BYTES))
    data = os.urandom(3 * HUGE_PAGE_BYTES)
    with monkeypatch.context() as patched:
        patched.setattr(mmap, "mmap", refuse)
        assert written(path, [data]) == data


def test_nothing_is_copied_through_a_mapping_where_a_file_has_no_pages(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped: list[tuple[int, int]] = []
    own = pages._copy

    def copy(descriptor: int, view: memoryview, offset: int) -> int:
        mapped.append((offset, offset + len(view)))
        return own(descriptor, view, offset)

    monkeypatch.setattr(pages, "_copy", copy)
    for ready in (0, 2 * MIN_MAPPED_BYTES, 5 * MIN_MAPPED_BYTES):
        path.write_bytes(bytes(ready))
        data = os.urandom(4 * MIN_MAPPED_BYTES)
        assert written(path, [data]) == data
    assert mapped == [(0, 2 * MIN_MAPPED_BYTES), (0, 4 * MIN_MAPPED_BYTES)]


def test_huge_pages_are_tried_no_more_when_the_kernel_refused_them(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(_: int, length: int) -> bool:
        asked.append(length)
        return False

    monkeypatch.setattr(pages, "_collapsed", refuse)
    huge_pages = HugePages()
    with io.FileIO(path, "x+") as file:
        for size in (MIN_HUGE_BYTES - 1, MIN_HUGE_BYTES + 1, MIN_HUGE_BYTES):
            huge_pages.give(file.fileno(), size)
    assert asked == [MIN_HUGE_BYTES]


@IN_A_NAMESPACE
@pytest.mark.parametrize("size", [8, 9, 12, 16, 40])
def test_full_store_raises_an_error_and_does_not_end_the_process(size: int, short_path: Path) -> None:
    """A write through a mapping into a page that cannot be had is a signal that ends the process."""
    script = f"""
import errno, io, os, sys
from lattice_worker.runner.encoding.pages import HugePages, fill
size, raised = {size} << 20, 0
for number in range(8):
    name = f"{{sys.argv[1]}}/{{number}}"
    try:
        with io.FileIO(name, "x+") as file:
            HugePages().give(file.fileno(), size)
            fill(file, [os.urandom(100), bytes(size - 100)], size)
        print("whole" if os.stat(name).st_size == size else "part")
    except OSError as error:
        assert error.errno == errno.ENOSPC, error
        raised += 1
        os.unlink(name)
print(raised)
"""
    (short_path / "script.py").write_text(script)
    (short_path / "memory").mkdir()
    mounted = "mount -t tmpfs -o size=33m none $1/memory; cd $2; PYTHONPATH=$2 exec $3 $1/script.py $1/memory"
    command = ["unshare", "-m", "sh", "-ec", mounted, "sh", str(short_path), str(ROOT), sys.executable]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    whole = 33 // size
    assert done.stdout.splitlines() == ["whole"] * whole + [str(8 - whole)]
