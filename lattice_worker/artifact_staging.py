"""Owns large values from when a process writes one until the server is known to have the report that names it.

Rule: a file that nobody will name is deleted, whoever is killed and whenever.

Every worker that uses a store has a folder in it, locked for as long as the worker lives. There each process has one
to write to, and values of other nodes have one to arrive in. What a process answers with is published: it gets its
place in the store, and keeps a second name among the reported until its report is acknowledged. Whatever else is in
the folder goes with the process, or with the worker. If that was killed, the next worker of the store takes over what
it had reported, to ask the server about it.

A value that the store has no room for lies on disk, in the folder that `disk` in the store links to. Wherever it would
be a file it is a link to its bytes. The link is made first, so that no bytes lie on disk without one.
"""

import fcntl
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

PREFIX = "staging-"
REPORTED = "reported"
INCOMING = "incoming"
DISK = "disk"


class ArtifactStaging:
    """The staging of one worker. `reported` are the values whose reports may not be acknowledged."""

    def __init__(self, store_directory: str) -> None:
        self._store = Path(store_directory)
        self._folder = self._store / f"{PREFIX}{uuid4().hex}"
        self._numbers = itertools.count(1)
        self.incoming = self._folder / INCOMING
        self.reported: set[str] = set()
        self._disk = (self._store / DISK).resolve()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder while the block runs, and what workers that were killed reported."""
        new = self._store / f"new-{self._folder.name}"
        new.mkdir()
        with locked(new):
            # Not before it is locked: another worker would take it for one of a killed one.
            new.rename(self._folder)
            (self._folder / REPORTED).mkdir()
            self.incoming.mkdir()
            for left in self._store.glob(f"{PREFIX}*"):
                with suppress(OSError), locked(left):
                    self._take_over(left)
            try:
                yield
            finally:
                if not self.reported:
                    self.discard(self._folder)

    def folder(self) -> str:
        """Make a folder for a process to write to."""
        folder = self._folder / str(next(self._numbers))
        folder.mkdir()
        return str(folder)

    def on_disk(self, path: Path) -> bool:
        """Have a value that is not there yet written to disk; False when the store has no such folder."""
        if not self._disk.is_dir():
            return False
        self.remove(path)
        path.symlink_to(self._disk / uuid4().hex)
        return True

    def remove(self, path: str | Path) -> None:
        """Delete a value, and its bytes if they lie on disk."""
        with suppress(OSError):
            target = Path(path).readlink()
            if target.parent == self._disk:
                target.unlink()
        with suppress(OSError):
            os.unlink(path)

    def discard(self, folder: str | Path) -> None:
        """Delete a folder, with the bytes on disk of the values in it."""
        for path in Path(folder).rglob("*"):
            if path.is_symlink():
                self.remove(path)
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: str, artifact_ids: Iterable[str]) -> None:
        """Give what a process wrote its place in the store."""
        for artifact_id in map(os.path.basename, artifact_ids):
            # What the task has deleted, those who need it will miss.
            with suppress(FileNotFoundError):
                reported = self._folder / REPORTED / artifact_id
                os.link(os.path.join(folder, artifact_id), reported, follow_symlinks=False)
                self.reported.add(artifact_id)
                os.rename(os.path.join(folder, artifact_id), self._store / artifact_id)

    def delete(self, folder: str, artifact_ids: Iterable[str]) -> None:
        """Delete what a process wrote and nobody will name."""
        for artifact_id in map(os.path.basename, artifact_ids):
            self.remove(os.path.join(folder, artifact_id))

    def settle(self, artifact_ids: Iterable[str]) -> None:
        """Leave values to the server, which knows of them."""
        for artifact_id in self.reported.intersection(artifact_ids):
            self.reported.discard(artifact_id)
            (self._folder / REPORTED / artifact_id).unlink(missing_ok=True)

    def _take_over(self, left: Path) -> None:
        for path in (left / REPORTED).iterdir():
            path.rename(self._folder / REPORTED / path.name)
            self.reported.add(path.name)
        self.discard(left)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Hold a directory as long as this process lives, or the block runs. Raises OSError when somebody else does."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
