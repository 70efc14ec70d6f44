"""The staging area of a store: artifacts from when a process writes one until its report is acknowledged.

Rule: an artifact that no report names is deleted, also when the process or the worker is killed.

Every worker that uses a store has a folder in it, and locks the folder as long as it lives. Each process has a folder
there to write to, and artifacts of other nodes have one to arrive in. The artifacts of an answer are published: moved
into the store, with a hard link in the folder `reported` until the report is acknowledged. All other files are deleted
with the process, or with the worker. The next worker of the store takes over the reported artifacts of a worker that
was killed, and asks the server about them.

An artifact that does not fit into the store lies on disk, in the folder that `disk` in the store links to. In the store
it is a symbolic link to its bytes. The link is made first, so that no bytes lie on disk without one.
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
    """The staging area of one worker. `reported` are the artifacts whose reports may not be acknowledged."""

    def __init__(self, store_directory: str) -> None:
        self._store = Path(store_directory)
        self._folder = self._store / f"{PREFIX}{uuid4().hex}"
        self._numbers = itertools.count(1)
        self.incoming = self._folder / INCOMING
        self.reported: set[str] = set()
        self._disk = (self._store / DISK).resolve()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Have the folder while the block runs, and take over what killed workers reported."""
        new = self._store / f"new-{self._folder.name}"
        new.mkdir()
        with locked(new):
            # Locked first: another worker would take it for the folder of a killed one.
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
        """Have an artifact that is about to be written lie on disk; False when the store has no such folder."""
        if not self._disk.is_dir():
            return False
        self.remove(path)
        path.symlink_to(self._disk / uuid4().hex)
        return True

    def remove(self, path: str | Path) -> None:
        """Delete an artifact, and its bytes if they lie on disk."""
        with suppress(OSError):
            target = Path(path).readlink()
            if target.parent == self._disk:
                target.unlink()
        with suppress(OSError):
            os.unlink(path)

    def discard(self, folder: str | Path) -> None:
        """Delete a folder, and the bytes on disk of the artifacts in it."""
        # Unlike `rglob`, this passes over folders that the next server deletes at the same time.
        for parent, _, names in os.walk(folder):
            for path in (Path(parent, name) for name in names):
                if path.is_symlink():
                    self.remove(path)
        shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: str, artifact_ids: Iterable[str]) -> None:
        """Move artifacts that a process wrote into the store."""
        for artifact_id in map(os.path.basename, artifact_ids):
            # The task may have deleted it; tasks that need it then fail.
            with suppress(FileNotFoundError):
                reported = self._folder / REPORTED / artifact_id
                os.link(os.path.join(folder, artifact_id), reported, follow_symlinks=False)
                self.reported.add(artifact_id)
                os.rename(os.path.join(folder, artifact_id), self._store / artifact_id)

    def delete(self, folder: str, artifact_ids: Iterable[str]) -> None:
        """Delete artifacts that a process wrote and that no report will name."""
        for artifact_id in map(os.path.basename, artifact_ids):
            self.remove(os.path.join(folder, artifact_id))

    def settle(self, artifact_ids: Iterable[str]) -> None:
        """Note that the server has the reports of artifacts: it decides when they are deleted."""
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
    """Lock a directory while the block runs. Raises OSError when another process has locked it."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
