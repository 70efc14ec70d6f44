"""Owns the disk space that is reserved for accepted work. Rule: new work never uses it."""

import os
from contextlib import suppress
from pathlib import Path

MIB = 1024 * 1024
RESERVE_BYTES = 16 * MIB


class DiskSpace:
    """A file that is only there to be deleted when the disk is full."""

    def __init__(self, folder: Path, reserve_bytes: int = RESERVE_BYTES) -> None:
        self._folder = folder
        self._path = folder / "reserve"
        self._reserve_bytes = reserve_bytes
        self.is_full = False
        self.look()

    def look(self) -> None:
        """Find out whether the disk is full, and make the reserve again when there is room for it."""
        status = os.statvfs(self._folder)
        free_bytes = status.f_bavail * status.f_frsize
        if not self._path.exists() and free_bytes > 3 * self._reserve_bytes:
            self._reserve()
        self.is_full = free_bytes < self._reserve_bytes or not self._path.exists()

    def release(self) -> bool:
        """Free the reserve for accepted work; return whether there was one."""
        self.is_full = True
        try:
            self._path.unlink()
        except FileNotFoundError:
            return False
        return True

    def _reserve(self) -> None:
        descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._reserve_bytes)
        except OSError:
            with suppress(FileNotFoundError):
                self._path.unlink()
        finally:
            os.close(descriptor)
