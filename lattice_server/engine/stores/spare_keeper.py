"""Owns the spares of the server's store: files of dropped values that wait to be written again.

Pages that exist already cost a fraction of new ones. Spares are kept in memory only, up to a limit; all of them are
deleted when room is short, and when no value was dropped for `IDLE_S`.

Rule: a file that is open or mapped anywhere becomes no spare. A writer takes one by moving it, and makes sure of the
same; see `spare_files.py` in the worker's runner, the other side of this.
"""

import asyncio
import fcntl
import os
import signal
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

SPARES = "spares"
MIN_SPARE_BYTES = 1024 * 1024
IDLE_S = 60.0
MOUNTS = Path("/proc/self/mountinfo")


class SpareKeeper:
    """The spares of a store, at most `limit_bytes` of them; lives on the main thread."""

    def __init__(self, store: Path, limit_bytes: int, idle_s: float = IDLE_S) -> None:
        self._folder = store / SPARES
        self._folder.mkdir()
        self._limit_bytes = limit_bytes if _is_in_memory(self._folder) else 0
        self._idle_s = idle_s
        self._timer: asyncio.TimerHandle | None = None

    def keep(self, path: Path) -> bool:
        """Make a spare of a file; return False when it is to be deleted."""
        size = path.stat(follow_symlinks=False).st_size  # Small for a link to a file on disk.
        if not MIN_SPARE_BYTES <= size <= self._limit_bytes - self._kept_bytes() or not _is_unused(path):
            return False
        # Under a new name: another file may be dropped by the old name while a worker takes this spare.
        path.rename(self._folder / uuid4().hex)
        self._wait()
        return True

    def delete_all(self) -> bool:
        """Delete the spares; return whether there were any."""
        has_deleted = False
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # A worker took it.
                os.unlink(entry.path)
                has_deleted = True
        return has_deleted

    def close(self) -> None:
        """Wait no longer; the files stay."""
        if self._timer is not None:
            self._timer.cancel()

    def _kept_bytes(self) -> int:
        kept_bytes = 0
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):  # A worker took it.
                kept_bytes += entry.stat().st_size
        return kept_bytes

    def _wait(self) -> None:
        self.close()
        loop = asyncio.get_running_loop()
        # In a thread: the kernel takes a tenth of a second to free half a gigabyte.
        self._timer = loop.call_later(self._idle_s, loop.run_in_executor, None, self._expire)

    def _expire(self) -> None:
        with suppress(FileNotFoundError):  # The store was deleted meanwhile.
            self.delete_all()


def _is_unused(path: Path) -> bool:
    """Whether a file in tmpfs is neither open nor mapped: the kernel grants a write lease for such a file only."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        # A reader that opens the file meanwhile breaks the lease: the signal for that, by default, ends a process.
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_WRLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _is_in_memory(folder: Path) -> bool:
    """Whether a folder lies in tmpfs. Elsewhere pages are hardly dearer when they are new, and overlayfs grants leases
    for files that are mapped."""
    device = folder.stat().st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError):
        mounts = [line.partition(" - ") for line in MOUNTS.read_text(errors="replace").splitlines()]
        return any(mount.split()[2] == name and kind.startswith("tmpfs ") for mount, _, kind in mounts)
    return False
