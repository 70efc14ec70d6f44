"""Owns the spares of a worker's own store: files of dropped values that wait to be written again.

Spares are kept in memory only, up to a limit; all of them are deleted when room is short, when no value was dropped for
`IDLE_S`, and when the worker ends.

Rule: a file that is open or mapped anywhere becomes no spare. Runners take spares by `claimed`, which makes sure of the
same.
"""

import asyncio
import contextlib
import os
from pathlib import Path
from uuid import uuid4

from lattice_worker.runner.encoding.spare_files import MIN_SPARE_BYTES, SPARES, delete_spares, is_unused

LIMIT_BYTES = 512 * 1024 * 1024
IDLE_S = 60.0
MOUNTS = Path("/proc/self/mountinfo")


class SpareKeeper:
    """The spare files of an open store: at most `limit_bytes`, and at most a quarter of the store's size."""

    def __init__(self, store_directory: str, limit_bytes: int = LIMIT_BYTES, idle_s: float = IDLE_S) -> None:
        self._folder = Path(store_directory) / SPARES
        self._most_bytes, self._limit_bytes = limit_bytes, 0
        self._idle_s = idle_s
        self._timer: asyncio.TimerHandle | None = None

    def open(self) -> None:
        """Begin without the spares of a worker that was killed."""
        self.delete_all()
        status = os.statvfs(self._folder)
        if is_in_memory(self._folder):
            self._limit_bytes = min(self._most_bytes, status.f_blocks * status.f_frsize // 4)

    def keep(self, path: Path) -> bool:
        """Make a spare of a file; return False when it is to be deleted. Raises OSError when there is no such file."""
        size = path.stat(follow_symlinks=False).st_size  # Small for a link to a file on disk.
        if not MIN_SPARE_BYTES <= size <= self._limit_bytes - self._kept_bytes() or not _is_file_unused(path):
            return False
        # Under a new name: another file may be dropped by the old name while a runner takes this spare.
        path.rename(self._folder / uuid4().hex)
        self._wait()
        return True

    def delete_all(self) -> bool:
        """Delete the spares; return whether there were any."""
        return delete_spares(str(self._folder))

    def close(self) -> None:
        """Delete the spares, and keep no more."""
        self._limit_bytes = 0
        self._stop_waiting()
        self.delete_all()

    def _kept_bytes(self) -> int:
        kept_bytes = 0
        for entry in os.scandir(self._folder):
            with contextlib.suppress(FileNotFoundError):  # A runner took it.
                kept_bytes += entry.stat().st_size
        return kept_bytes

    def _wait(self) -> None:
        self._stop_waiting()
        loop = asyncio.get_running_loop()
        # In a thread: the kernel takes a tenth of a second to free half a gigabyte.
        self._timer = loop.call_later(self._idle_s, loop.run_in_executor, None, self.delete_all)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def _is_file_unused(path: Path) -> bool:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        return is_unused(descriptor)
    finally:
        os.close(descriptor)


def is_in_memory(folder: Path) -> bool:
    """Whether a folder lies in tmpfs. Elsewhere pages are hardly dearer when they are new, and overlayfs grants leases
    for files that are mapped."""
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError):
        mounts = [line.partition(" - ") for line in MOUNTS.read_text(errors="replace").splitlines()]
        return any(mount.split()[2] == name and kind.startswith("tmpfs ") for mount, _, kind in mounts)
    return False
