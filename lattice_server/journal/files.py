"""Owns the values that are too large for a row, as files by digest in one folder.

Rules: a file is complete and synced, and so is its name, before a row that names it is committed. A file is deleted
only after the commit that removed the last row which named it.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lattice_server.engine.recording.journal_port import JournalDamagedError
from lattice_server.journal.failpoints import failpoint

UNFINISHED = ".tmp"
STEP_FILES = 200


class Files:
    """A folder of values. Only the thread that writes the journal writes and deletes."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True)
        # The names of files of an earlier process may not be synced.
        sync_folder(folder)
        self._has_new_names = False

    def write(self, data: bytes) -> str:
        """Write a value unless it is there; return its digest. Its name is durable after the next `sync_names`."""
        digest = hashlib.sha256(data).hexdigest()
        path = self._folder / digest
        if not path.exists():
            unfinished = path.with_suffix(UNFINISHED)
            failpoint("file.before_write")
            with unfinished.open("wb") as file:
                file.write(data)
                file.flush()
                failpoint("file.before_sync")
                os.fsync(file.fileno())
            failpoint("file.before_rename")
            unfinished.rename(path)
            failpoint("file.after_rename")
            self._has_new_names = True
        return digest

    def sync_names(self) -> None:
        """Make the names of all files durable."""
        if self._has_new_names:
            sync_folder(self._folder)
            self._has_new_names = False

    def read(self, digest: str) -> bytes:
        """Return a value. Raises JournalDamagedError."""
        try:
            data = (self._folder / digest).read_bytes()
        except OSError as error:
            raise JournalDamagedError(f"value {digest} cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise JournalDamagedError(f"value {digest} was changed on the disk")
        return data

    def delete(self, digests: Iterable[str]) -> None:
        """Delete values that no row names any more."""
        for digest in digests:
            failpoint("file.before_unlink")
            (self._folder / digest).unlink(missing_ok=True)
            failpoint("file.after_unlink")

    def sweeping(self, is_named: Callable[[str], bool]) -> Iterator[None]:
        """Delete files that no row names, which a crash may have left. Yields after each step."""
        with os.scandir(self._folder) as entries:
            for number, entry in enumerate(entries, 1):
                if not is_named(entry.name):
                    os.unlink(entry.path)
                if number % STEP_FILES == 0:
                    yield

    def size_bytes(self) -> int:
        """Return what all files take."""
        with os.scandir(self._folder) as entries:
            return sum(entry.stat().st_size for entry in entries)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
